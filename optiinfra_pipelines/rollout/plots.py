"""Two pictures of one rollout: the evidence against the candidate over time, and both arms' slow requests.

Pure: numbers in, a PNG out; matplotlib is imported when first drawn. What the numbers are is `rollout.judge`; showing
them is `defs.rollout_run`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optiinfra_pipelines.domain.verdicts import Verdict


@dataclass(frozen=True)
class EvidencePoint:
    """One look: seconds since the rollout began, the share, and the verdict's state."""

    seconds: float
    percent: float
    verdict: Verdict


def evidence_png(points: Sequence[EvidencePoint], title: str) -> bytes:
    """PNG of 8 by 6 inches. Above: evidence as odds (log scale) with the line that fails a step; below: both arms'
    share of requests over the first judged edge, or failed. Each step begins anew, so lines may fall back."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    evidence, slow = figure.subplots(2, 1, sharex=True)
    for name, drawn in _series(points).items():
        minutes = [point[0] / 60 for point in drawn]
        (line,) = evidence.plot(minutes, [point[1] for point in drawn], label=name)
        color = line.get_color()
        slow.plot(minutes, [point[2] for point in drawn], color=color, label=f"{name}, candidate")
        slow.plot(minutes, [point[3] for point in drawn], color=color, linestyle=":", label=f"{name}, baseline")
    limits = [state.fail_at_log_e / math.log(10) for point in points for state in point.verdict.signals]
    if limits:
        evidence.axhline(max(limits), color="black", linestyle="--", linewidth=1, label="fails the step")
    evidence.set_title(title)
    evidence.set_ylabel("evidence against it, log10 of odds")
    slow.set_ylabel("share slow or failed")
    slow.set_xlabel("minutes")
    for axes in (evidence, slow):
        axes.legend(fontsize="small", loc="upper left")
        axes.grid(alpha=0.3)
    page = io.BytesIO()
    figure.savefig(page, format="png", dpi=90)
    return page.getvalue()


def _series(points: Sequence[EvidencePoint]) -> Mapping[str, list[tuple[float, float, float, float]]]:
    """Per signal: seconds, log10 odds, candidate's share, baseline's share; nothing where nothing was counted."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for point in points:
        for state in point.verdict.signals:
            if state.canary_requests and state.baseline_requests:
                shares = (state.canary_over / state.canary_requests, state.baseline_over / state.baseline_requests)
                found.setdefault(state.signal, []).append((point.seconds, state.log_e / math.log(10), *shares))
    return found
