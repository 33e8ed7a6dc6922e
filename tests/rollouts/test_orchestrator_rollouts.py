"""Whole rollouts through an orchestrator: approval by its people, execution, and its demand to take back.

Every request and answer is held against the OpenAPI document. Counts are SIMULATED.
"""

from collections.abc import Iterator
from datetime import time
from pathlib import Path

import pytest

from optiinfra_pipelines.domain.fleet import Deployment, Fleet
from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts, DryRunSettings, FreezeWindow, RolloutPolicy
from optiinfra_pipelines.domain.rollout_targets import OrchestratorSettings
from optiinfra_pipelines.domain.rollouts import Change, KnobGroup, Proposal, RolloutPlan, RolloutState
from resources.rollouts import deadman
from resources.rollouts.deadman import Capsule
from resources.rollouts.desk import Rollouts
from resources.rollouts.executor import Executor
from resources.rollouts.rehearsal import SimulatedFeed, SimulatedStaging
from resources.rollouts.watchdog import Watchdog
from tests.rollouts.kit import TestClock
from tests.rollouts.orchestrator_server import OrchestratorServer

VARIABLE = "OPTIINFRA_ORCHESTRATOR_TOKEN"


@pytest.fixture
def server() -> Iterator[OrchestratorServer]:
    made = OrchestratorServer()
    yield made
    made.close()
    assert made.broken == []


class Desk:
    """Rollouts of one deployment that an orchestrator runs."""

    def __init__(self, server: OrchestratorServer, root: Path, policy: RolloutPolicy | None = None) -> None:
        self.server = server
        self.environ = {VARIABLE: server.token}
        self.clock = TestClock()
        settings = OrchestratorSettings(url=server.url, asks_approval=True)
        self.settings = DeploymentRollouts(deployment="chat", orchestrator=settings)
        fleet = Fleet(deployments=(Deployment(name="chat", model="tiny"),))
        given = (policy or RolloutPolicy()).model_copy(update={"deployments": (self.settings,)})
        self.rollouts = Rollouts(fleet, given, root, environ=self.environ, clock=self.clock)
        self.store = self.rollouts.store

    def proposed(self) -> None:
        change = Change(
            deployment="chat",
            knob_group=KnobGroup.BATCHING,
            current={"max_num_seqs": "64"},
            proposed={"max_num_seqs": "128"},
        )
        proposal = Proposal(
            rollout_id="chat-1",
            change=change,
            plan=RolloutPlan(percents=(10.0, 50.0, 100.0), bake_minutes=1.0),
            target="orchestrator",
            requester="alice",
            reason="more slots",
            created_at=self.clock().at,
        )
        self.rollouts.propose(proposal)

    def look(self) -> list[str]:
        """One look of the watchdog, which speaks with the orchestrator."""
        return [one.did for one in Watchdog(self.rollouts, lambda _: "alive").look()]

    def state(self) -> RolloutState:
        return self.store.get("chat-1").position.state

    def approved(self) -> None:
        self.proposed()
        self.look()
        self.server.decisions["chat-1"].update(state="approved", decided_by="bob", comment="go on")
        self.look()

    def executor(self, latency_factor: float = 1.0) -> Executor:
        target = self.rollouts.target(self.store.get("chat-1"))
        simulated = DryRunSettings(stable_replicas=3, latency_factor=latency_factor)
        made = Executor(
            self.store,
            "chat-1",
            owner="a",
            target=target,
            feed=SimulatedFeed(target, simulated),
            staging=SimulatedStaging(),
            policy=self.rollouts.policy,
            stamp=self.clock,
        )
        made.begin(self.clock())
        return made

    def until(self, executor: Executor, text: str) -> None:
        for _ in range(400):
            progress = executor.step(self.clock.go(25.0))
            if text in f"{progress.position} {progress.message}":
                return
        raise AssertionError(f"{text} never came: {progress}")


@pytest.fixture
def desk(server: OrchestratorServer, tmp_path: Path) -> Desk:
    return Desk(server, tmp_path)


def test_its_people_approve_and_the_change_completes(desk: Desk, server: OrchestratorServer) -> None:
    """Registered, heard, shown, approved with its hash, carried out, and the name of the approver is in the log."""
    desk.proposed()
    assert desk.look() == []
    assert server.asked[:3] == [
        ("PUT", "/v1/agents/optiinfra"),
        ("PUT", "/v1/agents/optiinfra/heartbeat"),
        ("PUT", "/v1/approval-requests/chat-1"),
    ]
    assert server.heartbeats[0]["rollouts"][0]["position"] == "PENDING_APPROVAL"
    server.decisions["chat-1"].update(state="approved", decided_by="bob", comment="go on")
    assert desk.look() == ["approved by bob"]
    row = desk.store.get("chat-1")
    assert row.approval is not None
    assert (row.approval.approver, row.approval.comment) == ("bob", "go on")

    desk.until(desk.executor(), "COMPLETED")
    assert desk.store.get("chat-1").is_settled
    assert server.deployment["promoted"] == "chat-1"
    assert server.flags == {"max_num_seqs": "128"}


def test_its_people_reject(desk: Desk, server: OrchestratorServer) -> None:
    desk.proposed()
    desk.look()
    server.decisions["chat-1"].update(state="rejected", decided_by="bob", comment="not today")

    assert desk.look() == ["rejected by bob"]
    assert desk.state() is RolloutState.REJECTED


@pytest.mark.parametrize(
    ("decision", "why"),
    [
        ({"decided_by": "Alice"}, "alice"),
        ({"decided_by": "bob", "proposal_hash": "0" * 64}, "hash"),
    ],
)
def test_an_approval_from_there_passes_the_same_gate(
    desk: Desk, server: OrchestratorServer, decision: dict[str, str], why: str
) -> None:
    """By the requester herself, or of another proposal: refused with the reason, and not once at every look."""
    desk.proposed()
    desk.look()
    server.decisions["chat-1"].update(state="approved", **decision)

    [said] = desk.look()
    assert "is not valid" in said
    assert why in said.lower()
    assert desk.look() == []
    assert desk.state() is RolloutState.PENDING_APPROVAL
    assert sum(one.kind == "refused" for one in desk.store.events("chat-1")) == 1


def test_an_approval_that_a_freeze_refused_is_asked_for_again(server: OrchestratorServer, tmp_path: Path) -> None:
    freeze = FreezeWindow(name="noon", since=time(11, 55), until=time(12, 5))
    desk = Desk(server, tmp_path, RolloutPolicy(freeze_windows=(freeze,)))
    desk.approved()
    assert desk.state() is RolloutState.PENDING_APPROVAL
    desk.clock.go(601)

    assert desk.look() == ["approved by bob"]


def test_a_slow_candidate_is_taken_back(desk: Desk, server: OrchestratorServer) -> None:
    desk.approved()
    desk.until(desk.executor(latency_factor=3.0), "ROLLED_BACK")

    assert server.deployment["percent"] == 0
    assert server.deployment["candidates"] == 0
    assert "rollBack" in [name for name, _ in server.done]


def test_what_its_people_demand_back_is_taken_back_at_once(desk: Desk, server: OrchestratorServer) -> None:
    desk.approved()
    executor = desk.executor()
    desk.until(executor, "50 % of new requests")
    server.demands = [{"rollout_id": "chat-1", "by": "carol", "reason": "an incident elsewhere"}]

    assert desk.look() == ["taken back for carol: an incident elsewhere"]
    assert server.deployment["percent"] == 0
    assert executor.step(desk.clock.go(5)).is_done
    assert any(one.actor == "carol" for one in desk.store.events("chat-1"))


def test_a_dead_man_takes_traffic_off_with_the_token_of_its_environment(desk: Desk, server: OrchestratorServer) -> None:
    desk.approved()
    executor = desk.executor()
    desk.until(executor, "50 % of new requests")
    capsule = Capsule(
        store=str(desk.store.path),
        root=str(desk.rollouts.root),
        rollout_id="chat-1",
        token=executor.token,
        lease_seconds=30.0,
        kind="orchestrator",
        settings=desk.settings,
    )
    assert server.token not in capsule.model_dump_json()
    desk.clock.go(31)

    assert deadman.look(capsule, desk.store, capsule.target(desk.environ), desk.clock)
    assert server.deployment["percent"] == 0
    assert "stopped acting" in executor.step(desk.clock.go(1)).message


def test_an_orchestrator_that_is_away_keeps_no_watch_from_its_work(
    desk: Desk, server: OrchestratorServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resources.rollouts.targets.orchestrator import client

    desk.proposed()
    server.close()
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 0.05)

    assert desk.look() == []
