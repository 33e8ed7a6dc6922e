"""A real HAProxy with real traffic: weights, drains, restarts and rollbacks lose no request.

apt-get update && apt-get install -y haproxy && pytest -n 0 -m engine tests/rollouts/test_haproxy.py
"""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from optiinfra_pipelines.domain.fleet import Deployment, Fleet
from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts, RolloutPolicy
from optiinfra_pipelines.domain.rollouts import Change, KnobGroup, Proposal, RolloutPlan, RolloutState
from resources.rollouts.clock import Moment, now_here
from resources.rollouts.deadman import Capsule, spawn
from resources.rollouts.desk import Rollouts
from resources.rollouts.executor import Executor
from resources.rollouts.ports import is_near
from resources.rollouts.targets import StaleTokenError, TargetError
from resources.rollouts.targets.haproxy import HaproxyTarget
from resources.rollouts.targets.haproxy_socket import RuntimeSocket
from tests.rollouts.haproxy_kit import HAPROXY, Clients, Gateway, process_at

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(240),
    pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed: apt-get install -y haproxy"),
]
# Real traffic, with a clock that runs so much faster: a look of 5 s takes a quarter of one.
SPEED = 20.0


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    made = Gateway(tmp_path, stable=2, candidates=2)
    yield made
    made.close()


@pytest.fixture
def target(gateway: Gateway) -> HaproxyTarget:
    return HaproxyTarget(gateway.settings, gateway.folder, gateway.launcher)


def candidates(gateway: Gateway) -> set[str]:
    return {one.url.rsplit(":", 1)[1] for one in gateway.settings.candidates}


def wait_until_up(target: HaproxyTarget) -> None:
    until = time.monotonic() + 20
    while not all(
        target.gateway_counts()[one.server].status.startswith(("UP", "DRAIN")) for one in target.started_servers()
    ):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_shares_are_what_was_asked_for_and_no_change_loses_a_request(gateway: Gateway, target: HaproxyTarget) -> None:
    """1, 5, 25, 50, 100 % and back, drained, stopped: counted at the clients, 0 lost."""
    target.claim("r-1", 1)
    with Clients(gateway.port) as clients:
        target.start_candidates(2, {"max_num_seqs": "128"}, 1)
        wait_until_up(target)
        assert clients.share(candidates(gateway), 100) == 0
        for percent in (1.0, 5.0, 25.0, 50.0, 100.0):
            target.set_share(percent, 1)
            assert is_near(target.observe().percent, percent)
            seen = 100 * clients.share(candidates(gateway), 400)
            assert abs(seen - percent) <= max(3.0, 0.15 * percent), (percent, seen)
        target.set_share(0.0, 1)
        time.sleep(0.2)
        assert clients.share(candidates(gateway), 200) == 0
        until = time.monotonic() + 10
        while not target.drain(1):
            assert time.monotonic() < until
        target.stop_candidates(1)
        clients.share(set(), 100)

    assert clients.lost == 0
    assert target.observe().candidates == 0
    assert target.observe().detail["weights"] == {"s0": 100, "s1": 100, "c0": 0, "c1": 0}


def test_a_killed_gateway_comes_back_with_the_weights_in_force(gateway: Gateway, target: HaproxyTarget) -> None:
    target.claim("r-1", 1)
    target.start_candidates(1, {}, 1)
    wait_until_up(target)
    target.set_share(25.0, 1)
    before = target.observe()

    gateway.kill()
    with pytest.raises(TargetError, match="does not answer"):
        target.observe()
    gateway.start()

    assert target.observe().detail["weights"] == before.detail["weights"]


def test_a_restart_that_finds_no_state_file_gives_candidates_nothing(gateway: Gateway, target: HaproxyTarget) -> None:
    """HAProxy silently returns to its configured weights then: the candidates' is 0, and the drift is seen."""
    target.claim("r-1", 1)
    target.start_candidates(1, {}, 1)
    wait_until_up(target)
    target.set_share(25.0, 1)
    gateway.kill()
    Path(gateway.settings.state_file).unlink()
    gateway.start()

    assert target.observe().percent == 0
    assert target.observe().detail["weights"] == {"s0": 100, "s1": 100, "c0": 0, "c1": 0}


def test_a_candidate_with_a_configured_weight_is_refused(gateway: Gateway, target: HaproxyTarget) -> None:
    """At weight 0 now, but a restart of HAProxy alone would send it requests."""
    gateway.kill()
    gateway.config.write_text(gateway.config.read_text().replace("weight 0", "weight 10"))
    gateway.start()
    for one in gateway.settings.candidates:
        RuntimeSocket(gateway.settings.socket).set_weight("chat", one.server, 0)

    with pytest.raises(TargetError, match=r"c0, c1 of chat would get traffic by a restart of HAProxy alone"):
        target.claim("r-1", 1)


def test_completed_pools_exchange_their_roles(gateway: Gateway, target: HaproxyTarget) -> None:
    """The next rollout's candidates are the servers that were stable before, started anew."""
    target.claim("r-1", 1)
    with Clients(gateway.port) as clients:
        target.start_candidates(2, {"max_num_seqs": "128"}, 1)
        wait_until_up(target)
        target.set_share(100.0, 1)
        until = time.monotonic() + 10
        while not target.promote("r-1", 1):
            assert time.monotonic() < until
        assert target.promote("r-1", 1)
        clients.share(set(), 100)
        assert [one.server for one in target.stable_servers] == ["c0", "c1"]
        target.claim("r-2", 2)
        target.start_candidates(1, {"max_num_seqs": "64"}, 2)
        wait_until_up(target)
        target.set_share(10.0, 2)
        assert target.observe().percent == pytest.approx(10, abs=1)
        target.set_share(0.0, 2)

    assert clients.lost == 0


def test_a_stale_token_changes_no_weight(gateway: Gateway, target: HaproxyTarget) -> None:
    target.claim("r-1", 5)
    with pytest.raises(StaleTokenError):
        target.set_share(0.0, 4)
    with pytest.raises(TargetError, match="no candidate runs"):
        target.set_share(10.0, 5)
    assert target.observe().percent == 0


def story(made: Rollouts) -> str:
    return "\n".join(f"{one.kind}: {one.to_position or ''} {one.reason}" for one in made.store.events("chat-1"))


class Fast:
    """The real clock, running SPEED times faster."""

    def __init__(self) -> None:
        self._start = now_here()

    def __call__(self) -> Moment:
        passed = (now_here().seconds - self._start.seconds) * (SPEED - 1)
        now = now_here()
        return replace(now, at=now.at + timedelta(seconds=passed), seconds=now.seconds + passed)


def rollouts(gateway: Gateway, clock: Fast) -> Rollouts:
    settings = DeploymentRollouts(deployment="chat", haproxy=gateway.settings)
    fleet = Fleet(deployments=(Deployment(name="chat", model="tiny"),))
    return Rollouts(fleet, RolloutPolicy(deployments=(settings,)), gateway.folder / "state", environ={}, clock=clock)


def begun(made: Rollouts, flags: dict[str, str | None], group: KnobGroup) -> Executor:
    plan = RolloutPlan(
        percents=(10.0, 50.0, 100.0),
        bake_minutes=2.0,
        warm_up_seconds=10.0,
        latency_signals=("time_to_first_token_seconds",),
        min_requests=100,
    )
    proposal = Proposal(
        rollout_id="chat-1",
        change=Change(deployment="chat", knob_group=group, current={}, proposed=flags),
        plan=plan,
        target="haproxy",
        requester="alice",
        reason="a test",
        created_at=made.clock().at,
    )
    row = made.propose(proposal)
    made.approve("chat-1", "bob", row.proposal_hash, "", "", None)
    executor = made.executor("chat-1", "test")
    # The launcher of the test has the stable replicas, too.
    executor.begin(made.clock())
    return executor


def follow(executor: Executor, clock: Fast, until: str = "", seconds: float = 150.0) -> str:
    """Look until it is done, or until a text comes; what the last look said."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        progress = executor.step(clock())
        if progress.is_done or (until and until in progress.message):
            return progress.message
        time.sleep(5.0 / SPEED)
    raise AssertionError(f"not done: {progress}")


def test_a_good_change_completes_under_traffic_and_loses_nothing(gateway: Gateway) -> None:
    clock = Fast()
    made = rollouts(gateway, clock)
    with Clients(gateway.port) as clients:
        executor = begun(made, {"max_num_seqs": "128"}, KnobGroup.BATCHING)
        follow(executor, clock)

    row = made.store.get("chat-1")
    assert row.position.state is RolloutState.COMPLETED, story(made)
    verdicts = [event.reason for event in made.store.events("chat-1") if event.kind == "verdict"]
    assert all("the hit rate has settled, 0." in reason for reason in verdicts[:-1]), "\n".join(verdicts)
    assert row.is_settled
    assert clients.lost == 0


def test_a_slow_candidate_is_taken_back_under_traffic_and_loses_nothing(gateway: Gateway) -> None:
    clock = Fast()
    made = rollouts(gateway, clock)
    with Clients(gateway.port) as clients:
        executor = begun(made, {"latency_ms": "45"}, KnobGroup.OTHER)
        follow(executor, clock)

    row = made.store.get("chat-1")
    events = made.store.events("chat-1")
    assert row.position.state is RolloutState.ROLLED_BACK
    [failed] = [event for event in events if event.to_position == RolloutState.FAILED]
    assert failed.reason.startswith("time_to_first_token_seconds")
    assert clients.lost == 0
    assert executor.target.observe().candidates == 0


def test_a_candidate_that_is_killed_is_out_at_the_next_look(gateway: Gateway) -> None:
    clock = Fast()
    made = rollouts(gateway, clock)
    with Clients(gateway.port) as clients:
        executor = begun(made, {"max_num_seqs": "128"}, KnobGroup.BATCHING)
        follow(executor, clock, until="of new requests")
        candidate = process_at(gateway.settings.candidates[0])
        assert candidate is not None
        candidate.kill()
        killed = time.monotonic()
        time.sleep(5.0 / SPEED)
        progress = executor.step(clock())
        seconds = time.monotonic() - killed
        assert progress.position.state in (RolloutState.FAILED, RolloutState.ROLLED_BACK)
        assert executor.target.observe().percent == 0
        follow(executor, clock)
        time.sleep(0.5)
        before = clients.lost
        clients.share(set(), 100)
        assert clients.lost == before

    assert seconds < 2
    assert made.store.get("chat-1").position.state is RolloutState.ROLLED_BACK


def test_a_dead_man_takes_traffic_off_when_the_executor_is_gone(gateway: Gateway) -> None:
    """kill -9 of the process that executes, with no Dagster anywhere: weight 0 within the lease and two looks."""
    clock = Fast()
    made = rollouts(gateway, clock)
    made.store.lease_seconds = 1.0
    executor = begun(made, {"max_num_seqs": "128"}, KnobGroup.BATCHING)
    target = executor.target
    target.start_candidates(1, {"max_num_seqs": "128"}, executor.token)
    target.set_share(50.0, executor.token)
    capsule = Capsule(
        store=str(made.store.path),
        root=str(made.root),
        rollout_id="chat-1",
        token=executor.token,
        lease_seconds=1.0,
        kind="haproxy",
        settings=DeploymentRollouts(deployment="chat", haproxy=gateway.settings),
    )
    made.store.renew("chat-1", executor.token, now_here())
    begun_at = time.monotonic()
    pid = spawn(capsule)
    while target.observe().percent > 0:
        assert time.monotonic() - begun_at < 20
        time.sleep(0.1)

    events = [event.reason for event in made.store.events("chat-1")]
    assert any(reason.startswith("dead-man: the executor was last seen") for reason in events)
    with pytest.raises(StaleTokenError):
        target.set_share(50.0, executor.token)
    os.waitpid(pid, 0)
