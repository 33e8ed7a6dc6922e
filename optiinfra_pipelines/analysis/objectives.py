"""Whether a deployment keeps its objectives: the indicator, its budget, and what is left of it.

Pure. The indicator of a latency is the share of requests at or under a bucket edge, which counts and does not
estimate. Here: objectives over counted steps. Not here: burn rates (`burn_rate`), buckets (`histogram_shares`), the
SQL that counts the steps (`resources.objective_counts`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

import polars as pl

from optiinfra_pipelines.analysis.burn_rate import burn_rates, never_firing
from optiinfra_pipelines.analysis.histogram_shares import Snapped, edge_remedy, snap
from optiinfra_pipelines.domain.fleet import Deployment, Objective
from optiinfra_pipelines.domain.objectives import (
    MODEL_CLASSES,
    GoodputBounds,
    ModelClass,
    ObjectiveStatus,
    State,
)

Vantage = Literal["engine", "frontend"]
COUNTS: pl.Schema = pl.Schema([("at", pl.Datetime("us", "UTC")), ("good", pl.Float64()), ("total", pl.Float64())])
# A default holds for 99 of 100 requests, as MLPerf's p99 does.
_DEFAULT_TARGET = 0.99


@dataclass(frozen=True)
class Counted:
    """Requests of one objective over time, by vantage (schema COUNTS), and how they were counted.

    snapped: the edge of a latency objective; None when no bucket edge lies at or under it. is_proxy: the engine has no
    such metric and this one only bounds it. started: requests seen at each vantage whatever their metrics told.
    """

    counts: Mapping[Vantage, pl.DataFrame]
    snapped: Snapped | None = None
    engine: str | None = None
    is_proxy: bool = False
    requests: Mapping[Vantage, float] = field(default_factory=dict)


def evaluate(
    deployment: str, objective: Objective, counted: Counted, now: datetime, values: Mapping[str, float]
) -> ObjectiveStatus:
    """One objective at `now`. Without a counted request in the window the state is no_data, not met."""
    notes = list(never_firing(objective))
    notes += _edge_notes(objective, counted)
    window = timedelta(days=objective.window_days)
    held = {
        vantage: frame.filter(pl.col("at") >= now - window, pl.col("at") < now, pl.col("total") > 0)
        for vantage, frame in counted.counts.items()
    }
    vantage = _vantage(held, counted, notes)
    unseen = _unseen(counted)
    if unseen:
        notes.append(f"{unseen:g} requests reached the frontend and no engine: only the frontend counts them")
    if counted.is_proxy:
        notes.append("the engine has no such metric; the one judged only bounds it from above")
    if vantage is None:
        return _status(deployment, objective, now, "no_data", None, None, counted, 0.0, unseen, (), notes)
    frame = held[vantage]
    good, total = float(frame["good"].sum()), float(frame["total"].sum())
    first = frame["at"].min()
    covered = (now - first).total_seconds() / 86_400 if isinstance(first, datetime) else 0.0
    if covered < 0.95 * objective.window_days:
        notes.append(f"{covered:.2f} of {objective.window_days:g} days have data; the budget is judged on those")
    rates = burn_rates(frame, objective, now, values)
    remaining = 1 - (total - good) / ((1 - objective.target_ratio) * total)
    state: State = "met"
    if any(rate.is_firing for rate in rates):
        state = "burning"
    if remaining <= 0:
        state = "exhausted"
    status = _status(deployment, objective, now, state, vantage, (good, total), counted, covered, unseen, rates, notes)
    return status.model_copy(update={"good_ratio": good / total, "remaining_ratio": remaining})


def _status(
    deployment: str,
    objective: Objective,
    now: datetime,
    state: State,
    vantage: Vantage | None,
    good_total: tuple[float, float] | None,
    counted: Counted,
    covered_days: float,
    unseen: float | None,
    rates: tuple[object, ...],
    notes: Sequence[str],
) -> ObjectiveStatus:
    return ObjectiveStatus.model_validate(
        {
            "deployment": deployment,
            "objective": objective,
            "at": now,
            "state": state,
            "vantage": vantage,
            "edge_seconds": counted.snapped.edge if counted.snapped else None,
            "good": good_total[0] if good_total else None,
            "total": good_total[1] if good_total else None,
            "good_ratio": None,
            "remaining_ratio": None,
            "covered_days": covered_days,
            "unseen_requests": unseen,
            "burn_rates": rates,
            "notes": tuple(notes),
        }
    )


def _edge_notes(objective: Objective, counted: Counted) -> list[str]:
    threshold = objective.threshold_seconds
    if threshold is None:
        return []
    if counted.snapped is None:
        if not counted.counts:
            return [f"no replica exposes a histogram for {objective.kind}"]
        return [f"no bucket edge lies at or under {threshold:g} s; {edge_remedy(threshold, counted.engine)}"]
    if counted.snapped.is_exact:
        return []
    said = f"judged at the bucket edge {counted.snapped.edge:g} s, the largest under {threshold:g} s"
    return [said if counted.snapped.remedy is None else f"{said}; {counted.snapped.remedy}"]


def _vantage(held: Mapping[Vantage, pl.DataFrame], counted: Counted, notes: list[str]) -> Vantage | None:
    """The frontend, because users sit there; an engine where the frontend measured nothing."""
    order: tuple[Vantage, ...] = ("frontend", "engine")
    told = [vantage for vantage in order if vantage in held and held[vantage].height]
    if not told:
        return None
    if told[0] == "engine" and counted.requests.get("frontend", 0) > 0:
        notes.append("the frontend saw requests and measured none of them; judged at the engines")
    return told[0]


def _unseen(counted: Counted) -> float | None:
    if not {"frontend", "engine"} <= set(counted.requests):
        return None
    return max(0.0, counted.requests["frontend"] - counted.requests["engine"])


def merge_edges(
    threshold: float, bounds_by_id: Mapping[int, Sequence[float]], engine: str | None
) -> tuple[dict[int, Snapped], Snapped | None]:
    """The edge of each set of bounds, and the lowest of them to name: replicas may count at different edges."""
    edges = {key: edge for key, bounds in bounds_by_id.items() if (edge := snap(threshold, bounds, engine)) is not None}
    return edges, min(edges.values(), key=lambda one: one.edge, default=None)


def goodput_bounds(statuses: Sequence[ObjectiveStatus]) -> GoodputBounds | str:
    """Bounds of the share of requests that keep every latency objective at once, or why there are none.

    At least the sum of the shares less their number but one, at most the smallest (Fréchet 1935).
    """
    latencies = [one for one in statuses if one.objective.threshold_seconds is not None]
    if len(latencies) < 2:
        return "goodput needs two latency objectives"
    shares = [one.good_ratio for one in latencies if one.good_ratio is not None]
    if len(shares) < len(latencies):
        return "a latency objective has no data"
    lower = max(0.0, sum(shares) - (len(shares) - 1))
    return GoodputBounds(kinds=tuple(one.objective.kind for one in latencies), lower=lower, upper=min(shares))


def evaluate_goodput(
    deployment: str, objective: Objective, statuses: Sequence[ObjectiveStatus], now: datetime
) -> ObjectiveStatus:
    """A goodput objective: met or missed only where the bounds leave no doubt, no_data in between."""
    bounds = goodput_bounds(statuses)
    state: State = "no_data"
    if isinstance(bounds, GoodputBounds):
        notes = [f"between {bounds.lower:.4f} and {bounds.upper:.4f} of requests keep all latency objectives"]
        if bounds.lower >= objective.target_ratio:
            state = "met"
        elif bounds.upper < objective.target_ratio:
            state = "exhausted"
        else:
            notes.append("the target lies between the bounds; only a vantage that sees whole requests can tell")
    else:
        notes = [bounds]
    covered = min((one.covered_days for one in statuses), default=0.0)
    return _status(deployment, objective, now, state, None, None, Counted({}), covered, None, (), notes)


def objectives_of(deployment: Deployment) -> tuple[tuple[Objective, ...], str]:
    """The deployment's own objectives, else defaults of its model's class; and where they come from."""
    if deployment.objectives:
        return deployment.objectives, "fleet.yaml"
    found = model_class(deployment.model)
    if found is None:
        return (), f"none in fleet.yaml, and the class of model {deployment.model!r} is not known from its name"
    kinds: tuple[tuple[Literal["ttft", "tpot"], float], ...] = (
        ("ttft", found.ttft_seconds),
        ("tpot", found.tpot_seconds),
    )
    defaults = tuple(
        Objective(kind=kind, threshold_seconds=seconds, target_ratio=_DEFAULT_TARGET) for kind, seconds in kinds
    )
    return defaults, f"default: {found.source}"


def model_class(model: str) -> ModelClass | None:
    """The class a model's name tells; None when it tells none, or a size no class was made for."""
    name = model.lower()
    if "gpt-oss-120b" in name:
        return MODEL_CLASSES["gpt_oss_120b"]
    if re.search(r"deepseek-r1(?!-distill)|qwq|thinking|reasoner", name):
        return MODEL_CLASSES["reasoning"]
    if re.search(r"\d+x\d+(\.\d+)?b|\d+b-a\d+(\.\d+)?b", name):
        return MODEL_CLASSES["mixture"]
    sizes = [float(size) for size in re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z0-9])", name)]
    if not sizes:
        return None
    if max(sizes) <= 13:
        return MODEL_CLASSES["up_to_13b"]
    if 13 < max(sizes) <= 80:
        return MODEL_CLASSES["up_to_80b"]
    return MODEL_CLASSES["from_400b"] if max(sizes) >= 400 else None
