"""Choose a policy's parameters on one part of a load's history, so that another part can judge them.

Pure. Only the days given are seen: whoever calls keeps the test days apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np

from optiinfra_pipelines.analysis.backtest.replay import backtest
from optiinfra_pipelines.analysis.kv_cache.stack import Floats
from optiinfra_pipelines.domain.scaling import BacktestResult, HpaPolicy, KedaLoadPolicy, Policy, TrendPolicy


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
    """Ours: 240 settings, from none to all of the trend trusted and from no to much headroom."""
    return tuple(
        TrendPolicy(
            up_ratio=ratio,
            down_ratio=ratio,
            trend_window_seconds=window,
            trend_damping_ratio=damping,
            error_sigmas=sigmas,
            stabilization_seconds=hold,
        )
        for ratio, window, damping, sigmas, hold in product(
            (1.0, 0.97, 0.94, 0.9, 0.85), (180.0, 240.0), (0.5, 0.75, 1.0), (0.0, 1.0, 2.0, 4.0), (180.0, 300.0)
        )
    )


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

    history: stretches of load (say days), each replayed from its own start. options: as for `backtest`.
    """
    if not history:
        raise ValueError("no history to choose on: give at least one stretch of load")
    best: tuple[tuple[bool, float, float], Policy] | None = None
    for policy in candidates:
        results = [backtest(part, policy, capacity, cold_start_seconds, **options) for part in history]
        kept = _pooled_attainment(results)
        hours = sum(result.replica_hours for result in results)
        reached = kept >= attainment_ratio
        rank = (not reached, hours if reached else -kept, hours)
        if best is None or rank < best[0]:
            best = (rank, policy)
    if best is None:
        raise ValueError("no candidates to choose from")
    return best[1]


def _pooled_attainment(results: Sequence[BacktestResult]) -> float:
    arrived = sum(result.arrived for result in results)
    if not arrived:
        return 1.0
    return sum((result.attainment_ratio or 0.0) * result.arrived for result in results) / arrived
