"""Rollouts on a real Kubernetes API server with its controllers, with exactly the documented rights.

    OPTIINFRA_KUBE_BIN=bin OPTIINFRA_KUBE_CRDS=crds.yaml pytest -n 0 -m engine tests/rollouts -k control_plane

The control plane is real; nodes and the gateway are played (see `kube_real`), engines are the fake one.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from optiinfra_pipelines.domain.rollout_targets import GatewayPage, KubernetesSettings
from optiinfra_pipelines.domain.rollouts import KnobGroup, RolloutState
from resources.rollouts.targets import StaleTokenError, TargetError
from resources.rollouts.targets.kubernetes.api import ROUTES, KubeApi
from resources.rollouts.targets.kubernetes.target import STATE
from tests.rollouts import kube_kit, kube_real
from tests.rollouts.kube_pods import Node, Proxy
from tests.rollouts.kube_real import RealServer
from tests.rollouts.kube_rollouts import GOOD_AND_SLOW, whole_rollout

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(kube_real.missing() is not None, reason=kube_real.missing() or ""),
]
FLAGS: dict[str, str | None] = {"max_num_seqs": "128"}


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def server(node: Node, tmp_path: Path) -> Iterator[RealServer]:
    """With Deployment `chat` of two ready pods behind its Service and HTTPRoute."""
    made = RealServer(tmp_path / "control-plane", node)
    try:
        service = kube_kit.service()
        del service["spec"]["clusterIP"]
        made.put("services", service)
        made.put("deployments", kube_kit.deployment(["--max-num-seqs", "64"], replicas=2))
        made.put("httproutes", kube_kit.route())
        made.until_taken_up("chat")
        made.until_ready("chat", 2)
        yield made
    finally:
        made.close()


def settings(server: RealServer, node: Node, folder: Path, proxy: Proxy | None = None) -> KubernetesSettings:
    page = GatewayPage(url=proxy.url) if proxy is not None else None
    return kube_kit.settings(server, folder, port=node.port, gateway=page)


@GOOD_AND_SLOW
def test_whole_rollouts_under_traffic(
    server: RealServer,
    node: Node,
    tmp_path: Path,
    group: KnobGroup,
    flags: dict[str, str | None],
    ends: RolloutState,
) -> None:
    """Staging, canary, steps, bake and promotion by a rolling update, or the way back; nobody's request is lost."""
    with Proxy(server.flowing, node) as proxy:
        made = whole_rollout(settings(server, node, tmp_path, proxy), tmp_path, group, flags)

    story = "\n".join(one.reason for one in made.store.events("chat-1"))
    assert made.store.get("chat-1").position.state is ends, story
    # The API gives a backend without a weight the weight 1.
    assert server.weights() == [{"chat": 1}]
    [chat] = server.all("deployments")
    slots = "128" if ends is RolloutState.COMPLETED else "64"
    assert " ".join(chat["spec"]["template"]["spec"]["containers"][0]["args"]).replace("=", " ").endswith(slots)
    assert proxy.counts["chat-candidate", "200"] > 0
    assert proxy.lost() == 0
    told = [one["reason"] for one in server.all("events") if one["source"].get("component") == "optiinfra"]
    assert told.count("RolloutPromoted") == (ends is RolloutState.COMPLETED)
    assert {"RolloutClaimed", "CandidateStarted", "WeightSet", "CandidateStopped"} <= set(told)


def test_of_two_holders_the_later_one_acts(server: RealServer, node: Node, tmp_path: Path) -> None:
    """The higher token stands in the HTTPRoute itself, whatever machine wrote it."""
    given = settings(server, node, tmp_path)
    first, second = (kube_kit.target(given, in_flight=lambda _: 0) for _ in range(2))
    first.claim("r-1", 1)
    first.start_candidates(1, FLAGS, 1)
    server.until_ready("chat-candidate", 1)
    first.set_share(10.0, 1)
    assert first.observe().percent == 10.0
    second.claim("r-1", 2)
    with pytest.raises(StaleTokenError):
        first.set_share(100.0, 1)
    assert second.observe().percent == 10.0
    second.set_share(0.0, 2)

    assert server.weights() == [{"chat": 1, "chat-candidate": 0}]


def test_a_write_onto_a_version_that_moved_is_refused_and_decided_anew(
    server: RealServer, node: Node, tmp_path: Path
) -> None:
    """Somebody labels the route between reading and writing: neither write is lost."""
    given = settings(server, node, tmp_path)
    api = KubeApi(given, sleep=lambda _: None)
    target, applied = kube_kit.target(given), api.apply
    target.claim("r-1", 1)
    found = api.get(ROUTES, "chat", "it was made")
    api.merge(ROUTES, "chat", {"metadata": {"labels": {"team": "ml"}}})
    body = {
        "apiVersion": ROUTES.api_version,
        "kind": ROUTES.kind,
        "metadata": {"name": "chat", "resourceVersion": found["metadata"]["resourceVersion"]},
        "spec": {"rules": found["spec"]["rules"]},
    }
    with pytest.raises(TargetError, match=r"apply|patch HTTPRoute llm/chat: .*modified"):
        applied(ROUTES, body)
    target.claim("r-1", 2)

    now = api.get(ROUTES, "chat", "it was made")["metadata"]
    assert now["labels"]["team"] == "ml"
    assert '"token": 2' in now["annotations"][STATE]


def test_without_its_rights_it_names_the_one_that_is_missing(server: RealServer, node: Node, tmp_path: Path) -> None:
    given = settings(server, node, tmp_path)
    server.take_rights_away()
    with pytest.raises(TargetError, match=r"not allowed to get HTTPRoute llm/chat: .*grant verb 'get' on httproutes"):
        kube_kit.target(given).claim("r-1", 1)
