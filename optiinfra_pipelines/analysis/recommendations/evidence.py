"""The signals that a recommendation cites: each one row of a table, with the query that fetches it again.

Here: which columns stand behind which measure. A measure that no query of one column can give (a lower bound, a share
of samples) is cited by the signals that it was made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from optiinfra_pipelines.analysis.recommendations.measures import Measures
from optiinfra_pipelines.analysis.recommendations.rule import Rule
from optiinfra_pipelines.analysis.recommendations.rules import DAILY
from optiinfra_pipelines.domain.evidence import Signal, Statistic


@dataclass(frozen=True)
class Spec:
    """One signal: where it is read and how its rows become a number."""

    column: str
    statistic: Statistic
    unit: str
    across: Literal["sum", "max"] = "sum"
    table: Literal["stg_engine_samples", "fct_replica_load_5m"] = "stg_engine_samples"


# What the daily rules saw: five-minute rows, which outlive the samples.
_DAILY_SPECS: Mapping[str, Spec] = {
    "kv_usage_max_ratio": Spec("kv_cache_usage_max_ratio", "max", "ratio", table="fct_replica_load_5m"),
    "waiting_max": Spec("requests_waiting_max", "max", "requests", table="fct_replica_load_5m"),
    "waiting_mean": Spec("requests_waiting_mean", "mean", "requests", table="fct_replica_load_5m"),
    "running_mean": Spec("requests_running_mean", "mean", "requests", table="fct_replica_load_5m"),
}
SPECS: Mapping[str, Spec] = {
    "preemptions": Spec("preemptions_total", "increase", "events"),
    "requests_finished": Spec("requests_finished_total", "increase", "requests"),
    "kv_usage_max_ratio": Spec("kv_cache_usage_ratio", "max", "ratio", "max"),
    "kv_usage_mean_ratio": Spec("kv_cache_usage_ratio", "mean", "ratio", "max"),
    "waiting_mean": Spec("requests_waiting", "mean", "requests"),
    "waiting_max": Spec("requests_waiting", "max", "requests"),
    "running_mean": Spec("requests_running", "mean", "requests"),
    "running_max": Spec("requests_running", "max", "requests"),
    "waiting_deferred_mean": Spec("requests_waiting_deferred", "mean", "requests"),
    "kv_capacity_tokens": Spec("kv_cache_capacity_tokens", "last", "tokens"),
    "prefix_cache_hits": Spec("prefix_cache_hits_total", "increase", "tokens"),
    "prefix_cache_queries": Spec("prefix_cache_queries_total", "increase", "tokens"),
    "cpu_seconds": Spec("cpu_seconds_total", "increase", "s"),
}
_HISTOGRAM_UNITS: Mapping[str, str] = {
    "queue_seconds": "s",
    "prefill_seconds": "s",
    "decode_seconds": "s",
    "time_to_first_token_seconds": "s",
    "inter_token_latency_seconds": "s",
    "time_per_output_token_seconds": "s",
    "prompt_tokens": "tokens",
    "generation_tokens": "tokens",
    "step_tokens": "tokens",
}
# Measure of a condition -> the signals behind it.
_BEHIND: Mapping[str, tuple[str, ...]] = {
    "preemptions_per_request_low": ("preemptions", "requests_finished", "prompt_tokens", "generation_tokens"),
    "kv_usage_max_ratio": ("kv_usage_max_ratio", "kv_capacity_tokens"),
    "waiting_share_ratio": ("waiting_mean", "waiting_max"),
    "waiting_mean": ("waiting_mean",),
    "waiting_max": ("waiting_max",),
    "at_ceiling_ratio": ("running_max", "running_mean"),
    "budget_use_ratio": ("step_tokens",),
    "cpu_cores_busy": ("cpu_seconds",),
    "deferred_share_ratio": ("waiting_deferred_mean", "waiting_mean"),
    "queue_share_ratio": ("queue_seconds", "time_to_first_token_seconds"),
    "itl_burn": ("inter_token_latency_seconds",),
    "ttft_burn": ("time_to_first_token_seconds",),
    "prefix_caching_off": ("prefix_cache_queries",),
    "cache_advice_bytes": ("prefix_cache_queries", "prefix_cache_hits"),
    "prefix_hit_ratio": ("prefix_cache_queries", "prefix_cache_hits"),
    "dram_active_p95_ratio": ("running_mean",),
}


def evidence(rule: Rule, measures: Measures) -> tuple[Signal, ...]:
    """The signals behind a rule's conditions, for the replica that its proposal was sized on; none twice.

    A signal without a value is left out: what was not seen supports nothing. The running and waiting requests always
    stand there, so that no proposal is without evidence.
    """
    thresholds = {condition.measure: condition.threshold for condition in rule.conditions}
    names: dict[str, None] = {}
    for condition in rule.conditions:
        names.update(dict.fromkeys(_BEHIND.get(condition.measure, ())))
    names.update(dict.fromkeys(("running_mean", "waiting_mean")))
    specs = _DAILY_SPECS if rule in DAILY else SPECS
    made = [_signal(name, measures, thresholds.get(name), specs.get(name)) for name in names]
    return tuple(signal for signal in made if signal is not None and signal.value is not None)


def _signal(name: str, measures: Measures, threshold: float | None, spec: Spec | None) -> Signal | None:
    if name in _HISTOGRAM_UNITS:
        return Signal(
            name=f"{name}_mean",
            value=measures[f"{name}_mean"],
            unit=_HISTOGRAM_UNITS[name],
            window_start=measures.window_start,
            window_end=measures.window_end,
            threshold=threshold,
            table="stg_engine_histograms",
            keys=(("target", measures.target), ("metric", name)),
            column="sum_value",
            statistic="increase_ratio",
            per="count_value",
        )
    if spec is None:
        return None
    return Signal(
        name=name,
        value=measures[name],
        unit=spec.unit,
        window_start=measures.window_start,
        window_end=measures.window_end,
        threshold=threshold,
        table=spec.table,
        keys=(("target", measures.target),),
        column=spec.column,
        statistic=spec.statistic,
        across=spec.across,
    )
