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
# A stratum of the reference hour holds at least so many requests; fewer make its tail a guess.
MIN_STRATUM_REQUESTS = 200
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
        """Share of requests above a latency.

        Between two edges the log-odds of the tail run straight in log latency, as a log-logistic law's do: latency
        tails are near it, and a straight line through shares would understate a margin by a third where buckets
        are as wide as an engine's usually are.
        """
        if self.total <= 0:
            raise ValueError("an empty histogram has no tail")
        index = next(i for i, bound in enumerate(self.upper_bounds) if bound >= seconds)
        above = self.upper_bounds[index]
        if above in (seconds, math.inf):
            return 1 - self.cumulative[index if above == seconds else max(index - 1, 0)] / self.total
        low = self.upper_bounds[index - 1] if index else 0.0
        if low <= 0:
            return 1 - self.cumulative[index] / self.total * seconds / above
        share = math.log(seconds / low) / math.log(above / low)
        log_odds = (1 - share) * self._log_odds_at(index - 1) + share * self._log_odds_at(index)
        return 1 / (1 + math.exp(-log_odds))

    def _log_odds_at(self, index: int) -> float:
        """Of the tail at one edge; half a request stands for none, so that it stays finite."""
        over = self.total - self.cumulative[index]
        return math.log((over + 0.5) / (self.cumulative[index] + 0.5))


def judged_edges(minutes: Sequence[StableHistogram], margin_ratio: float = DEFAULT_MARGIN_RATIO) -> list[JudgedEdge]:
    """The edges nearest the wanted tails, each once, ascending; empty when no edge is usable.

    minutes: increments of all stable replicas together, one histogram a minute over the last hour, of the same
    bounds. The odds of the margin are averaged over short strata: within an hour the load moves, an hour's mixture
    of quiet and busy is flatter than any of its minutes, and would call a harmless canary slower than it is.
    Raises ValueError for a negative margin or minutes of different bounds.
    """
    if margin_ratio < 0:
        raise ValueError(f"a margin of {margin_ratio} is negative; 0.10 accepts latencies scaled by up to 1.10")
    strata = _strata(minutes)
    if not strata:
        return []
    whole = merge(strata)
    tails = {bound: whole.tail_ratio(bound) for bound in whole.upper_bounds if math.isfinite(bound) and bound > 0}
    usable = {bound: tail for bound, tail in tails.items() if USABLE_TAIL[0] <= tail <= USABLE_TAIL[1]}
    if not usable:
        return []
    chosen = {min(usable, key=lambda bound: abs(_log_odds(usable[bound]) - _log_odds(want))) for want in WANTED_TAILS}
    return [JudgedEdge(bound, usable[bound], _null_odds(strata, bound, margin_ratio)) for bound in sorted(chosen)]


def merge(histograms: Sequence[StableHistogram]) -> StableHistogram:
    """The sum of histograms of the same bounds."""
    bounds = histograms[0].upper_bounds
    if any(list(other.upper_bounds) != list(bounds) for other in histograms):
        raise ValueError("histograms of different bounds cannot be merged; a configuration change split the window")
    return StableHistogram(bounds, [sum(column) for column in zip(*(h.cumulative for h in histograms), strict=True)])


def _strata(minutes: Sequence[StableHistogram]) -> list[StableHistogram]:
    """Neighboring minutes merged until each stratum has enough requests; a thin rest joins the last."""
    strata: list[StableHistogram] = []
    pending: list[StableHistogram] = []
    for minute in minutes:
        pending.append(minute)
        if sum(histogram.total for histogram in pending) >= MIN_STRATUM_REQUESTS:
            strata.append(merge(pending))
            pending = []
    if pending:
        rest = merge([strata.pop(), *pending]) if strata else merge(pending)
        strata += [rest] if rest.total > 0 else []
    return strata


def _null_odds(strata: Sequence[StableHistogram], bound: float, margin_ratio: float) -> float:
    """Mean over strata, by requests, of the log odds ratio between the shifted and the edge's tail; at least 1."""
    weighted = 0.0
    for stratum in strata:
        shifted, tail = stratum.tail_ratio(bound / (1 + margin_ratio)), stratum.tail_ratio(bound)
        half = 0.5 / stratum.total
        clamped = [min(max(share, half), 1 - half) for share in (shifted, tail)]
        weighted += stratum.total * (_log_odds(clamped[0]) - _log_odds(clamped[1]))
    return max(1.0, math.exp(weighted / sum(stratum.total for stratum in strata)))


def _log_odds(ratio: float) -> float:
    return math.log(ratio / (1 - ratio))
