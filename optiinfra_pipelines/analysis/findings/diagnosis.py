"""What is wrong with one target in one window: one root finding, its consequences, and what could not be judged.

Pure: time and every row enter as arguments. Order of causes: data that are not there rule out every other verdict; a
restart stands by itself; then memory pressure, low throughput, queue, latency, cache. The first of these that holds is
the root, the others of its time are named in it. Keeping findings over time is `update`.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from optiinfra_pipelines.analysis.findings.bottlenecks import (
    Queue,
    memory_pressure,
    queue_buildup,
)
from optiinfra_pipelines.analysis.findings.cache import cache_finding
from optiinfra_pipelines.analysis.findings.doubts import memory_doubt, queue_doubt
from optiinfra_pipelines.analysis.findings.latency_share import METRICS, Miss, miss, phase_shares
from optiinfra_pipelines.analysis.findings.life import restart_finding, stale_finding
from optiinfra_pipelines.analysis.findings.load import (
    latency_finding,
    memory_finding,
    queue_finding,
    throughput_finding,
)
from optiinfra_pipelines.analysis.findings.stretches import Stretch
from optiinfra_pipelines.analysis.findings.window import EngineWindow
from optiinfra_pipelines.domain.findings import Abstention, Consequence, Diagnosis, Finding, FindingKind
from optiinfra_pipelines.domain.fleet import Objective

Values = Mapping[str, float]
# What depends on load, from the deepest cause to the last effect.
LOAD_KINDS = (
    FindingKind.MEMORY_PRESSURE,
    FindingKind.LOW_THROUGHPUT,
    FindingKind.QUEUE_BUILDUP,
    FindingKind.HIGH_LATENCY,
    FindingKind.CACHE_INEFFICIENCY,
)


def diagnose(window: EngineWindow, values: Values) -> Diagnosis:
    """Everything that can be said about one target. values: every threshold by name (`domain.thresholds`)."""
    if window.is_idle_slot:
        reason = "an idle slot: a place for candidates of rollouts, in which nothing runs now"
        return _diagnosis(window, [], dict.fromkeys((FindingKind.RESTARTED, *LOAD_KINDS), reason))
    stale = stale_finding(window, values)
    if stale is not None:
        return _diagnosis(
            window, [stale], dict.fromkeys((FindingKind.RESTARTED, *LOAD_KINDS), "there are no fresh data")
        )
    own: list[Finding] = []
    unknown: dict[FindingKind, str] = {}
    _keep(own, unknown, FindingKind.RESTARTED, restart_finding(window, values))
    if window.vantage == "cache":
        return _diagnosis(window, own, unknown | dict.fromkeys(LOAD_KINDS, "a cache server runs no requests"))
    if not window.steps:
        reason = "fewer than two comparable scrapes in the window: no counter can be seen to move"
        return _diagnosis(window, own, unknown | dict.fromkeys(LOAD_KINDS, reason))
    load, reasons = _load(window, values)
    return _diagnosis(window, [*own, *load], unknown | reasons)


def _diagnosis(window: EngineWindow, findings: list[Finding], reasons: Mapping[FindingKind, str]) -> Diagnosis:
    kinds = {FindingKind.STALE_OR_MISSING_DATA, FindingKind.RESTARTED, *LOAD_KINDS}
    return Diagnosis(
        subject=window.subject,
        at=window.end,
        judged=frozenset(kinds - set(reasons)),
        findings=tuple(findings),
        abstentions=tuple(
            Abstention(subject=window.subject, kind=kind, reason=reason) for kind, reason in reasons.items()
        ),
    )


def _load(window: EngineWindow, values: Values) -> tuple[list[Finding], dict[FindingKind, str]]:
    """The root findings of the load, and the reasons of what could not be judged.

    What happens while memory is short follows from it. Work that waited at another time of the window is a second root.
    """
    reasons: dict[FindingKind, str] = {}
    pressed = _memory(window, values, reasons)
    queues = _queues(window, values, reasons, pressed)
    during: list[Finding] = [memory_finding(window, pressed, values)] if pressed else []
    apart: list[Finding] = []
    if FindingKind.QUEUE_BUILDUP in reasons:
        reasons[FindingKind.LOW_THROUGHPUT] = "nobody knows whether work waited"
    for queue in queues:
        place = during if pressed and queue.cause == "kv_bound" else apart
        if window.vantage != "frontend":
            _keep(place, reasons, FindingKind.LOW_THROUGHPUT, throughput_finding(window, queue.stretch, values))
        place.append(queue_finding(window, queue, values))
    # Latency and cache are judged over the whole window, so they follow from its latest trouble.
    last = apart or during
    _keep(last, reasons, FindingKind.HIGH_LATENCY, _latency(window, values))
    _keep(last, reasons, FindingKind.CACHE_INEFFICIENCY, cache_finding(window, values))
    roots = [_rooted(found) for found in (during, apart) if found]
    return roots, {kind: why for kind, why in reasons.items() if kind not in {root.kind for root in roots}}


def _rooted(found: list[Finding]) -> Finding:
    """The first is the root; the others become its consequences, their evidence its evidence."""
    root, *rest = found
    known = {(signal.name, signal.window_start, signal.window_end) for signal in root.evidence}
    more = [s for one in rest for s in one.evidence if (s.name, s.window_start, s.window_end) not in known]
    effects = tuple(Consequence(kind=one.kind, cause=one.cause, summary=one.summary) for one in rest)
    return root.model_copy(update={"consequences": effects, "evidence": (*root.evidence, *more)})


def _keep(
    found: list[Finding], reasons: dict[FindingKind, str], kind: FindingKind, outcome: Finding | str | None
) -> None:
    if isinstance(outcome, Finding):
        found.append(outcome)
    elif isinstance(outcome, str):
        reasons[kind] = outcome


def _memory(window: EngineWindow, values: Values, reasons: dict[FindingKind, str]) -> Stretch | None:
    if not window.has("kv_cache_usage_ratio"):
        reasons[FindingKind.MEMORY_PRESSURE] = "KV-cache usage is not exposed"
        return None
    preempts = any("preemptions_total" in step.growth for step in window.steps)
    if not preempts and not window.has("requests_waiting"):
        reasons[FindingKind.MEMORY_PRESSURE] = "neither preemptions nor waiting requests are exposed"
        return None
    pressed = memory_pressure(window, values)
    doubt = memory_doubt(window, values) if pressed is None else None
    if doubt is not None:
        reasons[FindingKind.MEMORY_PRESSURE] = doubt
    return pressed


def _queues(
    window: EngineWindow, values: Values, reasons: dict[FindingKind, str], pressed: Stretch | None
) -> list[Queue]:
    if window.vantage == "frontend":
        is_known = window.has("requests_running") and window.has("max_running_requests")
        missing = "requests in flight or the workers' batch slots are not exposed"
    else:
        is_known, missing = window.has("requests_waiting"), "waiting requests are not exposed"
    if not is_known:
        reasons[FindingKind.QUEUE_BUILDUP] = missing
        return []
    queues = queue_buildup(window, values, pressed)
    doubt = None if queues else queue_doubt(window, values, pressed)
    if doubt is not None:
        reasons[FindingKind.QUEUE_BUILDUP] = doubt
    return queues


def _latency(window: EngineWindow, values: Values) -> Finding | str | None:
    """The first objective of latency that is missed; a reason when none could be judged."""
    own = [objective for objective in window.objectives if objective.kind in METRICS]
    if not own:
        return "the deployment has no latency objective"
    reasons: list[str] = []
    for objective in own:
        outcome = _missed(window, objective, values)
        if isinstance(outcome, Miss):
            return latency_finding(window, outcome, phase_shares(objective.kind, window.steps))
        if isinstance(outcome, str):
            reasons.append(f"{objective.kind}: {outcome}")
    return "; ".join(reasons) if len(reasons) == len(own) else None


def _missed(window: EngineWindow, objective: Objective, values: Values) -> Miss | str | None:
    rows = window.tables.frames["stg_engine_histograms"].filter(
        pl.col("metric") == METRICS[objective.kind], pl.col("bucket_counts").is_not_null()
    )
    known = [bounds_id for bounds_id in rows["bounds_id"].unique().to_list() if bounds_id in window.bounds]
    if not known:
        return f"{METRICS[objective.kind]} is not exposed"
    if len(known) > 1:
        return "bucket bounds changed within the window"
    bounds = list(window.bounds[known[0]])
    first, last = window.steps[0].start_at, window.steps[-1].end_at
    good = total = 0.0
    edge = max((b for b in bounds if b <= (objective.threshold_seconds or 0) * (1 + 1e-9)), default=None)
    for _, rank in rows.filter(pl.col("scraped_at").is_between(first, last)).group_by("engine_rank"):
        counts = rank.sort("scraped_at")["bucket_counts"].to_list()
        if edge is not None and len(counts) > 1 and len(counts[0]) == len(counts[-1]) == len(bounds):
            good += counts[-1][bounds.index(edge)] - counts[0][bounds.index(edge)]
            total += counts[-1][-1] - counts[0][-1]
    if good < 0 or total < good:
        return "its counters contradict each other"
    outcome = miss(objective, (good, total), bounds, window.engine, values["latency_requests"])
    if isinstance(outcome, Miss) and outcome.snapped.remedy is not None:
        return f"the nearest bucket edge under it is {outcome.snapped.edge:g} s; {outcome.snapped.remedy}"
    return outcome
