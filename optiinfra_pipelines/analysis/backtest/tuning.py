"""Choose a policy's parameters on one part of a load's history, so that another part can judge them.

Pure. Only the days given are seen: whoever calls keeps the test days apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from optiinfra_pipelines.analysis.backtest.replay import WAIT_BOUND_SECONDS, replay
from optiinfra_pipelines.analysis.kv_cache.stack import Floats
from optiinfra_pipelines.domain.scaling import HpaPolicy, KedaLoadPolicy, Policy, TrendPolicy


def hpa_candidates() -> tuple[Policy, ...]:
    """Target utilization over the range people set."""
    return tuple(HpaPolicy(target_ratio=round(ratio, 2)) for ratio in np.arange(0.5, 0.96, 0.05))


def keda_candidates() -> tuple[Policy, ...]:
    """Load plus queue: target, and how fast a queue is to be drained."""
    ratios = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
    return tuple(
        KedaLoadPolicy(target_ratio=ratio, queue_drain_seconds=drain) for ratio, drain in product(ratios, (30.0, 60.0))
    )


def trend_candidates() -> tuple[Policy, ...]:
    """Ours: 198 settings, from none to all of the trend trusted, from no to much headroom, with and without reserve."""
    plain = [
        TrendPolicy(
            up_ratio=ratio,
            down_ratio=ratio,
            trend_window_seconds=window,
            trend_damping_ratio=damping,
            miss_quantile_ratio=quantile,
            stabilization_seconds=hold,
            reserve_ratio=0.0,
        )
        for ratio, window, damping, quantile, hold in product(
            (1.0, 0.98, 0.96, 0.94, 0.92, 0.9), (180.0, 240.0), (0.75, 1.0), (0.0, 0.9, 0.95, 0.98), (60.0, 120.0)
        )
    ]
    reserved = [
        TrendPolicy(reserve_ratio=ratio, reserve_window_seconds=window)
        for ratio, window in product((1.1, 1.25, 1.5), (300.0, 900.0))
    ]
    return (*plain, *reserved)


def choose_policy(
    history: Sequence[Floats],
    candidates: Iterable[Policy],
    capacity: float,
    cold_start_seconds: float,
    *,
    attainment_ratio: float,
    **options: Any,
) -> Policy:
    """The cheapest candidate that keeps `attainment_ratio` over all parts of the history; the best kept if none does.

    history: stretches of load (say days), each replayed from its own start. options: as for `score_policies`.
    """
    return pick(score_policies(history, candidates, capacity, cold_start_seconds, **options), attainment_ratio)


@dataclass(frozen=True)
class Score:
    """What a candidate cost and kept over the history."""

    policy: Policy
    replica_hours: float
    kept_ratio: float


def score_policies(
    history: Sequence[Floats],
    candidates: Iterable[Policy],
    capacity: float,
    cold_start_seconds: float,
    *,
    wait_bound_seconds: float = WAIT_BOUND_SECONDS,
    step_seconds: float = 10.0,
    **options: Any,
) -> list[Score]:
    """Every candidate replayed on every part of the history. options: as for `replay`."""
    if not history:
        raise ValueError("no history to choose on: give at least one stretch of load")
    arrived = float(sum(part.sum() for part in history))
    scores = []
    for policy in candidates:
        hours = kept = 0.0
        for part in history:
            timeline, _ = replay(
                part, policy, capacity=capacity, cold_start_seconds=cold_start_seconds, step_seconds=step_seconds,
                **options,
            )  # fmt: skip
            hours += float(timeline["paid_replicas"].sum()) * step_seconds / 3600
            kept += float(part[timeline["wait_seconds"].to_numpy() <= wait_bound_seconds].sum())
        scores.append(Score(policy, hours, kept / arrived if arrived else 1.0))
    return scores


def pick(scores: Sequence[Score], attainment_ratio: float) -> Policy:
    """The cheapest that keeps attainment_ratio; where none does, the one that keeps most."""
    if not scores:
        raise ValueError("no candidates to choose from")
    keeping = [score for score in scores if score.kept_ratio >= attainment_ratio]
    if keeping:
        return min(keeping, key=lambda score: score.replica_hours).policy
    return min(scores, key=lambda score: (-score.kept_ratio, score.replica_hours)).policy
