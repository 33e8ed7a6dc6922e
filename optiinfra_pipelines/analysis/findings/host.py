"""Whether a host holds its engines back: CPU pressure, steal, quota, run-queue wait.

Pure. A busy host that serves nothing is nobody's bottleneck: without an engine at work on it there is no finding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import polars as pl

from optiinfra_pipelines.analysis.findings.load import finding
from optiinfra_pipelines.analysis.findings.measure import Tables
from optiinfra_pipelines.domain.base import Source
from optiinfra_pipelines.domain.evidence import Signal
from optiinfra_pipelines.domain.findings import Abstention, Diagnosis, Finding, FindingKind, Severity, Subject

Values = Mapping[str, float]


@dataclass(frozen=True)
class HostWindow:
    """One host in [start, end]. minutes, processes: rows of int_host_minutes and int_host_process_minutes.

    is_serving: whether an engine on it ran or queued requests in the window; None when nobody knows.
    """

    host: str
    start: datetime
    end: datetime
    source: Source
    minutes: pl.DataFrame
    processes: pl.DataFrame
    is_serving: bool | None

    @property
    def subject(self) -> Subject:
        return Subject(kind="host", name=self.host)


def diagnose_host(window: HostWindow, values: Values) -> Diagnosis:
    """HOST_BOUND and stale data of one host."""
    stale = _stale(window, values)
    outcome = "there are no fresh data" if stale else _bound(window, values)
    kinds = {FindingKind.STALE_OR_MISSING_DATA} | (set() if isinstance(outcome, str) else {FindingKind.HOST_BOUND})
    found = [one for one in (stale, outcome) if isinstance(one, Finding)]
    abstained = [outcome] if isinstance(outcome, str) else []
    return Diagnosis(
        subject=window.subject,
        at=window.end,
        judged=frozenset(kinds),
        findings=tuple(found),
        abstentions=tuple(
            Abstention(subject=window.subject, kind=FindingKind.HOST_BOUND, reason=why) for why in abstained
        ),
    )


def _stale(window: HostWindow, values: Values) -> Finding | None:
    newest = window.minutes["minute_at"].max() if window.minutes.height else None
    # A minute's row may be read up to a refresh after the minute's end.
    limit = timedelta(seconds=values["stale_after_seconds"] + values["close_after_seconds"] + 60)
    if isinstance(newest, datetime) and window.end - newest <= limit:
        return None
    since = newest if isinstance(newest, datetime) else window.start
    span = (since, None, window.end)
    signal = _tables(window).signal(
        "minutes_seen",
        "min",
        (since + timedelta(microseconds=1), window.end),
        table="int_host_minutes",
        keys={"host": window.host},
        column="sample_count",
        statistic="count",
        threshold=1.0,
    )
    summary = f"No sample of host {window.host} since {since.isoformat(timespec='seconds')}."
    kind = FindingKind.STALE_OR_MISSING_DATA
    return finding(window.subject, kind, "not_sampled", Severity.WARNING, span, window.source, summary, [signal])


def _bound(window: HostWindow, values: Values) -> Finding | str | None:
    if window.is_serving is None:
        return "no target of fleet.yaml names this host, so nobody knows whether it serves"
    if not window.is_serving:
        return "no engine on it had work in the window"
    signals = _signals(window, values)
    known = [(cause, signal) for cause, signal in signals if signal.value is not None]
    if not known:
        return "neither PSI, steal, quota nor run-queue wait is known of this host"
    over = [(cause, s) for cause, s in known if s.threshold is not None and (s.value or 0) >= s.threshold]
    if not over:
        return None
    cause, signal = max(over, key=lambda one: (one[1].value or 0) / (one[1].threshold or 1))
    summary = (
        f"Engines on {window.host} had work while {cause.replace('_', ' ')} took "
        f"{signal.value:.3g} {signal.unit} of the time."
    )
    evidence = [s for _, s in known]
    kind = FindingKind.HOST_BOUND
    at = (_first(window), None, window.end)
    return finding(window.subject, kind, cause, Severity.WARNING, at, window.source, summary, evidence)


def _first(window: HostWindow) -> datetime:
    first = window.minutes["minute_at"].min()
    return first if isinstance(first, datetime) else window.start


def _tables(window: HostWindow) -> Tables:
    return Tables({"int_host_minutes": window.minutes, "int_host_process_minutes": window.processes})


def _signals(window: HostWindow, values: Values) -> list[tuple[str, Signal]]:
    """What may hold engines back, each with its cause."""
    counted = window.minutes["cpu_count"].drop_nulls() if "cpu_count" in window.minutes.columns else None
    cores = float(counted[-1]) if counted is not None and counted.len() else 1.0

    def share(cause: str, column: str, unit: str, threshold: float) -> tuple[str, Signal]:
        return cause, _share(window, "int_host_minutes", {"host": window.host}, column, unit, threshold)

    waits = _run_queue_wait(window, values["run_queue_wait_ratio"])
    return [
        *([("run_queue_wait", waits)] if waits else []),
        share("cpu_quota", "cgroup_cpu_throttled_seconds", "ratio", values["cgroup_throttled_ratio"]),
        # Steal is counted over all CPUs: cores that were taken away.
        share("cpu_steal", "cpu_steal_seconds", "cores", values["cpu_steal_ratio"] * cores),
        share("cpu_pressure", "psi_cpu_some_seconds", "ratio", values["psi_cpu_ratio"]),
    ]


def _run_queue_wait(window: HostWindow, threshold: float) -> Signal | None:
    """Of the engine processes the one that waited most; None when there are none."""
    if window.processes.is_empty():
        return None
    pids = window.processes.filter(pl.col("role").is_in(["engine", "gpu"]))["pid"].unique().sort().to_list()
    table, column = "int_host_process_minutes", "run_queue_wait_seconds"
    waits = [_share(window, table, {"host": window.host, "pid": str(pid)}, column, "ratio", threshold) for pid in pids]
    return max((one for one in waits if one.value is not None), key=lambda one: one.value or 0, default=None)


def _share(window: HostWindow, table: str, keys: Mapping[str, str], column: str, unit: str, threshold: float) -> Signal:
    """Seconds of something over the seconds observed."""
    return _tables(window).signal(
        column.replace("_seconds", "_ratio"),
        unit,
        (window.start, window.end),
        table=table,
        keys=keys,
        column=column,
        statistic="sum_ratio",
        per="observed_seconds",
        threshold=threshold,
    )
