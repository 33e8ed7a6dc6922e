"""Judge one step of a canary: take in ticks of counts, give a verdict at any moment.

Pure: no clock, no IO. Counts are whole numbers of requests of the same tick of both arms, summed over processes by
the caller (`rollout.counts`), never rates. Hard guards (a crash, an OOM) are `rollout.guards`; they need no
statistics. Method: `rollout.eprocess`; margins: `rollout.margins`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from optiinfra_pipelines.domain.verdicts import SignalState, Verdict, VerdictKind
from optiinfra_pipelines.rollout.eprocess import ERROR_ALTERNATIVES, EdgeProcess, TickCounts, combined_log_e
from optiinfra_pipelines.rollout.margins import JudgedEdge
from optiinfra_pipelines.rollout.tempering import DEFAULT_STAKE, LATENCY_ALTERNATIVES, Drift, latency_rule, scale_of
from optiinfra_pipelines.rollout.throughput import ThroughputSequence
from optiinfra_pipelines.rollout.warm_up import CacheTick

# An odds ratio of two: errors that double from 0.1 % to 0.2 % are within what replicas differ by.
ERROR_NULL_ODDS = 2.0
ERRORS = "errors"
# Weight of the latency bets that start with the step. Those with a free start find a late regression and cost an early
# one little: at 10 requests/s a +25 % that begins in mid-step is the slowest to find, and is found sooner so. Any
# weight is fair: those of both kinds, as the priors of the starts, add to one and are fixed before the step, and a mean
# of bets that each gain nothing on average gains nothing either, however they depend on each other.
LATENCY_PLAIN_SHARE = 0.1
THROUGHPUT = "generation_tokens_per_second"
_NOTHING = TickCounts(0, 0, 0, 0)


@dataclass(frozen=True)
class StepPlan:
    """What one step is judged by; fixed before it starts.

    edges: judged edges of each latency signal, from the stable replicas' last hour. alpha: false-failure rate of the
    whole step, shared evenly by its signals. latency_stake: the most to stake, from the A/A replay of stable replicas;
    what these differ by during the step can only lower it.
    max_ticks: ticks of the step with every extension. min_requests: of each arm, below which nothing passes.
    judge_throughput: only where both arms carry the same load per replica; margin_ratio is its margin.
    """

    edges: Mapping[str, Sequence[JudgedEdge]]
    alpha: float = 0.01
    latency_stake: float = DEFAULT_STAKE
    max_ticks: int = 360
    min_requests: int = 300
    judge_errors: bool = True
    judge_throughput: bool = False
    margin_ratio: float = 0.10

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha {self.alpha} is no probability of a false failure; 0.01 is usual")
        if not 0 < self.latency_stake <= 1:
            raise ValueError(f"latency_stake {self.latency_stake} is not in (0, 1]; {DEFAULT_STAKE} is usual")
        if not self.judge_errors and not any(self.edges.values()):
            raise ValueError("nothing to judge by: no latency edge is usable and errors are not counted")

    @property
    def signals(self) -> tuple[str, ...]:
        latencies = tuple(name for name, edges in self.edges.items() if edges)
        throughput = (THROUGHPUT,) if self.judge_throughput else ()
        return (*latencies, *((ERRORS,) if self.judge_errors else ()), *throughput)

    @property
    def fail_at_log_e(self) -> float:
        return math.log(len(self.signals) / self.alpha)


@dataclass(frozen=True)
class ArmTick:
    """One arm in one tick: requests of each latency signal, how many went over each bound, and failures.

    observed: requests per signal. over: signal -> bound -> requests above it; a bound that not every process of the
    arm counts at is left out. requests, failed: for the error gate. tokens_per_replica: tokens generated per replica,
    None where not told. replicas: the same by process, where known: signal -> bound -> process -> (requests, over).
    cache: lookups in the prefix cache; the warm-up alone looks at them, None where not told.
    """

    observed: Mapping[str, int] = field(default_factory=dict)
    over: Mapping[str, Mapping[float, int]] = field(default_factory=dict)
    requests: int = 0
    failed: int = 0
    tokens_per_replica: float | None = None
    replicas: Mapping[str, Mapping[float, Mapping[str, tuple[int, int]]]] = field(default_factory=dict)
    cache: CacheTick | None = None


@dataclass
class _Edge:
    """One bound of one signal: its process, what replicas differ by at it, and the sums of both arms."""

    process: EdgeProcess
    bound: float | None = None
    drift: Drift | None = None
    ticks_counted: int = 0
    sums: TickCounts = _NOTHING

    def observe(self, tick: TickCounts | None, replicas: Mapping[str, tuple[int, int]], scale: float) -> None:
        """Take in one tick; None: an arm does not count at this bound, so the tick says nothing of it."""
        self.process.observe(tick or _NOTHING, scale)
        if tick is not None:
            self.ticks_counted += 1
            if tick.canary_total and tick.baseline_total:
                # Requests of a tick without the other arm's compare with nothing: they count toward no minimum.
                self.sums = self.sums + tick
        if self.drift is not None:
            self.drift.observe(replicas)


@dataclass
class _Signal:
    name: str
    edges: list[_Edge]
    plain_share: float = 0.5

    @property
    def told(self) -> _Edge:
        """The edge whose counts are told: the first one that both arms count at."""
        return next((edge for edge in self.edges if edge.ticks_counted), self.edges[0])

    def scale(self, most: float) -> float:
        """Of the stakes: what the plan allows, or less where the replicas of this step differ further."""
        seen = [edge.drift.share for edge in self.edges if edge.drift is not None and edge.drift.replica_minutes]
        return min(most, float(scale_of(seen))) if seen else most

    def state(self, fail_at: float) -> SignalState:
        told = self.told
        return SignalState(
            signal=self.name,
            log_e=combined_log_e([edge.process for edge in self.edges], self.plain_share),
            fail_at_log_e=fail_at,
            canary_requests=told.sums.canary_total,
            baseline_requests=told.sums.baseline_total,
            canary_over=told.sums.canary_over,
            baseline_over=told.sums.baseline_over,
            bound=told.bound,
        )


class StepJudge:
    """Judge one step. `observe` each tick in order, ask `verdict` whenever you like: looking costs nothing."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self.ticks = 0
        self._failed: SignalState | None = None
        self._signals = [self._build(name) for name in plan.signals if name != THROUGHPUT]
        self._throughput = ThroughputSequence(plan.margin_ratio) if plan.judge_throughput else None

    def _build(self, name: str) -> _Signal:
        ticks = self.plan.max_ticks
        if name == ERRORS:
            return _Signal(name, [_Edge(EdgeProcess(ERROR_NULL_ODDS, ERROR_ALTERNATIVES, 1.0, ticks))])
        rule = latency_rule(DEFAULT_STAKE)
        edges = [
            _Edge(
                EdgeProcess(edge.null_odds, LATENCY_ALTERNATIVES, max_ticks=ticks, rule=rule),
                edge.bound_seconds,
                Drift(math.log(edge.null_odds)),
            )
            for edge in self.plan.edges[name]
        ]
        return _Signal(name, edges, LATENCY_PLAIN_SHARE)

    def observe(self, canary: ArmTick, baseline: ArmTick) -> None:
        """Take in one tick of both arms. Raises ValueError for counts that cannot be, and past the plan's ticks."""
        self.ticks += 1
        for signal in self._signals:
            scale = signal.scale(self._most(signal))
            for edge in signal.edges:
                tick = _counts(signal.name, edge.bound, canary, baseline)
                at_edge = {} if edge.bound is None else baseline.replicas.get(signal.name, {}).get(edge.bound, {})
                edge.observe(tick, at_edge, scale)
            state = signal.state(self.plan.fail_at_log_e)
            if self._failed is None and state.log_e >= state.fail_at_log_e:
                # A failure stands: that the wealth falls again later takes nothing back.
                self._failed = state
        self._observe_throughput(canary, baseline)

    def _most(self, signal: _Signal) -> float:
        """The scale of stakes that the plan allows."""
        return 1.0 if signal.name == ERRORS else self.plan.latency_stake / DEFAULT_STAKE

    def _observe_throughput(self, canary: ArmTick, baseline: ArmTick) -> None:
        if self._throughput is None or canary.tokens_per_replica is None or baseline.tokens_per_replica is None:
            return
        self._throughput.observe(canary.tokens_per_replica, baseline.tokens_per_replica)
        if self._failed is None and self._throughput.log_e >= self.plan.fail_at_log_e:
            self._failed = self._throughput_state(self._throughput)

    def _throughput_state(self, throughput: ThroughputSequence) -> SignalState:
        return SignalState(
            signal=THROUGHPUT,
            log_e=throughput.log_e,
            fail_at_log_e=self.plan.fail_at_log_e,
            canary_requests=throughput.batches,
            baseline_requests=throughput.batches,
            canary_over=0,
            baseline_over=0,
            bound=None,
        )

    def states(self) -> tuple[SignalState, ...]:
        counted = tuple(signal.state(self.plan.fail_at_log_e) for signal in self._signals)
        return counted if self._throughput is None else (*counted, self._throughput_state(self._throughput))

    def verdict(self, *, is_dwell_over: bool) -> Verdict:
        """The verdict now. Before the dwell is over only FAIL is final; the rest says what is still missing."""
        states = self.states()
        if self._failed is not None:
            return self._say(VerdictKind.FAIL, _why_failed(self._failed), states)
        # Batches of throughput are no requests: it can fail a step, and its silence holds none up.
        counted = [state for state in states if state.signal != THROUGHPUT]
        silent = [state.signal for state in counted if not state.canary_requests or not state.baseline_requests]
        if silent:
            return self._say(VerdictKind.NODATA, f"no request in one of the arms for {', '.join(silent)}", states)
        fewest = min(min(state.canary_requests, state.baseline_requests) for state in counted)
        if fewest < self.plan.min_requests:
            reason = f"{fewest} of {self.plan.min_requests} requests in the smaller arm"
            return self._say(VerdictKind.INCONCLUSIVE, reason, states)
        if not is_dwell_over:
            return self._say(VerdictKind.INCONCLUSIVE, "enough requests; the step's time is not over", states)
        blunted = [one.name for one in self._signals if one.scale(self._most(one)) < self._most(one) / 2]
        if blunted and len(blunted) == sum(1 for signal in self._signals if signal.name != ERRORS):
            reason = (
                f"the stable replicas differ among themselves so much that {', '.join(blunted)} could not be judged as "
                "planned; lengthen the step, widen margin_ratio, or use two candidate replicas"
            )
            return self._say(VerdictKind.INCONCLUSIVE, reason, states)
        strongest = max(states, key=lambda state: state.log_e)
        reason = (
            f"the step's time is over with {fewest} requests or more in each arm; the strongest evidence against the "
            f"canary is {strongest.signal} at {math.exp(min(strongest.log_e, 50)):.3g}:1, "
            f"{math.exp(strongest.fail_at_log_e):.0f}:1 would fail it{self._uncounted()}"
        )
        return self._say(VerdictKind.PASS, reason, states)

    def _uncounted(self) -> str:
        """What to add about edges that were planned but that both arms never counted at together."""
        missing = [
            f"{signal.name} at {edge.bound:g} s"
            for signal in self._signals
            for edge in signal.edges
            if edge.bound is not None and not edge.ticks_counted
        ]
        return f"; not judged, as the arms' buckets differ: {', '.join(missing)}" if missing else ""

    def _say(self, kind: VerdictKind, reason: str, states: tuple[SignalState, ...]) -> Verdict:
        return Verdict(kind=kind, reason=reason, ticks=self.ticks, signals=states)


def _counts(name: str, bound: float | None, canary: ArmTick, baseline: ArmTick) -> TickCounts | None:
    """Both arms at one edge; None when one of them has requests and does not count at the bound."""
    if bound is None:
        return TickCounts(canary.requests, canary.failed, baseline.requests, baseline.failed)
    found: list[int] = []
    for arm in (canary, baseline):
        total = arm.observed.get(name, 0)
        over = arm.over.get(name, {}).get(bound, None if total else 0)
        if over is None:
            return None
        found += [total, over]
    return TickCounts(*found)


def _why_failed(state: SignalState) -> str:
    if state.signal == THROUGHPUT:
        evidence = math.exp(min(state.log_e, 50))
        return f"{state.signal} of a replica are fewer than the margin allows: evidence {evidence:.3g}:1"
    what = "failed" if state.bound is None else f"over {state.bound:g} s"
    return (
        f"{state.signal}: {state.canary_over} of {state.canary_requests} canary requests {what}, "
        f"{state.baseline_over} of {state.baseline_requests} in the baseline; evidence "
        f"{math.exp(min(state.log_e, 50)):.3g}:1 where {math.exp(state.fail_at_log_e):.0f}:1 fails the step"
    )
