"""How much of the evidence of one tick to believe: stakes that know what replicas of one configuration differ by.

Requests of one replica are not independent: each replica drifts by itself for a minute or so. The more requests a
tick has, the more of its evidence is that drift, so a bet is staked the less the more information the tick carries,
and less again where the stable replicas, counted against each other, drift further than the margin allows for. Stakes
are fixed before the canary's share of the tick is known, so every bet stays fair (see `rollout.eprocess`).

Pure. Gains, damping and reference are chosen on simulated fleets and verified on others with fresh seeds by
benchmarks/judge_acceptance.py; what stays of false alarms where they do not fit is printed there too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

# Bets on how much worse the canary is, as odds ratios over the null; the mixture needs no guess which is true.
LATENCY_ALTERNATIVES = (1.15, 1.3, 1.6, 2.2, 3.5, 6.0, 15.0)
# Per alternative: the largest stake, the gain, and how fast it falls with the information of a tick. Drift looks like
# a small regression, never like a large one: small bets are damped, large ones hardly. The gain holds at the usual
# odds of a 10 % margin; the damping is six ticks of the drift's variance of log odds, 0.05. Gains lean to 1.3 and 1.6,
# which find +25 %, and away from 2.2: a short swing of one replica looks like it and won 7 of 17 false failures.
_LARGEST = (0.65, 0.65, 0.65, 0.65, 0.75, 0.75, 0.75)
_GAIN = (1.75, 1.7, 1.2, 0.95, 0.8, 0.7, 0.7)
_DAMPING = (0.3, 0.3, 0.3, 0.2, 0.08, 0.02, 0.0)
# The stake at which the table holds as it stands; others scale it.
DEFAULT_STAKE = 0.5
# One minute at the 5 s look: drifts of 20 to 60 s show in it, and it holds enough requests to see them.
WINDOW_TICKS = 12
# Drift over a minute as a share of the margin, both in log odds, that the table is made for. Beyond it stakes fall
# with the third power: false alarms of a bet grow exponentially in stake times drift.
USUAL_DRIFT = 0.82
_FALL = 3
# Spread of that share squared between fleets, as a variance of log odds: how soon live counts overrule the usual.
_PRIOR_SPREAD = 0.02
# Even the wildest fleet is judged with a fifth of the usual stake; below it nothing would ever be found.
_LEAST_SCALE, _MOST_SCALE = 0.2, 2.0


def latency_rule(stake: float) -> Floats:
    """[alternative, (largest, gain, damping)] at a stake; 0.5 is the table as it stands."""
    scale = stake / DEFAULT_STAKE
    return np.array([np.array(_LARGEST) * scale, np.array(_GAIN) * scale, np.array(_DAMPING)]).T.copy()


def plain_rule(stakes: npt.ArrayLike) -> Floats:
    """The same stakes in every tick, whatever it holds."""
    fixed = np.asarray(stakes, dtype=np.float64)
    return np.stack([fixed, np.full(fixed.size, np.inf), np.zeros(fixed.size)], axis=1)


class Drift:
    """How far replicas of one configuration differ at one edge, minute by minute, beyond what chance explains.

    From counts of the stable replicas against each other; it begins at the usual drift and moves with what it sees,
    slowly where there are few requests. log_null: the margin's log odds ratio, which is the yardstick.
    """

    def __init__(self, log_null: float) -> None:
        self._yardstick = max(abs(log_null), 0.05)
        self._usual = (USUAL_DRIFT * self._yardstick) ** 2
        prior = 1 / _PRIOR_SPREAD**2
        self._weighted, self._weight = prior * self._usual, prior
        self._sums: dict[str, list[float]] = {}
        self._ticks = 0
        self.replica_minutes = 0

    @property
    def share(self) -> float:
        """Standard deviation of the drift as a share of the margin, in log odds; 0.82 is usual."""
        return math.sqrt(max(0.0, self._weighted / self._weight)) / self._yardstick

    def observe(self, replicas: Mapping[str, tuple[int, int]]) -> None:
        """One tick: requests and those over the edge of every stable replica, by name."""
        total = float(sum(requests for requests, _ in replicas.values()))
        over = float(sum(slow for _, slow in replicas.values()))
        if len(replicas) > 1 and total > 1:
            for name, (requests, slow) in replicas.items():
                sums = self._sums.setdefault(name, [0.0, 0.0])
                sums[0] += slow - requests * over / total
                sums[1] += requests * (total - requests) * over * (total - over) / (total * total * (total - 1))
        self._ticks += 1
        if self._ticks % WINDOW_TICKS == 0:
            for excess, chance in self._sums.values():
                if chance > 0:
                    self._weighted += (excess**2 - chance) / (2 * (1 + chance * self._usual) ** 2)
                    self._weight += chance**2 / (2 * (1 + chance * self._usual) ** 2)
                    self.replica_minutes += 1
            self._sums = {}

    def observe_all(self, totals: Counts, overs: Counts) -> Floats:
        """Many ticks at once, of a new `Drift`: both [tick, replica]. Gives the share known before each tick."""
        path = np.zeros((len(totals) + 1, 3))
        _follow(totals, overs, self._usual, WINDOW_TICKS, path)
        variances = (self._weighted + path[:, 0]) / (self._weight + path[:, 1])
        self._weighted += float(path[-1, 0])
        self._weight += float(path[-1, 1])
        self.replica_minutes += int(path[-1, 2])
        shares: Floats = np.sqrt(np.maximum(0.0, variances)) / self._yardstick
        return shares[:-1]


def scale_of(shares: npt.ArrayLike) -> Floats:
    """What to multiply stakes with, at the mean over edges of `Drift.share`: 1 at the usual one; from 0.2 to 2.

    shares: [..., edge]. The edges of one signal see the same replicas, so their mean is the better estimate.
    """
    mean = np.asarray(shares, dtype=np.float64).mean(axis=-1)
    scales: Floats = np.clip((USUAL_DRIFT / np.maximum(mean, 1e-9)) ** _FALL, _LEAST_SCALE, _MOST_SCALE)
    return scales


@njit(cache=True, nogil=True)
def _follow(totals: Counts, overs: Counts, usual: float, window: int, path: Floats) -> None:
    """`Drift.observe` over many ticks: path[tick + 1] is (weighted, weight, replica minutes) after each tick."""
    ticks, count = totals.shape
    excess, chance = np.zeros(count), np.zeros(count)
    for t in range(ticks):
        path[t + 1] = path[t]
        total, over = float(totals[t].sum()), float(overs[t].sum())
        if count > 1 and total > 1:
            for r in range(count):
                requests = float(totals[t, r])
                excess[r] += overs[t, r] - requests * over / total
                chance[r] += requests * (total - requests) * over * (total - over) / (total * total * (total - 1))
        if (t + 1) % window == 0:
            for r in range(count):
                if chance[r] > 0:
                    by = 2 * (1 + chance[r] * usual) ** 2
                    path[t + 1, 0] += (excess[r] ** 2 - chance[r]) / by
                    path[t + 1, 1] += chance[r] ** 2 / by
                    path[t + 1, 2] += 1
            excess[:], chance[:] = 0.0, 0.0
