"""Every threshold by name, with its default, unit, range, reason and source; fleet.yaml may override the default.

To add one: append a Threshold to the group it belongs to (or add a group and name it in THRESHOLDS). A number that
decides something about a fleet belongs here; a property of a protocol or of our own code stays beside that code.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from optiinfra_pipelines.domain.thresholds_collection import COLLECTION, Threshold


def _threshold(
    name: str, default: float, unit: str, bounds: tuple[float, float], reason: str, source: str
) -> Threshold:
    low, high = bounds
    return Threshold(name=name, default=default, unit=unit, minimum=low, maximum=high, reason=reason, source=source)


_VLLM = "vLLM documentation, optimization and tuning (preemption)"
_HOST = "Our judgment; vLLM documentation asks for 2 + N physical cores for N GPUs"
_OURS = "Our judgment, checked on recordings of loaded and idle engines"

FINDINGS: tuple[Threshold, ...] = (
    _threshold(
        "kv_pressure_ratio",
        0.85,
        "ratio",
        (0.5, 1.0),
        "With less than 15 % of the blocks free, one long prompt no longer fits and the scheduler holds it back or "
        "preempts. Alone it is no finding: a full cache that nobody waits for is a well-used one.",
        _VLLM,
    ),
    _threshold(
        "kv_full_ratio",
        0.95,
        "ratio",
        (0.5, 1.0),
        "Above it requests that wait do so for blocks, even when all batch slots are taken as well.",
        _VLLM,
    ),
    _threshold(
        "kv_spare_ratio",
        0.7,
        "ratio",
        (0.1, 1.0),
        "Under it KV blocks are not what requests wait for. Between it and pressure nobody can tell: schedulers that "
        "reserve the blocks of a whole answer hold requests back while blocks are still unused.",
        "Recorded KV-bound queues of Dynamo's TensorRT-LLM scheduler at 0.53 to 0.82; our judgment",
    ),
    _threshold(
        "preemptions_per_request",
        0.01,
        "preemptions/request",
        (0.0, 10.0),
        "One recomputed request in a hundred shows in the p99; rarer ones do not show.",
        _OURS,
    ),
    _threshold(
        "preemptions_critical_per_request",
        0.25,
        "preemptions/request",
        (0.0, 10.0),
        "Every fourth request is computed at least twice: the replica spends its work on recomputation.",
        _OURS,
    ),
    _threshold(
        "queue_wait_seconds",
        2.0,
        "s",
        (0.05, 600.0),
        "The least time to first token that MLPerf allows a conversational service: waiting alone already spends it. "
        "A TTFT objective of the deployment takes its place.",
        "MLPerf Inference policies, Llama 3.1 8B and Llama 2 70B server scenario",
    ),
    _threshold(
        "sustained_seconds",
        10.0,
        "s",
        (2.0, 600.0),
        "Two collection ticks: a burst that is gone at the second look needs no person.",
        "Our cadence of 5 s",
    ),
    _threshold(
        "sustained_requests",
        10.0,
        "requests",
        (1.0, 10_000.0),
        "Where scrapes are too far apart for the gauge to tell, this many finished requests that waited tell.",
        _OURS,
    ),
    _threshold(
        "slots_flat_ratio",
        0.85,
        "ratio",
        (0.5, 1.0),
        "Running requests that stay above this share of their own maximum while others wait are held by a limit on "
        "their number; KV blocks as the limit let the number move with the lengths of the requests.",
        _OURS,
    ),
    _threshold(
        "token_budget_ratio",
        0.8,
        "ratio",
        (0.3, 1.0),
        "Mean tokens of a step over its budget, from which on the budget is what limits.",
        "vLLM documentation, max_num_batched_tokens",
    ),
    _threshold(
        "pegged_cores",
        0.9,
        "cores",
        (0.5, 64.0),
        "The serving process runs Python in one thread: nine tenths of a core is all it has.",
        "vLLM documentation, api-server-count",
    ),
    _threshold(
        "latency_requests",
        20.0,
        "requests",
        (1.0, 100_000.0),
        "Under 20 requests one slow one is 5 % of them and no share can be told from chance.",
        _OURS,
    ),
    _threshold(
        "low_throughput_ratio",
        0.6,
        "ratio",
        (0.1, 0.95),
        "Of the deployment's own observed capacity; the mix of prompt lengths alone moves capacity by a third.",
        _OURS,
    ),
    _threshold(
        "capacity_periods",
        12.0,
        "periods",
        (3.0, 10_000.0),
        "An hour of five-minute periods in which work waited: fewer do not tell what a replica can do.",
        _OURS,
    ),
    _threshold(
        "cache_periods",
        12.0,
        "periods",
        (3.0, 10_000.0),
        "An hour of five-minute periods, before which nobody knows what hit ratio is usual.",
        _OURS,
    ),
    _threshold(
        "cache_fall_ratio",
        0.2,
        "ratio",
        (0.02, 1.0),
        "Fall below the usual hit ratio, or gap to the attainable one, in shares of all prompt tokens: a fifth of the "
        "prefill is then done that need not be. Four median deviations must be passed as well.",
        _OURS,
    ),
    _threshold(
        "cache_query_tokens",
        10_000.0,
        "tokens",
        (100.0, 1e9),
        "Hit ratios of fewer looked-up tokens are decided by a handful of prompts.",
        _OURS,
    ),
    _threshold(
        "imbalance_ratio",
        0.3,
        "ratio",
        (0.05, 1.0),
        "Spread between the most and the least loaded replica over the most loaded one.",
        "Our judgment; 30 points is where a router is worth looking at",
    ),
    _threshold(
        "fresh_process_seconds",
        300.0,
        "s",
        (10.0, 3_600.0),
        "A process first seen within five minutes of its start, with nothing counted yet, has just been started.",
        "Measured engine starts of 1 to 5 minutes",
    ),
    _threshold("psi_cpu_ratio", 0.2, "ratio", (0.01, 1.0), "Share of time in which some task waited for a CPU.", _HOST),
    _threshold("cpu_steal_ratio", 0.05, "ratio", (0.01, 1.0), "CPU time that the hypervisor gave to others.", _HOST),
    _threshold(
        "cgroup_throttled_ratio", 0.05, "ratio", (0.001, 1.0), "Share of time that the CPU quota held us.", _HOST
    ),
    _threshold(
        "run_queue_wait_ratio",
        0.1,
        "ratio",
        (0.01, 1.0),
        "Share of time in which the engine's main thread was ready and had no CPU: every step of every request waits.",
        _HOST,
    ),
    _threshold(
        "power_throttled_ratio",
        0.1,
        "ratio",
        (0.01, 1.0),
        "Expected at high load, and worth knowing: the clock is then set by the power limit.",
        "NVIDIA, clock event reasons; our judgment of the share",
    ),
    _threshold(
        "thermal_throttled_ratio",
        0.01,
        "ratio",
        (0.001, 1.0),
        "Heat must not slow a GPU that has cooling: one percent of the time is a fault of air or mounting.",
        "NVIDIA, clock event reasons; our judgment of the share",
    ),
    _threshold(
        "idle_activity_ratio",
        0.02,
        "ratio",
        (0.0, 0.2),
        "p95 of the minutes' activity; health checks and monitoring stay under it.",
        "Our judgment; measured idle GPUs show 0",
    ),
    _threshold(
        "idle_free_memory_ratio",
        0.01,
        "ratio",
        (0.0, 0.2),
        "Memory that an unused GPU shows as used: driver context, nothing of a model.",
        "Our judgment; measured idle GPUs show 0 to 0.6 %",
    ),
    _threshold(
        "idle_held_memory_ratio",
        0.1,
        "ratio",
        (0.01, 1.0),
        "Memory from which on somebody keeps a model loaded.",
        "Our judgment",
    ),
    _threshold(
        "idle_free_minutes",
        30.0,
        "min",
        (5.0, 1_440.0),
        "Shorter pauses between jobs are no waste that anyone could avoid.",
        "Our judgment",
    ),
    _threshold(
        "idle_held_minutes",
        30.0,
        "min",
        (5.0, 1_440.0),
        "Energy breaks even after 1 to 5 minutes; a cold start of minutes and its risk ask for longer.",
        "Measured engine starts of 1 to 5 minutes; our judgment",
    ),
    _threshold(
        "close_after_seconds",
        120.0,
        "s",
        (0.0, 86_400.0),
        "What was fine for one refresh may be bad at the next: a finding ends after two minutes without it.",
        "Our refresh cadence of 2 min",
    ),
    _threshold(
        "reopen_within_seconds",
        900.0,
        "s",
        (0.0, 86_400.0),
        "What comes back within a quarter of an hour is the same trouble: one finding, not one for every swing.",
        "Our judgment",
    ),
    _threshold(
        "burn_minimum_requests",
        20.0,
        "requests",
        (1.0, 100_000.0),
        "Fewer requests in the long window of a pair: one failure would burn a month's budget by chance.",
        "Our judgment",
    ),
)

WATCH: tuple[Threshold, ...] = (
    _threshold(
        "watch_minimum_requests",
        10.0,
        "requests",
        (1.0, 10_000.0),
        "Under ten requests in the window one failure is a share that says nothing.",
        _OURS,
    ),
    _threshold(
        "watch_error_ratio",
        0.2,
        "ratio",
        (0.01, 1.0),
        "A fifth of all requests failing is an outage for somebody; smaller shares burn an objective's budget and are "
        "told by its burn rate.",
        "The hard-failure bound that canary rollbacks use too",
    ),
    _threshold(
        "watch_queue_per_running",
        4.0,
        "waiting requests per running one",
        (0.5, 1_000.0),
        "Four full batches wait: a new request waits for four generations of them. A queue of three batches was "
        "recorded under a steady closed-loop load that served everybody.",
        _OURS,
    ),
    _threshold(
        "watch_stall_seconds",
        20.0,
        "s",
        (10.0, 30.0),
        "Longer than the longest recorded prefill with a batch before it; shorter than most clients wait.",
        _OURS,
    ),
)

ADVICE: tuple[Threshold, ...] = (
    Threshold(
        name="advice_window_seconds",
        default=300.0,
        unit="s",
        minimum=30.0,
        maximum=3_600.0,
        reason="What the tuning rules look at once: long enough to hold the requests that a share needs, short enough "
        "to be about one state of the load. Shorten it only where the load itself is short, as in a recording.",
        source="vLLM's tuning advice is about sustained behavior; five minutes is our judgment.",
    ),
    Threshold(
        name="advice_windows",
        default=2.0,
        unit="windows",
        minimum=1.0,
        maximum=288.0,
        reason="Windows in a row that must call for a change before it is advised: a burst of minutes restarts no "
        "engine.",
        source="Our judgment; ten minutes as shipped.",
    ),
)

THRESHOLDS: Mapping[str, Threshold] = MappingProxyType(
    {threshold.name: threshold for threshold in (*COLLECTION, *FINDINGS, *WATCH, *ADVICE)}
)


def threshold_values(overrides: Mapping[str, float]) -> Mapping[str, float]:
    """Every threshold's value by name: fleet.yaml's where it sets one, else the default.

    Raises KeyError for a name that is not a threshold (settings refuses it earlier, with its line).
    """
    unknown = sorted(set(overrides) - set(THRESHOLDS))
    if unknown:
        raise KeyError(f"no such threshold: {', '.join(unknown)}")
    return {name: overrides.get(name, threshold.default) for name, threshold in THRESHOLDS.items()}
