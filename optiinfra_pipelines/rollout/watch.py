"""Watch one step of a rollout: takes in looks, answers hold, pass, fail or pause, each with its reason.

Pure: time is an argument, in seconds of any steady clock. It joins the judge (`rollout.judge`), the guards
(`rollout.guards`) and the rules for silence; doing what it answers is `resources.rollouts.executor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from optiinfra_pipelines.domain.rollouts import Stage, Step
from optiinfra_pipelines.domain.verdicts import Verdict, VerdictKind
from optiinfra_pipelines.rollout.guards import Trip
from optiinfra_pipelines.rollout.judge import ArmTick, StepJudge, StepPlan

# Three missed looks: what is judged is no longer what happens.
SILENT_HOLD_SECONDS = 15.0
# A candidate with traffic that nobody has seen for a minute is taken out; the outage may be its own doing.
SILENT_FAIL_SECONDS = 60.0


class Act(StrEnum):
    """What to do with a step now."""

    HOLD = "hold"
    PASS = "pass"
    FAIL = "fail"
    PAUSE = "pause"


@dataclass(frozen=True)
class Decision:
    """The answer to one look. verdict: the judge's, where one judges."""

    act: Act
    reason: str
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Look:
    """What was seen in one tick. An arm of None: nothing of it could be counted. trips: guards that tripped."""

    seconds: float
    canary: ArmTick | None
    baseline: ArmTick | None
    trips: Sequence[Trip] = ()


class StepWatch:
    """One step from its first moment with traffic to its decision.

    plan: what the judge goes by; None where there is no concurrent baseline (all traffic at the candidate), and only
    guards, silence and a minimum of requests decide. warm_up_seconds: counts before it are not judged.
    """

    def __init__(
        self, step: Step, plan: StepPlan | None, *, started: float, warm_up_seconds: float, min_requests: int
    ) -> None:
        self.step = step
        self._judge = StepJudge(plan) if plan is not None else None
        self._started = started
        self._warm_at = started + warm_up_seconds
        self._min_requests = min_requests
        self._last_seen = started
        self._requests = 0
        self._trips: tuple[Trip, ...] = ()

    def observe(self, look: Look) -> None:
        """Take in one look."""
        self._trips = tuple(look.trips)
        is_seen = look.canary is not None and (self._judge is None or look.baseline is not None)
        if not is_seen:
            return
        self._last_seen = look.seconds
        assert look.canary is not None
        if look.seconds < self._warm_at:
            return
        self._requests += look.canary.requests
        if self._judge is not None and look.baseline is not None and self._judge.ticks < self._judge.plan.max_ticks:
            self._judge.observe(look.canary, look.baseline)

    def decide(self, now: float) -> Decision:
        """The decision at a moment. FAIL before anything else; silence is never a pass."""
        if self._trips:
            return Decision(Act.FAIL, "; ".join(f"{trip.guard}: {trip.reason}" for trip in self._trips))
        elapsed, silent = now - self._started, now - self._last_seen
        if silent > SILENT_FAIL_SECONDS:
            return Decision(Act.FAIL, f"nothing could be counted for {silent:.0f} s while the candidate had traffic")
        verdict = self._verdict(elapsed)
        if verdict.kind is VerdictKind.FAIL:
            return Decision(Act.FAIL, verdict.reason, verdict)
        if silent > SILENT_HOLD_SECONDS:
            return Decision(Act.HOLD, f"nothing could be counted for {silent:.0f} s", verdict)
        if verdict.kind is VerdictKind.PASS:
            return Decision(Act.PASS, verdict.reason, verdict)
        if elapsed >= self.step.max_seconds + (self._warm_at - self._started):
            return Decision(Act.PAUSE, f"{verdict.kind} at the end of the step: {verdict.reason}", verdict)
        return Decision(Act.HOLD, verdict.reason, verdict)

    def _verdict(self, elapsed: float) -> Verdict:
        is_dwell_over = elapsed >= self.step.dwell_seconds + (self._warm_at - self._started)
        if self._judge is not None:
            return self._judge.verdict(is_dwell_over=is_dwell_over)
        enough = self._requests >= self._min_requests
        counted = f"{self._requests} of {self._min_requests} requests at the candidate"
        if not self._requests:
            return Verdict(kind=VerdictKind.NODATA, reason=f"{counted}; no baseline beside it", ticks=0)
        if not (enough and is_dwell_over):
            reason = counted if not enough else "enough requests; the step's time is not over"
            return Verdict(kind=VerdictKind.INCONCLUSIVE, reason=reason, ticks=0)
        what = "the bake" if self.step.stage is Stage.BAKE else "the step"
        return Verdict(kind=VerdictKind.PASS, reason=f"{what} is over, no guard tripped, {counted}", ticks=0)
