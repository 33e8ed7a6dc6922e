"""Measure a signal on frames, to the same value that its own SQL gives on the tables.

Pure. Here: the arithmetic of `domain.evidence.Statistic`. Not here: which signals matter (the findings modules).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import polars as pl

from optiinfra_pipelines.domain.evidence import SERIES, TIME, Signal, Statistic

# time, series, value
Point = tuple[datetime, object, float]


@dataclass(frozen=True)
class Tables:
    """The rows a diagnosis looked at, by table name, and the bucket bounds its histograms point to."""

    frames: Mapping[str, pl.DataFrame]
    bounds: Mapping[int, Sequence[float]] = field(default_factory=dict)

    def signal(
        self,
        name: str,
        unit: str,
        window: tuple[datetime, datetime],
        *,
        table: str,
        keys: Mapping[str, str],
        column: str,
        statistic: Statistic,
        per: str | None = None,
        across: Literal["sum", "max"] = "sum",
        threshold: float | None = None,
    ) -> Signal:
        """A signal with its value measured here; None where the rows do not tell."""
        unmeasured = Signal(
            name=name,
            value=None,
            unit=unit,
            window_start=window[0],
            window_end=window[1],
            threshold=threshold,
            table=table,
            keys=tuple(keys.items()),
            column=column,
            statistic=statistic,
            per=per,
            across=across,
        )
        return unmeasured.model_copy(update={"value": self.measure(unmeasured)})

    def measure(self, signal: Signal) -> float | None:
        """The value of a signal on these rows; None where they do not tell. Its stored value is not looked at."""
        rows = self._rows(signal)
        if rows is None:
            return None
        if signal.statistic == "share_at_or_under":
            return self._share(rows, signal)
        points = _points(rows, signal, signal.column)
        if signal.statistic in ("sum", "count", "distinct"):
            return _over_rows(rows, signal)
        if signal.statistic == "sum_ratio":
            return _quotient(_sum(points), _sum(_points(rows, signal, signal.per or "")))
        if signal.statistic == "increase_ratio":
            return _quotient(increase(points), increase(_points(rows, signal, signal.per or "")))
        if signal.statistic == "mean_over_rate":
            return _quotient(_mean(_moments(points, signal.across)), rate(_points(rows, signal, signal.per or "")))
        if signal.statistic in ("increase", "rate"):
            return increase(points) if signal.statistic == "increase" else rate(points)
        return _at_moments(_moments(points, signal.across), signal.statistic)

    def _rows(self, signal: Signal) -> pl.DataFrame | None:
        frame = self.frames.get(signal.table)
        if frame is None or signal.column not in frame.columns:
            return None
        time = pl.col(TIME[signal.table])
        matches = [pl.col(column).cast(pl.String) == value for column, value in signal.keys if column in frame.columns]
        return frame.filter(time >= signal.window_start, time <= signal.window_end, *matches)

    def _share(self, rows: pl.DataFrame, signal: Signal) -> float | None:
        series = SERIES.get(signal.table)
        edge = signal.threshold
        good = total = 0.0
        groups: dict[tuple[object, int], list[Sequence[float]]] = defaultdict(list)
        for row in rows.sort(TIME[signal.table]).iter_rows(named=True):
            if row["bucket_counts"] and row["bounds_id"] in self.bounds:
                groups[row[series] if series else 1, row["bounds_id"]].append(row["bucket_counts"])
        for (_, bounds_id), counts in groups.items():
            bounds = list(self.bounds[bounds_id])
            if edge in bounds:
                place = bounds.index(edge)
                good += counts[-1][place] - counts[0][place]
                total += counts[-1][-1] - counts[0][-1]
        return good / total if total else None


def increase(points: Iterable[Point]) -> float | None:
    """Growth of a counter, series added up; a value below the one before counts from zero. None without a pair."""
    before: dict[object, float] = {}
    grown: float | None = None
    for _, series, value in sorted(points, key=lambda point: point[0]):
        if series in before:
            step = value - before[series]
            grown = (grown or 0.0) + (value if step < 0 else step)
        before[series] = value
    return grown


def rate(points: Sequence[Point]) -> float | None:
    """Growth a second between the first and the last point."""
    if not points:
        return None
    times = [at for at, _, _ in points]
    return _quotient(increase(points), (max(times) - min(times)).total_seconds())


def _points(rows: pl.DataFrame, signal: Signal, column: str) -> list[Point]:
    """Known values; NaN is a value an engine prints for "no observation yet", so it is none."""
    if column not in rows.columns:
        return []
    series = SERIES.get(signal.table)
    picked = rows.select(
        pl.col(TIME[signal.table]),
        pl.col(series).alias("series_") if series else pl.lit(1).alias("series_"),
        pl.col(column).cast(pl.Float64, strict=False).alias("value_"),
    )
    return [(at, key, value) for at, key, value in picked.iter_rows() if value is not None and not math.isnan(value)]


def _moments(points: Iterable[Point], across: Literal["sum", "max"]) -> list[tuple[datetime, float]]:
    values: dict[datetime, float] = {}
    for at, _, value in points:
        if at in values:
            values[at] = values[at] + value if across == "sum" else max(values[at], value)
        else:
            values[at] = value
    return sorted(values.items())


def _at_moments(moments: Sequence[tuple[datetime, float]], statistic: Statistic) -> float | None:
    if not moments:
        return None
    values = [value for _, value in moments]
    if statistic == "last":
        return values[-1]
    if statistic == "max":
        return max(values)
    if statistic == "min":
        return min(values)
    if statistic == "mean":
        return sum(values) / len(values)
    raise ValueError(f"{statistic} is not a statistic of moments")


def _over_rows(rows: pl.DataFrame, signal: Signal) -> float | None:
    column = rows[signal.column].drop_nulls()
    if signal.statistic == "count":
        return float(column.len())
    if signal.statistic == "distinct":
        return float(column.n_unique())
    return None if column.is_empty() else float(column.cast(pl.Float64).sum())


def _sum(points: Sequence[Point]) -> float | None:
    return sum(value for _, _, value in points) if points else None


def _mean(moments: Sequence[tuple[datetime, float]]) -> float | None:
    return sum(value for _, value in moments) / len(moments) if moments else None


def _quotient(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
