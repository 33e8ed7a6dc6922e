"""Watch one step of a rollout: takes in looks, answers hold, pass, fail or pause, each with its reason.

Pure: time is an argument, in seconds of any steady clock. It joins the judge (`rollout.judge`), the guards
(`rollout.guards`), the warm-up (`rollout.warm_up`) and the rules for silence; doing what it answers is
`resources.rollouts.executor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from optiinfra_pipelines.domain.rollouts import Stage, Step
from optiinfra_pipelines.domain.verdicts import Verdict, VerdictKind
from optiinfra_pipelines.rollout.guards import Trip
from optiinfra_pipelines.rollout.judge import ArmTick, StepJudge, StepPlan
from optiinfra_pipelines.rollout.warm_up import WarmUp, WarmUpEnd

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
    guards, silence and a minimum of requests decide. Nothing is judged before the step's warm-up is over, and its time
    counts from there.
    """

    def __init__(self, step: Step, plan: StepPlan | None, *, started: float, min_requests: int) -> None:
        self.step = step
        self._judge = StepJudge(plan) if plan is not None else None
        self._started = started
        self._warm_up = WarmUp(step.warm_up_seconds)
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
        if self._warm_up.end is None:
            # Also the tick that ends it: what it counts happened before.
            baseline = None if look.baseline is None else look.baseline.cache
            self._warm_up.observe(look.seconds - self._started, look.canary.cache, baseline)
            return
        self._requests += look.canary.requests
        if self._judge is not None and look.baseline is not None and self._judge.ticks < self._judge.plan.max_ticks:
            self._judge.observe(look.canary, look.baseline)

    def decide(self, now: float) -> Decision:
        """The decision at a moment. FAIL before anything else; silence is never a pass."""
        if self._trips:
            return Decision(Act.FAIL, "; ".join(f"{trip.guard}: {trip.reason}" for trip in self._trips))
        silent = now - self._last_seen
        if silent > SILENT_FAIL_SECONDS:
            return Decision(Act.FAIL, f"nothing could be counted for {silent:.0f} s while the candidate had traffic")
        judged = self._judged_seconds(now)
        verdict = self._verdict(is_dwell_over=judged is not None and judged >= self.step.dwell_seconds)
        said = f"{verdict.reason}; {self._warm_up.said}"
        if verdict.kind is VerdictKind.FAIL:
            return Decision(Act.FAIL, said, verdict)
        if silent > SILENT_HOLD_SECONDS:
            return Decision(Act.HOLD, f"nothing could be counted for {silent:.0f} s", verdict)
        if judged is None:
            return Decision(Act.HOLD, self._warm_up.said, verdict)
        if verdict.kind is VerdictKind.PASS:
            return Decision(Act.PASS, said, verdict)
        if judged >= self.step.max_seconds:
            return Decision(Act.PAUSE, f"{verdict.kind} at the end of the step: {said}", verdict)
        return Decision(Act.HOLD, verdict.reason, verdict)

    @property
    def warm_up_end(self) -> WarmUpEnd | None:
        """When and by which rule the warm-up ended; None before that."""
        return self._warm_up.end

    def seconds_left(self, now: float) -> float:
        """Least seconds until the step can pass; while it warms up, with what is left of its least warm-up."""
        judged = self._judged_seconds(now)
        if judged is not None:
            return max(0.0, self.step.dwell_seconds - judged)
        return max(0.0, self.step.warm_up_seconds - (now - self._started)) + self.step.dwell_seconds

    def _judged_seconds(self, now: float) -> float | None:
        """Seconds since the end of the warm-up; None before it."""
        end = self._warm_up.end
        return None if end is None else now - self._started - end.seconds

    def _verdict(self, *, is_dwell_over: bool) -> Verdict:
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
