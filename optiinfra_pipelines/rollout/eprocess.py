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

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

# Bets on how much worse the canary is, as odds ratios over the null; the mixture needs no guess which is true.
LATENCY_ALTERNATIVES = (1.15, 1.3, 1.6, 2.2, 3.5, 6.0, 15.0)
# Stake of each latency alternative relative to the judge's own. A replica's drift looks like a small regression, never
# like a large one: small bets are tempered more, large ones less. Chosen on 4,000 simulated harmless canaries at 10
# requests/s (false failures 1.4 % with one stake for all, 0.65 % so, large regressions found no later); re-measured on
# fresh seeds by benchmarks/judge_acceptance.py.
_STAKE_PROFILE = (0.70, 0.76, 0.84, 0.92, 1.04, 1.20, 1.20)
# Errors come from near zero: a broken canary multiplies their odds, not raises them by a third.
ERROR_ALTERNATIVES = (1.5, 3.0, 6.0, 15.0, 50.0, 200.0)
# A term this far under the sum changes no digit of it.
_NEGLIGIBLE = 1e-17


def latency_stakes(stake: float) -> tuple[float, ...]:
    """Stake of every latency alternative; none over 1, past which a bet is no longer fair."""
    return tuple(min(1.0, stake * share) for share in _STAKE_PROFILE)


@njit(cache=True)
def _log_normalizer(canary_total: int, baseline_total: int, over: int, log_odds: float) -> float:
    """log of the sum over j of C(n1, j) C(n2, k - j) odds^j: how many of the k requests over the edge are the canary's.

    Summed outward from the largest term, each from its neighbor, until a term no longer counts: terms fall faster
    than a normal law's, so the work grows with the square root of the counts, and nothing overflows.
    """
    low, high = max(0, over - baseline_total), min(over, canary_total)
    n1, n2, k, odds = float(canary_total), float(baseline_total), float(over), math.exp(log_odds)
    # Neighboring terms are equal where (n1 - j)(k - j) odds = (j + 1)(n2 - k + j + 1): the positive root, the stable way.
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


@njit(cache=True)
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


@dataclass
class EdgeProcess:
    """The wealth of the bets at one edge, from the start of a step.

    null_odds: odds ratio that is still acceptable (over 1: a margin). direction: +1 bets that the canary is worse
    than the null, -1 that it is better. stake: 0 to 1; under 1 it is tempered against what replicas of one
    configuration differ by. max_ticks: ticks of the step with every extension; the bound holds so long.
    stakes: one for each alternative in place of the one for all.
    """

    null_odds: float
    alternatives: Sequence[float] = LATENCY_ALTERNATIVES
    stake: float = 0.5
    max_ticks: int = 360
    direction: int = 1
    stakes: Sequence[float] | None = None
    ticks: int = 0
    _stakes: Floats = field(init=False, repr=False)
    _plain: Floats = field(init=False, repr=False)
    _restart: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.null_odds <= 0 or not 0 < self.stake <= 1 or min(self.alternatives) <= 1 or self.max_ticks < 1:
            raise ValueError(
                f"null_odds {self.null_odds}, stake {self.stake}, max_ticks {self.max_ticks}, alternatives "
                f"{tuple(self.alternatives)}: odds must be positive, the stake in (0, 1], every alternative over 1"
            )
        stakes = [self.stake] * len(self.alternatives) if self.stakes is None else self.stakes
        if len(stakes) != len(self.alternatives) or not all(0 < stake <= 1 for stake in stakes):
            raise ValueError(f"stakes {tuple(stakes)}: one in (0, 1] for each of {len(self.alternatives)} alternatives")
        self._stakes = np.asarray(stakes, dtype=np.float64)
        self._log_ratios = self.direction * np.log(np.asarray(self.alternatives, dtype=np.float64))
        self._plain = np.zeros(len(self.alternatives))
        self._restart = np.full(len(self.alternatives), -np.inf)

    def observe(self, tick: TickCounts) -> None:
        """Take in one tick. Raises ValueError past `max_ticks`: a longer step needs an error budget of its own."""
        if self.ticks >= self.max_ticks:
            raise ValueError(f"the step was planned for {self.max_ticks} ticks; start a new step with its own alpha")
        self.ticks += 1
        # A bet may start in any tick: with prior 1/T each, also in ticks that carry no information.
        self._restart = np.logaddexp(self._restart, -math.log(self.max_ticks))
        increments = self._stakes * log_increments(
            tick.canary_over,
            tick.canary_total,
            tick.baseline_over,
            tick.baseline_total,
            math.log(self.null_odds),
            self._log_ratios,
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


def combined_log_e(processes: Sequence[EdgeProcess]) -> float:
    """log of the mean wealth over edges and over both kinds of start: valid under any dependence between them."""
    if not processes:
        raise ValueError("no edge to judge by")
    values = [value for process in processes for value in process.log_e]
    return float(np.logaddexp.reduce(np.asarray(values))) - math.log(len(values))


@njit(cache=True)
def first_crossing(
    totals: Counts,
    overs: Counts,
    log_nulls: Floats,
    log_ratios: Floats,
    stakes: Floats,
    max_ticks: int,
    log_limit: float,
) -> int:
    """First tick (from 1) at which the mean wealth over edges and starts reaches a limit; 0 when it never does.

    The same process as `EdgeProcess` and `combined_log_e` over a whole step at once, for planning and replay.
    totals: [tick, arm] requests, arm 0 the canary. overs: [tick, edge, arm] of them over each edge. stakes: one for
    each alternative.
    """
    edges, count = overs.shape[1], log_ratios.size
    plain, restart = np.zeros((edges, count)), np.full((edges, count), -np.inf)
    prior = -math.log(max_ticks)
    for t in range(totals.shape[0]):
        top = -np.inf
        for e in range(edges):
            increments = stakes * log_increments(
                overs[t, e, 0], totals[t, 0], overs[t, e, 1], totals[t, 1], log_nulls[e], log_ratios
            )
            plain[e] += increments
            restart[e] = np.logaddexp(restart[e], prior) + increments
            top = max(top, plain[e].max(), restart[e].max())
        total = np.exp(plain - top).sum() + np.exp(restart - top).sum()
        if top + math.log(total) - math.log(2 * edges * count) >= log_limit:
            return t + 1
    return 0
