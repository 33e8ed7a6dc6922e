"""What a fleet report is made of, and the queries that fetch its tables.

Pure: names, shapes, SQL. Running the queries is `resources.report.reader`; the document made of it `sections`.
Frames a report cannot have (no such table yet) are None, which it says; an empty frame means that nothing was there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType

import polars as pl

from optiinfra_pipelines.domain.findings import Abstention, Finding
from optiinfra_pipelines.domain.fleet import Deployment
from optiinfra_pipelines.domain.insights import Insight
from optiinfra_pipelines.domain.objectives import ObjectiveStatus
from optiinfra_pipelines.domain.recommendations import Accuracy, Recommendation, RuleAbstention


@dataclass(frozen=True)
class Advice:
    """Everything that was decided about the fleet. None: that part has not been made yet; empty: there was nothing."""

    objectives: Sequence[ObjectiveStatus] | None = None
    findings: Sequence[Finding] | None = None
    abstentions: Sequence[Abstention] | None = None
    recommendations: Sequence[Recommendation] | None = None
    refusals: Sequence[RuleAbstention] | None = None
    accuracy: Sequence[Accuracy] | None = None
    insight: Insight | None = None


@dataclass(frozen=True)
class ReportData:
    """One report: over [since, made_at].

    frames: by the names of QUERIES. waste: tables of waste and cost by title, whose columns carry their unit as suffix.
    gpu_states: host, state, gpu_hours of the UTC days of the window. cost: deployment, usd of the last 7 days. Both are
    None when they have not been made. The queries of these three are `waste`.
    """

    made_at: datetime
    since: datetime
    deployments: Sequence[Deployment] = ()
    advice: Advice = field(default_factory=Advice)
    frames: Mapping[str, pl.DataFrame | None] = field(default_factory=dict)
    waste: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    gpu_states: pl.DataFrame | None = None
    cost: pl.DataFrame | None = None

    @property
    def hours(self) -> float:
        return (self.made_at - self.since).total_seconds() / 3600


# Parameters: $since, $until (timestamptz). Each is one screen and ends in the order in which it is shown.
QUERIES: Mapping[str, str] = MappingProxyType(
    {
        # One row per target: what it is, whether it can be read, its load and first-token latency over the window.
        "fleet": """
            with load as (
                select target,
                       sum(requests_finished) / nullif(sum(observed_seconds), 0) as requests_per_second,
                       sum(coalesce(realtime_tokens, generation_tokens)) / nullif(sum(observed_seconds), 0)
                           as generation_tokens_per_second,
                       max(kv_cache_usage_max_ratio) as kv_cache_usage_max_ratio,
                       max(requests_waiting_max) as requests_waiting_max,
                       sum(preemptions) as preemptions
                from fct_replica_load_5m
                where period_at >= $since and period_at < $until
                group by all
            ),
            merged as (
                select target, bounds_id, sum(observation_count) as n, histogram_merge(list(bucket_increments)) as b
                from fct_latency_5m
                where metric = 'time_to_first_token_seconds' and period_at >= $since and period_at < $until
                group by target, bounds_id
            ),
            widest as (
                -- Bounds change with an engine's version; the ones that most requests were counted in speak.
                select * from merged where n > 0 qualify row_number() over (partition by target order by n desc) = 1
            ),
            latency as (
                select target,
                       histogram_quantile(0.95, upper_bounds, b) as p95_seconds,
                       histogram_quantile_lower(0.95, upper_bounds, b) as p95_lower_seconds,
                       histogram_quantile_upper(0.95, upper_bounds, b) as p95_upper_seconds
                from widest join stg_histogram_bounds using (bounds_id)
            )
            select targets.target, targets.deployment, targets.engine, targets.source,
                   health.is_up, health.error_kind_last, health.since_at,
                   load.* exclude (target), latency.* exclude (target)
            from dim_targets as targets
            left join fct_scrape_health as health using (target)
            left join load using (target)
            left join latency using (target)
            order by target
        """,
        # One row per target, metric and minute of the last two hours: the quantile with the buckets that enclose it.
        "latency": """
            with minutes as (
                select target, metric, minute_at, bounds_id, sum(observation_count) as observation_count,
                       histogram_merge(list(bucket_increments)) as b
                from int_latency_minutes
                where metric in ('time_to_first_token_seconds', 'time_per_output_token_seconds',
                                 'inter_token_latency_seconds', 'request_duration_seconds')
                  and not coalesce(is_proxy, false) and minute_at >= $since and minute_at < $until
                  and minute_at > (select max(minute_at) from int_latency_minutes) - interval 2 hours
                group by target, metric, minute_at, bounds_id
            )
            select target, metric, minute_at, observation_count,
                   histogram_quantile(0.95, upper_bounds, b) as p95_seconds,
                   histogram_quantile_lower(0.95, upper_bounds, b) as p95_lower_seconds,
                   histogram_quantile_upper(0.95, upper_bounds, b) as p95_upper_seconds
            from minutes join stg_histogram_bounds using (bounds_id)
            where observation_count > 0
            order by target, metric, minute_at
        """,
        # One row per target and minute of the last two hours. Ranks of a replica: the fullest, and the queue of all.
        "load": """
            select target, minute_at, max(kv_cache_usage_max_ratio) as kv_cache_usage_max_ratio,
                   sum(requests_waiting_max) as requests_waiting_max
            from int_engine_minutes
            where minute_at >= $since and minute_at < $until
              and minute_at > (select max(minute_at) from int_engine_minutes) - interval 2 hours
            group by target, minute_at
            order by target, minute_at
        """,
        # One row per GPU: activity over the window.
        "gpus": """
            select host, gpu_uuid, mig_instance, arg_max(source, period_at) as source,
                   weighted_mean(gpu_utilization_mean_ratio, sample_count) as duty_cycle_mean_ratio,
                   weighted_mean(sm_active_mean_ratio, sample_count) as sm_active_mean_ratio,
                   weighted_mean(dram_active_mean_ratio, sample_count) as dram_active_mean_ratio,
                   max(memory_used_max_bytes) as memory_used_max_bytes,
                   sum(energy_joules) as energy_joules
            from fct_gpu_utilization_5m
            where period_at >= $since and period_at < $until
            group by all
            order by host, gpu_uuid, mig_instance
        """,
        # One row per host: over the window.
        "hosts": """
            select host, arg_max(source, period_at) as source, arg_max(cpu_count, period_at) as cpus,
                   weighted_mean(cpu_busy_ratio, sample_count) as cpu_busy_ratio,
                   max(memory_used_max_ratio) as memory_used_max_ratio,
                   weighted_mean(psi_cpu_some_ratio, sample_count) as waiting_for_cpu_ratio
            from fct_host_utilization_5m
            where period_at >= $since and period_at < $until
            group by all
            order by host
        """,
    }
)
