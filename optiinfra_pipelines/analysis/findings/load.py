"""Findings about the load of one replica: memory pressure, queues, latency, throughput.

Pure. Here: facts of `bottlenecks` and `latency_share` -> findings with evidence. Not here: which of two findings of
one window is the root (`findings`).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from optiinfra_pipelines.analysis.findings.bottlenecks import Queue, wait_limit
from optiinfra_pipelines.analysis.findings.latency_share import METRICS, Miss, PhaseShares
from optiinfra_pipelines.analysis.findings.stretches import Stretch
from optiinfra_pipelines.analysis.findings.window import EngineWindow
from optiinfra_pipelines.domain.base import Source
from optiinfra_pipelines.domain.evidence import Signal, Statistic
from optiinfra_pipelines.domain.findings import Finding, FindingKind, Severity, Subject, finding_id

Values = Mapping[str, float]
Span = tuple[datetime, datetime]


def finding(
    subject: Subject,
    kind: FindingKind,
    cause: str,
    severity: Severity,
    span: tuple[datetime, datetime | None, datetime],
    source: Source,
    summary: str,
    evidence: list[Signal],
) -> Finding:
    """A finding with its id. span: since, until (None while it holds), last seen."""
    since, until, last_seen_at = span
    return Finding(
        id=finding_id(subject, kind, since),
        subject=subject,
        kind=kind,
        cause=cause,
        severity=severity,
        since=since,
        until=until,
        last_seen_at=last_seen_at,
        source=source,
        summary=summary,
        evidence=tuple(evidence),
    )


def memory_finding(window: EngineWindow, run: Stretch, values: Values) -> Finding:
    """KV memory is short: blocks ran out while requests were preempted or waited for them."""
    span = (run.counted_from, run.last_at)
    usage = gauge(window, "kv_cache_usage", "kv_cache_usage_ratio", "max", span, "ratio", values["kv_pressure_ratio"])
    preempted = growth(window, "preemptions", "preemptions_total", span, "preemptions")
    finished = growth(window, "requests_finished", "requests_finished_total", span, "requests")
    column = "requests_waiting_capacity" if window.has("requests_waiting_capacity") else "requests_waiting"
    waiting = gauge(window, column, column, "max", span, "requests", 1.0)
    evidence = [usage, preempted, finished, waiting]
    summary = f"KV cache {_percent(usage.value)} full"
    cause, severity = "requests_wait_for_blocks", Severity.WARNING
    if preempted.value:
        cause = "preemptions"
        per = ratio(window, "preemptions_per_request", ("preemptions_total", "requests_finished_total"), span)
        evidence.append(per.model_copy(update={"threshold": values["preemptions_per_request"]}))
        summary += f", {preempted.value:g} preemptions"
        if per.value is None or per.value >= values["preemptions_critical_per_request"]:
            severity = Severity.CRITICAL
    if waiting.value:
        summary += f", up to {waiting.value:g} requests waiting for blocks"
    kind = FindingKind.MEMORY_PRESSURE
    at = (run.since, run.until, run.last_at)
    return finding(window.subject, kind, cause, severity, at, window.source, summary + ".", evidence)


def queue_finding(window: EngineWindow, queue: Queue, values: Values) -> Finding:
    """Work waits longer than it may, and what it waits for."""
    run, limit = queue.stretch, wait_limit(window, values)
    span = (run.counted_from, run.last_at)
    at_frontend = window.vantage == "frontend"
    waiting_column = "requests_running" if at_frontend else "requests_waiting"
    waiting = gauge(window, waiting_column, waiting_column, "max", span, "requests", 1.0)
    evidence = [
        waiting,
        gauge(window, "requests_running", "requests_running", "mean", span, "requests"),
        gauge(window, "kv_cache_usage", "kv_cache_usage_ratio", "max", span, "ratio", values["kv_pressure_ratio"]),
        growth(window, "requests_finished", "requests_finished_total", span, "requests"),
        gauge(window, "batch_slots", "max_running_requests", "last", span, "requests"),
    ]
    words = f"Up to {waiting.value or 0:g} requests {'in flight' if at_frontend else 'waiting'}"
    if not at_frontend:
        evidence += [
            histogram_mean(window, "mean_queue_time", "queue_seconds", span, limit),
            _over_rate(window, "queued_work", ("requests_waiting", "requests_finished_total"), span, limit),
            histogram_mean(window, "tokens_per_step", "step_tokens", span, None, "tokens/step"),
        ]
        if evidence[-2].value is not None:
            words += f", {evidence[-2].value:.1f} s of work queued"
    told = [signal for signal in evidence if signal.value is not None]
    severity = Severity.CRITICAL if queue.is_growing and run.until is None else Severity.WARNING
    summary = f"{words}, {queue.because}." if at_frontend else f"{words}: {queue.because}."
    at = (run.since, run.until, run.last_at)
    kind = FindingKind.QUEUE_BUILDUP
    return finding(window.subject, kind, queue.cause, severity, at, window.source, summary, told)


def latency_finding(window: EngineWindow, missed: Miss, shares: PhaseShares | str) -> Finding:
    """An objective is missed, and the phase that spends the time."""
    kind = missed.objective.kind
    steps = window.steps
    span = (steps[0].start_at, steps[-1].end_at)
    metric = METRICS[kind]
    keys = {"target": window.target, "metric": metric}
    edge = missed.snapped.edge
    share = window.tables.signal(
        f"{kind}_at_or_under_edge",
        "ratio",
        span,
        table="stg_engine_histograms",
        keys=keys,
        column="bucket_counts",
        statistic="share_at_or_under",
        threshold=edge,
    )
    evidence = [share, histogram_mean(window, f"mean_{kind}", metric, span, None)]
    cause = "decode" if kind in ("tpot", "itl") else "unattributed"
    where = ""
    if isinstance(shares, PhaseShares):
        cause = shares.largest
        where = f"; {cause} takes {_percent(shares.shares[shares.largest])} of the mean"
        phases = [phase for phase in shares.shares if phase != "host"]
        evidence += [histogram_mean(window, f"mean_{p}", f"{p}_seconds", span, None) for p in phases]
    good = share.value if share.value is not None else 1 - missed.bad / missed.total
    snapped = "" if missed.snapped.is_exact else f" (edge under {missed.snapped.threshold:g} s)"
    summary = (
        f"{_percent(good)} of requests had {kind} of at most {edge:g} s{snapped}, "
        f"{_percent(missed.objective.target_ratio)} were promised{where}."
    )
    at = (span[0], None, span[1])
    kind_ = FindingKind.HIGH_LATENCY
    return finding(window.subject, kind_, cause, Severity.WARNING, at, window.source, summary, evidence)


def throughput_finding(window: EngineWindow, run: Stretch, values: Values) -> Finding | str | None:
    """Tokens a second under the deployment's own observed capacity while work waits; a reason where unknown."""
    capacity = window.capacity
    if capacity is None or capacity.period_count < values["capacity_periods"]:
        seen = capacity.period_count if capacity else 0
        return f"{seen} of {values['capacity_periods']:g} periods with waiting work were observed"
    tokens = run.grown("generation_tokens_total")
    if tokens is None or run.shown_seconds < values["sustained_seconds"]:
        return "output tokens are not counted, or work waited too briefly"
    limit = values["low_throughput_ratio"] * capacity.tokens_per_second
    span = (run.counted_from, run.last_at)
    made = sample_signal(window, "output_tokens", "generation_tokens_total", "rate", span, "tokens/s", limit)
    if made.value is None or made.value >= limit:
        return None
    waiting = gauge(window, "requests_waiting", "requests_waiting", "mean", span, "requests")
    summary = (
        f"{made.value:.1f} output tokens a second while {waiting.value or 0:.1f} requests waited; "
        f"this deployment's replicas made {capacity.tokens_per_second:.1f}."
    )
    at = (run.since, run.until, run.last_at)
    kind = FindingKind.LOW_THROUGHPUT
    cause = "below_own_capacity"
    return finding(window.subject, kind, cause, Severity.WARNING, at, window.source, summary, [made, waiting])


def sample_signal(
    window: EngineWindow,
    name: str,
    column: str,
    statistic: Statistic,
    span: Span,
    unit: str,
    threshold: float | None = None,
    per: str | None = None,
) -> Signal:
    """A signal of stg_engine_samples of this target. Ranks add up; a share is that of the fullest."""
    return window.tables.signal(
        name,
        unit,
        span,
        table="stg_engine_samples",
        keys={"target": window.target},
        column=column,
        statistic=statistic,
        per=per,
        across="max" if column.endswith("_ratio") else "sum",
        threshold=threshold,
    )


def gauge(
    window: EngineWindow,
    name: str,
    column: str,
    statistic: Statistic,
    span: Span,
    unit: str,
    threshold: float | None = None,
) -> Signal:
    return sample_signal(window, name, column, statistic, span, unit, threshold)


def growth(window: EngineWindow, name: str, column: str, span: Span, unit: str) -> Signal:
    return sample_signal(window, name, column, "increase", span, unit)


def ratio(window: EngineWindow, name: str, columns: tuple[str, str], span: Span) -> Signal:
    return sample_signal(window, name, columns[0], "increase_ratio", span, "ratio", per=columns[1])


def _over_rate(window: EngineWindow, name: str, columns: tuple[str, str], span: Span, threshold: float) -> Signal:
    return sample_signal(window, name, columns[0], "mean_over_rate", span, "s", threshold, per=columns[1])


def histogram_mean(
    window: EngineWindow, name: str, metric: str, span: Span, threshold: float | None, unit: str = "s"
) -> Signal:
    """New sum over new count of one histogram of this target."""
    return window.tables.signal(
        name,
        unit,
        span,
        table="stg_engine_histograms",
        keys={"target": window.target, "metric": metric},
        column="sum_value",
        statistic="increase_ratio",
        per="count_value",
        threshold=threshold,
    )


def _percent(ratio_value: float | None) -> str:
    return "unknown" if ratio_value is None else f"{100 * ratio_value:.1f} %"
