"""How boldly to bet: the stake at which stable replicas, judged against each other, are almost never failed.

Replicas of one configuration differ: each drifts by itself for a minute or so, and some differ for good. A bet at
full stake takes that for a regression when traffic is high. So every stable replica is judged as if it were a canary,
on the deployment's own last day, and the largest stake is taken that fails at most one in a hundred. A hundredth needs
many windows to be seen; how far replicas drift within a minute needs an hour, and bounds the stake before that. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optiinfra_pipelines.rollout.eprocess import Counts, Floats, first_crossing
from optiinfra_pipelines.rollout.judge import LATENCY_PLAIN_SHARE
from optiinfra_pipelines.rollout.tempering import DEFAULT_STAKE, LATENCY_ALTERNATIVES, Drift, latency_rule, scale_of

# Bold to timid. Between them nothing is gained that the replay could tell apart.
STAKES = (1.0, 0.7, 0.5, 0.35, 0.25)
# The replay may only lower the default on few windows; it takes so many for a share of 1 % to mean anything.
MIN_WINDOWS_TO_RAISE = 300
MIN_WINDOWS_TO_LOWER = 50
ACCEPTED_RATIO = 0.01
MIN_WINDOW_REQUESTS = 100
# An hour of one pair of replicas; the drift of fewer minutes is mostly chance, and weighs little anyway.
MIN_REPLICA_MINUTES = 60


@dataclass(frozen=True)
class Replay:
    """One window of one stable replica against the others. totals: [tick, arm]; overs: [tick, edge, arm]."""

    totals: Counts
    overs: Counts


@dataclass(frozen=True)
class Calibration:
    """The stake to judge with and what it stands on. failed_ratio: share of harmless windows it fails."""

    stake: float
    failed_ratio: float | None
    windows: int
    reason: str


def windows(replicas: Mapping[str, tuple[Counts, Counts]], ticks: int) -> list[Replay]:
    """Every replica in turn as pseudo-canary, in windows that do not overlap and have traffic.

    replicas: name -> (requests per tick, [tick, edge] of them over each edge), the same ticks for all.
    """
    if len(replicas) < 2:
        return []
    totals = np.stack([requests for requests, _ in replicas.values()])
    overs = np.stack([over for _, over in replicas.values()])
    all_totals, all_overs = totals.sum(axis=0), overs.sum(axis=0)
    found = []
    for index in range(len(replicas)):
        pair = np.stack([totals[index], all_totals - totals[index]], axis=1)
        over = np.stack([overs[index], all_overs - overs[index]], axis=2)
        for start in range(0, pair.shape[0] - ticks + 1, ticks):
            stretch = slice(start, start + ticks)
            if pair[stretch].sum(axis=0).min() < MIN_WINDOW_REQUESTS:
                # Hours without data or traffic fail nothing and would make any stake look harmless.
                continue
            found.append(Replay(np.ascontiguousarray(pair[stretch]), np.ascontiguousarray(over[stretch])))
    return found


def drifts(replicas: Mapping[str, tuple[Counts, Counts]], null_odds: Sequence[float]) -> list[Drift]:
    """What the replicas of `windows` differ by within a minute, one for each edge of null_odds."""
    found = [Drift(math.log(null)) for null in null_odds]
    if replicas:
        totals = np.stack([requests for requests, _ in replicas.values()], axis=1)
        overs = np.stack([over for _, over in replicas.values()], axis=1)
        for index, drift in enumerate(found):
            drift.observe_all(totals, np.ascontiguousarray(overs[:, :, index]))
    return found


def calibrate(
    replays: Sequence[Replay],
    null_odds: Sequence[float],
    *,
    alpha: float,
    signals: int = 1,
    drift: Sequence[Drift] = (),
) -> Calibration:
    """The largest stake with at most 1 % of harmless windows failed, and none that the replicas' drift forbids.

    null_odds: of each judged edge, estimated as for the step. Few windows cannot show a share of 1 %: then the default
    stands, and a stake under it is taken where the drift asks for it, or the replay shows that the default fails too
    often.
    """
    known = [one for one in drift if one.replica_minutes >= MIN_REPLICA_MINUTES]
    shares = [one.share for one in known]
    largest = min(1.0, DEFAULT_STAKE * float(scale_of(shares))) if known else 1.0
    why = f"; replicas drift by {np.mean(shares):.0%} of the margin within a minute" if known else ""
    if len(replays) < MIN_WINDOWS_TO_LOWER or not null_odds:
        stake = min(DEFAULT_STAKE, largest)
        told = "the default stands" if stake == DEFAULT_STAKE else f"stake {stake:.2g} for their drift"
        return Calibration(stake, None, len(replays), f"{len(replays)} of {MIN_WINDOWS_TO_LOWER} windows: {told}{why}")
    log_nulls: Floats = np.log(np.asarray(null_odds, dtype=np.float64))
    highest = min(largest, 1.0 if len(replays) >= MIN_WINDOWS_TO_RAISE else DEFAULT_STAKE)
    candidates = [highest, *(stake for stake in STAKES if stake < highest)]
    for stake in candidates:
        failed = failed_ratio(replays, log_nulls, stake, math.log(signals / alpha))
        if failed <= ACCEPTED_RATIO:
            reason = f"{failed:.2%} of {len(replays)} harmless windows fail at stake {stake:.2g}{why}"
            return Calibration(stake, failed, len(replays), reason)
    return Calibration(
        candidates[-1],
        failed,
        len(replays),
        f"even stake {candidates[-1]:.2g} fails {failed:.2%} of {len(replays)} harmless windows: widen margin_ratio, "
        f"or use two candidate replicas{why}",
    )


def failed_ratio(replays: Sequence[Replay], log_nulls: Floats, stake: float, log_limit: float) -> float:
    """Share of windows that the judge fails at a stake."""
    log_ratios = np.log(np.asarray(LATENCY_ALTERNATIVES, dtype=np.float64))
    rule, unscaled = latency_rule(stake), np.zeros((0, 0))
    hits = 0
    for replay in replays:
        ticks = len(replay.totals)
        hits += bool(
            first_crossing(
                replay.totals,
                replay.overs,
                log_nulls,
                log_ratios,
                rule,
                unscaled,
                LATENCY_PLAIN_SHARE,
                ticks,
                log_limit,
            )
        )
    return hits / len(replays)
