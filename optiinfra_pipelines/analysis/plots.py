"""Small pictures of advice for the UI and the report: forecast fan, policies by cost and objective, reuse curve.

Pure: frames in, PNG bytes out (at most some 25 kB each); matplotlib is imported when first drawn, with its Agg backend,
for no display is there. What is shown is in the tables; a picture adds nothing to them.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import polars as pl

SIZE_INCHES = (6.0, 3.0)
DOTS_PER_INCH = 80
MAX_BYTES = 25_000
COLORS = 64
# Policies with a number of their own in the plot and a line in its legend; more would not fit beside it.
MAX_POLICIES = 14
# The hour ahead is what the fan shows: beside a whole day of load it would be a sliver.
SHOWN_STEPS = 72
_BLUE, _GRAY, _RED = "#2b6cb0", "#718096", "#c53030"
# What the y axis of the reuse curve counts, by the column it is drawn from.
_SERVED = {
    "token_hit_ratio": "input tokens served from cache, %",
    "block_hit_ratio": "prompt blocks served from cache, %",
    "reuse_share_ratio": "served, % of the reuse that is possible",
}


def _axes(title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: it keeps figures and a global state

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, linewidth=0.3)
    return figure, axes


def _png(figure: Any) -> bytes:
    from PIL import Image  # matplotlib writes its PNG files with it

    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    # A few colors and their blends: a palette takes a third of the bytes. The octree keeps the rare ones, such as red.
    image = Image.open(drawn).convert("RGB").quantize(COLORS, method=Image.Quantize.FASTOCTREE)
    image.save(out, format="png", optimize=True)
    return out.getvalue()


def _short(value: float) -> str:
    """A number for a tick or a legend: 250, 1.5k, 400k, 2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _plain(axis: Any) -> None:
    """Ticks of an axis as short plain numbers, on any scale, without the small ones between."""
    axis.set_major_formatter(lambda value, _: _short(value))
    axis.set_minor_formatter("")


def fan_chart(steps: pl.DataFrame, forecasts: pl.DataFrame, title: str, unit: str = "tokens/s") -> bytes:
    """Load of the last hours, the median ahead of it and the band P10 to P90.

    steps: at (s), value. forecasts: horizon_seconds, p10, p50, p90 from the last step on; rows without p50 go.
    """
    figure, axes = _axes(title)
    shown = steps.sort("at").tail(SHOWN_STEPS)
    last = float(shown["at"][-1]) if shown.height else 0.0
    hours_ago = [(at - last) / 3600 for at in shown["at"]]
    axes.plot(hours_ago, shown["value"].to_list(), color=_GRAY, linewidth=1.2, label="load, mean of a step")
    ahead = forecasts.drop_nulls("p50").sort("horizon_seconds")
    if ahead.height and shown.height:
        now = float(shown["value"][-1])
        hours = [0.0, *(seconds / 3600 for seconds in ahead["horizon_seconds"])]
        axes.fill_between(
            hours, [now, *ahead["p10"]], [now, *ahead["p90"]], color=_BLUE, alpha=0.25, linewidth=0, label="P10 to P90"
        )
        axes.plot(hours, [now, *ahead["p50"]], color=_BLUE, linewidth=1.2, marker="o", ms=3, label="median")
    if shown.height:
        axes.legend(fontsize=8, loc="upper left", framealpha=0.7)
    axes.set_xlabel("hours from the last known step", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.set_ylim(bottom=0)
    _plain(axes.yaxis)
    return _png(figure)


def pareto_plot(rows: pl.DataFrame, title: str) -> bytes:
    """Replica-hours against the share of demand kept, by policy; those nothing beats are joined.

    rows: policy_name, kind, replica_hours, attainment_ratio, is_pareto, is_advised (rows of scaling_backtest).
    Points carry numbers by rising cost, which the legend names: names beside points would lie on each other.
    """
    from matplotlib.lines import Line2D

    figure, axes = _axes(title)
    known = rows.drop_nulls(["replica_hours", "attainment_ratio"]).sort("replica_hours")
    missed = [(1 - ratio) * 100 for ratio in known["attainment_ratio"]]
    best = known.filter(pl.col("is_pareto"))
    front = [(1 - ratio) * 100 for ratio in best["attainment_ratio"]]
    axes.plot(best["replica_hours"].to_list(), front, color=_GRAY, lw=0.8)
    entries: list[Any] = [Line2D([], [], color=_GRAY, lw=0.8, label="no policy is better in both")]
    for number, (row, miss) in enumerate(zip(known.iter_rows(named=True), missed, strict=True), start=1):
        color = _RED if row["is_advised"] else _BLUE
        axes.plot(row["replica_hours"], miss, marker="*" if row["is_advised"] else "o", color=color,
            ms=9 if row["is_advised"] else 5, zorder=3)  # fmt: skip
        if number <= MAX_POLICIES:
            # Three heights in turn: neighbors at the same cost keep their numbers apart.
            place = (0, 5 + 8 * (number % 3))
            axes.annotate(str(number), (row["replica_hours"], miss), fontsize=7, xytext=place,
                          textcoords="offset points", ha="center")  # fmt: skip
            note = ", advised" if row["is_advised"] else ", perfect knowledge" if row["kind"] == "foresight" else ""
            told = f"{number}  {row['policy_name']}{note}"
            entries.append(Line2D([], [], ls="", marker="o", color=color, ms=3, label=told))
    if known.height:
        figure.legend(handles=entries, fontsize=7, loc="outside right upper", handlelength=1.0)
    axes.set_xscale("log")  # a bad policy costs several times the others, which would lie on each other
    _few_ticks(axes.xaxis, known["replica_hours"])
    axes.margins(x=0.08)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(-0.01, max(missed, default=0.1) * 3 + 0.05)
    _plain(axes.yaxis)
    axes.set_xlabel("replica-hours", fontsize=8)
    axes.set_ylabel("demand past the wait bound, %", fontsize=8)
    return _png(figure)


def _few_ticks(axis: Any, values: pl.Series) -> None:
    """Four plain numbers over the range of the values, evenly on a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, NullLocator

    if not len(values) or float(values[0]) <= 0:
        return
    low, high = float(values[0]), float(values[-1])
    ticks = [float(f"{low * (high / low) ** (step / 3):.2g}") for step in range(4)]
    axis.set_major_locator(FixedLocator(sorted({*ticks})))
    axis.set_minor_locator(NullLocator())
    _plain(axis)


def reuse_plot(curve: pl.DataFrame, title: str) -> bytes:
    """Hit ratio by cache size, with the ceiling an infinite cache would reach, and where 95 % of that is.

    curve: capacity_blocks, capacity_tokens, capacity_bytes, and token_hit_ratio, else block_hit_ratio, else
    reuse_share_ratio (rows of kv_reuse_curve).
    """
    figure, axes = _axes(title)
    shown = next((name for name in _SERVED if curve[name].null_count() < curve.height), next(iter(_SERVED)))
    points = curve.drop_nulls(["capacity_blocks", shown]).sort("capacity_blocks")
    axes.plot(points["capacity_blocks"].to_list(), (points[shown] * 100).to_list(), color=_BLUE, linewidth=1.2)
    unit = "cache size, blocks"
    if points.height:
        top = points.row(-1, named=True)
        ceiling = top[shown] * 100
        axes.axhline(ceiling, color=_GRAY, linewidth=0.8, linestyle="--", label=f"infinite cache: {ceiling:.1f} %")
        enough = points.filter(pl.col(shown) >= 0.95 * top[shown]).row(0, named=True)
        size = f"{_short(enough['capacity_blocks'])} blocks"
        if enough["capacity_bytes"] is not None:
            size += f", {enough['capacity_bytes'] / 1024**3:,.0f} GiB"
        axes.axvline(
            enough["capacity_blocks"], color=_RED, linewidth=0.8, linestyle=":", label=f"95 % of it within {size}"
        )
        axes.legend(fontsize=8, loc="upper left", framealpha=0.7)
        axes.set_ylim(0, ceiling * 1.35 + 1)  # room for the legend above the curve
        if top["capacity_tokens"] is not None:
            unit += f" of {top['capacity_tokens'] // top['capacity_blocks']} tokens"
    axes.set_xscale("log")
    _plain(axes.xaxis)
    axes.set_xlabel(unit, fontsize=8)
    axes.set_ylabel(_SERVED[shown], fontsize=8)
    return _png(figure)


def as_markdown(png: bytes, alt: str) -> str:
    """The picture as Markdown with its bytes inside, as the UI shows it; words instead of one that is too large."""
    if len(png) > MAX_BYTES:
        return f"(the picture of {alt} takes {len(png)} bytes, over {MAX_BYTES}; the table has its numbers)"
    return f"![{alt}](data:image/png;base64,{base64.b64encode(png).decode('ascii')})"
