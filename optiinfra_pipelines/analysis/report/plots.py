"""The report's plots: latency against its objective, KV cache and queue, GPU states, cost.

Pure: frames in, SVG (for the HTML report) or PNG (for the Dagster UI) out. matplotlib is imported when the first plot
is drawn: it takes a second, and most processes draw none. Labels are never read as formulas, and the few colors of ink
and grid become CSS variables, so that one drawing is readable on light and on dark.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import polars as pl

from optiinfra_pipelines.analysis.report.values import plain, value

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More lines than this cannot be told apart; the tables have the others.
MAX_LINES = 6
MAX_PANELS = 4
# Paul Tol's "bright" set: told apart by color-blind readers, on white and on near-black.
_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_TICK_MINUTES = (1, 2, 5, 10, 15, 20, 30, 60, 120)
_MAX_TICKS = 6
_INK, _GRID = "#123456", "#234567"
_STATE_COLORS = {"active": "#228833", "idle_held": "#ee6677", "idle_free": "#ccbb44", "unknown": "#999999"}
_PANEL_INCHES = (4.6, 2.3)


@dataclass(frozen=True)
class LatencyLine:
    """One panel: rows minute_at, p95_seconds, p95_lower_seconds, p95_upper_seconds, sorted; the objective where set."""

    title: str
    rows: pl.DataFrame
    threshold_seconds: float | None


def latency_svg(lines: Sequence[LatencyLine]) -> str:
    """95th percentile per minute with the buckets that enclose it, one panel each, the objective as a dashed line."""
    return _drawn("latency", lambda figure: _latency(figure, lines[:MAX_PANELS]), *_panel_size(len(lines[:MAX_PANELS])))


def load_svg(rows: pl.DataFrame) -> str:
    """KV-cache usage and waiting requests per minute. rows: target, minute_at, kv_cache_usage_max_ratio,
    requests_waiting_max.
    """
    return _drawn("load", lambda figure: _load(figure, rows), 9.2, 3.0)


def states_svg(rows: pl.DataFrame) -> str:
    """GPU-hours by state, one bar per host. rows: host, state, gpu_hours."""
    hosts = rows["host"].n_unique()
    return _drawn("states", lambda figure: _states(figure, rows), 9.2, 0.9 + 0.34 * min(hosts, 20))


def cost_svg(rows: pl.DataFrame, label: str) -> str:
    """Dollars over the window, one bar each. rows: `label` and usd."""
    return _drawn("cost", lambda figure: _cost(figure, rows, label), 9.2, 0.9 + 0.34 * min(rows.height, 20))


def load_png(rows: pl.DataFrame) -> bytes:
    """The load plot as a small PNG: the UI shows no SVG inside markdown."""
    return _png(lambda figure: _load(figure, rows), 7.5, 2.6)


def _panel_size(panels: int) -> tuple[float, float]:
    columns = 1 if panels == 1 else 2
    return columns * _PANEL_INCHES[0], math.ceil(panels / columns) * _PANEL_INCHES[1]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    return figure


def _settings(name: str) -> dict[Any, Any]:
    return {
        # A name with dollar signs is a name.
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "font.family": "sans-serif",
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _GRID,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _GRID,
        "grid.linewidth": 0.4,
        "axes.grid": True,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "timezone": "UTC",
    }


def _drawn(name: str, draw: Callable[[Figure], None], width: float, height: float) -> str:
    import matplotlib as mpl

    with mpl.rc_context(_settings(name)):
        figure = _figure(width, height)
        draw(figure)
        buffer = io.StringIO()
        with warnings.catch_warnings():
            # The browser has the letters that the measuring font lacks.
            warnings.filterwarnings("ignore", message="Glyph")
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inlined(buffer.getvalue(), name)


def _png(draw: Callable[[Figure], None], width: float, height: float) -> bytes:
    import matplotlib as mpl

    with mpl.rc_context({**_settings(""), "text.color": "#333333", "axes.labelcolor": "#333333"}):
        figure = _figure(width, height)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80, facecolor="white")
    return buffer.getvalue()


def _inlined(svg: str, name: str) -> str:
    """The drawing alone, as wide as its place, in the page's ink, its ids its own."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{name}-\1"', body)
    return body.replace(_INK, "var(--ink)").replace(_GRID, "var(--line)")


def _latency(figure: Figure, lines: Sequence[LatencyLine]) -> None:
    columns = 1 if len(lines) == 1 else 2
    grid = figure.subplots(math.ceil(len(lines) / columns), columns, squeeze=False)
    for axes, line in zip(grid.flat, lines, strict=False):
        _latency_panel(axes, line)
    for axes in grid.flat[len(lines) :]:
        axes.set_visible(False)


def _latency_panel(axes: Axes, line: LatencyLine) -> None:
    at = line.rows["minute_at"].to_list()
    lower = line.rows["p95_lower_seconds"].to_list()
    upper = line.rows["p95_upper_seconds"].to_list()
    middle = line.rows["p95_seconds"].to_list()
    finite = [one for one in (*lower, *upper, *middle, line.threshold_seconds) if one and math.isfinite(one)]
    top = max(finite, default=1.0) * 1.4
    bottom = min(finite, default=0.1) / 1.4
    # An end that is open is drawn to the edge of the panel.
    closed = [top if not math.isfinite(one) else one for one in upper]
    axes.fill_between(at, [max(one, bottom) for one in lower], closed, color=_COLORS[0], alpha=0.28, linewidth=0)
    axes.plot(at, middle, color=_COLORS[0], marker="o", markersize=3, linewidth=1.4)
    if line.threshold_seconds is not None:
        axes.axhline(line.threshold_seconds, color=_COLORS[1], linestyle="--", linewidth=1.2)
        axes.annotate(
            f"objective {value(line.threshold_seconds, 's')}",
            (0.99, line.threshold_seconds),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            ha="right",
            va="bottom",
            color=_COLORS[1],
        )
    if top / bottom > 30:
        axes.set_yscale("log")
    axes.set_ylim(bottom if top / bottom > 30 else 0.0, top)
    axes.yaxis.set_major_formatter(lambda number, _: value(number, "s"))
    axes.yaxis.set_minor_formatter(lambda *_: "")
    axes.set_title(_label(line.title, 58))
    _times(axes, at)


def _load(figure: Figure, rows: pl.DataFrame) -> None:
    usage_axes, waiting_axes = figure.subplots(1, 2)
    panels = (
        (usage_axes, "kv_cache_usage_max_ratio", "KV cache in use, %", 100.0),
        (waiting_axes, "requests_waiting_max", "requests waiting, most at once", 1.0),
    )
    shown = _busiest(rows)
    for axes, column, title, scale in panels:
        for color, target in zip(_COLORS, shown, strict=False):
            one = rows.filter(pl.col("target") == target, pl.col(column).is_not_null())
            if one.height:
                numbers = [scale * number for number in one[column].to_list()]
                axes.plot(
                    one["minute_at"].to_list(),
                    numbers,
                    color=color,
                    marker="o",
                    markersize=2.5,
                    linewidth=1.3,
                    label=_label(target, 34),
                )
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        _times(axes, rows["minute_at"].to_list())
    usage_axes.set_ylim(0, 105)
    handles: dict[str, Artist] = {}
    for axes in (usage_axes, waiting_axes):
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3)


def _busiest(rows: pl.DataFrame) -> list[str]:
    """The targets under most pressure first: by the fullest cache, then by the longest queue."""
    ranked = (
        rows.group_by("target")
        .agg(
            pl.col("kv_cache_usage_max_ratio").max().fill_null(-1.0).alias("usage"),
            pl.col("requests_waiting_max").max().fill_null(-1.0).alias("waiting"),
        )
        .sort("usage", "waiting", "target", descending=[True, True, False])
    )
    return ranked["target"].head(MAX_LINES).to_list()


def _states(figure: Figure, rows: pl.DataFrame) -> None:
    axes = figure.subplots()
    totals = rows.group_by("host").agg(pl.col("gpu_hours").sum()).sort("gpu_hours", "host", descending=[True, False])
    hosts = totals["host"].head(20).to_list()
    for state in [*_STATE_COLORS, *sorted(set(rows["state"].to_list()) - set(_STATE_COLORS))]:
        hours = {
            row["host"]: row["gpu_hours"] or 0.0 for row in rows.filter(pl.col("state") == state).iter_rows(named=True)
        }
        before = [
            sum(
                row["gpu_hours"] or 0.0
                for row in rows.filter(pl.col("host") == host).iter_rows(named=True)
                if _order(row["state"]) < _order(state)
            )
            for host in hosts
        ]
        widths = [hours.get(host, 0.0) for host in hosts]
        if any(widths):
            color = _STATE_COLORS.get(state, "#bbbbbb")
            axes.barh(range(len(hosts)), widths, left=before, color=color, label=_label(state.replace("_", " "), 30))
    _bars(axes, hosts)
    axes.set_xlabel("GPU-hours")
    if axes.containers:
        figure.legend(loc="outside lower center", ncols=4)


def _order(state: str) -> tuple[int, str]:
    known = list(_STATE_COLORS)
    return (known.index(state), state) if state in known else (len(known), state)


def _cost(figure: Figure, rows: pl.DataFrame, label: str) -> None:
    axes = figure.subplots()
    ranked = rows.drop_nulls("usd").sort("usd", descending=True).head(20)
    axes.barh(range(ranked.height), ranked["usd"].to_list(), color=_COLORS[0])
    _bars(axes, [str(name) for name in ranked[label].to_list()])
    axes.set_xlabel("USD over the window")


def _bars(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_label(name, 40) for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _times(axes: Axes, moments: Sequence[datetime]) -> None:
    """Ticks on whole minutes, few enough to be read."""
    first, last = min(moments), max(moments)
    minutes = (last - first).total_seconds() / 60
    step = next((step for step in _TICK_MINUTES if minutes / step <= _MAX_TICKS), _TICK_MINUTES[-1])
    begin = first.replace(hour=0, minute=0, second=0, microsecond=0)
    count = math.ceil((first - begin).total_seconds() / 60 / step)
    ticks = []
    while (tick := begin + timedelta(minutes=step * count)) <= last:
        ticks.append(tick)
        count += 1
    axes.set_xticks(ticks, [f"{tick:%H:%M}" for tick in ticks])  # type: ignore[arg-type]
    margin = timedelta(seconds=max(30.0, 1.5 * minutes))
    axes.set_xlim(first - margin, last + margin)  # type: ignore[arg-type]


def _label(text: str, most: int) -> str:
    """A name as a label: cleaned, and short enough for its place."""
    # matplotlib leaves labels that begin with an underscore out of legends.
    cleaned = plain(text).lstrip("_") or "?"
    return cleaned if len(cleaned) <= most else cleaned[: most - 1] + "…"
