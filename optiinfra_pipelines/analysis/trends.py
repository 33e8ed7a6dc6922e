"""How a signal develops: a slope that outliers do not bend, with its interval; when it will be full; whether it has
a season.

Pure: a series in, a trend or a reason out. Forecasting load ahead is `forecast`; what to do about it is a rule's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt
import polars as pl

LEVEL = 0.95
# A slope over less than a day is the day's own shape.
MIN_POINTS = 24
# Two whole seasons to learn from and one to be tested on.
SEASONS = (("day", timedelta(days=1)), ("week", timedelta(days=7)))
# A profile must be right by this much more than none on data it has not seen.
MIN_SKILL_RATIO = 0.05

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trend:
    """A line through a series, per day, with an interval that allows for neighboring points being alike.

    saturation: when the line reaches the capacity; earliest and latest by the ends of the interval. None: it never
    does at that slope. season: 'day' or 'week' where such a profile predicts better than none, else None.
    """

    points: int
    level: float
    slope_per_day: float
    slope_low_per_day: float
    slope_high_per_day: float
    is_clear: bool
    saturates_at: datetime | None
    saturates_earliest: datetime | None
    saturates_latest: datetime | None
    season: str | None
    season_skill_ratio: float | None


@dataclass(frozen=True)
class NoTrend:
    """Why no trend is told."""

    reason: str


def trend(series: pl.DataFrame, capacity: float | None = None) -> Trend | NoTrend:
    """The trend of one series. series: period_at (UTC) and value, any order, NULL and NaN values left out.

    capacity: where the signal is full, in its own unit (1.0 for a ratio); None when it has no end.
    Slope: median of all pairwise slopes (Theil 1950, Sen 1968), after the season's profile is taken out where it has
    one. Interval: Sen's, widened by the autocorrelation of the residuals, which his formula takes for none.
    """
    known = series.filter(pl.col("value").is_not_null() & pl.col("value").is_finite()).sort("period_at")
    if known.height < MIN_POINTS:
        return NoTrend(f"{known.height} of {MIN_POINTS} points")
    times = known["period_at"].to_list()
    days: Floats = np.array([(at - times[0]).total_seconds() / 86_400 for at in times])
    if days[-1] <= 0 or len(set(times)) < len(times):
        return NoTrend("points share a time: give one series")
    value = known["value"].to_numpy().astype(np.float64)
    season, skill = _season(days, value)
    flat = value if season is None else value - _profile(days, value, dict(SEASONS)[season])
    slope, low, high, level = _slope(days, flat)
    return Trend(
        points=known.height,
        level=level,
        slope_per_day=slope,
        slope_low_per_day=low,
        slope_high_per_day=high,
        is_clear=low > 0 or high < 0,
        saturates_at=_reaches(level, slope, capacity, times[-1]),
        saturates_earliest=_reaches(level, high, capacity, times[-1]),
        saturates_latest=_reaches(level, low, capacity, times[-1]),
        season=season,
        season_skill_ratio=skill,
    )


def _slope(days: Floats, value: Floats) -> tuple[float, float, float, float]:
    """Slope, interval and the line's value at the last point."""
    from scipy.stats import theilslopes  # half a second to import: only where it is used

    found = theilslopes(value, days, alpha=LEVEL)
    slope, intercept = float(found[0]), float(found[1])
    residual = value - (intercept + slope * days)
    # AR(1) of the residuals: n points are worth n (1 - r) / (1 + r) independent ones.
    spread = float(residual @ residual)
    alike = float(residual[1:] @ residual[:-1]) / spread if spread > 0 else 0.0
    r = min(0.99, max(0.0, alike))
    widen = math.sqrt((1 + r) / (1 - r))
    low, high = slope - widen * (slope - float(found[2])), slope + widen * (float(found[3]) - slope)
    return slope, low, high, intercept + slope * float(days[-1])


def _reaches(level: float, slope: float, capacity: float | None, last: datetime) -> datetime | None:
    if capacity is None or slope <= 0:
        return last if capacity is not None and level >= capacity else None
    days = max(0.0, (capacity - level) / slope)
    # Past ten years a date says nothing but "not soon".
    return last + timedelta(days=days) if days < 3650 else None


def _season(days: Floats, value: Floats) -> tuple[str | None, float | None]:
    """The longest season that beats none on the last part of the data, and by how much of the absolute error."""
    best: tuple[str | None, float | None] = (None, None)
    for name, length in SEASONS:
        period = length.total_seconds() / 86_400
        if days[-1] < 3 * period:
            continue
        skill = _skill(days, value, period)
        if skill is not None and skill >= MIN_SKILL_RATIO and (best[1] is None or skill > best[1] + MIN_SKILL_RATIO):
            best = (name, skill)
    return best


def _skill(days: Floats, value: Floats, period: float) -> float | None:
    """1 - error with the profile / error without, on the last period, both told from what came before."""
    test = days > days[-1] - period
    if test.sum() < 2 or (~test).sum() < MIN_POINTS:
        return None
    before_days, before = days[~test], value[~test]
    profile = _profile(before_days, before, timedelta(days=period))
    slope, _, _, level = _slope(before_days, before - profile)
    plain_slope, _, _, plain_level = _slope(before_days, before)
    ahead = days[test] - before_days[-1]
    shape = _profile_at(before_days, before, period, days[test])
    with_season = np.abs(value[test] - (level + slope * ahead + shape)).mean()
    without = np.abs(value[test] - (plain_level + plain_slope * ahead)).mean()
    return float(1 - with_season / without) if without > 0 else None


def _profile(days: Floats, value: Floats, length: timedelta) -> Floats:
    return _profile_at(days, value, length.total_seconds() / 86_400, days)


def _profile_at(days: Floats, value: Floats, period: float, at: Floats) -> Floats:
    """Median distance from the median, by hour of the season; 0 for an hour that was never seen."""
    hours = _hours(days, period)
    middle = float(np.median(value))
    medians = {hour: float(np.median(value[hours == hour])) - middle for hour in np.unique(hours)}
    return np.array([medians.get(hour, 0.0) for hour in _hours(at, period)])


def _hours(days: Floats, period: float) -> npt.NDArray[np.int64]:
    # Times carry rounding of their float days; half a second settles which hour they belong to.
    return np.floor((days % period) * 24 + 0.5 / 3600).astype(np.int64)


def trends(rows: pl.DataFrame, keys: Sequence[str], capacities: dict[str, float]) -> list[dict[str, object]]:
    """A trend for every series of a frame in the shape of fct_utilization_trends.

    rows: keys, signal, period_at, mean_value. capacities: signal -> where it is full. A row each: keys, signal, the
    fields of Trend, and reason where there is none.
    """
    found: list[dict[str, object]] = []
    for names, part in rows.group_by([*keys, "signal"], maintain_order=True):
        signal = str(names[-1])
        outcome = trend(part.select("period_at", value="mean_value"), capacities.get(signal))
        row: dict[str, object] = dict(zip([*keys, "signal"], names, strict=True))
        fields = outcome.__dict__ if isinstance(outcome, Trend) else dict.fromkeys(Trend.__dataclass_fields__)
        found.append(row | fields | {"reason": None if isinstance(outcome, Trend) else outcome.reason})
    return found
