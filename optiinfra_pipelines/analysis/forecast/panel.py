"""Load series on one grid of steps, with gaps named: what the forecast models are fed.

Pure. A gap is a missing or NULL step, or a short drop to nothing between busy steps (a recorder that stopped, not a
fleet that fell silent). Gaps are bridged for the models' eyes and never scored or forecast from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.forecast.models import Bools, Floats

# The public fleets' recorder gaps read 0 to 2 % of the median for up to an hour between busy windows.
GAP_RATIO = 0.02
GAP_NEIGHBOR_RATIO = 0.25
GAP_STEPS = 6


@dataclass(frozen=True)
class Panel:
    """(time, series) arrays on a grid of step_seconds."""

    names: tuple[str, ...]
    at: Floats  # seconds
    step_seconds: float
    load: Floats  # gaps bridged by a straight line
    known: Bools  # False in a gap and outside a series' record
    members: dict[int, Floats]  # series index -> (time, member), gaps bridged
    burst_ratio: tuple[float | None, ...]

    @property
    def steps_per_day(self) -> int:
        return max(1, round(86_400 / self.step_seconds))


def make_panel(history: pl.DataFrame, step_seconds: float, members: pl.DataFrame | None = None) -> Panel:
    """history: series, at, value, optional peak; members: series, member, at, value. See `forecast.forecast`."""
    for frame, needed in ((history, ("series", "at", "value")), (members, ("series", "member", "at", "value"))):
        missing = [] if frame is None else [name for name in needed if name not in frame.columns]
        if missing:
            raise ValueError(f"a load frame has no column {missing}; it needs {needed}")
    if (history["value"] < 0).any():
        raise ValueError("a load is negative: rates and counts are not; was a counter's reset taken for a rate?")
    names = tuple(history["series"].unique(maintain_order=True).to_list())
    if history.is_empty():
        return Panel((), np.empty(0), step_seconds, np.empty((0, 0)), np.empty((0, 0), dtype=np.bool_), {}, ())
    first = float(history["at"].cast(pl.Float64).min())  # type: ignore[arg-type]
    last = float(history["at"].cast(pl.Float64).max())  # type: ignore[arg-type]
    steps = round((last - first) / step_seconds) + 1
    grid: Floats = (first + np.arange(steps) * step_seconds).astype(np.float64)
    raw = np.column_stack(
        [_on_grid(history.filter(pl.col("series") == name), first, steps, step_seconds) for name in names]
    )
    known = np.column_stack([np.isfinite(column) & ~recorder_gaps(column) for column in raw.T])
    load = np.column_stack([_bridged(column, mask) for column, mask in zip(raw.T, known.T, strict=True)])
    parts: dict[int, Floats] = {}
    if members is not None:
        for index, name in enumerate(names):
            own = members.filter(pl.col("series") == name)
            if own.is_empty():
                continue
            columns = [
                np.nan_to_num(_on_grid(group, first, steps, step_seconds))
                for _, group in own.group_by("member", maintain_order=True)
            ]
            parts[index] = np.column_stack([_bridged(column, known[:, index]) for column in columns])
    bursts = tuple(_burst_ratio(history.filter(pl.col("series") == name)) for name in names)
    return Panel(names, grid, step_seconds, load, known, parts, bursts)


def _on_grid(series: pl.DataFrame, first: float, steps: int, step_seconds: float) -> Floats:
    out = np.full(steps, np.nan)
    place = np.round((series["at"].cast(pl.Float64).to_numpy() - first) / step_seconds).astype(np.int64)
    out[place] = series["value"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    return out


def recorder_gaps(values: Floats) -> Bools:
    """Steps at almost nothing, in runs of at most GAP_STEPS, between two busy ones."""
    finite = values[np.isfinite(values)]
    gaps = np.zeros(len(values), dtype=np.bool_)
    median = float(np.median(finite)) if len(finite) else 0.0
    low = np.isfinite(values) & (values <= GAP_RATIO * median) & (median > 0)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], low, [False]]).astype(np.int8)))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        inside = start > 0 and end < len(values) and end - start <= GAP_STEPS
        if inside and min(values[start - 1], values[end]) >= GAP_NEIGHBOR_RATIO * median:
            gaps[start:end] = True
    return gaps


def _bridged(values: Floats, known: Bools) -> Floats:
    if not known.any():
        return np.zeros(len(values))
    at = np.arange(len(values))
    return np.interp(at, at[known], values[known])


def _burst_ratio(series: pl.DataFrame) -> float | None:
    """P90 over steps of the largest value inside a step to its mean; None without peaks."""
    if "peak" not in series.columns:
        return None
    ratio = series.filter(pl.col("value") > 0).select(pl.col("peak") / pl.col("value")).to_series().drop_nulls()
    return None if ratio.is_empty() else ratio.quantile(0.9, "linear")
