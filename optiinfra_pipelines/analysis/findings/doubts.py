"""What stands against a clean bill where no trouble was found: work that nobody saw, numbers that nobody can compare.

Pure. Here: reasons of abstentions about memory and queues. Not here: finding trouble (`bottlenecks`), or what a page
does not tell at all (`diagnosis`).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import polars as pl

from optiinfra_pipelines.analysis.findings.bottlenecks import wait_limit, waiting_runs
from optiinfra_pipelines.analysis.findings.stretches import Stretch
from optiinfra_pipelines.analysis.findings.window import EngineWindow, Step

Values = Mapping[str, float]
_WORK = ("requests_finished_total", "generation_tokens_total", "prompt_tokens_total", "preemptions_total")


def memory_doubt(window: EngineWindow, values: Values) -> str | None:
    """Why no memory pressure was found and there may have been some; None when there was none as far as one can see."""
    newest = window.steps[-1]
    is_short = (newest.gauge("kv_cache_usage_ratio") or 0) >= values["kv_full_ratio"]
    if is_short and newest.gauge("requests_waiting"):
        return "requests wait at a full KV cache, not long enough yet to tell"
    blind = _blind_start(window, values)
    if blind is not None:
        return blind
    for step in _unseen(window, values):
        preempted, finished = step.grew("preemptions_total"), step.grew("requests_finished_total") or 0
        if preempted is None:
            return f"{_gap(step)}, and preemptions are not counted"
        if preempted >= 2 and preempted >= values["preemptions_per_request"] * finished:
            return f"{_gap(step)}, with {preempted:g} preemptions at a KV usage that nobody saw"
    return None


def queue_doubt(window: EngineWindow, values: Values, pressed: Stretch | None) -> str | None:
    """Why no queue was found and there may have been one; None when there was none as far as one can see."""
    if window.vantage != "frontend":
        runs = waiting_runs(window, values, pressed, within=False)
        if runs and runs[-1].until is None and runs[-1].shown_seconds < values["sustained_seconds"]:
            return "requests wait now, not long enough yet to tell"
        if any(run.shown_seconds >= values["sustained_seconds"] and not _is_comparable(run) for run in runs):
            return "requests waited, and neither finished nor running ones are told to compare them with"
    elif all(step.grew("requests_finished_total") is None for step in window.steps):
        return "finished requests are not counted, so what is in flight cannot be told from a queue"
    blind = _blind_start(window, values)
    if blind is not None:
        return blind
    metric = "time_to_first_token_seconds" if window.vantage == "frontend" else "queue_seconds"
    limit = wait_limit(window, values)
    for step in _unseen(window, values):
        total, count = step.observed.get(metric, (0.0, 0.0))
        if not count:
            return f"{_gap(step)}, and how long requests waited is not measured"
        if count >= values["sustained_requests"] and total / count >= limit:
            return f"{_gap(step)}, with a mean {metric} of {total / count:.1f} over {count:g} requests"
    return None


def _is_comparable(run: Stretch) -> bool:
    return bool(run.grown("requests_finished_total")) or run.most("requests_running") is not None


def _blind_start(window: EngineWindow, values: Values) -> str | None:
    """Scrapes that failed before the first one that can be compared: no counter bridges that time."""
    scrapes, first = window.tables.frames["stg_scrapes"], window.steps[0].start_at
    failed = scrapes.filter(pl.col("scraped_at").is_between(window.start, first), ~pl.col("is_up"))["scraped_at"].min()
    if not isinstance(failed, datetime):
        return None
    seconds = (first - failed).total_seconds()
    return f"nothing could be read for {seconds:.0f} s" if seconds > values["stale_after_seconds"] else None


def _unseen(window: EngineWindow, values: Values) -> list[Step]:
    """Steps longer than a target may go unread in which work was done."""
    return [step for step in window.steps if step.seconds > values["stale_after_seconds"] and _worked(step)]


def _worked(step: Step) -> bool:
    """By any counter, or by anything that was observed of a request; or for all that anybody knows."""
    grown = [growth for counter in _WORK if (growth := step.grew(counter)) is not None]
    observed = [count for _, count in step.observed.values()]
    return any(number > 0 for number in (*grown, *observed)) or not (grown or observed)


def _gap(step: Step) -> str:
    return f"work was done in {step.seconds:.0f} s without a scrape"
