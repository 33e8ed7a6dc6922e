"""When one replica was short of KV memory or had work queued, for how long, and what the queue waited for.

Pure: steps in, stretches of time out. Here: MEMORY_PRESSURE and QUEUE_BUILDUP as facts with their numbers. Not here:
turning them into findings with evidence (`findings_load`), or which of two facts is the root (`findings`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Literal

import polars as pl

from optiinfra_pipelines.analysis.findings_window import EngineWindow, Step

QueueCause = Literal[
    "batch_slot_bound", "token_budget_bound", "kv_bound", "front_end_bound", "deferred", "workers_full", "unattributed"
]
Values = Mapping[str, float]
KV_BOUND: tuple[QueueCause, str] = ("kv_bound", "the KV cache was full")


@dataclass(frozen=True)
class Stretch:
    """Steps in a row that share a condition. since: the first scrape that showed it, or the start of the step whose
    counters did. until: the first scrape without it, None when the window ends with it. after: the step that follows,
    in which requests finish that were there at the last of these scrapes.
    """

    steps: tuple[Step, ...]
    since: datetime
    until: datetime | None
    last_at: datetime
    after: Step | None

    @property
    def counted_from(self) -> datetime:
        """The scrape from which on the counters of these steps grow."""
        return self.steps[0].start_at

    @property
    def shown_seconds(self) -> float:
        """Between the first and the last scrape that showed it."""
        return (self.last_at - self.steps[0].end_at).total_seconds()

    @property
    def through(self) -> tuple[Step, ...]:
        """Its steps and the one after."""
        return (*self.steps, self.after) if self.after else self.steps

    def grown(self, counter: str) -> float | None:
        known = [growth for step in self.steps if (growth := step.grew(counter)) is not None]
        return sum(known) if known else None

    def observed(self, histogram: str) -> tuple[float, float]:
        """Sum and count of what a histogram observed; (0, 0) when nothing."""
        return observed(self.steps, histogram)

    def mean(self, gauge: str) -> float | None:
        known = [value for step in self.steps if (value := step.gauge(gauge)) is not None]
        return sum(known) / len(known) if known else None

    def most(self, gauge: str) -> float | None:
        return max((value for step in self.steps if (value := step.gauge(gauge)) is not None), default=None)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


@dataclass(frozen=True)
class Queue:
    """Work that waited. wait_seconds: how long a request that comes now waits, as far as can be told."""

    stretch: Stretch
    cause: QueueCause
    because: str
    wait_seconds: float | None
    is_growing: bool


def observed(steps: Sequence[Step], histogram: str) -> tuple[float, float]:
    """Sum and count of what a histogram observed over some steps; (0, 0) when nothing."""
    made = [step.observed.get(histogram, (0.0, 0.0)) for step in steps]
    return sum(total for total, _ in made), sum(count for _, count in made)


def stretches(steps: Sequence[Step], holds: Callable[[Step], bool], longest_gap_seconds: float) -> list[Stretch]:
    """Runs of steps that hold; one step in between that does not is bridged, time that nobody looked at is not."""
    runs: list[list[int]] = []
    for place, step in enumerate(steps):
        if not holds(step):
            continue
        if runs and place - runs[-1][-1] <= 2 and _unseen(steps[runs[-1][-1] + 1 : place + 1]) <= longest_gap_seconds:
            runs[-1].append(place)
        else:
            runs.append([place])
    return [_stretch(steps, run[0], run[-1]) for run in runs]


def _unseen(steps: Sequence[Step]) -> float:
    return max((step.seconds for step in steps), default=0.0)


def _stretch(steps: Sequence[Step], first: int, last: int) -> Stretch:
    held = tuple(steps[first : last + 1])
    after = steps[last + 1] if last + 1 < len(steps) else None
    return Stretch(held, held[0].end_at, after.end_at if after else None, held[-1].end_at, after)


def memory_pressure(window: EngineWindow, values: Values) -> Stretch | None:
    """The stretch in which KV usage was high and requests were preempted or waited for blocks; None without one."""
    slots = slot_limit(window)
    high, full = values["kv_pressure_ratio"], values["kv_full_ratio"]

    def holds(step: Step) -> bool:
        if (step.grew("preemptions_total") or 0) > 0 and (step.usage or 0) >= high:
            return True
        usage = step.gauge("kv_cache_usage_ratio")
        if usage is None or usage < high:
            return False
        waiting = step.gauge("requests_waiting_capacity")
        waiting = step.gauge("requests_waiting") if waiting is None else waiting
        if not waiting:
            return False
        running = step.gauge("requests_running")
        return usage >= full or slots is None or running is None or running < slots * values["slots_flat_ratio"]

    found = [run for run in stretches(window.steps, holds, values["stale_after_seconds"]) if _presses(run, values)]
    return _joined(window.steps, found)


def _presses(run: Stretch, values: Values) -> bool:
    """Long enough by the gauge, or shown by counters: repeated preemptions, or many requests that waited long."""
    preemptions = run.grown("preemptions_total") or 0
    finished = run.grown("requests_finished_total") or 0
    if preemptions >= 2 and preemptions >= values["preemptions_per_request"] * finished:
        return True
    return run.shown_seconds >= values["sustained_seconds"] or _waited(run, values, values["queue_wait_seconds"])


def queue_buildup(window: EngineWindow, values: Values, pressed: Stretch | None) -> list[Queue]:
    """Stretches in which more work waited than the limit allows: at most one during memory pressure and one outside.

    The limit is the deployment's own TTFT objective, else the threshold queue_wait_seconds.
    """
    if window.vantage == "frontend":
        queue = _behind_frontend(window, values)
        return [queue] if queue else []
    queues = []
    for within in (True, False):
        runs = [run for run in waiting_runs(window, values, pressed, within) if _queues(run, values, window)]
        joined = _joined(window.steps, runs)
        if joined is not None:
            cause, because = KV_BOUND if within else _queue_cause(window, joined, values)
            growing = _is_growing(joined, "requests_waiting")
            queues.append(Queue(joined, cause, because, _drain_seconds(joined), growing))
    return queues


def waiting_runs(window: EngineWindow, values: Values, pressed: Stretch | None, within: bool) -> list[Stretch]:
    """Runs of steps with waiting requests, inside or outside the stretch of memory pressure."""

    def holds(step: Step) -> bool:
        is_pressed = pressed is not None and pressed.steps[0].end_at <= step.end_at <= pressed.last_at
        return is_pressed == within and (step.gauge("requests_waiting") or 0) >= 1

    return stretches(window.steps, holds, values["stale_after_seconds"])


def wait_limit(window: EngineWindow, values: Values) -> float:
    """Seconds of waiting that are too long: the deployment's own TTFT objective, else the threshold."""
    own = [o.threshold_seconds for o in window.objectives if o.kind == "ttft" and o.threshold_seconds is not None]
    return min(own, default=values["queue_wait_seconds"])


def _queues(run: Stretch, values: Values, window: EngineWindow) -> bool:
    limit = wait_limit(window, values)
    if _waited(run, values, limit):
        return True
    if run.shown_seconds < values["sustained_seconds"]:
        return False
    drain = _drain_seconds(run)
    if drain is not None:
        return drain >= limit
    # No request count to divide by (llama.cpp), or none finished: a queue as long as the batch doubles the latency.
    longer = stretches(run.steps, _is_longer_than_batch, values["stale_after_seconds"])
    return any(one.shown_seconds >= values["sustained_seconds"] for one in longer)


def _is_longer_than_batch(step: Step) -> bool:
    waiting, running = step.gauge("requests_waiting"), step.gauge("requests_running")
    return waiting is not None and running is not None and waiting >= max(running, 1.0)


def _waited(run: Stretch, values: Values, limit: float) -> bool:
    """Requests that finished in the stretch or right after it had waited too long, and they were many."""
    return any(
        count >= values["sustained_requests"] and total / count >= limit
        for total, count in (observed(steps, "queue_seconds") for steps in (run.steps, run.through))
    )


def _drain_seconds(run: Stretch) -> float | None:
    """Mean waiting requests over the rate at which requests finished: what a new one has before it."""
    waiting, finished = run.mean("requests_waiting"), run.grown("requests_finished_total")
    if waiting is None or not finished or not run.seconds:
        return None
    return waiting / (finished / run.seconds)


def _is_growing(run: Stretch, gauge: str) -> bool:
    """The last third holds clearly more than the first: half as much again."""
    held = [value for step in run.steps if (value := step.gauge(gauge)) is not None]
    third = len(held) // 3
    return third > 0 and sum(held[-third:]) > 1.5 * sum(held[:third])


def _behind_frontend(window: EngineWindow, values: Values) -> Queue | None:
    """A frontend's own counts of running and waiting overlap; what its workers cannot hold at once is queued there.

    Where it measures TTFT, that rules; where it does not, requests in flight beyond the workers' slots tell.
    """
    limit = wait_limit(window, values)
    workers = window.ready_replicas or 1

    def excess(step: Step) -> float:
        slots, running = step.gauge("max_running_requests"), step.gauge("requests_running")
        return running - slots * workers if slots and running is not None else 0.0

    def queues(run: Stretch) -> bool:
        total, count = run.observed("time_to_first_token_seconds")
        if count >= values["sustained_requests"]:
            return total / count >= limit
        speed = _finish_rate(run)
        if not speed or not _is_crowded(run, values, workers):
            return False
        queued = sum(max(0.0, excess(step)) for step in run.steps) / len(run.steps)
        return queued / speed >= limit

    runs = stretches(window.steps, lambda step: excess(step) >= 1, values["stale_after_seconds"])
    found = [run for run in runs if queues(run)]
    joined = _joined(window.steps, found)
    if joined is None:
        return None
    speed = _finish_rate(joined)
    queued = sum(max(0.0, excess(step)) for step in joined.steps) / len(joined.steps)
    told = "" if window.ready_replicas else " (the fewest there can be)"
    because = f"more than the batch slots of {workers} worker{'s' if workers > 1 else ''}{told}"
    wait = queued / speed if speed else None
    return Queue(joined, "workers_full", because, wait, _is_growing(joined, "requests_running"))


def _finish_rate(run: Stretch) -> float | None:
    """Requests finished a second over the stretch and the step after it, where they are counted."""
    counted = [step for step in run.through if step.grew("requests_finished_total") is not None]
    seconds = sum(step.seconds for step in counted)
    return sum(step.grew("requests_finished_total") or 0 for step in counted) / seconds if seconds else None


def _is_crowded(run: Stretch, values: Values, workers: int) -> bool:
    """More in flight than slots for long enough: by the gauge, or by the mean that durations tell (Little 1961)."""
    if run.shown_seconds >= values["sustained_seconds"]:
        return True
    slots = run.mean("max_running_requests")
    total, count = observed(run.through, "request_duration_seconds")
    seconds = sum(step.seconds for step in run.through if "request_duration_seconds" in step.observed)
    return slots is not None and count >= values["sustained_requests"] and total / seconds > slots * workers


def slot_limit(window: EngineWindow) -> float | None:
    """Batch slots of the replica as its page tells them, ranks added up; None where it does not."""
    told = [slots for step in window.steps if (slots := step.gauge("max_running_requests"))]
    return told[-1] if told else None


def _queue_cause(window: EngineWindow, run: Stretch, values: Values) -> tuple[QueueCause, str]:
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
    if usage is None or not running or not mean_running:
        return "unattributed", "KV usage or running requests are not told"
    cores = _cores(run)
    is_flat = len(running) < 2 or min(running) >= flat * max(running)
    if slots is None and is_flat and usage < values["kv_pressure_ratio"]:
        if cores is not None and cores >= values["pegged_cores"]:
            return "front_end_bound", "the serving process used a whole core while requests waited"
        return "batch_slot_bound", "running requests stayed at one number while KV blocks and tokens were free"
    if cores is not None and cores >= values["pegged_cores"]:
        return "front_end_bound", "the serving process used a whole core while slots and KV blocks were free"
    return "unattributed", "neither slots, tokens, KV blocks nor the serving process's CPU explain it"


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


def _joined(steps: Sequence[Step], found: Sequence[Stretch]) -> Stretch | None:
    """One stretch from the first to the last: a signal that flaps within a window is one finding."""
    if not found:
        return None
    places = {step.end_at: place for place, step in enumerate(steps)}
    return _stretch(steps, places[found[0].steps[0].end_at], places[found[-1].steps[-1].end_at])
