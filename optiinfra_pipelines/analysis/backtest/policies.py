"""What each scaling policy wants at every step of a recorded load, before the queue and the actuator have their say.

Pure arrays. Load is known to a policy only as the mean of a window that has already passed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.kv_cache.stack import Floats
from optiinfra_pipelines.domain.scaling import (
    ForesightPolicy,
    HpaPolicy,
    KedaLoadPolicy,
    KedaWaitingPolicy,
    PlannerPolicy,
    Policy,
    SloRatioPolicy,
    StaticPolicy,
    TrendPolicy,
)


@dataclass(frozen=True)
class Wants:
    """Replicas wanted by the load alone, per step, and how the policy acts on them."""

    up: Floats  # scale up to this
    down: Floats  # scale down to no less than this
    sync_seconds: float
    stabilization_seconds: float  # a scale-down goes to the most that was wanted in this time
    tolerance: float = 0.0  # no action while wanted / current is within this of 1
    per_queued: float = 0.0  # further replicas per unit of queued work
    growth: float = 0.0  # at most this factor (or 4 replicas) per decision; 0: no limit
    wait_target_seconds: float = 0.0  # over 0: scale by wait / this instead of by load
    initial: int | None = None


def window_mean(rate: Floats, window_seconds: float, step_seconds: float) -> Floats:
    """Mean rate of the steps of the last window, the present step included; shorter at the start."""
    steps = max(1, round(window_seconds / step_seconds))
    total = np.concatenate([[0.0], np.cumsum(rate)])
    end = np.arange(1, len(rate) + 1)
    start = np.maximum(end - steps, 0)
    mean: Floats = (total[end] - total[start]) / (end - start)
    return mean


def window_max_ahead(rate: Floats, steps: int) -> Floats:
    """Largest of the present and the next steps - 1 values."""
    padded = np.concatenate([rate, np.full(max(steps - 1, 0), -np.inf)])
    largest: Floats = np.lib.stride_tricks.sliding_window_view(padded, max(steps, 1)).max(axis=1)
    return largest


def line_fit(rate: Floats, window_seconds: float, step_seconds: float) -> tuple[Floats, Floats]:
    """Least-squares line through the last window at every step: its mean, and its slope per step."""
    steps = max(2, round(window_seconds / step_seconds))
    centered = np.arange(steps) - (steps - 1) / 2
    padded = np.concatenate([np.full(steps - 1, rate[0]), rate])
    mean: Floats = np.convolve(padded, np.full(steps, 1 / steps), "valid")
    slope: Floats = np.convolve(padded, (centered / (centered @ centered))[::-1], "valid")
    return mean, slope


def trend_level(rate: Floats, policy: TrendPolicy, horizon_seconds: float, step_seconds: float) -> Floats:
    """The load to provision for: the damped line `horizon_seconds` ahead, at least the present level, and headroom.

    Headroom: the policy's quantile of how far, relative to the load, earlier values fell short of what came.
    """
    level = window_mean(rate, policy.window_seconds, step_seconds)
    mean, slope = line_fit(rate, policy.trend_window_seconds, step_seconds)
    ahead = round(horizon_seconds / step_seconds)
    to_end = max(2, round(policy.trend_window_seconds / step_seconds)) / 2
    expected: Floats = np.maximum(mean + policy.trend_damping_ratio * slope * (to_end + ahead), level)
    if policy.miss_quantile_ratio > 0 and 0 < ahead < len(rate):
        missed = np.zeros(len(rate))
        missed[ahead:] = np.maximum(level[ahead:] - expected[:-ahead], 0.0) / np.maximum(level[ahead:], 1e-12)
        steps = max(2, round(policy.miss_window_seconds / step_seconds))
        headroom = pl.Series(missed).rolling_quantile(policy.miss_quantile_ratio, "higher", steps, min_samples=1)
        expected = expected * (1 + headroom.to_numpy())
    return expected


def recent_peak(level: Floats, window_seconds: float, step_seconds: float) -> Floats:
    """Largest value of the last window, the present step included; shorter at the start."""
    steps = max(1, round(window_seconds / step_seconds))
    return pl.Series(level).rolling_max(steps, min_samples=1).to_numpy()


# Downwards until a reserve window has been seen: what the recent peak was is not known, so nothing is given up.
NO_LESS = 1e9


def wants(
    policy: Policy, rate: Floats, capacity: float, cold_start_seconds: float, step_seconds: float, per_request: float
) -> Wants:
    """rate: units of work per second and step; capacity: units per second and replica."""
    zeros = np.zeros(len(rate))
    match policy:
        case StaticPolicy():
            fixed = np.full(len(rate), float(policy.replicas))
            return Wants(fixed, fixed, step_seconds, 0.0, initial=policy.replicas)
        case HpaPolicy():
            load = window_mean(rate, policy.window_seconds, step_seconds) / (capacity * policy.target_ratio)
            return Wants(
                load,
                load,
                policy.sync_seconds,
                policy.stabilization_seconds,
                tolerance=policy.tolerance_ratio,
                growth=2.0,  # Kubernetes: at most doubled, or 4 more, per period
            )
        case KedaWaitingPolicy():
            per_queued = 1.0 / (policy.waiting_per_replica * per_request)
            return Wants(zeros, zeros, policy.sync_seconds, policy.stabilization_seconds, per_queued=per_queued)
        case KedaLoadPolicy():
            load = window_mean(rate, policy.window_seconds, step_seconds) / (capacity * policy.target_ratio)
            per_queued = 1.0 / (policy.queue_drain_seconds * policy.target_ratio * capacity)
            return Wants(load, load, policy.sync_seconds, policy.stabilization_seconds, per_queued=per_queued)
        case SloRatioPolicy():
            load = window_mean(rate, policy.window_seconds, step_seconds) / (capacity * policy.spare_ratio)
            return Wants(
                zeros,
                load,
                policy.sync_seconds,
                policy.stabilization_seconds,
                wait_target_seconds=policy.wait_target_seconds,
            )
        case PlannerPolicy():
            load = window_mean(rate, policy.window_seconds, step_seconds) / (capacity * policy.target_ratio)
            return Wants(load, load, policy.interval_seconds, 0.0)
        case TrendPolicy():
            horizon = cold_start_seconds + max(policy.sync_seconds, step_seconds)
            ahead = trend_level(rate, policy, horizon, step_seconds) / capacity
            level = window_mean(rate, policy.window_seconds, step_seconds) / capacity
            reserve = policy.reserve_ratio * recent_peak(level, policy.reserve_window_seconds, step_seconds)
            down = np.maximum(ahead / min(policy.down_ratio, policy.up_ratio), reserve)
            if policy.reserve_ratio > 0:
                down[: round(policy.reserve_window_seconds / step_seconds)] = NO_LESS
            return Wants(
                np.maximum(ahead / policy.up_ratio, reserve),
                down,
                policy.sync_seconds,
                policy.stabilization_seconds,
                per_queued=1.0 / (policy.queue_drain_seconds * capacity),
            )
        case ForesightPolicy():
            steps = max(1, round(policy.horizon_seconds / step_seconds))
            load = window_max_ahead(window_mean(rate, policy.window_seconds, step_seconds), steps) / capacity
            return Wants(load, load, step_seconds, policy.stabilization_seconds)
