"""Whole rollouts on Kubernetes: the real executor, judge, store, watchdog and dead-man over real HTTP to the API.

Counts are SIMULATED here, so that a rollout takes a second; everything that is written and read is real.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from optiinfra_pipelines.domain.fleet import Deployment, Fleet
from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts, DryRunSettings, RolloutPolicy
from optiinfra_pipelines.domain.rollouts import Change, KnobGroup, PauseReason, Proposal, RolloutPlan, RolloutState
from resources.rollouts import deadman
from resources.rollouts.clock import now_here
from resources.rollouts.deadman import Capsule
from resources.rollouts.desk import Rollouts
from resources.rollouts.executor import Executor
from resources.rollouts.ports import Progress
from resources.rollouts.rehearsal import SimulatedFeed, SimulatedStaging
from resources.rollouts.store import RolloutError
from resources.rollouts.targets import StaleTokenError
from resources.rollouts.targets.kubernetes import api
from resources.rollouts.watchdog import Watchdog
from tests.rollouts import kube_kit
from tests.rollouts.kit import TestClock
from tests.rollouts.kube_server import KubeServer

PLAN = RolloutPlan(percents=(10.0, 50.0, 100.0), bake_minutes=1.0)
LOOK_SECONDS = 25.0


@pytest.fixture
def server() -> Iterator[KubeServer]:
    made = kube_kit.cluster()
    yield made
    made.close()


class Machine:
    """One machine with a store of its own, which acts on the cluster."""

    def __init__(self, server: KubeServer, folder: Path, **simulated: float) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.given = kube_kit.settings(server, folder)
        self.clock = TestClock()
        self.settings = DeploymentRollouts(deployment="chat", kubernetes=self.given)
        fleet = Fleet(deployments=(Deployment(name="chat", model="tiny"),))
        policy = RolloutPolicy(deployments=(self.settings,))
        self.rollouts = Rollouts(fleet, policy, folder / "state", environ={}, clock=self.clock)
        self.store = self.rollouts.store
        self.traffic = DryRunSettings(stable_replicas=3, **simulated)

    def approved(self, rollout_id: str) -> None:
        change = Change(
            deployment="chat",
            knob_group=KnobGroup.BATCHING,
            current={"max_num_seqs": "64"},
            proposed={"max_num_seqs": "128"},
        )
        proposal = Proposal(
            rollout_id=rollout_id,
            change=change,
            plan=PLAN,
            target="kubernetes",
            requester="alice",
            reason="more slots",
            created_at=self.clock().at,
        )
        row = self.rollouts.propose(proposal)
        self.rollouts.approve(rollout_id, "bob", row.proposal_hash, "", "", None)

    def executor(self, rollout_id: str, owner: str = "a") -> Executor:
        target = kube_kit.target(self.given, in_flight=lambda _: 0)
        made = Executor(
            self.store,
            rollout_id,
            owner=owner,
            target=target,
            feed=SimulatedFeed(target, self.traffic),
            staging=SimulatedStaging(),
            policy=self.rollouts.policy,
            stamp=self.clock,
        )
        made.begin(self.clock())
        return made

    def follow(self, executor: Executor, is_there: Callable[[Progress], bool]) -> Progress:
        for _ in range(400):
            progress = executor.step(self.clock.go(LOOK_SECONDS))
            if is_there(progress):
                return progress
        raise AssertionError(f"it never came: {progress}; {self.story(executor.rollout_id)}")

    def until(self, executor: Executor, text: str) -> Progress:
        return self.follow(executor, lambda progress: text in f"{progress.position} {progress.message}")

    def story(self, rollout_id: str) -> str:
        return "\n".join(f"{one.kind}: {one.reason}" for one in self.store.events(rollout_id))


@pytest.fixture
def machine(server: KubeServer, tmp_path: Path) -> Machine:
    return Machine(server, tmp_path / "one")


def test_a_good_change_completes_and_becomes_the_deployments_own(server: KubeServer, machine: Machine) -> None:
    machine.approved("chat-1")
    machine.follow(machine.executor("chat-1"), lambda progress: progress.is_done)

    row = machine.store.get("chat-1")
    assert row.position.state is RolloutState.COMPLETED, machine.story("chat-1")
    assert row.is_settled
    [chat] = server.all("deployments")
    assert chat["spec"]["template"]["spec"]["containers"][0]["args"] == ["--model", "tiny", "--max-num-seqs=128"]
    assert server.weights() == [{"chat": None}]
    shares = [one["message"].split(" % ")[0] for one in server.all("events") if one["reason"] == "WeightSet"]
    assert [one.removeprefix("the candidate has ") for one in shares] == ["10", "25", "50", "100", "0"]


def test_a_slow_candidate_is_taken_back_to_exactly_what_was_there(server: KubeServer, tmp_path: Path) -> None:
    machine = Machine(server, tmp_path / "slow", latency_factor=3.0)
    before = server.get("deployments", "chat")
    machine.approved("chat-1")
    machine.follow(machine.executor("chat-1"), lambda progress: progress.is_done)

    assert machine.store.get("chat-1").position.state is RolloutState.ROLLED_BACK
    assert server.all("deployments") == [before]
    assert server.weights() == [{"chat": None}]
    [failed] = [one for one in machine.store.events("chat-1") if one.to_position == RolloutState.FAILED]
    assert failed.reason.startswith("time_to_first_token_seconds")


def test_two_executors_with_one_store_and_exactly_one_acts(machine: Machine) -> None:
    machine.approved("chat-1")
    first = machine.executor("chat-1")
    with pytest.raises(RolloutError, match="executed by a"):
        machine.executor("chat-1", "b")
    machine.until(first, "50 % of new requests")
    machine.clock.go(31)
    second = machine.executor("chat-1", "b")

    assert second.target.observe().percent == 0
    assert "stopped acting" in first.step(machine.clock.go(5)).message
    with pytest.raises(StaleTokenError):
        first.target.set_share(50.0, first.token)


def test_two_machines_with_a_store_each_and_exactly_one_acts(server: KubeServer, tmp_path: Path) -> None:
    """Nothing is shared but the cluster: the second is refused by what stands there, whatever its token."""
    one, other = Machine(server, tmp_path / "one"), Machine(server, tmp_path / "other")
    one.approved("chat-1")
    first = one.executor("chat-1")
    one.until(first, "50 % of new requests")
    other.approved("chat-2")
    with pytest.raises(RolloutError, match=r"has 50 % of HTTPRoute llm/chat already.*is there already, of chat-1"):
        other.executor("chat-2")

    one.follow(first, lambda progress: progress.is_done)
    assert one.store.get("chat-1").position.state is RolloutState.COMPLETED


def test_a_dead_executor_leaves_no_traffic_and_its_successor_goes_on(server: KubeServer, machine: Machine) -> None:
    machine.approved("chat-1")
    machine.until(machine.executor("chat-1"), "50 % of new requests")
    machine.clock.go(31)
    Watchdog(machine.rollouts, lambda _: "unknown").look()

    assert server.weights() == [{"chat": None, "chat-candidate": 0}]
    assert machine.store.get("chat-1").position.pause is PauseReason.EXECUTOR_LOST
    machine.follow(machine.executor("chat-1", "b"), lambda progress: progress.is_done)
    assert machine.store.get("chat-1").position.state is RolloutState.COMPLETED


def test_a_dead_man_takes_traffic_off_from_what_its_capsule_says(server: KubeServer, machine: Machine) -> None:
    machine.approved("chat-1")
    executor = machine.executor("chat-1")
    machine.until(executor, "50 % of new requests")
    capsule = Capsule(
        store=str(machine.store.path),
        root=str(machine.rollouts.root),
        rollout_id="chat-1",
        token=executor.token,
        lease_seconds=30.0,
        kind="kubernetes",
        settings=machine.settings,
    )
    assert Capsule.model_validate_json(capsule.model_dump_json()) == capsule
    assert not deadman.look(capsule, machine.store, capsule.target({}), machine.clock)
    assert executor.target.observe().percent == 50
    machine.clock.go(31)

    assert deadman.look(capsule, machine.store, capsule.target({}), machine.clock)
    assert server.weights() == [{"chat": None, "chat-candidate": 0}]
    assert "stopped acting" in executor.step(machine.clock.go(1)).message


@pytest.mark.slow
def test_a_dead_man_process_does_so_when_nothing_else_lives(server: KubeServer, machine: Machine) -> None:
    """A process of its own, with the real clock: weight 0 within the lease and two of its looks."""
    machine.approved("chat-1")
    executor = machine.executor("chat-1")
    machine.until(executor, "50 % of new requests")
    machine.store.lease_seconds = 1.0
    machine.store.renew("chat-1", executor.token, now_here())
    capsule = Capsule(
        store=str(machine.store.path),
        root=str(machine.rollouts.root),
        rollout_id="chat-1",
        token=executor.token,
        lease_seconds=1.0,
        kind="kubernetes",
        settings=machine.settings,
    )
    begun = time.monotonic()
    pid = deadman.spawn(capsule)
    while server.weights() != [{"chat": None, "chat-candidate": 0}]:
        assert time.monotonic() - begun < 30
        time.sleep(0.1)
    os.waitpid(pid, 0)


def test_an_api_that_is_away_during_the_way_back_is_asked_until_it_is_verified(
    server: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is called rolled back while the API does not show it; an alert says why, and then it is."""
    monkeypatch.setattr(api, "PATIENCE_SECONDS", 0.02)
    machine = Machine(server, tmp_path / "slow", latency_factor=3.0)
    machine.approved("chat-1")
    executor = machine.executor("chat-1")
    machine.until(executor, "10 % of new requests")
    server.before_write = lambda method, path: setattr(server, "is_down", "httproutes" in path)
    # The write that would take traffic off arrives, is answered with nothing, and the API is away from then on.
    while machine.store.get("chat-1").position.state is RolloutState.IN_PROGRESS:
        executor.step(machine.clock.go(LOOK_SECONDS))
        if server.is_down:
            break
    server.is_down = True
    for _ in range(4):
        progress = executor.step(machine.clock.go(20.0))
        assert progress.position.state is not RolloutState.ROLLED_BACK
    assert progress.position.state is RolloutState.FAILED
    alerts = [one.reason for one in machine.store.events("chat-1") if one.kind == "alert"]
    assert any("the Kubernetes API did not" in one for one in alerts)
    server.is_down, server.before_write = False, None

    machine.until(executor, "ROLLED_BACK")
    assert server.weights() == [{"chat": None}]
    assert [one["metadata"]["name"] for one in server.all("deployments")] == ["chat"]


def test_weights_that_git_put_back_pause_the_rollout_without_traffic(server: KubeServer, machine: Machine) -> None:
    """A controller that restores the route from its repository is seen at the next look."""
    machine.approved("chat-1")
    executor = machine.executor("chat-1")
    machine.until(executor, "50 % of new requests")
    server.edit("httproutes", "chat", lambda body: body["spec"].update(rules=kube_kit.route()["spec"]["rules"]))

    executor.step(machine.clock.go(5))

    assert machine.store.get("chat-1").position.pause is PauseReason.WEIGHT_DRIFT
    assert executor.target.observe().percent == 0
