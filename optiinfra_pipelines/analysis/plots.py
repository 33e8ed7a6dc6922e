"""Small pictures of advice for the UI and the report: forecast fan, policies by cost and objective, reuse curve.

Pure: frames in, PNG bytes out (at most some 25 kB each); matplotlib is imported when first drawn, with its Agg backend,
for no display is there. What is shown is in the tables; a picture adds nothing to them.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import polars as pl

SIZE_INCHES = (5.2, 2.8)
DOTS_PER_INCH = 80
MAX_BYTES = 25_000
# Names beside points stay readable up to this many.
MAX_LABELS = 14
_BLUE, _GRAY, _RED = "#2b6cb0", "#718096", "#c53030"


def _axes(title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: it keeps figures and a global state

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(visible=True, linewidth=0.3)
    return figure, axes


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def fan_chart(steps: pl.DataFrame, forecasts: pl.DataFrame, title: str) -> bytes:
    """Load of the last day and the band P10 to P90 ahead of it.

    steps: at (s), value. forecasts: horizon_seconds, p10, p50, p90 from the last step on; rows without p50 go.
    """
    figure, axes = _axes(title)
    shown = steps.sort("at").tail(144)
    last = float(shown["at"][-1]) if shown.height else 0.0
    axes.plot([(at - last) / 3600 for at in shown["at"]], shown["value"].to_list(), color=_GRAY, linewidth=1)
    ahead = forecasts.drop_nulls("p50").sort("horizon_seconds")
    if ahead.height and shown.height:
        now = float(shown["value"][-1])
        hours = [0.0, *(seconds / 3600 for seconds in ahead["horizon_seconds"])]
        axes.fill_between(hours, [now, *ahead["p10"]], [now, *ahead["p90"]], color=_BLUE, alpha=0.25, linewidth=0)
        axes.plot(hours, [now, *ahead["p50"]], color=_BLUE, linewidth=1.2)
    axes.set_xlabel("hours from the last step", fontsize=7)
    axes.set_ylim(bottom=0)
    return _png(figure)


def pareto_plot(rows: pl.DataFrame, title: str) -> bytes:
    """Replica-hours against the share of demand kept, by policy; those nothing beats are joined.

    rows: policy_name, replica_hours, attainment_ratio, is_pareto, is_advised (rows of scaling_backtest).
    """
    figure, axes = _axes(title)
    known = rows.drop_nulls(["replica_hours", "attainment_ratio"]).sort("replica_hours")
    missed = [(1 - ratio) * 100 for ratio in known["attainment_ratio"]]
    colors = [_RED if advised else _BLUE for advised in known["is_advised"]]
    axes.scatter(known["replica_hours"].to_list(), missed, c=colors, s=14, zorder=3)
    best = known.filter(pl.col("is_pareto"))
    axes.plot(
        best["replica_hours"].to_list(), [(1 - ratio) * 100 for ratio in best["attainment_ratio"]], color=_GRAY, lw=0.8
    )
    for name, hours, miss in list(zip(known["policy_name"], known["replica_hours"], missed, strict=True))[:MAX_LABELS]:
        axes.annotate(name, (hours, miss), fontsize=5.5, xytext=(3, 3), textcoords="offset points")
    # Costs lie within a factor of a few: a few plain numbers on a straight scale, and room for the names at the edges.
    axes.locator_params(axis="x", nbins=6)
    axes.margins(x=0.12)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(0, max(missed, default=0.1) * 3 + 0.01)
    axes.set_xlabel("replica-hours", fontsize=7)
    axes.set_ylabel("demand past the wait bound, %", fontsize=7)
    return _png(figure)


def reuse_plot(curve: pl.DataFrame, title: str) -> bytes:
    """Hit ratio by cache size, with the ceiling an infinite cache would reach.

    curve: capacity_blocks and token_hit_ratio, else block_hit_ratio, else reuse_share_ratio (rows of kv_reuse_curve).
    """
    figure, axes = _axes(title)
    names = ("token_hit_ratio", "block_hit_ratio", "reuse_share_ratio")
    shown = next((name for name in names if curve[name].null_count() < curve.height), names[0])
    points = curve.drop_nulls(["capacity_blocks", shown]).sort("capacity_blocks")
    axes.plot(points["capacity_blocks"].to_list(), (points[shown] * 100).to_list(), color=_BLUE, linewidth=1.2)
    if points.height:
        axes.axhline(float(points[shown][-1]) * 100, color=_GRAY, linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("cache size, blocks", fontsize=7)
    axes.set_ylabel(f"{shown.replace('_', ' ').replace(' ratio', '')}, %", fontsize=7)
    return _png(figure)


def as_markdown(png: bytes, alt: str) -> str:
    """The picture as Markdown with its bytes inside, as the UI shows it; words instead of one that is too large."""
    if len(png) > MAX_BYTES:
        return f"(the picture of {alt} takes {len(png)} bytes, over {MAX_BYTES}; the table has its numbers)"
    return f"![{alt}](data:image/png;base64,{base64.b64encode(png).decode('ascii')})"
