"""Which bucket edges to judge latency at, and how much worse is still acceptable at each.

A margin of 10 % means: latencies scaled by up to 1.1 are fine. At an edge c that is an odds ratio,
odds(S(c / 1.1)) / odds(S(c)), with S the share of the stable replicas' requests above a latency. Fixed before the
step starts and never updated in it. Pure: histograms in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Tail shares at which edges carry information: the middle for shifts, the tail for stalls.
WANTED_TAILS = (0.5, 0.25, 0.1, 0.05)
# An edge that fewer than 0.5 % of requests exceed (or fall under) decides nothing in a step's time.
USABLE_TAIL = (0.005, 0.995)
DEFAULT_MARGIN_RATIO = 0.10


@dataclass(frozen=True)
class JudgedEdge:
    """One edge: its latency bound, the stable share above it, and the odds ratio that is still acceptable."""

    bound_seconds: float
    stable_tail_ratio: float
    null_odds: float


@dataclass(frozen=True)
class StableHistogram:
    """Increments of one histogram over the reference window, cumulative; the last bound is +Inf."""

    upper_bounds: Sequence[float]
    cumulative: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.upper_bounds) != len(self.cumulative) or not self.upper_bounds:
            raise ValueError(f"{len(self.upper_bounds)} bounds and {len(self.cumulative)} counts do not fit together")
        if self.upper_bounds[-1] != math.inf:
            raise ValueError("the last bound must be +Inf; this histogram cannot say how many requests it saw")

    @property
    def total(self) -> float:
        return self.cumulative[-1]

    def tail_ratio(self, seconds: float) -> float:
        """Share of requests above a latency. Between two edges the tail falls geometrically.

        Latency tails fall by factors, not by steps: interpolating the logarithm keeps the odds ratio of a margin
        nearer the truth than a straight line does where buckets are wide.
        """
        if self.total <= 0:
            raise ValueError("an empty histogram has no tail")
        below, above = 0.0, 0.0
        count_below, count_above = 0.0, 0.0
        for bound, count in zip(self.upper_bounds, self.cumulative, strict=True):
            above, count_above = bound, count
            if bound >= seconds:
                break
            below, count_below = bound, count
        tail_below, tail_above = 1 - count_below / self.total, 1 - count_above / self.total
        if above == seconds or above == math.inf:
            return tail_above if above == seconds else tail_below
        if tail_above <= 0 or tail_below <= 0 or below <= 0:
            share = (seconds - below) / (above - below)
            return tail_below + share * (tail_above - tail_below)
        share = math.log(seconds / below) / math.log(above / below)
        return float(tail_below * (tail_above / tail_below) ** share)


def judged_edges(stable: StableHistogram, margin_ratio: float = DEFAULT_MARGIN_RATIO) -> list[JudgedEdge]:
    """The edges nearest the wanted tails, each once, ascending; empty when no edge is usable.

    stable: increments of the stable replicas over the last hour. Raises ValueError for a negative margin.
    """
    if margin_ratio < 0:
        raise ValueError(f"a margin of {margin_ratio} is negative; 0.10 accepts latencies scaled by up to 1.10")
    if stable.total <= 0:
        return []
    tails = {
        bound: 1 - count / stable.total
        for bound, count in zip(stable.upper_bounds, stable.cumulative, strict=True)
        if math.isfinite(bound) and bound > 0
    }
    usable = {bound: tail for bound, tail in tails.items() if USABLE_TAIL[0] <= tail <= USABLE_TAIL[1]}
    if not usable:
        return []
    chosen = {min(usable, key=lambda bound: abs(_log_odds(usable[bound]) - _log_odds(want))) for want in WANTED_TAILS}
    edges = []
    for bound in sorted(chosen):
        shifted = min(stable.tail_ratio(bound / (1 + margin_ratio)), 1 - 1e-6)
        null_odds = math.exp(_log_odds(shifted) - _log_odds(usable[bound]))
        edges.append(JudgedEdge(bound, usable[bound], max(null_odds, 1.0)))
    return edges


def _log_odds(ratio: float) -> float:
    return math.log(ratio / (1 - ratio))
