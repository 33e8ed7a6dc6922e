"""Rollouts on Kubernetes with pods that run: real staging, real pages of both arms, real counts of a proxy.

The API server and the node are the tests' own; what serves is the fake engine, one process a pod.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from optiinfra_pipelines.domain.rollout_targets import GatewayPage, KubernetesSettings
from optiinfra_pipelines.domain.rollouts import KnobGroup, RolloutState
from resources.rollouts.assembly import make_parts
from resources.rollouts.targets import TargetError
from resources.rollouts.targets.gateway_page import GatewayCounters
from tests.rollouts import kube_kit
from tests.rollouts.kube_pods import Node, Proxy
from tests.rollouts.kube_rollouts import GOOD_AND_SLOW, Fast, approved, rollouts, whole_rollout
from tests.rollouts.kube_server import KubeServer


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def server(node: Node) -> Iterator[KubeServer]:
    made = KubeServer(run_pod=node.run, end_pod=node.end)
    made.put("services", kube_kit.service())
    made.put("deployments", kube_kit.deployment(["--max-num-seqs", "64"], replicas=2))
    made.put("httproutes", kube_kit.route())
    node.until_up(made)
    yield made
    made.close()


def settings(server: KubeServer, node: Node, folder: Path, proxy: Proxy | None) -> KubernetesSettings:
    page = GatewayPage(url=proxy.url) if proxy is not None else None
    return kube_kit.settings(server, folder, port=node.port, gateway=page)


def test_pods_of_both_arms_are_asked_and_the_proxy_tells_what_clients_saw(
    server: KubeServer, node: Node, tmp_path: Path
) -> None:
    """What the desk assembles for a rollout: addresses, readiness, pages, the proxy's counts, requests in flight."""
    with Proxy(server, node, threads=2) as proxy:
        clock = Fast()
        made = rollouts(settings(server, node, tmp_path, proxy), tmp_path, clock)
        approved(made, KnobGroup.BATCHING, {"max_num_seqs": "128"})
        parts = make_parts(made, made.store.get("chat-1"))
        parts.target.claim("chat-1", 1)
        assert parts.staging.not_ready(clock()) == "there is no Deployment llm/chat-candidate"
        parts.target.start_candidates(1, {"max_num_seqs": "128"}, 1)
        node.until_up(server)
        assert parts.staging.not_ready(clock()) is None
        parts.target.set_share(50.0, 1)
        until = time.monotonic() + 30
        while proxy.counts["chat-candidate", "200"] < 5:
            assert time.monotonic() < until
            time.sleep(0.02)
        readings = parts.feed.read(clock())
        parts.target.set_share(0.0, 1)
        until = time.monotonic() + 30
        while not parts.target.drain(1):
            assert time.monotonic() < until

    assert parts.feed.counts_errors
    assert [page.process.rsplit("/", 1)[-1] for page in readings.baseline] == ["0", "0", "stable@gateway"]
    [engine, gateway] = readings.canary
    assert engine.histograms["time_to_first_token_seconds"].cumulative[-1] >= 4
    assert gateway.requests is not None
    assert gateway.requests >= 5
    assert gateway.failed == 0
    [health] = readings.health
    assert health.is_process_alive
    assert health.failed_probes == 0


def test_a_proxys_page_counts_answers_of_5xx_and_none_at_all(server: KubeServer, node: Node) -> None:
    proxy = Proxy(server, node, threads=0)
    proxy.counts.update({("chat", "200"): 90, ("chat", "503"): 4, ("chat-candidate", "0"): 3, ("other", "500"): 9})
    with proxy:
        counters = GatewayCounters(GatewayPage(url=proxy.url))
        counts = counters.read("chat-candidate", "chat")
        assert (counts.stable["stable"].requests, counts.stable["stable"].failed) == (94, 4)
        assert (counts.candidate["candidate"].requests, counts.candidate["candidate"].failed) == (3, 3)
        renamed = GatewayPage(url=proxy.url, stable="other", candidate="nobody")
        counts = GatewayCounters(renamed).read("chat-candidate", "chat")
        assert (counts.stable["stable"].failed, counts.candidate["candidate"].requests) == (9, 0)
    with pytest.raises(TargetError, match=r"the gateway's page http://127.* cannot be read: ConnectError"):
        counters.read("chat-candidate", "chat")


@pytest.mark.slow
@pytest.mark.timeout(420)
@GOOD_AND_SLOW
def test_whole_rollouts_under_traffic(
    server: KubeServer,
    node: Node,
    tmp_path: Path,
    group: KnobGroup,
    flags: dict[str, str | None],
    ends: RolloutState,
) -> None:
    """Staging, canary, steps, bake and promotion, or the way back; judged by the pods' own pages."""
    with Proxy(server, node) as proxy:
        made = whole_rollout(settings(server, node, tmp_path, proxy), tmp_path, group, flags)

    story = "\n".join(one.reason for one in made.store.events("chat-1"))
    assert made.store.get("chat-1").position.state is ends, story
    assert server.weights() == [{"chat": None}]
    assert [one["metadata"]["name"] for one in server.all("deployments")] == ["chat"]
    assert proxy.counts["chat-candidate", "200"] > 0
    failed = [one.reason for one in made.store.events("chat-1") if one.to_position == RolloutState.FAILED]
    assert [reason.split(":")[0] for reason in failed] == (
        ["time_to_first_token_seconds"] if ends is RolloutState.ROLLED_BACK else []
    )
