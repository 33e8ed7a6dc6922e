"""A whole rollout on Kubernetes by the real executor, on a clock that runs faster, with pods that run and traffic."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from optiinfra_pipelines.domain.fleet import Deployment, Fleet
from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts, RolloutPolicy
from optiinfra_pipelines.domain.rollout_targets import KubernetesSettings
from optiinfra_pipelines.domain.rollouts import Change, KnobGroup, Proposal, RolloutPlan, RolloutState
from resources.rollouts.clock import Moment, now_here
from resources.rollouts.desk import Rollouts

SPEED = 12.0
# One change that helps and one that doubles each latency, and how a rollout of each must end.
GOOD_AND_SLOW = pytest.mark.parametrize(
    ("group", "flags", "ends"),
    [
        (KnobGroup.BATCHING, {"max_num_seqs": "128"}, RolloutState.COMPLETED),
        (KnobGroup.OTHER, {"latency_ms": "45"}, RolloutState.ROLLED_BACK),
    ],
    ids=["good", "slow"],
)


class Fast:
    """The real clock, running SPEED times faster."""

    def __init__(self) -> None:
        self._start = now_here()

    def __call__(self) -> Moment:
        now = now_here()
        passed = (now.seconds - self._start.seconds) * (SPEED - 1)
        return replace(now, at=now.at + timedelta(seconds=passed), seconds=now.seconds + passed)


def rollouts(given: KubernetesSettings, folder: Path, clock: Fast) -> Rollouts:
    fleet = Fleet(deployments=(Deployment(name="chat", model="tiny"),))
    # A look of 5 s takes less than half a second here; a busy machine is no executor that was asleep.
    one = DeploymentRollouts(deployment="chat", kubernetes=given)
    policy = RolloutPolicy(deployments=(one,), max_gap_seconds=120.0)
    return Rollouts(fleet, policy, folder / "state", environ={}, clock=clock)


def approved(made: Rollouts, group: KnobGroup, flags: dict[str, str | None]) -> None:
    proposal = Proposal(
        rollout_id="chat-1",
        change=Change(deployment="chat", knob_group=group, current={}, proposed=flags),
        plan=RolloutPlan(
            percents=(10.0, 50.0, 100.0),
            bake_minutes=1.0,
            warm_up_seconds=10.0,
            latency_signals=("time_to_first_token_seconds",),
            min_requests=100,
        ),
        target="kubernetes",
        requester="alice",
        reason="a test",
        created_at=made.clock().at,
    )
    row = made.propose(proposal)
    made.approve("chat-1", "bob", row.proposal_hash, "", "", None)


def whole_rollout(
    given: KubernetesSettings, folder: Path, group: KnobGroup, flags: dict[str, str | None], within_seconds: float = 360
) -> Rollouts:
    """Proposed, approved and followed to its end; the desk, which has its record."""
    clock = Fast()
    made = rollouts(given, folder, clock)
    approved(made, group, flags)
    executor = made.executor("chat-1", "test")
    executor.begin(clock())
    until = time.monotonic() + within_seconds
    while not (progress := executor.step(clock())).is_done:
        assert time.monotonic() < until, progress
        time.sleep(5.0 / SPEED)
    return made
