"""What is wrong with one GPU: faults, throttling, idleness that costs money.

Pure. Activity, memory and processes decide, never the duty cycle alone: 100 % "utilization" is one small kernel that
never ends. GPU memory of an engine that preallocates says nothing about pressure and is not looked at for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import polars as pl

from optiinfra_pipelines.analysis.findings.load import finding
from optiinfra_pipelines.analysis.findings.measure import Tables
from optiinfra_pipelines.domain.base import Source
from optiinfra_pipelines.domain.evidence import Signal, Statistic
from optiinfra_pipelines.domain.findings import Abstention, Diagnosis, Finding, FindingKind, Severity, Subject
from optiinfra_pipelines.domain.gpus import xid

Values = Mapping[str, float]
Outcome = Finding | str | None
# cause, column of int_gpu_minutes, threshold, severity: the worst first
_THROTTLES = (
    ("hardware", "hardware_slowdown_seconds", "thermal_throttled_ratio", Severity.CRITICAL),
    ("thermal", "thermal_throttle_seconds", "thermal_throttled_ratio", Severity.WARNING),
    ("power", "power_throttle_seconds", "power_throttled_ratio", Severity.INFO),
)
# Best first: what a GPU's activity is read from.
_ACTIVITY = ("sm_active_max_ratio", "graphics_active_mean_ratio", "gpu_utilization_max_ratio")


@dataclass(frozen=True)
class GpuWindow:
    """One GPU (or MIG instance) in [start, end]. minutes: its rows of int_gpu_minutes, oldest first.

    requests: most requests that engines on its host ran or queued in the window; None when nobody knows.
    """

    host: str
    gpu_uuid: str
    mig_instance: str
    start: datetime
    end: datetime
    source: Source
    minutes: pl.DataFrame
    requests: float | None

    @property
    def subject(self) -> Subject:
        slice_ = f"/{self.mig_instance}" if self.mig_instance else ""
        return Subject(kind="gpu", name=f"{self.host}/{self.gpu_uuid}{slice_}")

    @property
    def span(self) -> tuple[datetime, datetime]:
        return self.start, self.end

    def signal(
        self,
        name: str,
        column: str,
        statistic: Statistic,
        unit: str,
        *,
        threshold: float | None = None,
        per: str | None = None,
        since: datetime | None = None,
    ) -> Signal:
        """A signal of int_gpu_minutes of this GPU over the window, or from `since` on."""
        return Tables({"int_gpu_minutes": self.minutes}).signal(
            name,
            unit,
            (since or self.start, self.end),
            table="int_gpu_minutes",
            keys={"host": self.host, "gpu_uuid": self.gpu_uuid, "mig_instance": self.mig_instance},
            column=column,
            statistic=statistic,
            per=per,
            threshold=threshold,
        )


def diagnose_gpu(window: GpuWindow, values: Values) -> Diagnosis:
    """GPU_FAULT, THROTTLED, IDLE_FREE, IDLE_HELD and stale data of one GPU."""
    stale = _stale(window, values)
    if stale is not None:
        kinds = (FindingKind.GPU_FAULT, FindingKind.THROTTLED, FindingKind.IDLE_FREE, FindingKind.IDLE_HELD)
        outcomes: dict[FindingKind, Outcome] = dict.fromkeys(kinds, "there are no fresh data")
    else:
        fault = _fault(window)
        outcomes = {FindingKind.GPU_FAULT: fault, FindingKind.THROTTLED: _throttled(window, values)}
        idle = "it is faulty" if isinstance(fault, Finding) else None
        outcomes[FindingKind.IDLE_FREE] = idle or _idle_free(window, values)
        outcomes[FindingKind.IDLE_HELD] = idle or _idle_held(window, values)
    found = [one for one in (stale, *outcomes.values()) if isinstance(one, Finding)]
    judged = {kind for kind, outcome in outcomes.items() if not isinstance(outcome, str)}
    return Diagnosis(
        subject=window.subject,
        at=window.end,
        judged=frozenset(judged | {FindingKind.STALE_OR_MISSING_DATA}),
        findings=tuple(found),
        abstentions=tuple(
            Abstention(subject=window.subject, kind=kind, reason=outcome)
            for kind, outcome in outcomes.items()
            if isinstance(outcome, str)
        ),
    )


def _found(window: GpuWindow, kind: FindingKind, cause: str, severity: Severity, summary: str, *s: Signal) -> Finding:
    first = window.minutes["minute_at"].min()
    since = first if isinstance(first, datetime) else window.start
    span = (since, None, window.end)
    return finding(window.subject, kind, cause, severity, span, window.source, summary, list(s))


def _stale(window: GpuWindow, values: Values) -> Finding | None:
    newest = window.minutes["minute_at"].max() if window.minutes.height else None
    limit = timedelta(seconds=values["stale_after_seconds"] + values["close_after_seconds"] + 60)
    if isinstance(newest, datetime) and window.end - newest <= limit:
        return None
    since = newest if isinstance(newest, datetime) else window.start
    seen = window.signal("minutes_seen", "sample_count", "count", "min", since=since + timedelta(microseconds=1))
    summary = f"No sample of this GPU since {since.isoformat(timespec='seconds')}."
    kind = FindingKind.STALE_OR_MISSING_DATA
    span = (since, None, window.end)
    return finding(window.subject, kind, "not_sampled", Severity.WARNING, span, window.source, summary, [seen])


def _fault(window: GpuWindow) -> Outcome:
    """The driver's own words: lost, a recovery it asks for, uncorrectable memory errors, XID events of the window."""
    newest = window.minutes.sort("minute_at").row(-1, named=True)
    kind = FindingKind.GPU_FAULT
    unhealthy = window.signal("unhealthy_samples", "unhealthy_count", "sum", "samples", threshold=1.0)
    health = newest.get("health_last")
    if health in ("lost", "reset_required"):
        words = "is lost" if health == "lost" else "needs a reset"
        return _found(window, kind, str(health), Severity.CRITICAL, f"The GPU {words}.", unhealthy)
    uncorrected = window.signal("ecc_uncorrected", "ecc_uncorrected", "sum", "errors", threshold=1.0)
    if newest.get("is_row_remap_failed"):
        return _found(
            window, kind, "row_remap_failed", Severity.CRITICAL, "A memory row could not be remapped.", unhealthy
        )
    if (uncorrected.value or 0) >= 1:
        words = f"{uncorrected.value:g} memory errors could not be corrected."
        return _found(window, kind, "ecc_uncorrected", Severity.CRITICAL, words, uncorrected)
    by_xid = _xid_fault(window)
    if by_xid is not None:
        return by_xid
    action = newest.get("recovery_action")
    if action not in (None, "none"):
        words = f"The driver asks for a recovery: {action}."
        return _found(window, kind, "recovery_action", Severity.WARNING, words, unhealthy)
    if newest.get("is_row_remap_pending"):
        words = "A memory row waits for a reset to be remapped."
        return _found(window, kind, "row_remap_pending", Severity.WARNING, words, unhealthy)
    known = (health, action, uncorrected.value, newest.get("xid_last"))
    return "health, errors and recovery action are not exposed" if all(one is None for one in known) else None


def _xid_fault(window: GpuWindow) -> Finding | None:
    """An XID of this window. One that was there before its first minute is old news, unless the GPU is unfit by it."""
    rows = window.minutes.sort("minute_at")
    counted = window.signal("xid_events", "xid", "sum", "events", threshold=1.0)
    codes = rows["xid_last"].drop_nulls() if "xid_last" in rows.columns else pl.Series([], dtype=pl.Int32)
    if codes.is_empty():
        return None
    meaning = xid(int(codes[-1]))
    is_new = (counted.value or 0) >= 1 or codes.n_unique() > 1 or rows["xid_last"].null_count() > 0
    if meaning.severity == "info" or (not is_new and meaning.severity != "critical"):
        return None
    last = window.signal("xid_last", "xid_last", "last", "xid")
    severity = Severity.CRITICAL if meaning.severity == "critical" else Severity.WARNING
    words = f"XID {meaning.code}: {meaning.meaning}. {meaning.action}"
    return _found(window, FindingKind.GPU_FAULT, f"xid_{meaning.code}", severity, words, last, counted)


def _throttled(window: GpuWindow, values: Values) -> Outcome:
    """Clocks held down by hardware, heat or the power limit, in shares of the time observed."""
    shares = [
        (
            cause,
            severity,
            window.signal(column, column, "sum_ratio", "ratio", per="observed_seconds", threshold=values[limit]),
        )
        for cause, column, limit, severity in _THROTTLES
    ]
    known = [one for one in shares if one[2].value is not None]
    if not known:
        return "time spent throttled is not exposed"
    for cause, severity, share in known:
        if (share.value or 0) > (share.threshold or 0):
            words = f"Clocks were held down by {cause} limits for {100 * (share.value or 0):.1f} % of the time."
            return _found(window, FindingKind.THROTTLED, cause, severity, words, share)
    return None


def _covers(window: GpuWindow, minutes: float) -> str | None:
    """A reason when too few minutes were seen to call anything idle."""
    seen = window.minutes.height
    # One minute in ten may be missing: a restart of collection is no activity.
    return None if seen >= 0.9 * minutes else f"{seen} of {minutes:g} minutes were seen"


def _activity(window: GpuWindow, values: Values) -> tuple[Signal, float] | None:
    """Largest activity of the window, and the p95 of its minutes; None where no counter tells."""
    for column in _ACTIVITY:
        known = (
            window.minutes[column].drop_nulls() if column in window.minutes.columns else pl.Series([], dtype=pl.Float64)
        )
        if known.len() >= 0.9 * window.minutes.height and known.len():
            p95 = known.quantile(0.95, interpolation="higher")
            signal = window.signal(f"{column}_mean", column, "mean", "ratio", threshold=values["idle_activity_ratio"])
            return signal, float(p95 if p95 is not None else 1.0)
    return None


def _memory_share(window: GpuWindow) -> Signal:
    return window.signal("memory_used_ratio", "memory_used_max_bytes", "sum_ratio", "ratio", per="memory_total_bytes")


def _idle_free(window: GpuWindow, values: Values) -> Outcome:
    """Nobody holds it and nothing ran on it for half an hour: it could be given back."""
    if (thin := _covers(window, values["idle_free_minutes"])) is not None:
        return thin
    activity, memory = _activity(window, values), _memory_share(window)
    processes = window.signal("processes", "process_count_max", "max", "processes", threshold=1.0)
    if activity is None or memory.value is None:
        return "activity or memory is not exposed"
    is_still = activity[1] <= values["idle_activity_ratio"]
    is_empty = memory.value <= values["idle_free_memory_ratio"] and (processes.value or 0) < 1
    if not is_still or not is_empty:
        return None
    words = f"No process, no activity, {100 * memory.value:.1f} % of memory used for {window.minutes.height} minutes."
    return _found(window, FindingKind.IDLE_FREE, "unused", Severity.INFO, words, activity[0], memory, processes)


def _idle_held(window: GpuWindow, values: Values) -> Outcome:
    """A model is kept in memory and nothing was asked of it."""
    if (thin := _covers(window, values["idle_held_minutes"])) is not None:
        return thin
    activity, memory = _activity(window, values), _memory_share(window)
    if activity is None or memory.value is None:
        return "activity or memory is not exposed"
    if activity[1] > values["idle_activity_ratio"] or memory.value < values["idle_held_memory_ratio"]:
        return None
    words = f"{100 * memory.value:.1f} % of memory held and no activity for {window.minutes.height} minutes."
    # Requests of the host may be those of its other GPUs: they do not make this one busy.
    cause = "no_requests" if window.requests == 0 else "no_activity"
    return _found(window, FindingKind.IDLE_HELD, cause, Severity.WARNING, words, activity[0], memory)
