"""Trends: the slope, its interval, when it is full, and seasons that have to earn their place."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.trends import NoTrend, Trend, trend, trends

START = datetime(2026, 11, 1, tzinfo=UTC)


def hours(values: list[float | None] | np.ndarray) -> pl.DataFrame:
    times = [START + timedelta(hours=i) for i in range(len(values))]
    return pl.DataFrame({"period_at": times, "value": [None if v is None else float(v) for v in values]})


def found(values: list[float | None] | np.ndarray, capacity: float | None = None) -> Trend:
    outcome = trend(hours(values), capacity)
    assert isinstance(outcome, Trend), outcome
    return outcome


def test_a_line_is_found_and_so_is_the_hour_at_which_it_is_full() -> None:
    """0.4 and one point a day up, full at 1.0: that is 60 days after the start, whatever two restarts do."""
    values = 0.4 + 0.01 / 24 * np.arange(200)
    values[[50, 120]] = 0.0

    line = found(values, capacity=1.0)

    assert abs(line.slope_per_day - 0.01) < 1e-4
    assert line.is_clear
    assert line.saturates_at is not None
    assert abs((line.saturates_at - (START + timedelta(days=60))).total_seconds()) < 86_400
    assert line.saturates_earliest is not None
    assert line.saturates_earliest <= line.saturates_at


def test_a_flat_or_falling_signal_never_saturates() -> None:
    """There is no time to report, not an infinite one."""
    flat = found(np.full(100, 0.5), capacity=1.0)
    falling = found(1 - 0.001 * np.arange(100), capacity=1.5)

    assert (flat.saturates_at, flat.is_clear) == (None, False)
    assert (falling.saturates_at, falling.is_clear) == (None, True)
    assert found(np.arange(100)).saturates_at is None  # no capacity, no end


def test_an_unsure_slope_has_no_latest_time() -> None:
    """Where the interval holds zero the signal may never be full, and the slope is not called clear."""
    rng = np.random.default_rng(3)
    line = found(0.5 + rng.normal(0, 0.05, 48), capacity=1.0)

    assert not line.is_clear
    assert line.saturates_latest is None


def test_a_daily_shape_is_a_season_and_noise_is_none() -> None:
    """A profile is kept only where it beats none on a day that it has not seen."""
    rng = np.random.default_rng(1)
    i = np.arange(24 * 10)
    daily = found(0.5 + 0.2 * np.sin(2 * np.pi * i / 24) + rng.normal(0, 0.02, len(i)) + 0.005 / 24 * i)
    noise = found(0.5 + rng.normal(0, 0.02, len(i)))

    assert daily.season == "day"
    assert (daily.season_skill_ratio or 0) > 0.5
    assert abs(daily.slope_per_day - 0.005) < 0.003
    assert (noise.season, noise.season_skill_ratio) == (None, None)


def test_a_weekly_shape_is_told_from_a_daily_one() -> None:
    """Quiet weekends: the week predicts better than the day."""
    i = np.arange(24 * 35)
    weekend = (i // 24 % 7) >= 5
    assert found(np.where(weekend, 0.1, 0.5 + 0.1 * np.sin(2 * np.pi * i / 24))).season == "week"


def test_too_few_points_are_no_trend() -> None:
    """Less than a day of hours is the day's own shape; NULL and NaN are no points."""
    outcome = trend(hours([0.5] * 23 + [None, float("nan")]))
    assert isinstance(outcome, NoTrend)
    assert "23 of 24" in outcome.reason
    doubled = pl.concat([hours([0.5] * 24), hours([0.5] * 24)])
    assert isinstance(trend(doubled), NoTrend)


def test_neighbors_that_are_alike_widen_the_interval() -> None:
    """A random walk has no slope of its own: its interval must be wider than that of independent noise."""
    rng = np.random.default_rng(5)
    steps = rng.normal(0, 1, 400)
    walk, noise = found(np.cumsum(steps)), found(steps)

    def width(line: Trend) -> float:
        return line.slope_high_per_day - line.slope_low_per_day

    assert width(walk) > 5 * width(noise)


def test_every_series_gets_a_row_with_a_trend_or_a_reason() -> None:
    """A frame of two signals: one long enough, one not."""
    rows = pl.concat(
        [
            hours(list(np.arange(48.0))).rename({"value": "mean_value"}).with_columns(signal=pl.lit("a")),
            hours([1.0, 2.0]).rename({"value": "mean_value"}).with_columns(signal=pl.lit("b")),
        ]
    ).with_columns(name=pl.lit("r1"))
    by_signal = {row["signal"]: row for row in trends(rows, ["name"], {})}

    assert by_signal["a"]["reason"] is None
    assert by_signal["b"]["slope_per_day"] is None
    assert by_signal["b"]["reason"] == "2 of 24 points"


@settings(max_examples=25, deadline=None)
@given(st.floats(-0.1, 0.1), st.floats(0.001, 0.05), st.integers(0, 1000))
def test_the_slope_scales_and_lies_in_its_interval(slope: float, noise: float, seed: int) -> None:
    """Ten times the signal has ten times the slope, and the interval holds the estimate."""
    values = slope / 24 * np.arange(60) + np.random.default_rng(seed).normal(0, noise, 60)
    one, ten = found(values), found(10 * values)

    assert one.slope_low_per_day <= one.slope_per_day <= one.slope_high_per_day
    assert abs(ten.slope_per_day - 10 * one.slope_per_day) < 1e-9
