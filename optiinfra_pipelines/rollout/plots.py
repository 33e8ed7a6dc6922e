"""A picture of one rollout: the evidence against the candidate over time, and both arms' slow or failed requests.

Pure: numbers in, a PNG out; matplotlib is imported when first drawn. What the numbers are is `rollout.judge`; showing
them is `defs.rollout_run`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from optiinfra_pipelines.domain.verdicts import SignalState, Verdict, VerdictKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Odds on the axis of evidence; between and beyond them a reader needs no number.
_ODDS = (0.001, 0.01, 0.1, 1, 10, 100, 1000, 10_000)
_LOWEST_ODDS, _HIGHEST_ODDS = 1e-3, 1e4
_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:olive")


@dataclass(frozen=True)
class EvidencePoint:
    """One look: seconds since the rollout began, the share, and the verdict's state."""

    seconds: float
    percent: float
    verdict: Verdict


def evidence_png(points: Sequence[EvidencePoint], title: str) -> bytes:
    """PNG, 9 inches wide. Above: evidence as odds with the line that fails a step; below, for each signal that counts
    requests: both arms' share over the first judged edge, or failed. Each step begins anew, so its lines do too."""
    from matplotlib.figure import Figure

    steps = _steps(points)
    names = list(dict.fromkeys(state.signal for point in points for state in point.verdict.signals))
    counted = [name for name in names if any(_share(state) is not None for state in _states(points, name))]
    figure = Figure(figsize=(9, 3.4 + 1.5 * len(counted)), layout="constrained")
    ratios = [2.0, *[1.0] * len(counted)]
    rows = figure.subplots(1 + len(counted), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    _draw_evidence(rows[0], steps, names)
    rows[0].set_title(title, loc="left", pad=16)
    for axes, name in zip(rows[1:], counted, strict=True):
        _draw_shares(axes, steps, name, _COLORS[names.index(name) % len(_COLORS)])
    for axes in rows:
        for before, after in pairwise(steps):
            axes.axvline((before[-1].seconds + after[0].seconds) / 120, color="0.8", linewidth=1)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1].set_xlabel("minutes since the rollout began")
    page = io.BytesIO()
    figure.savefig(page, format="png", dpi=90)
    return page.getvalue()


def _steps(points: Sequence[EvidencePoint]) -> list[list[EvidencePoint]]:
    """Stretches judged as one: a new one begins where the share changes or the judge's ticks start over."""
    found: list[list[EvidencePoint]] = []
    for point in points:
        last = found[-1][-1] if found else None
        if last is None or point.percent != last.percent or point.verdict.ticks < last.verdict.ticks:
            found.append([])
        found[-1].append(point)
    return found


def _draw_evidence(axes: Axes, steps: Sequence[Sequence[EvidencePoint]], names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        for number, step in enumerate(steps):
            drawn = [(point.seconds / 60, _odds(state)) for point in step for state in _states([point], name)]
            label = name if number == 0 else None
            axes.plot(*zip(*drawn, strict=True), color=_COLORS[index % len(_COLORS)], label=label) if drawn else None
    limits = [math.exp(state.fail_at_log_e) for step in steps for point in step for state in point.verdict.signals]
    if limits:
        axes.axhline(max(limits), color="black", linestyle="--", linewidth=1)
        axes.annotate(
            f"fails the step at {max(limits):.0f}:1",
            (0.995, max(limits)),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize="small",
        )
    failed = [point for step in steps for point in step if point.verdict.kind is VerdictKind.FAIL]
    if failed:
        axes.axvline(failed[0].seconds / 60, color="tab:red", linewidth=1.5)
    for step in steps:
        axes.annotate(
            f"{step[0].percent:g} %",
            (step[0].seconds / 60, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 3),
            textcoords="offset points",
            fontsize="small",
            color="0.4",
        )
    axes.set_yscale("log")
    axes.set_ylim(_LOWEST_ODDS / 2, max([_HIGHEST_ODDS, *(3 * limit for limit in limits)]))
    axes.set_yticks(_ODDS, [f"{odds:g}:1" if odds >= 1 else f"1:{1 / odds:g}" for odds in _ODDS])
    axes.minorticks_off()
    axes.set_ylabel("evidence against it")
    if names:
        axes.legend(fontsize="small", loc="upper left", ncols=3, framealpha=0.9)


def _draw_shares(axes: Axes, steps: Sequence[Sequence[EvidencePoint]], name: str, color: str) -> None:
    told = [state for step in steps for state in _states(step, name)]
    bound = next((state.bound for state in told if state.bound is not None), None)
    for number, step in enumerate(steps):
        drawn = [
            (point.seconds / 60, *shares)
            for point in step
            for state in _states([point], name)
            if (shares := _share(state)) is not None
        ]
        if not drawn:
            continue
        minutes, ours, theirs = zip(*drawn, strict=True)
        axes.plot(minutes, ours, color=color, label=None if number else "candidate")
        axes.plot(minutes, theirs, color="0.45", linestyle="--", linewidth=1, label=None if number else "baseline")
    what = "share failed" if bound is None else f"share over {bound:g} s"
    axes.set_title(f"{name}: {what}, since its step began", fontsize="small", loc="left")
    axes.set_ylim(0, 1.1 * max(axes.get_ylim()[1], 1e-6))
    axes.legend(fontsize="small", loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, frameon=False)


def _states(points: Sequence[EvidencePoint], name: str) -> list[SignalState]:
    return [state for point in points for state in point.verdict.signals if state.signal == name]


def _odds(state: SignalState) -> float:
    return min(_HIGHEST_ODDS, max(_LOWEST_ODDS, math.exp(min(50.0, state.log_e))))


def _share(state: SignalState) -> tuple[float, float] | None:
    """Candidate's and baseline's; None where one of them has no requests, or the signal counts none."""
    is_counting = state.bound is not None or state.canary_over or state.baseline_over or state.signal == "errors"
    if not (is_counting and state.canary_requests and state.baseline_requests):
        return None
    return state.canary_over / state.canary_requests, state.baseline_over / state.baseline_requests
