"""What a change really did: its effect on one signal, apart from load and mix, with an interval and a grade.

Pure. Against concurrent replicas left unchanged where there are any (difference of differences), else before and
after, which is weaker and says so. Warm-up after the change is left out. Deciding what it proves is `ledger.decide`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt
import polars as pl

from optiinfra_pipelines.domain.recommendations import Grade, RealizedEffect

LEVEL = 0.95


@dataclass(frozen=True)
class Scale:
    """How closely a measurement looks. warm_up: left out after the change. min_periods: least number on either side."""

    period: timedelta
    warm_up: timedelta
    min_periods: int


# Caches fill and kernels compile: twice the five-minute period in which the restart fell. Under half an hour on either
# side nothing is told from the minute-to-minute noise.
SETTLED = Scale(timedelta(minutes=5), timedelta(minutes=10), 6)
# For people who wait: what the first minutes show. It decides nothing, for load that moved with the change by chance is
# in it; with under five minutes a side an interval over neighboring minutes has no degrees of freedom left.
EARLY = Scale(timedelta(minutes=1), timedelta(minutes=3), 5)
EARLY_DUE = timedelta(minutes=10)
# A measure of load or mix that differs by more than this between the sides makes an early look worthless.
ALIKE_RATIO = 0.15
# When a measurement is tried, counted from the change: an hour and the warm-up, a shift, a day, a week. The first that
# is clear counts; what a week leaves unclear cannot be verified.
DUE = tuple(SETTLED.warm_up + timedelta(hours=hours) for hours in (1, 6, 24, 168))
# Load and mix that the effect is adjusted for: requests that came a second and replica, tokens in and out of a request.
# Those that came and not those that were finished: an overloaded replica that is helped finishes more, and adjusting
# for that would take the effect away from itself.
COVARIATES = ("arrivals_per_second", "prompt_tokens_per_request", "generation_tokens_per_request")


@dataclass(frozen=True)
class SignalSource:
    """How a signal is read from five-minute rows: a column, or one over another; metric: of fct_latency_5m."""

    unit: str
    column: str
    per: str | None = None
    metric: str | None = None


# The signals that effects are promised in and measured on; `gpus_held` is counted and needs no estimate.
SIGNALS: Mapping[str, SignalSource] = {
    "preemptions_per_request": SignalSource("events/request", "preemptions", "requests_finished"),
    "requests_waiting_mean": SignalSource("requests", "requests_waiting_mean"),
    "kv_capacity_tokens": SignalSource("tokens", "kv_cache_capacity_tokens"),
    "prefix_hit_ratio": SignalSource("ratio", "prefix_cache_hits", "prefix_cache_queries"),
    "external_hit_ratio": SignalSource("ratio", "external_cache_hits", "external_cache_queries"),
    "inter_token_latency_mean_seconds": SignalSource(
        "s", "observation_sum", "observation_count", "inter_token_latency_seconds"
    ),
}


def measure_effect(
    recommendation_id: str,
    signal: str,
    rows: pl.DataFrame,
    applied_at: datetime,
    measured_at: datetime,
    *,
    changing_since: datetime | None = None,
    scale: Scale = SETTLED,
) -> RealizedEffect | str:
    """The effect on `signal`, or why it cannot be told.

    rows: target, period_at (UTC, starts of the scale's periods), is_changed (whether the target got the change), value
    and COVARIATES (NULL where unknown); before and after windows of equal length around the change.
    changing_since: when the change began to reach traffic, where that was before it was applied as a whole.
    """
    source = SIGNALS.get(signal)
    if source is None:
        return f"{signal} is not measured"
    known = rows.filter(
        pl.col("value").is_not_null() & pl.col("value").is_finite(), pl.col("period_at") + scale.period <= measured_at
    )
    sides = known.with_columns(
        is_after=pl.when(pl.col("period_at") >= applied_at + scale.warm_up)
        .then(pl.lit(True))
        .when(pl.col("period_at") + scale.period <= (changing_since or applied_at))
        .then(pl.lit(False))
        .otherwise(None)
    ).drop_nulls("is_after")
    changed = sides.filter("is_changed")
    unchanged = sides.filter(~pl.col("is_changed"))
    series, grade = _series(changed, unchanged, scale.min_periods)
    before, after = series.filter(~pl.col("is_after")).height, series.filter("is_after").height
    if min(before, after) < scale.min_periods:
        return f"{before} periods before and {after} after the change; {scale.min_periods} are needed on both sides"
    moved = _moved(series, changed) if scale is EARLY else None
    if moved is not None:
        return moved
    usable = [
        name for name in COVARIATES if not series[name].null_count() and float(series[name].to_numpy().std()) > 1e-12
    ]
    estimate, low, high, adjusted = _fit(series, usable)
    return RealizedEffect(
        recommendation_id=recommendation_id,
        signal=signal,
        unit=source.unit,
        change=estimate,
        change_low=low,
        change_high=high,
        level_ratio=LEVEL,
        grade=grade,
        periods_before=before,
        periods_after=after,
        replicas_changed=changed["target"].n_unique(),
        replicas_unchanged=unchanged["target"].n_unique() if grade is Grade.CONCURRENT else 0,
        adjusted_for=tuple(adjusted),
        measured_at=measured_at,
    )


def _moved(series: pl.DataFrame, changed: pl.DataFrame) -> str | None:
    """Load or mix that is not the same on both sides, in words: a few minutes are too few to adjust for it.

    Against unchanged replicas the series is of differences: how far they move is told in parts of the level itself.
    """
    for name in COVARIATES:
        before, after = (series.filter(pl.col("is_after") == side)[name].mean() for side in (False, True))
        level = changed.filter(~pl.col("is_after"))[name].mean()
        if isinstance(before, float) and isinstance(after, float) and isinstance(level, float) and level:
            change = (after - before) / level
            if abs(change) > ALIKE_RATIO:
                return f"{name} changed by {change:+.0%} meanwhile: the effect cannot be told apart from that so early"
    return None


def _series(changed: pl.DataFrame, unchanged: pl.DataFrame, min_periods: int) -> tuple[pl.DataFrame, Grade]:
    """One value a period: the changed replicas' mean, less that of unchanged ones of the same period where any are."""
    columns = ("value", *COVARIATES)
    means = [pl.col(name).mean() for name in columns]
    own = changed.group_by("period_at", "is_after").agg(means)
    other = unchanged.group_by("period_at").agg(means)
    both = own.join(other, on="period_at", suffix="_other")
    halves = both.group_by("is_after").len()
    if halves.height == 2 and min(halves["len"].to_list()) >= min_periods:
        differences = both.with_columns((pl.col(name) - pl.col(f"{name}_other")).alias(name) for name in columns)
        return differences.select("period_at", "is_after", *columns).sort("period_at"), Grade.CONCURRENT
    return own.select("period_at", "is_after", *columns).sort("period_at"), Grade.BEFORE_AFTER


def _fit(series: pl.DataFrame, covariates: list[str]) -> tuple[float, float, float, list[str]]:
    """Effect of `is_after` with its interval, by least squares with errors that may hang together over time.

    A covariate costs ten periods; when there are fewer, the adjustment is dropped and not named. One that moves with
    the change as one (load that doubled at that moment) makes the interval wide, as it should.
    """
    value = series["value"].to_numpy().astype(np.float64)
    after = series["is_after"].to_numpy().astype(np.float64)
    used = covariates[: max(0, len(value) // 10 - 2)]
    columns = [np.ones_like(value), after]
    for name in used:
        x = series[name].to_numpy().astype(np.float64)
        columns.append((x - x.mean()) / x.std())
    design = np.column_stack(columns)
    coefficients, _, rank, _ = np.linalg.lstsq(design, value, rcond=None)
    if rank < design.shape[1]:
        return _fit(series, covariates[: len(used) - 1]) if used else (math.nan, -math.inf, math.inf, [])
    error = _standard_error(design, value - design @ coefficients)
    lags = _lags(len(value))
    freedom = max(1.0, len(value) / (1 + lags) - design.shape[1])
    from scipy.stats import t as student  # half a second to import: only where it is used

    reach = float(student.ppf((1 + LEVEL) / 2, freedom)) * error
    estimate = float(coefficients[1])
    return estimate, estimate - reach, estimate + reach, used


def _standard_error(design: npt.NDArray[np.float64], residual: npt.NDArray[np.float64]) -> float:
    """The larger of two: plain least squares, and Newey and West (1987), which allow for neighboring periods being
    alike but come out too small when a short series swings by chance.
    """
    n, k = design.shape
    scores = design * residual[:, None]
    meat = scores.T @ scores
    lags = _lags(n)
    for lag in range(1, lags + 1):
        cross = scores[lag:].T @ scores[:-lag]
        meat += (1 - lag / (lags + 1)) * (cross + cross.T)
    bread = np.linalg.inv(design.T @ design)
    freedom = max(1, n - k)
    alike = (bread @ meat @ bread)[1, 1] * n / freedom
    plain = bread[1, 1] * float(residual @ residual) / freedom
    return math.sqrt(max(0.0, float(alike), float(plain)))


def _lags(n: int) -> int:
    """Newey and West's rule for how far errors reach: 4 (n / 100)^(2/9)."""
    return int(4 * (n / 100) ** (2 / 9))
