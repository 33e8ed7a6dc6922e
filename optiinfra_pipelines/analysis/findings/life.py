"""Whether one target can be judged at all: stale or missing data, restarts.

Pure. A target without fresh data gets a finding that says so and no other verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

import polars as pl

from optiinfra_pipelines.analysis.findings.load import finding, sample_signal
from optiinfra_pipelines.analysis.findings.window import EngineWindow, Step, is_restart
from optiinfra_pipelines.domain.findings import Finding, FindingKind, Severity

Values = Mapping[str, float]


def stale_finding(window: EngineWindow, values: Values) -> Finding | None:
    """The target's newest good scrape is too old, or its pages tell nothing about an engine; None when all is well."""
    scrapes = window.tables.frames["stg_scrapes"].filter(pl.col("scraped_at") <= window.end).sort("scraped_at")
    samples = window.tables.frames["stg_engine_samples"].filter(pl.col("scraped_at") <= window.end)
    last_up = window.last_up_at
    limit = timedelta(seconds=values["stale_after_seconds"])
    if last_up is not None and window.end - last_up <= limit:
        newest = samples["scraped_at"].max()
        is_empty = not isinstance(newest, datetime) or window.end - newest > limit
        if window.vantage == "cache" or not is_empty:
            return None
        return _stale(window, "no_engine_metrics", "Pages were read and none told anything about an engine", last_up)
    newest_scrape = scrapes["scraped_at"].max() if scrapes.height else None
    since = last_up or window.start
    if isinstance(newest_scrape, datetime) and window.end - newest_scrape <= limit:
        failed = scrapes.filter(~pl.col("is_up"))
        kind = str(failed["error_kind"][-1]) if failed.height else "unknown"
        return _stale(window, "target_down", f"The target could not be read ({kind})", since)
    return _stale(window, "not_scraped", "The target was not scraped", since)


def _stale(window: EngineWindow, cause: str, words: str, since: datetime) -> Finding:
    evidence = [
        window.tables.signal(
            "scrapes_that_worked",
            "scrapes",
            (since + timedelta(microseconds=1), window.end),
            table="stg_scrapes",
            keys={"target": window.target},
            column="engine",
            statistic="count",
            threshold=1.0,
        )
    ]
    last = "none in this window" if window.last_up_at is None else window.last_up_at.isoformat(timespec="seconds")
    summary = f"{words}; last good scrape: {last}."
    span = (since, None, window.end)
    kind = FindingKind.STALE_OR_MISSING_DATA
    severity = Severity.WARNING if cause == "no_engine_metrics" else Severity.CRITICAL
    return finding(window.subject, kind, cause, severity, span, window.source, summary, evidence)


def restart_finding(window: EngineWindow, values: Values) -> Finding | str | None:
    """The serving process started in the window: seen as it happened, or found fresh; a reason when nobody can tell."""
    restarts = [step for step in window.all_steps if is_restart(step)]
    if restarts:
        return _restarted(window, restarts[-1], len(restarts))
    return _fresh(window, values)


def _restarted(window: EngineWindow, step: Step, count: int) -> Finding:
    told = step.started_at is not None
    if step.started_at is not None or step.fallen is None:
        across = (step.start_at, step.end_at)
        seen = sample_signal(window, "processes_seen", "process_started_at", "distinct", across, "processes")
    else:
        seen = sample_signal(window, step.fallen, step.fallen, "last", (step.end_at, step.end_at), "events")
    # A clock ahead of ours tells a start that is yet to come: it was at the latest when the page was read.
    at = min(step.started_at, step.end_at) if step.started_at and not step.was_running else step.start_at
    often = f" ({count} times in this window)" if count > 1 else ""
    how = "started anew" if told else "counts from zero again"
    summary = f"The serving process {how} at {at.isoformat(timespec='seconds')}{often}."
    if step.was_running and step.started_at is not None:
        begun = step.started_at.isoformat(timespec="seconds")
        summary = f"Another process, started at {begun}, took over after {at.isoformat(timespec='seconds')}{often}."
    severity = Severity.CRITICAL if count > 1 else Severity.WARNING
    span = (at, step.end_at, step.end_at)
    single = "process_replaced" if step.was_running else "process_restart" if told else "counters_fell"
    cause = "crash_loop" if count > 1 else single
    return finding(window.subject, FindingKind.RESTARTED, cause, severity, span, window.source, summary, [seen])


def _fresh(window: EngineWindow, values: Values) -> Finding | str | None:
    """A young process that has counted nothing has just been started; behind a new target it is no restart."""
    if window.is_new:
        return None
    samples = window.tables.frames["stg_engine_samples"].sort("scraped_at")
    if samples.is_empty():
        return None
    first = samples.row(0, named=True)
    started_at, seen_at = first["process_started_at"], first["scraped_at"]
    if started_at is None or seen_at < window.start:
        return None
    age = (seen_at - started_at).total_seconds()
    counted = [first[c] for c in ("requests_finished_total", "generation_tokens_total", "prompt_tokens_total")]
    if not 0 <= age <= values["fresh_process_seconds"] or any(value not in (0, None) for value in counted):
        return None
    if None in counted:
        return f"first seen {age:.0f} s after its start, and what it had served by then is not told"
    evidence = [
        sample_signal(window, "requests_finished", "requests_finished_total", "last", (seen_at, seen_at), "requests")
    ]
    summary = (
        f"The serving process started at {started_at.isoformat(timespec='seconds')} and had served nothing when it was "
        "first seen; what ran there before is not known."
    )
    span = (started_at, seen_at, seen_at)
    kind = FindingKind.RESTARTED
    return finding(window.subject, kind, "first_seen_fresh", Severity.INFO, span, window.source, summary, evidence)
