"""Make the document of a report from its data: what burns, why, what to do, what it costs, what there is.

Pure. A section always appears: with what it has, or saying that there was nothing, or that it has not been made yet.
Findings and recommendations are `advice`; plots `plots`; showing the document the renderers'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime

import polars as pl

from optiinfra_pipelines.analysis.report.advice import (
    accuracy_section,
    findings_section,
    insight_section,
    recommendations_section,
)
from optiinfra_pipelines.analysis.report.data import ReportData
from optiinfra_pipelines.analysis.report.document import Document, Grid, Part, Picture, Section, Tile, Tone, Words
from optiinfra_pipelines.analysis.report.plots import (
    MAX_LINES,
    MAX_PANELS,
    LatencyLine,
    cost_svg,
    latency_svg,
    load_svg,
    states_svg,
)
from optiinfra_pipelines.analysis.report.values import at, cell, digits, duration, heading, interval, unit_of, value
from optiinfra_pipelines.domain.objectives import ObjectiveStatus

NOT_MADE = "Not made yet: the next refresh makes it."
# Objective kinds -> the metric whose plot shows them.
_METRICS = {
    "ttft": "time_to_first_token_seconds",
    "tpot": "time_per_output_token_seconds",
    "itl": "inter_token_latency_seconds",
    "e2e": "request_duration_seconds",
}
_METRIC_WORDS = {
    "time_to_first_token_seconds": "time to first token",
    "time_per_output_token_seconds": "time per output token",
    "inter_token_latency_seconds": "inter-token latency",
    "request_duration_seconds": "request duration",
}
_STATE_TONES: dict[str, Tone] = {"burning": "critical", "exhausted": "critical", "met": "good", "no_data": "warning"}
_SOURCE_WORDS = {
    "live": "live",
    "recorded": "recorded (shows what happened when it was recorded, not now)",
    "simulated": "simulated (no real engine behind it)",
}


def make_document(data: ReportData) -> Document:
    """The whole report, in the order in which a person on call reads it."""
    return Document(
        title="OptiInfra fleet report",
        subtitle=f"{at(data.made_at)}, over the {digits(round(data.hours, 2))} h before. {_sources(data)}",
        tiles=_tiles(data),
        sections=(
            insight_section(data.advice.insight),
            _burning(data),
            findings_section(data.advice.findings, data.advice.abstentions, data.made_at),
            recommendations_section(data.advice.recommendations, data.advice.refusals),
            accuracy_section(data.advice.accuracy),
            _waste(data),
            _fleet(data),
            _hosts(data),
            _reading(),
        ),
    )


def _sources(data: ReportData) -> str:
    fleet = data.frames.get("fleet")
    if fleet is None:
        return "Which targets there are is not known."
    counts = Counter(str(source) for source in fleet["source"].to_list())
    told = [f"{count} {_SOURCE_WORDS.get(source, source)}" for source, count in sorted(counts.items())]
    return f"Targets: {', '.join(told)}." if told else "No target is configured."


def _tiles(data: ReportData) -> list[Tile]:
    tiles = []
    fleet = data.frames.get("fleet")
    if fleet is not None:
        expected = fleet.filter(~_is_idle_slot())
        up, known = expected["is_up"].sum() or 0, expected["is_up"].is_not_null().sum()
        tone: Tone = "good" if expected.height and up == expected.height else "critical" if known > up else "warning"
        tiles.append(Tile("targets up", f"{up} of {expected.height}", tone=tone if expected.height else "quiet"))
    else:
        tiles.append(Tile("targets up", "unknown"))
    tiles.append(_objectives_tile(data.advice.objectives))
    findings = data.advice.findings
    if findings is None:
        tiles.append(Tile("open findings", "unknown"))
    else:
        severities = Counter(finding.severity.value for finding in findings if finding.is_open)
        worst: Tone = "critical" if severities["critical"] else "warning" if severities["warning"] else "quiet"
        note = ", ".join(f"{severities[one]} {one}" for one in ("critical", "warning", "info") if severities[one])
        tiles.append(Tile("open findings", digits(severities.total()), note, worst))
    declined = data.advice.abstentions
    tiles.append(Tile("judgments declined", "unknown" if declined is None else digits(len(declined))))
    advised = data.advice.recommendations
    tiles.append(Tile("recommendations", "unknown" if advised is None else digits(len(advised))))
    return tiles


def _objectives_tile(objectives: Sequence[ObjectiveStatus] | None) -> Tile:
    if objectives is None:
        return Tile("objectives kept", "unknown")
    if not objectives:
        return Tile("objectives kept", "none set")
    states = Counter(one.state for one in objectives)
    bad = states["burning"] + states["exhausted"]
    note = f"{states['no_data']} without data" if states["no_data"] else ""
    tone: Tone = "critical" if bad else "warning" if states["no_data"] else "good"
    return Tile("objectives kept", f"{states['met']} of {len(objectives)}", note, tone)


def _burning(data: ReportData) -> Section:
    """Objectives, and latency against them."""
    objectives = data.advice.objectives
    parts: list[Part] = []
    if objectives is None:
        parts.append(Words(f"Objectives: {NOT_MADE}", "quiet"))
    elif not objectives:
        parts.append(Words("No deployment states an objective; add `objectives` to it in fleet.yaml.", "quiet"))
    else:
        ranked = sorted(objectives, key=lambda one: (_rank(one), one.remaining_ratio or 0.0))
        parts.append(
            Grid(
                ("deployment", "objective", "state", "good share", "budget left", "requests", "seen at", "notes"),
                tuple(_objective_row(one) for one in ranked),
                title="Objectives",
                note="The share of requests at or under the bucket edge; each over its own window.",
                numeric=frozenset({3, 4, 5}),
            )
        )
    lines = _latency_lines(data)
    if lines:
        parts.append(
            Picture(
                latency_svg(lines),
                "95th percentile by the minute, last two hours with data. The band is the histogram bucket that holds "
                "it: the true value lies in the band, the line inside is interpolated. Dashed: the objective.",
            )
        )
    elif data.frames.get("latency") is None:
        parts.append(Words(f"Latency: {NOT_MADE}", "quiet"))
    else:
        parts.append(Words("No request was measured in the window, so there is no latency to show.", "quiet"))
    return Section("What burns", parts)


def _rank(status: ObjectiveStatus) -> int:
    return ("exhausted", "burning", "no_data", "met").index(status.state)


def _objective_row(status: ObjectiveStatus) -> tuple[str, ...]:
    objective = status.objective
    bound = "" if objective.threshold_seconds is None else f" within {value(objective.threshold_seconds, 's')}"
    window = f"{digits(objective.window_days)} d"
    firing = [rate.pair.name for rate in status.burn_rates if rate.is_firing]
    notes = [*(f"burns: {name}" for name in firing), *status.notes]
    return (
        status.deployment,
        f"{objective.kind}{bound} for {value(objective.target_ratio, 'ratio')} over {window}",
        status.state.replace("_", " "),
        value(status.good_ratio, "ratio"),
        value(status.remaining_ratio, "ratio"),
        value(status.total, ""),
        status.vantage or "unknown",
        "; ".join(notes),
    )


def _latency_lines(data: ReportData) -> list[LatencyLine]:
    """Panels of what has an objective first, then of what served most."""
    latency, fleet = data.frames.get("latency"), data.frames.get("fleet")
    if latency is None or latency.is_empty():
        return []
    deployed = {} if fleet is None else dict(zip(fleet["target"].to_list(), fleet["deployment"].to_list(), strict=True))
    promised: dict[tuple[str, str], float | None] = {
        (deployment.name, _METRICS[objective.kind]): objective.threshold_seconds
        for deployment in data.deployments
        for objective in deployment.objectives
        if objective.kind in _METRICS
    }
    has_objective = {name for name, _ in promised}
    ranked: list[tuple[tuple[bool, float], LatencyLine]] = []
    for (target, metric), rows in latency.group_by("target", "metric", maintain_order=True):
        deployment = deployed.get(target)
        threshold = promised.get((str(deployment), str(metric)))
        # Without an objective of its own a target shows its first token only.
        if threshold is None and (deployment in has_objective or metric != "time_to_first_token_seconds"):
            continue
        count = float(rows["observation_count"].sum())
        title = f"{target}: {_METRIC_WORDS.get(str(metric), str(metric))}, p95"
        ranked.append(((threshold is None, -count), LatencyLine(title, rows.sort("minute_at"), threshold)))
    return [line for _, line in sorted(ranked, key=lambda pair: pair[0])[:MAX_PANELS]]


def _waste(data: ReportData) -> Section:
    parts: list[Part] = []
    states, cost = data.gpu_states, data.cost
    if states is not None:
        if not states.is_empty():
            parts.append(
                Picture(states_svg(states), "GPU-hours by what the GPU did, per host, on the window's UTC days.")
            )
        parts.append(frame_grid(states, "GPU-hours by state", empty="No GPU was seen in the window."))
    if cost is not None:
        if cost.drop_nulls("usd").height:
            parts.append(Picture(cost_svg(cost, "deployment"), "Cost by deployment over the last 7 days, US dollars."))
        parts.append(
            frame_grid(cost, "Cost by deployment", empty="No deployment has a cost: none has GPUs or a price.")
        )
    parts += [frame_grid(frame, title) for title, frame in data.waste.items()]
    gpus = data.frames.get("gpus")
    if gpus is None:
        parts.append(Words(f"GPU activity: {NOT_MADE}", "quiet"))
    else:
        parts.append(
            frame_grid(
                gpus,
                "GPU activity over the window",
                empty="No GPU was seen in the window, so nothing is known about idle ones.",
                note="Duty cycle is the share of time in which anything ran; SM and DRAM activity say how much.",
            )
        )
    if not data.waste and states is None and cost is None:
        parts.append(Words(f"Waste and cost: {NOT_MADE}", "quiet"))
    return Section("Waste and cost", parts)


def _fleet(data: ReportData) -> Section:
    fleet, load = data.frames.get("fleet"), data.frames.get("load")
    if fleet is None:
        return Section("Fleet", [Words(NOT_MADE, "quiet")])
    parts: list[Part] = [
        Grid(
            (
                "target",
                "deployment",
                "engine",
                "source",
                "state",
                "requests",
                "output",
                "KV cache, most",
                "waiting, most",
                "preempted",
                "first token p95 in",
            ),
            tuple(_fleet_row(data, row) for row in fleet.iter_rows(named=True)),
            note=f"Over the last {digits(round(data.hours, 2))} h. The p95 is given as the bucket that holds it.",
            numeric=frozenset(range(5, 11)),
            empty="No target is configured; add `targets` to fleet.yaml.",
        )
    ]
    if load is not None and not load.is_empty():
        targets = load["target"].n_unique()
        rest = f" The {MAX_LINES} under most pressure of {targets}." if targets > MAX_LINES else ""
        parts.append(
            Picture(
                load_svg(load),
                f"By the minute, last two hours with data: the largest share of KV-cache blocks in use, and the most "
                f"requests waiting at once.{rest}",
            )
        )
    return Section("Fleet", parts)


def _is_idle_slot() -> pl.Expr:
    """Of a target: it does not answer, and nothing should run there."""
    return pl.col("is_up").eq_missing(False) & pl.col("error_kind_last").eq_missing("idle_slot")


def _fleet_row(data: ReportData, row: dict[str, object]) -> tuple[str, ...]:
    match row["is_up"]:
        case True:
            state = "up"
        case False if row["error_kind_last"] == "idle_slot":
            state = "idle slot"
        case False:
            state = f"down ({row['error_kind_last'] or 'unknown'})"
        case _:
            state = "never scraped"
    since = row["since_at"]
    if isinstance(since, datetime):
        state += f" for {duration(data.made_at - since)}"
    return (
        str(row["target"]),
        cell("deployment", row["deployment"]) if row["deployment"] else "none",
        cell("engine", row["engine"]),
        cell("source", row["source"]),
        state,
        cell("requests_per_second", row["requests_per_second"]),
        cell("generation_tokens_per_second", row["generation_tokens_per_second"]),
        cell("kv_cache_usage_max_ratio", row["kv_cache_usage_max_ratio"]),
        cell("requests", row["requests_waiting_max"]),
        cell("preemptions", row["preemptions"]),
        interval(_float(row["p95_lower_seconds"]), _float(row["p95_upper_seconds"]), "s"),
    )


def _float(item: object) -> float | None:
    return float(item) if isinstance(item, int | float) else None


def _hosts(data: ReportData) -> Section:
    hosts = data.frames.get("hosts")
    if hosts is None:
        return Section("Hosts", [Words(NOT_MADE, "quiet")])
    return Section("Hosts", [frame_grid(hosts, "Over the window", empty="No host was read in the window.")])


def frame_grid(frame: pl.DataFrame, title: str, *, empty: str = "nothing to show", note: str = "") -> Grid:
    """A frame as a table: headings in words, each value with the unit that its column's name ends in."""
    columns = frame.columns
    rows = [tuple(map(cell, columns, row)) for row in frame.iter_rows()]
    return Grid(
        tuple(heading(column) for column in columns),
        tuple(rows),
        title=title,
        note=note,
        numeric=frozenset(
            index for index, column in enumerate(columns) if frame[column].dtype.is_numeric() or unit_of(column)
        ),
        empty=empty,
        is_brief=False,
    )


def _reading() -> Section:
    return Section(
        "How to read this",
        [
            Words(
                "Unknown means that nothing told the value; it is neither zero nor well. Latencies come from "
                "histograms: a quantile is known to the bucket that holds it and no closer. Times are UTC. "
                "An expected effect is an interval for the change of a mean, with how it was obtained.",
                "quiet",
            )
        ],
    )
