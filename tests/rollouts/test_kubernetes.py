"""Weights, candidates and promotion on Kubernetes: the official client over real HTTP to a small API server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resources.rollouts.targets import StaleTokenError, TargetError
from resources.rollouts.targets.kubernetes import target as target_module
from resources.rollouts.targets.kubernetes.target import STATE, KubernetesTarget
from tests.rollouts import kube_kit
from tests.rollouts.kube_kit import FLAGS
from tests.rollouts.kube_server import Fault, KubeServer


@pytest.fixture
def server() -> Iterator[KubeServer]:
    made = kube_kit.cluster()
    yield made
    made.close()


@pytest.fixture
def target(server: KubeServer, tmp_path: Path) -> KubernetesTarget:
    return kube_kit.target(kube_kit.settings(server, tmp_path), in_flight=lambda _: 0)


def test_shares_are_exact_and_the_way_back_is_what_was_there(server: KubeServer, target: KubernetesTarget) -> None:
    """The stable backend had no weight at all; after the rollout it has none again, and nothing of ours is left."""
    target.claim("r-1", 1)
    target.start_candidates(2, FLAGS, 1)
    for percent in (1.0, 5.0, 25.0, 50.0, 100.0, 0.5):
        target.set_share(percent, 1)
        assert target.observe().percent == pytest.approx(percent)
    target.set_share(0.0, 1)
    assert server.weights() == [{"chat": None, "chat-candidate": 0}]
    assert target.drain(1)
    target.stop_candidates(1)

    assert server.weights() == [{"chat": None}]
    assert target.observe().candidates == 0
    assert [one["metadata"]["name"] for one in server.all("deployments")] == ["chat"]
    assert [one["metadata"]["name"] for one in server.all("services")] == ["chat"]


def test_a_candidate_is_the_stable_deployment_with_other_flags(server: KubeServer, target: KubernetesTarget) -> None:
    """No selector of the stable pods chooses it, and everything but name, labels and flags is the same."""
    target.claim("r-1", 1)
    target.start_candidates(2, {**FLAGS, "enable_chunked_prefill": "", "model": None}, 1)

    made = server.get("deployments", "chat-candidate")
    assert made is not None
    pod = made["spec"]["template"]
    assert pod["spec"]["containers"][0]["args"] == ["--max-num-seqs=128", "--enable-chunked-prefill"]
    assert pod["metadata"]["labels"]["app"] == "chat-candidate"
    assert pod["metadata"]["labels"]["team"] == "ml"
    assert made["spec"]["replicas"] == 2
    twin = server.get("services", "chat-candidate")
    assert twin is not None
    assert twin["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert "clusterIP" not in twin["spec"]
    assert [one.server for one in target.started_arm()] != [one.server for one in target.stable_arm()]
    assert len(target.stable_arm()) == 3
    assert target.not_started() is None


def test_other_backends_and_rules_keep_their_part(server: KubeServer, target: KubernetesTarget) -> None:
    chat = {"kind": "Service", "name": "chat", "port": 80, "weight": 3}
    other = {"kind": "Service", "name": "other", "port": 80, "weight": 1}
    server.put("services", {**kube_kit.service(), "metadata": {"name": "other"}})
    server.put("httproutes", kube_kit.route({"backendRefs": [chat, other]}, {"backendRefs": [other]}))
    target.claim("r-1", 1)
    target.start_candidates(1, FLAGS, 1)
    target.set_share(10.0, 1)

    assert server.weights() == [{"chat": 27000, "chat-candidate": 3000, "other": 10000}, {"other": 1}]
    target.set_share(0.0, 1)
    assert server.weights() == [{"chat": 3, "chat-candidate": 0, "other": 1}, {"other": 1}]


def test_a_write_onto_a_version_that_moved_is_decided_anew(server: KubeServer, target: KubernetesTarget) -> None:
    """Somebody adds a hostname between our reading and our writing: 409, then both changes stand."""
    target.claim("r-1", 1)
    target.start_candidates(1, FLAGS, 1)
    moved = []

    def meanwhile(method: str, path: str) -> None:
        if "httproutes" in path and not moved:
            moved.append(path)
            server.edit("httproutes", "chat", lambda body: body["spec"].update(hostnames=["a.example"]))

    server.before_write = meanwhile
    target.set_share(25.0, 1)

    found = server.get("httproutes", "chat")
    assert found is not None
    assert found["spec"]["hostnames"] == ["a.example"]
    assert target.observe().percent == 25


def test_a_higher_token_that_came_between_reading_and_writing_wins(server: KubeServer, tmp_path: Path) -> None:
    """Two executors on two machines: the one that was replaced in the middle of its write changes nothing."""
    given = kube_kit.settings(server, tmp_path)
    old, new = kube_kit.target(given), kube_kit.target(given)
    old.claim("r-1", 1)
    old.start_candidates(1, FLAGS, 1)
    done = []

    def meanwhile(method: str, path: str) -> None:
        if "httproutes" in path and not done:
            done.append(path)
            new.claim("r-1", 2)
            new.set_share(0.0, 2)

    server.before_write = meanwhile
    with pytest.raises(StaleTokenError, match="token 1 is stale; 2 owns HTTPRoute llm/chat"):
        old.set_share(50.0, 1)

    assert server.weights() == [{"chat": None}]
    for act in (lambda: old.drain(1), lambda: old.stop_candidates(1), lambda: old.promote("r-1", 1)):
        with pytest.raises(StaleTokenError):
            act()
    assert server.get("deployments", "chat-candidate") is not None


def test_candidates_made_by_one_who_was_replaced_meanwhile_are_removed(server: KubeServer, tmp_path: Path) -> None:
    given = kube_kit.settings(server, tmp_path)
    old, new = kube_kit.target(given), kube_kit.target(given)
    old.claim("r-1", 1)
    done = []

    def meanwhile(method: str, path: str) -> None:
        if path.endswith("deployments/chat-candidate") and not done:
            done.append(path)
            new.claim("r-1", 2)

    server.before_write = meanwhile
    with pytest.raises(StaleTokenError, match="while candidates were being started"):
        old.start_candidates(1, FLAGS, 1)

    assert server.get("deployments", "chat-candidate") is None


def test_an_object_that_always_moves_is_given_up_with_its_name(server: KubeServer, target: KubernetesTarget) -> None:
    target.claim("r-1", 1)
    target.start_candidates(1, FLAGS, 1)
    counter = iter(range(1000))
    server.before_write = lambda _, path: (
        "httproutes" not in path
        or server.edit("httproutes", "chat", lambda body: body["metadata"].update(labels={"n": str(next(counter))}))
    )

    with pytest.raises(TargetError, match="HTTPRoute llm/chat changed 8 times"):
        target.set_share(10.0, 1)
    assert target.observe().percent == 0


def test_promotion_updates_the_stable_pods_and_then_takes_the_candidate_out(
    server: KubeServer, target: KubernetesTarget
) -> None:
    """Traffic stays at the candidate until the stable pods run with its flags; strategy and weights are as before."""
    before = server.get("deployments", "chat")
    target.claim("r-1", 1)
    target.start_candidates(3, FLAGS, 1)
    target.set_share(100.0, 1)
    server.pods_ready = False
    assert not target.promote("r-1", 1)
    assert target.observe().percent == 100
    updating = server.get("deployments", "chat")
    assert updating is not None
    assert updating["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    for pod in server._pods_of("chat"):
        pod["status"]["conditions"][0]["status"] = "True"
    server.count("chat")
    assert target.promote("r-1", 1)
    assert target.promote("r-1", 1)

    after = server.get("deployments", "chat")
    assert before is not None
    assert after is not None
    args = after["spec"]["template"]["spec"]["containers"][0].pop("args")
    assert args == ["--model", "tiny", "--max-num-seqs=128"]
    del before["spec"]["template"]["spec"]["containers"][0]["args"]
    assert after["spec"] == before["spec"]
    assert server.weights() == [{"chat": None}]
    assert server.get("deployments", "chat-candidate") is None
    reasons = [one["reason"] for one in server.all("events")]
    assert reasons == [
        "RolloutClaimed", "CandidateStarted", "WeightSet", "FlagsPromoted", "WeightSet", "CandidateStopped",
        "RolloutPromoted",
    ]  # fmt: skip


def test_a_promotion_whose_record_was_lost_changes_nothing(server: KubeServer, target: KubernetesTarget) -> None:
    before = server.get("deployments", "chat")
    target.claim("r-1", 1)
    target.start_candidates(3, FLAGS, 1)
    target.set_share(100.0, 1)
    server.edit("httproutes", "chat", lambda body: body["metadata"].update(annotations={}))

    with pytest.raises(TargetError, match="HTTPRoute llm/chat has lost the record of rollout r-1"):
        target.promote("r-1", 1)
    assert server.get("deployments", "chat") == before
    assert target.observe().percent == 100


def test_a_kubeconfig_that_says_nothing_is_told_with_the_remedy(server: KubeServer, tmp_path: Path) -> None:
    given = kube_kit.settings(server, tmp_path)
    for text in ("", "no: [yaml", "{}"):
        Path(str(given.kubeconfig)).write_text(text)
        with pytest.raises(TargetError, match=r"no way into a Kubernetes cluster: .*set kubeconfig and context"):
            kube_kit.target(given).observe()


def test_a_stuck_promotion_keeps_traffic_at_the_candidate_and_says_why(
    server: KubeServer, target: KubernetesTarget
) -> None:
    target.claim("r-1", 1)
    target.start_candidates(3, FLAGS, 1)
    target.set_share(100.0, 1)
    server.pods_ready = False
    target.promote("r-1", 1)
    stuck = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "no GPU free"}
    server.objects["deployments", "llm", "chat"]["status"]["conditions"] = [stuck]

    with pytest.raises(TargetError, match="Deployment llm/chat does not become ready with the new flags: no GPU free"):
        target.promote("r-1", 1)
    assert target.observe().percent == 100


def test_idle_stable_pods_that_were_scaled_away_get_no_traffic_back(
    server: KubeServer, target: KubernetesTarget
) -> None:
    target.claim("r-1", 1)
    target.start_candidates(3, FLAGS, 1)
    target.set_share(100.0, 1)
    server.edit("deployments", "chat", lambda body: body["spec"].update(replicas=1))

    with pytest.raises(TargetError, match="was scaled to 1, it had 3 replicas; scale it back"):
        target.promote("r-1", 1)
    assert target.observe().percent == 100


def test_what_a_gateway_has_not_taken_up_is_not_told_as_so(
    server: KubeServer, target: KubernetesTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weight stands in the object, but no gateway has seen it: neither set nor observed."""
    monkeypatch.setattr(target_module, "GATEWAY_SECONDS", 0.05)
    target.claim("r-1", 1)
    target.start_candidates(1, FLAGS, 1)
    server.takes_up_routes = False

    with pytest.raises(TargetError, match="HTTPRoute llm/chat: gateway has not taken up generation 2 yet"):
        target.set_share(10.0, 1)
    with pytest.raises(TargetError, match="not taken up"):
        target.observe()
    server.take_up(server.objects["httproutes", "llm", "chat"])
    assert target.observe().percent == 10


def test_a_share_without_a_ready_pod_is_refused(server: KubeServer, target: KubernetesTarget) -> None:
    target.claim("r-1", 1)
    server.pods_ready = False
    target.start_candidates(1, FLAGS, 1)

    with pytest.raises(TargetError, match="no pod of Deployment llm/chat-candidate is ready"):
        target.set_share(10.0, 1)
    target.set_share(0.0, 1)


def test_a_candidate_pod_that_restarted_or_vanished_is_dead(server: KubeServer, target: KubernetesTarget) -> None:
    target.claim("r-1", 1)
    target.start_candidates(2, FLAGS, 1)
    first, second = (one.server for one in target.started_arm())
    assert [target.is_alive(first), target.is_alive(second)] == [True, True]
    server.objects["pods", "llm", first]["status"]["containerStatuses"][0]["restartCount"] = 1
    server._end(server.objects["pods", "llm", second])

    assert [one.server for one in target.started_arm()] == [first, second]
    assert [target.is_alive(first), target.is_alive(second)] == [False, False]


def test_a_pod_that_finds_no_gpu_says_so(server: KubeServer, target: KubernetesTarget) -> None:
    target.claim("r-1", 1)
    target.start_candidates(2, FLAGS, 1)
    pod = server._pods_of("chat-candidate")[0]
    unscheduled = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: insufficient nvidia.com/gpu"}
    pod["status"] = {"phase": "Pending", "conditions": [unscheduled]}

    assert target.not_started() == "1 of 2 candidate pods run: 0/3 nodes: insufficient nvidia.com/gpu"


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda s: s.objects.pop(("httproutes", "llm", "chat")), "llm has no HTTPRoute chat; check `route`"),
        (lambda s: s.objects.pop(("deployments", "llm", "chat")), "llm has no Deployment chat; check `deployment`"),
        (lambda s: s.objects.pop(("services", "llm", "chat")), "llm has no Service chat"),
        (lambda s: s.put("httproutes", kube_kit.route({"backendRefs": []})), "sends nothing to Service chat"),
        (lambda s: s.edit("httproutes", "chat", lambda b: b.update(status={})) or s.objects["httproutes", "llm", "chat"].pop("status"), "no Gateway has accepted it"),  # noqa: E501
        (lambda s: s.put("deployments", kube_kit.deployment(["sh", "-c", "vllm serve"])), "runs a shell script"),
        (lambda s: s.put("deployments", kube_kit.deployment(replicas=0)), "has no ready pod"),
        (lambda s: s.put("horizontalpodautoscalers", {"metadata": {"name": "hpa"}, "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "chat"}}}), "HorizontalPodAutoscaler hpa scales Deployment chat"),  # noqa: E501
        (lambda s: s.faults.append(Fault("GET", "httproutes", 403, reason="Forbidden")), "grant verb 'get' on httproutes.gateway.networking.k8s.io in namespace llm"),  # noqa: E501
        (lambda s: s.faults.append(Fault("PATCH", "httproutes", 422, reason="Invalid")), "refuses to patch HTTPRoute llm/chat: status 422"),  # noqa: E501
    ],
)  # fmt: skip
def test_what_keeps_a_rollout_from_beginning_names_the_thing_and_the_remedy(
    server: KubeServer, target: KubernetesTarget, prepare: Any, says: str
) -> None:
    prepare(server)

    with pytest.raises(TargetError) as refused:
        target.claim("r-1", 1)
    assert says in str(refused.value)


def test_a_pool_needs_a_twin_of_its_own(server: KubeServer, tmp_path: Path) -> None:
    """An endpoint picker inside one pool would send a slow candidate less and make it look fine."""
    group = "inference.networking.k8s.io"
    server.put("inferencepools", {"metadata": {"name": "chat"}, "spec": {"selector": {"matchLabels": {"app": "chat"}}}})
    server.put(
        "httproutes", kube_kit.route({"backendRefs": [{"group": group, "kind": "InferencePool", "name": "chat"}]})
    )
    given = kube_kit.settings(server, tmp_path, backend_kind="InferencePool", backend_group=group)
    made = kube_kit.target(given)
    with pytest.raises(TargetError, match="has no InferencePool chat-candidate; make it"):
        made.claim("r-1", 1)
    twin = {"metadata": {"name": "chat-candidate"}, "spec": {"selector": {"matchLabels": {"app": "chat"}}}}
    server.put("inferencepools", twin)
    with pytest.raises(TargetError, match="does not choose pods by"):
        made.claim("r-1", 1)
    twin["spec"]["selector"]["matchLabels"] = {"optiinfra.io/arm": "candidate"}
    server.put("inferencepools", twin)

    made.claim("r-1", 1)
    made.start_candidates(1, FLAGS, 1)
    made.set_share(10.0, 1)
    assert server.weights() == [{"chat": 9000, "chat-candidate": 1000}]
    assert [one["metadata"]["name"] for one in server.all("services")] == ["chat"]


def test_what_is_busy_is_asked_again_and_what_is_away_is_told(server: KubeServer, target: KubernetesTarget) -> None:
    """429 with its Retry-After, 500, 503 and a cut connection are forgiven; a refused password is not asked twice."""
    target.claim("r-1", 1)
    server.faults = [
        Fault("GET", "httproutes", 429, retry_after=1),
        Fault("GET", "httproutes", 500),
        Fault("GET", "httproutes", 503),
        Fault("GET", "httproutes", 0),
    ]
    assert target.observe().percent == 0
    assert not any(fault.times for fault in server.faults)
    server.token = "another"
    server.requests.clear()
    with pytest.raises(TargetError, match="not allowed to get HTTPRoute llm/chat"):
        target.observe()
    assert len(server.requests) == 1


def test_a_server_that_hangs_costs_seconds_and_no_more(
    server: KubeServer, target: KubernetesTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resources.rollouts.targets.kubernetes import api

    monkeypatch.setattr(api, "READ_SECONDS", 0.1)
    monkeypatch.setattr(api, "PATIENCE_SECONDS", 0.3)
    server.faults = [Fault("GET", "httproutes", 0, times=99, hang_seconds=0.5)]

    with pytest.raises(TargetError, match="did not get HTTPRoute llm/chat in 0 s: ReadTimeoutError"):
        target.observe()


def test_events_that_may_not_be_written_stop_nothing(server: KubeServer, target: KubernetesTarget) -> None:
    server.faults = [Fault("POST", "events", 403, times=99, reason="Forbidden")]
    target.claim("r-1", 1)
    target.start_candidates(1, FLAGS, 1)
    target.set_share(10.0, 1)

    assert target.observe().percent == 10
    assert server.all("events") == []


def test_original_weights_stand_in_the_object_before_the_first_change(
    server: KubeServer, target: KubernetesTarget
) -> None:
    target.claim("r-1", 7)

    found = server.get("httproutes", "chat")
    assert found is not None
    state = json.loads(found["metadata"]["annotations"][STATE])
    assert state == {"token": 7, "rollout_id": "r-1", "original": {"0": {"chat": None}}, "stable_replicas": 3}
    assert server.weights() == [{"chat": None}]


def test_traffic_comes_off_even_when_the_record_was_lost(server: KubeServer, target: KubernetesTarget) -> None:
    """Git replaced the object's annotations while the candidate had everything: the stable backend serves again."""
    target.claim("r-1", 1)
    target.start_candidates(3, FLAGS, 1)
    target.set_share(100.0, 1)
    server.edit("httproutes", "chat", lambda body: body["metadata"].update(annotations={}))

    target.set_share(0.0, 1)
    assert server.weights() == [{"chat": None, "chat-candidate": 0}]


def test_a_watchdog_takes_traffic_off_although_the_record_was_lost(server: KubeServer, tmp_path: Path) -> None:
    """It claims with a token of its own, and the candidate itself says whose it is; growing again is refused."""
    given = kube_kit.settings(server, tmp_path)
    executor, watchdog = kube_kit.target(given), kube_kit.target(given)
    executor.claim("r-1", 1)
    executor.start_candidates(3, FLAGS, 1)
    executor.set_share(100.0, 1)
    server.edit("httproutes", "chat", lambda body: body["metadata"].update(annotations={}))

    watchdog.claim("r-1", 2)
    watchdog.set_share(0.0, 2)
    assert server.weights() == [{"chat": None, "chat-candidate": 0}]
    with pytest.raises(TargetError, match="begin anew"):
        watchdog.set_share(10.0, 2)
    with pytest.raises(StaleTokenError, match="remove the annotation"):
        executor.set_share(10.0, 1)


def test_a_rule_that_was_added_meanwhile_stops_growth_and_not_the_way_back(
    server: KubeServer, target: KubernetesTarget
) -> None:
    target.claim("r-1", 1)
    target.start_candidates(1, FLAGS, 1)
    target.set_share(10.0, 1)
    more = {"backendRefs": [{"kind": "Service", "name": "chat", "port": 80, "weight": 5}]}
    server.edit("httproutes", "chat", lambda body: body["spec"]["rules"].append(more))

    with pytest.raises(TargetError, match=r"rules with chat were \['0'\] at the start and are \['0', '1'\] now"):
        target.set_share(50.0, 1)
    target.set_share(0.0, 1)
    assert server.weights() == [{"chat": None, "chat-candidate": 0}, {"chat": 5}]


def test_a_candidate_left_by_another_rollout_is_not_taken_over(server: KubeServer, target: KubernetesTarget) -> None:
    target.claim("r-1", 1)
    target.start_candidates(1, FLAGS, 1)

    with pytest.raises(TargetError, match="Deployment llm/chat-candidate is there already, of r-1; delete it"):
        target.claim("r-2", 2)
