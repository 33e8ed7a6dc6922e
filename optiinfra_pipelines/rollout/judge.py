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
from optiinfra_pipelines.rollout.eprocess import (
    ERROR_ALTERNATIVES,
    LATENCY_ALTERNATIVES,
    EdgeProcess,
    TickCounts,
    combined_log_e,
    latency_stakes,
)
from optiinfra_pipelines.rollout.margins import JudgedEdge
from optiinfra_pipelines.rollout.throughput import ThroughputSequence

# An odds ratio of two: errors that double from 0.1 % to 0.2 % are within what replicas differ by.
ERROR_NULL_ODDS = 2.0
ERRORS = "errors"
THROUGHPUT = "generation_tokens_per_second"


@dataclass(frozen=True)
class StepPlan:
    """What one step is judged by; fixed before it starts.

    edges: judged edges of each latency signal, from the stable replicas' last hour. alpha: false-failure rate of the
    whole step, shared evenly by its signals. latency_stake: tempering from the A/A replay of stable replicas.
    max_ticks: ticks of the step with every extension. min_requests: of each arm, below which nothing passes.
    judge_throughput: only where both arms carry the same load per replica; margin_ratio is its margin.
    """

    edges: Mapping[str, Sequence[JudgedEdge]]
    alpha: float = 0.01
    latency_stake: float = 0.5
    max_ticks: int = 360
    min_requests: int = 300
    judge_errors: bool = True
    judge_throughput: bool = False
    margin_ratio: float = 0.10

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha {self.alpha} is no probability of a false failure; 0.01 is usual")
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

    observed: requests per signal. over: signal -> bound -> requests above it. requests, failed: for the error gate.
    tokens_per_replica: tokens generated per replica, None where not told.
    """

    observed: Mapping[str, int] = field(default_factory=dict)
    over: Mapping[str, Mapping[float, int]] = field(default_factory=dict)
    requests: int = 0
    failed: int = 0
    tokens_per_replica: float | None = None


@dataclass
class _Signal:
    name: str
    processes: list[EdgeProcess]
    bounds: tuple[float, ...]
    canary_requests: int = 0
    baseline_requests: int = 0
    canary_over: int = 0
    baseline_over: int = 0

    def state(self, fail_at: float) -> SignalState:
        return SignalState(
            signal=self.name,
            log_e=combined_log_e(self.processes),
            fail_at_log_e=fail_at,
            canary_requests=self.canary_requests,
            baseline_requests=self.baseline_requests,
            canary_over=self.canary_over,
            baseline_over=self.baseline_over,
            bound=self.bounds[0] if self.bounds else None,
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
            return _Signal(name, [EdgeProcess(ERROR_NULL_ODDS, ERROR_ALTERNATIVES, 1.0, ticks)], ())
        edges = self.plan.edges[name]
        processes = [
            EdgeProcess(
                edge.null_odds,
                LATENCY_ALTERNATIVES,
                self.plan.latency_stake,
                ticks,
                stakes=latency_stakes(self.plan.latency_stake),
            )
            for edge in edges
        ]
        return _Signal(name, processes, tuple(edge.bound_seconds for edge in edges))

    def observe(self, canary: ArmTick, baseline: ArmTick) -> None:
        """Take in one tick of both arms. Raises KeyError when a judged bound is not counted in it."""
        self.ticks += 1
        for signal in self._signals:
            counts = _counts(signal, canary, baseline)
            for process, tick in zip(signal.processes, counts, strict=True):
                process.observe(tick)
            first = counts[0]
            signal.canary_requests += first.canary_total
            signal.baseline_requests += first.baseline_total
            signal.canary_over += first.canary_over
            signal.baseline_over += first.baseline_over
            state = signal.state(self.plan.fail_at_log_e)
            if self._failed is None and state.log_e >= state.fail_at_log_e:
                # A failure stands: that the wealth falls again later takes nothing back.
                self._failed = state
        self._observe_throughput(canary, baseline)

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
        strongest = max(states, key=lambda state: state.log_e)
        reason = (
            f"the step's time is over with {fewest} requests or more in each arm; the strongest evidence against the "
            f"canary is {strongest.signal} at {math.exp(min(strongest.log_e, 50)):.3g}:1, "
            f"{math.exp(strongest.fail_at_log_e):.0f}:1 would fail it"
        )
        return self._say(VerdictKind.PASS, reason, states)

    def _say(self, kind: VerdictKind, reason: str, states: tuple[SignalState, ...]) -> Verdict:
        return Verdict(kind=kind, reason=reason, ticks=self.ticks, signals=states)


def _counts(signal: _Signal, canary: ArmTick, baseline: ArmTick) -> list[TickCounts]:
    if signal.name == ERRORS:
        return [TickCounts(canary.requests, canary.failed, baseline.requests, baseline.failed)]
    canary_total, baseline_total = canary.observed.get(signal.name, 0), baseline.observed.get(signal.name, 0)
    return [
        TickCounts(
            canary_total,
            canary.over[signal.name][bound] if canary_total else 0,
            baseline_total,
            baseline.over[signal.name][bound] if baseline_total else 0,
        )
        for bound in signal.bounds
    ]


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
