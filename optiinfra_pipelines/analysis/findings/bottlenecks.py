"""When one replica was short of KV memory or had work queued, for how long, and what the queue waited for.

Pure: steps in, stretches of time out. Here: MEMORY_PRESSURE and QUEUE_BUILDUP as facts with their numbers. Not here:
turning them into findings with evidence (`load`), or which of two facts is the root (`findings`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from optiinfra_pipelines.analysis.findings.bottleneck_causes import KV_BOUND, QueueCause, queue_cause, slot_limit
from optiinfra_pipelines.analysis.findings.stretches import Stretch, joined, observed, stretches
from optiinfra_pipelines.analysis.findings.window import EngineWindow, Step

Values = Mapping[str, float]


@dataclass(frozen=True)
class Queue:
    """Work that waited. wait_seconds: how long a request that comes now waits, as far as can be told."""

    stretch: Stretch
    cause: QueueCause
    because: str
    wait_seconds: float | None
    is_growing: bool


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
    return joined(window.steps, found)


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
        whole = joined(window.steps, runs)
        if whole is not None:
            cause, because = KV_BOUND if within else queue_cause(window, whole, values)
            growing = _is_growing(whole, "requests_waiting")
            queues.append(Queue(whole, cause, because, _drain_seconds(whole), growing))
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
    whole = joined(window.steps, found)
    if whole is None:
        return None
    speed = _finish_rate(whole)
    queued = sum(max(0.0, excess(step)) for step in whole.steps) / len(whole.steps)
    told = "" if window.ready_replicas else " (the fewest there can be)"
    because = f"more than the batch slots of {workers} worker{'s' if workers > 1 else ''}{told}"
    wait = queued / speed if speed else None
    return Queue(whole, "workers_full", because, wait, _is_growing(whole, "requests_running"))


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
