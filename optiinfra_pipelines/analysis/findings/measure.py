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
    _lists: dict[tuple[str, str], list[object]] = field(default_factory=dict, repr=False, compare=False)

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
        if signal.statistic in ("count", "distinct"):
            known = [value for place in rows if (value := self._column(signal.table, signal.column)[place]) is not None]
            return float(len(known) if signal.statistic == "count" else len(set(known)))
        points = self._points(rows, signal, signal.column)
        if signal.statistic == "sum":
            return _sum(points)
        if signal.statistic == "sum_ratio":
            return _quotient(_sum(points), _sum(self._points(rows, signal, signal.per or "")))
        if signal.statistic == "increase_ratio":
            return _quotient(increase(points), increase(self._points(rows, signal, signal.per or "")))
        if signal.statistic == "mean_over_rate":
            return _quotient(_mean(_moments(points, signal.across)), rate(self._points(rows, signal, signal.per or "")))
        if signal.statistic in ("increase", "rate"):
            return increase(points) if signal.statistic == "increase" else rate(points)
        return _at_moments(_moments(points, signal.across), signal.statistic)

    def _column(self, table: str, column: str) -> list[object]:
        """One column as a list, made once: windows are small and asked often."""
        key = (table, column)
        if key not in self._lists:
            self._lists[key] = self.frames[table][column].to_list()
        return self._lists[key]

    def _rows(self, signal: Signal) -> list[int] | None:
        """Places of the rows that a signal is about."""
        frame = self.frames.get(signal.table)
        if frame is None or signal.column not in frame.columns:
            return None
        times = self._column(signal.table, TIME[signal.table])
        start, end = signal.window_start, signal.window_end
        places = [place for place, at in enumerate(times) if isinstance(at, datetime) and start <= at <= end]
        for column, wanted in signal.keys:
            if column in frame.columns:
                values = self._column(signal.table, column)
                places = [place for place in places if values[place] is not None and str(values[place]) == wanted]
        return places

    def _points(self, rows: Sequence[int], signal: Signal, column: str) -> list[Point]:
        """Known values; NaN is a value an engine prints for "no observation yet", so it is none."""
        if column not in self.frames[signal.table].columns:
            return []
        values, times = self._column(signal.table, column), self._column(signal.table, TIME[signal.table])
        series = SERIES.get(signal.table)
        keys = self._column(signal.table, series) if series else None
        points: list[Point] = []
        for place in rows:
            value, at = values[place], times[place]
            if isinstance(value, int | float) and isinstance(at, datetime) and not math.isnan(value):
                points.append((at, keys[place] if keys else 1, float(value)))
        return points

    def _share(self, rows: Sequence[int], signal: Signal) -> float | None:
        series, edge = SERIES.get(signal.table), signal.threshold
        wanted = [TIME[signal.table], series or TIME[signal.table], "bounds_id", "bucket_counts"]
        held = self.frames[signal.table][list(rows)].select(list(dict.fromkeys(wanted))).sort(TIME[signal.table])
        good = total = 0.0
        groups: dict[tuple[object, int], list[Sequence[float]]] = defaultdict(list)
        for row in held.iter_rows(named=True):
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


def _sum(points: Sequence[Point]) -> float | None:
    return sum(value for _, _, value in points) if points else None


def _mean(moments: Sequence[tuple[datetime, float]]) -> float | None:
    return sum(value for _, value in moments) / len(moments) if moments else None


def _quotient(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
