"""A rollout in simulated time: the real store, executor and judge on a dry-run target, without a sleep."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts, DryRunSettings, RolloutPolicy
from optiinfra_pipelines.domain.rollouts import Change, KnobGroup, Proposal, Rollout, RolloutPlan
from resources.rollouts.clock import Moment
from resources.rollouts.desk import Rollouts
from resources.rollouts.executor import Executor
from resources.rollouts.ports import Progress

START = Moment(datetime(2026, 11, 18, 12, 0, tzinfo=UTC), 1_000.0, "boot-1")
QUICK = RolloutPlan(percents=(10.0, 50.0, 100.0), bake_minutes=2.0)


class TestClock:
    """Both clocks in the test's hand."""

    __test__ = False

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> Moment:
        return self.now

    def go(self, seconds: float) -> Moment:
        """Time passes."""
        self.now = replace(self.now, at=self.now.at + timedelta(seconds=seconds), seconds=self.now.seconds + seconds)
        return self.now

    def set_by(self, seconds: float) -> Moment:
        """Somebody sets the wall clock; no time passes."""
        self.now = replace(self.now, at=self.now.at + timedelta(seconds=seconds))
        return self.now


class Kit:
    """Rollouts under one folder with a clock of the test's own."""

    def __init__(self, root: Path, settings: DryRunSettings | None = None, policy: RolloutPolicy | None = None) -> None:
        self.clock = TestClock()
        deployments = (DeploymentRollouts(deployment="chat", dry_run=settings or DryRunSettings()),)
        given = (policy or RolloutPolicy()).model_copy(update={"deployments": deployments})
        self.rollouts = Rollouts(Fleet(), given, root, environ={}, clock=self.clock)
        self.store = self.rollouts.store

    def propose(self, rollout_id: str = "chat-1", plan: RolloutPlan = QUICK) -> Rollout:
        change = Change(
            deployment="chat",
            knob_group=KnobGroup.BATCHING,
            current={"max_num_seqs": "64"},
            proposed={"max_num_seqs": "128"},
        )
        proposal = Proposal(
            rollout_id=rollout_id,
            change=change,
            plan=plan,
            requester="alice",
            reason="more slots",
            created_at=self.clock().at,
        )
        return self.rollouts.propose(proposal)

    def approve(self, row: Rollout) -> Rollout:
        return self.rollouts.approve(row.rollout_id, "bob", row.proposal_hash, "", "", None)

    def approved(self, rollout_id: str = "chat-1", plan: RolloutPlan = QUICK) -> Rollout:
        return self.approve(self.propose(rollout_id, plan))

    def executor(self, owner: str, rollout_id: str = "chat-1", run_id: str | None = None) -> Executor:
        made = self.rollouts.executor(rollout_id, owner, run_id)
        made.begin(self.clock())
        return made

    def percent(self, rollout_id: str = "chat-1") -> float:
        return self.rollouts.target(self.store.get(rollout_id)).observe().percent

    def run(self, executor: Executor, until: str, seconds: float = 10.0, looks: int = 5000) -> Progress:
        """Look until the position or the message has a text."""
        for _ in range(looks):
            progress = executor.step(self.clock.go(seconds))
            if until in str(progress.position) or until in progress.message:
                return progress
        raise AssertionError(f"{until} never came; {progress}")
