"""A test that may be looked at after every tick: the stratified conditional e-process.

Per tick, the canary's and the concurrent baseline's requests are counted over and under a bucket edge. Given how
many went over in both arms together, the canary's share of them follows Fisher's noncentral hypergeometric law, and
its odds ratio is all that is left to test: load, time of day and bursts cancel because they strike both arms in the
same tick. The wealth of a bet against "the canary is at most `null_odds` times as likely to exceed the edge" is a
nonnegative supermartingale, so it exceeds 1/alpha with probability at most alpha, however often one looks.

Here: the arithmetic of one edge, and its mean over edges. Not here: which edges and margins (`rollout.margins`) or
what a verdict is (`rollout.judge`). Sources: Turner, Ly, Grünwald 2021 (arXiv 2106.02693) for 2x2 e-values;
mixture over start times as in Shiryaev-Roberts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from numba import njit

from optiinfra_pipelines.rollout.tempering import LATENCY_ALTERNATIVES, plain_rule

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

# Errors come from near zero: a broken canary multiplies their odds, not raises them by a third.
ERROR_ALTERNATIVES = (1.5, 3.0, 6.0, 15.0, 50.0, 200.0)
# A term this far under the sum changes no digit of it.
_NEGLIGIBLE = 1e-17
# log odds ratio of a 10 % margin at edges near the middle of usual latencies; tempering's gains are made for it.
_USUAL_LOG_NULL = 0.27


@njit(cache=True, nogil=True)
def _log_normalizer(canary_total: int, baseline_total: int, over: int, log_odds: float) -> float:
    """log of the sum over j of C(n1, j) C(n2, k - j) odds^j: how many of the k requests over the edge are the canary's.

    Summed outward from the largest term, each from its neighbor, until a term no longer counts: terms fall faster
    than a normal law's, so the work grows with the square root of the counts, and nothing overflows.
    """
    low, high = max(0, over - baseline_total), min(over, canary_total)
    n1, n2, k, odds = float(canary_total), float(baseline_total), float(over), math.exp(log_odds)
    # Neighboring terms are equal where (n1 - j)(k - j) odds = (j + 1)(n2 - k + j + 1): its positive root.
    a, b, c = 1.0 - odds, n2 - k + odds * (n1 + k + 2.0), -odds * (n1 + 1.0) * (k + 1.0)
    top = min(high, max(low, int(-2.0 * c / (b + math.sqrt(b * b - 4.0 * a * c)))))
    largest = (
        math.lgamma(n1 + 1)
        - math.lgamma(top + 1)
        - math.lgamma(n1 - top + 1)
        + math.lgamma(n2 + 1)
        - math.lgamma(k - top + 1)
        - math.lgamma(n2 - k + top + 1)
        + top * log_odds
    )
    total = term = 1.0
    for j in range(top, high):
        term *= (n1 - j) * (k - j) * odds / ((j + 1.0) * (n2 - k + j + 1.0))
        total += term
        if term < _NEGLIGIBLE * total:
            break
    term = 1.0
    for j in range(top, low, -1):
        term *= j * (n2 - k + j) / ((n1 - j + 1.0) * (k - j + 1.0) * odds)
        total += term
        if term < _NEGLIGIBLE * total:
            break
    return largest + math.log(total)


@njit(cache=True, nogil=True)
def log_increments(
    canary_over: int, canary_total: int, baseline_over: int, baseline_total: int, log_null: float, log_ratios: Floats
) -> Floats:
    """log e of one tick at full stake, one per alternative; zeros when the tick carries no information."""
    increments = np.zeros(log_ratios.size)
    over = canary_over + baseline_over
    if min(over, canary_total) <= max(0, over - baseline_total):
        return increments
    null = _log_normalizer(canary_total, baseline_total, over, log_null)
    for i in range(log_ratios.size):
        worse = _log_normalizer(canary_total, baseline_total, over, log_null + log_ratios[i])
        increments[i] = canary_over * log_ratios[i] + null - worse
    return increments


@njit(cache=True, nogil=True)
def information(canary_total: int, baseline_total: int, over: int) -> float:
    """What a tick can tell of the log odds ratio: variance of the canary's share of `over`, were the arms equal."""
    total = float(canary_total + baseline_total)
    if total < 2:
        return 0.0
    return canary_total * float(baseline_total) * over * (total - over) / (total * total * (total - 1.0))


@njit(cache=True, nogil=True)
def fill_stakes(rule: Floats, scale: float, log_null: float, log_ratios: Floats, informed: float, out: Floats) -> None:
    """Write the stake of each alternative in a tick to `out`: 0 to 1.

    scale: of the drift, from `tempering.Drift`. informed: of the tick, from `information`. A bet is won by excursions
    past the middle between the null and its alternative; the nearer that is to equality, the smaller the stake.
    """
    for i in range(log_ratios.size):
        half = abs(log_ratios[i]) / 2
        room = ((abs(log_null) + half) / (_USUAL_LOG_NULL + half)) ** 2
        out[i] = min(1.0, scale * min(rule[i, 0], rule[i, 1] * room / (1.0 + rule[i, 2] * informed)))


@dataclass(frozen=True)
class TickCounts:
    """One tick at one edge: whole numbers of requests of each arm, and how many of them went over the edge."""

    canary_total: int
    canary_over: int
    baseline_total: int
    baseline_over: int

    def __post_init__(self) -> None:
        for name, over, total in (
            ("canary", self.canary_over, self.canary_total),
            ("baseline", self.baseline_over, self.baseline_total),
        ):
            if not 0 <= over <= total:
                raise ValueError(
                    f"{name}: {over} of {total} requests over the edge; deltas of one histogram cannot be so"
                )

    def __add__(self, other: TickCounts) -> TickCounts:
        return TickCounts(
            self.canary_total + other.canary_total,
            self.canary_over + other.canary_over,
            self.baseline_total + other.baseline_total,
            self.baseline_over + other.baseline_over,
        )


@dataclass
class EdgeProcess:
    """The wealth of the bets at one edge, from the start of a step.

    null_odds: odds ratio that is still acceptable (over 1: a margin). direction: +1 bets that the canary is worse
    than the null, -1 that it is better. stake: 0 to 1; under 1 it is tempered against what replicas of one
    configuration differ by. max_ticks: ticks of the step with every extension; the bound holds so long.
    rule: stakes that depend on the tick, from `tempering.latency_rule`, in place of the one for all.
    """

    null_odds: float
    alternatives: Sequence[float] = LATENCY_ALTERNATIVES
    stake: float = 0.5
    max_ticks: int = 360
    direction: int = 1
    rule: Floats | None = None
    ticks: int = 0
    _plain: Floats = field(init=False, repr=False)
    _restart: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.null_odds <= 0 or not 0 < self.stake <= 1 or min(self.alternatives) <= 1 or self.max_ticks < 1:
            raise ValueError(
                f"null_odds {self.null_odds}, stake {self.stake}, max_ticks {self.max_ticks}, alternatives "
                f"{tuple(self.alternatives)}: odds must be positive, the stake in (0, 1], every alternative over 1"
            )
        self._rule = plain_rule([self.stake] * len(self.alternatives)) if self.rule is None else self.rule
        if self._rule.shape != (len(self.alternatives), 3) or not (self._rule[:, :2] > 0).all():
            raise ValueError(f"rule of shape {self._rule.shape}: one row of positive stakes for each alternative")
        self._stakes = np.zeros(len(self.alternatives))
        self._log_ratios = self.direction * np.log(np.asarray(self.alternatives, dtype=np.float64))
        self._plain = np.zeros(len(self.alternatives))
        self._restart = np.full(len(self.alternatives), -np.inf)

    def observe(self, tick: TickCounts, scale: float = 1.0) -> None:
        """Take in one tick. scale: of the rule's stakes, known before the tick (`tempering.Drift`).

        Raises ValueError past `max_ticks`: a longer step needs an error budget of its own.
        """
        if self.ticks >= self.max_ticks:
            raise ValueError(f"the step was planned for {self.max_ticks} ticks; start a new step with its own alpha")
        self.ticks += 1
        # A bet may start in any tick: with prior 1/T each, also in ticks that carry no information.
        self._restart = np.logaddexp(self._restart, -math.log(self.max_ticks))
        log_null, over = math.log(self.null_odds), tick.canary_over + tick.baseline_over
        informed = information(tick.canary_total, tick.baseline_total, over)
        fill_stakes(self._rule, scale, log_null, self._log_ratios, informed, self._stakes)
        increments = self._stakes * log_increments(
            tick.canary_over, tick.canary_total, tick.baseline_over, tick.baseline_total, log_null, self._log_ratios
        )
        self._plain = self._plain + increments
        self._restart = self._restart + increments

    @property
    def log_e(self) -> tuple[float, float]:
        """log wealth of the bets from the first tick on, and of those with a free start; means over alternatives."""
        count = math.log(len(self.alternatives))
        return (
            float(np.logaddexp.reduce(self._plain)) - count,
            float(np.logaddexp.reduce(self._restart)) - count,
        )


def combined_log_e(processes: Sequence[EdgeProcess], plain_share: float = 0.5) -> float:
    """log of the mean wealth over edges and over both kinds of start: valid under any dependence between them.

    plain_share: weight of the bets that start with the first tick; the rest is on a free start.
    """
    if not processes:
        raise ValueError("no edge to judge by")
    weights = (math.log(plain_share), math.log(1 - plain_share))
    values = [value + weight for process in processes for value, weight in zip(process.log_e, weights, strict=True)]
    return float(np.logaddexp.reduce(np.asarray(values))) - math.log(len(processes))


@njit(cache=True, nogil=True)
def first_crossing(
    totals: Counts,
    overs: Counts,
    log_nulls: Floats,
    log_ratios: Floats,
    rule: Floats,
    scales: Floats,
    plain_share: float,
    max_ticks: int,
    log_limit: float,
) -> int:
    """First tick (from 1) at which the mean wealth over edges and starts reaches a limit; 0 when it never does.

    The same process as `EdgeProcess` and `combined_log_e` over a whole step at once, for planning and replay.
    totals: [tick, arm] requests, arm 0 the canary. overs: [tick, edge, arm] of them over each edge. rule: stakes, see
    `tempering`. scales: [tick, edge] of them; empty for 1 throughout.
    """
    edges, count = overs.shape[1], log_ratios.size
    plain, restart = np.zeros((edges, count)), np.full((edges, count), -np.inf)
    stakes, prior = np.zeros(count), -math.log(max_ticks)
    on_plain, on_restart = math.log(plain_share), math.log(1 - plain_share)
    for t in range(totals.shape[0]):
        top = -np.inf
        for e in range(edges):
            x, n1, y, n2 = overs[t, e, 0], totals[t, 0], overs[t, e, 1], totals[t, 1]
            scale = scales[t, e] if scales.size else 1.0
            fill_stakes(rule, scale, log_nulls[e], log_ratios, information(n1, n2, x + y), stakes)
            increments = stakes * log_increments(x, n1, y, n2, log_nulls[e], log_ratios)
            plain[e] += increments
            restart[e] = np.logaddexp(restart[e], prior) + increments
            top = max(top, plain[e].max(), restart[e].max())
        total = np.exp(plain - top + on_plain).sum() + np.exp(restart - top + on_restart).sum()
        if top + math.log(total) - math.log(edges * count) >= log_limit:
            return t + 1
    return 0
