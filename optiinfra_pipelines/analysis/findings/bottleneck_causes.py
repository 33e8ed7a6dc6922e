"""What a queue waits for: batch slots, tokens of a step, KV blocks, the serving process, or nobody knows.

Pure. By exclusion: a cause is named when what is known rules out the others. Here: the cause of a stretch of waiting.
Not here: whether there was one (`bottlenecks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import polars as pl

from optiinfra_pipelines.analysis.findings.stretches import Stretch
from optiinfra_pipelines.analysis.findings.window import EngineWindow

QueueCause = Literal[
    "batch_slot_bound", "token_budget_bound", "kv_bound", "front_end_bound", "deferred", "workers_full", "unattributed"
]
Values = Mapping[str, float]
KV_BOUND: tuple[QueueCause, str] = ("kv_bound", "the KV cache was full")


def slot_limit(window: EngineWindow) -> float | None:
    """Batch slots of the replica as its page tells them, ranks added up; None where it does not."""
    told = [slots for step in window.steps if (slots := step.gauge("max_running_requests"))]
    return told[-1] if told else None


def queue_cause(window: EngineWindow, run: Stretch, values: Values) -> tuple[QueueCause, str]:
    """What the queue waits for, by what can be excluded; 'unattributed' where too little is known to exclude."""
    waiting, deferred = run.mean("requests_waiting") or 0, run.mean("requests_waiting_deferred") or 0
    if deferred > waiting / 2:
        return "deferred", "most requests that wait, wait for a KV transfer and not for capacity"
    usage = run.most("kv_cache_usage_ratio")
    if usage is not None and usage >= values["kv_full_ratio"]:
        return KV_BOUND
    if window.engine == "llamacpp":
        return "batch_slot_bound", "llama.cpp defers requests only while all its slots are taken"
    slots, running = slot_limit(window), [r for s in run.steps if (r := s.gauge("requests_running")) is not None]
    flat = values["slots_flat_ratio"]
    if slots is not None and running and sum(running) / len(running) >= flat * slots:
        return "batch_slot_bound", "all batch slots were taken"
    mean_running = sum(running) / len(running) if running else None
    if _fills_budget(window, run, mean_running, values):
        return "token_budget_bound", "steps carried as many tokens as their budget allows"
    if usage is None and running and _is_held(run, running, flat):
        return "batch_slot_bound", f"{max(running):g} requests ran and no more, while many times as many came and went"
    if usage is None or not running or not mean_running:
        return "unattributed", "KV usage or running requests are not told"
    cores = _cores(run)
    if slots is None and _is_flat(running, flat) and usage < values["kv_spare_ratio"]:
        if cores is not None and cores >= values["pegged_cores"]:
            return "front_end_bound", "the serving process used a whole core while requests waited"
        return "batch_slot_bound", "running requests stayed at one number while KV blocks and tokens were free"
    if cores is not None and cores >= values["pegged_cores"]:
        return "front_end_bound", "the serving process used a whole core while slots and KV blocks were free"
    return "unattributed", "neither slots, tokens, KV blocks nor the serving process's CPU explain it"


def _is_flat(running: Sequence[float], flat: float) -> bool:
    """Whether requests ran up to a ceiling all the time: the most that ran, less a slot that stands empty for a step.

    The batch fills when a queue begins and empties when it ends; in between one scrape, or one in ten, may be off.
    """
    most = max(running)
    near = most if most <= 3 else min(most - 1, flat * most)
    at = [place for place, number in enumerate(running) if number >= near]
    span = at[-1] - at[0] + 1
    return span - len(at) <= max(1, span // 10) and len(at) > len(running) / 2


def _is_held(run: Stretch, running: Sequence[float], flat: float) -> bool:
    """A ceiling that shows without KV usage: flat, mostly full, while requests of other lengths took turns.

    A limit by KV blocks lets the number move with the lengths: five scrapes, three quarters of them full, and three
    turns of the whole batch are too many to meet the same number by chance.
    """
    if len(running) < 5 or not _is_flat(running, flat):
        return False
    full = sum(number == max(running) for number in running)
    return full >= 0.75 * len(running) and (run.grown("requests_finished_total") or 0) >= 3 * max(running)


def _fills_budget(window: EngineWindow, run: Stretch, mean_running: float | None, values: Values) -> bool:
    """Steps were as full of tokens as they may be.

    Where the page does not tell the budget: half of all steps in the fullest size class that occurs at all, and four
    times the tokens that decoding alone would carry (one for each running request), so prefill is cut to size.
    """
    tokens, steps = run.observed("step_tokens")
    running, made = run.most("requests_running"), run.grown("generation_tokens_total")
    # A step makes one token for each running request: more tokens than that were not counted by step.
    if not steps or running is None or made is None or made > steps * max(running, 1.0):
        return False
    told = window.tables.frames["stg_engine_samples"].sort("scraped_at")["max_batched_tokens"].drop_nulls()
    if told.len() and told[-1]:
        return bool(tokens / steps >= values["token_budget_ratio"] * float(told[-1]))
    counts = _bucket_growth(window, "step_tokens", run)
    top = max((place for place, count in enumerate(counts) if count > 0), default=None)
    if top is None or mean_running is None:
        return False
    return counts[top] >= sum(counts) / 2 and tokens / steps >= 4 * max(mean_running, 1.0)


def _bucket_growth(window: EngineWindow, metric: str, run: Stretch) -> list[float]:
    """New observations of each bucket by itself, of the rank that comes first; [] when there are none."""
    rows = (
        window.tables.frames["stg_engine_histograms"]
        .filter(
            pl.col("metric") == metric,
            pl.col("scraped_at").is_between(run.counted_from, run.last_at),
            pl.col("bucket_counts").is_not_null(),
        )
        .sort("engine_rank", "scraped_at")
    )
    if rows.height < 2:
        return []
    rows = rows.filter(pl.col("engine_rank") == rows["engine_rank"][0], pl.col("bounds_id") == rows["bounds_id"][0])
    first, last = rows["bucket_counts"][0].to_list(), rows["bucket_counts"][-1].to_list()
    grown = [late - early for early, late in zip(first, last, strict=True)]
    return [now - before for before, now in pairwise([0.0, *grown])]


def _cores(run: Stretch) -> float | None:
    used = run.grown("cpu_seconds_total")
    return used / run.seconds if used is not None and run.seconds else None
