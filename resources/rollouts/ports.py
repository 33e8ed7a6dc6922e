"""What the executor needs beside a target: readings of both arms, and a way to try a candidate away from traffic.

Protocols and their carriers only. Real ones: `feed` and `staging`; simulated: `rehearsal`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from optiinfra_pipelines.domain.rollouts import Position, RolloutPlan
from optiinfra_pipelines.domain.verdicts import Verdict, VerdictKind
from optiinfra_pipelines.rollout.calibration import Calibration
from optiinfra_pipelines.rollout.counts import ProcessPage
from optiinfra_pipelines.rollout.guards import ReplicaHealth
from optiinfra_pipelines.rollout.planner import Traffic
from resources.rollouts.clock import Moment


@dataclass(frozen=True)
class Readings:
    """One tick of both arms. preemptions: cumulative over the arm's processes, None where not exposed.

    baseline_waiting: requests queued per stable replica."""

    canary: tuple[ProcessPage, ...]
    baseline: tuple[ProcessPage, ...]
    health: tuple[ReplicaHealth, ...] = ()
    canary_preemptions: float | None = None
    baseline_preemptions: float | None = None
    baseline_waiting: float | None = None


class Feed(Protocol):
    """Where counts come from."""

    @property
    def counts_errors(self) -> bool:
        """Whether requests and failures are counted, so that the error gate can judge."""
        ...

    def read(self, now: Moment) -> Readings:
        """Both arms now. Never raises for a replica that does not answer: it is left out."""
        ...

    def traffic(self, now: Moment) -> Traffic | str:
        """The deployment's load and its stable latency histograms of the last hour; a text says why not yet."""
        ...

    def calibration(self, plan: RolloutPlan, traffic: Traffic, now: Moment) -> Calibration:
        """How boldly to bet on latencies, from the stable replicas' own last day where that is stored."""
        ...


@dataclass(frozen=True)
class StagingReport:
    """What a candidate did away from traffic. FAIL ends the rollout; INCONCLUSIVE and NODATA wait for a person."""

    kind: VerdictKind
    reason: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


class Staging(Protocol):
    """A candidate before it gets traffic."""

    def not_ready(self, now: Moment) -> str | None:
        """Why the candidates cannot take traffic yet: health, a real completion, the size of the KV cache."""
        ...

    def test(self) -> StagingReport:
        """Load the candidate and a stable replica alike, away from traffic; with prompts of known answers where set.

        Repeatable: another call asks other requests than the one before.
        """
        ...


def is_near(actual: float, percent: float) -> bool:
    """Whether a share is what was asked for, within what whole weights can express; 0 and 100 are exact."""
    if percent in (0.0, 100.0):
        return actual == percent
    return abs(actual - percent) <= max(0.5, 0.1 * percent)


@dataclass(frozen=True)
class Progress:
    """What one look of the executor came to. numbers: for charts, by name. verdict: where one judges.

    decides_at: when the present step can pass at the earliest, by the clock of the run; None where none is judged.
    """

    position: Position
    is_done: bool
    message: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None
    decides_at: datetime | None = None
