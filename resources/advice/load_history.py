"""What advice reads from the warehouse: minutes of load and of replicas, starts, cache accesses.

Here: the queries, one short connection each. Not here: what is made of them (`analysis.advise_*`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import duckdb
import polars as pl

from optiinfra_pipelines.domain.fleet import Deployment
from resources.warehouse import Warehouse

METRIC_OF_OBJECTIVE = {
    "ttft": "time_to_first_token_seconds",
    "tpot": "time_per_output_token_seconds",
    "itl": "inter_token_latency_seconds",
    "e2e": "request_duration_seconds",
}
_REPLICA_MINUTES = """
    with

    wanted as (select unnest($objectives, recursive := true)),

    shares as (
        -- At or under the largest edge that is not over the threshold: the share that is surely good.
        select target, minute_at, wanted.metric, threshold, target_ratio,
            sum(latency.bucket_increments[len(list_filter(bounds.upper_bounds, lambda edge: edge <= threshold))])
                as good,
            sum(latency.observation_count) as total
        from int_latency_minutes as latency
        inner join int_scrape_minutes as scrape using (target, minute_at)
        inner join wanted on wanted.deployment = scrape.deployment and wanted.metric = latency.metric
        inner join stg_histogram_bounds as bounds using (bounds_id)
        where latency.minute_at >= $since and not coalesce(latency.is_proxy, false)
        group by all
    ),

    kept as (
        select target, minute_at, bool_and(good / nullif(total, 0) >= target_ratio) as is_within_objective
        from shares
        group by all
    )

    select scrape.deployment, minute_at, target,
        any_value(config_hash) as config_hash,
        sum(prompt_tokens) as prompt_tokens,
        sum(coalesce(realtime_tokens, generation_tokens)) as generation_tokens,
        sum(prompt_tokens + coalesce(realtime_tokens, generation_tokens)) / nullif(max(observed_seconds), 0)
            as work_per_second,
        sum(requests_running_mean) as running,
        sum(requests_waiting_mean) as waiting,
        sum(max_running_requests) as max_running,
        any_value(is_within_objective) as is_within_objective
    from int_engine_minutes as engine
    inner join int_scrape_minutes as scrape using (target, minute_at)
    left join kept using (target, minute_at)
    where engine.vantage = 'engine' and minute_at >= $since and scrape.deployment is not null
    group by all
    order by minute_at
"""


class LoadHistory:
    """Every method opens the warehouse for one query. Tables that no import or model has made yet read as empty."""

    def __init__(self, warehouse: Warehouse) -> None:
        self._warehouse = warehouse

    def minutes(self, since: datetime) -> pl.DataFrame:
        """Rows of int_load_minutes from `since` on, in order."""
        return self._warehouse.read(
            "select * from int_load_minutes where minute_at >= ? order by deployment, minute_at", [since]
        )

    def replica_minutes(self, since: datetime, deployments: Sequence[Deployment]) -> pl.DataFrame:
        """One row per engine replica and minute, with whether the minute kept its deployment's latency objectives.

        NULL where it has none, no histogram edge lies at or under a threshold, or no request was done.
        """
        objectives = [
            {
                "deployment": deployment.name,
                "metric": METRIC_OF_OBJECTIVE[objective.kind],
                "threshold": objective.threshold_seconds,
                "target_ratio": objective.target_ratio,
            }
            for deployment in deployments
            for objective in deployment.objectives
            if objective.kind in METRIC_OF_OBJECTIVE and objective.threshold_seconds is not None
        ] or [{"deployment": "", "metric": "", "threshold": 0.0, "target_ratio": 1.0}]
        with self._warehouse.connect() as connection:
            found = connection.sql(_REPLICA_MINUTES, params={"objectives": objectives, "since": since})
            frame: pl.DataFrame = found.pl()
        return frame

    def starts(self, since: datetime) -> pl.DataFrame:
        """Rows of int_replica_starts from `since` on."""
        return self._warehouse.read(
            "select deployment, target, event, happened_at, process_started_at from int_replica_starts "
            "where happened_at >= ?",
            [since],
        )

    def clients(self, since: datetime) -> pl.DataFrame | None:
        """Load of each client as an import tells it: deployment, client, at (s), rate and tokens a second."""
        return self._if_there(
            "select deployment, client, epoch(period_at) as at, requests_per_second, demand_tokens_per_second "
            "from trace_clients where period_at >= ? order by deployment, client, period_at",
            [since],
        )

    def accesses(self) -> pl.DataFrame | None:
        """Blocks of every request of an imported trace, in the order of the trace."""
        return self._if_there(
            "select deployment, epoch_ms(request_at) as timestamp_ms, input_tokens, output_tokens, block_size, "
            "hash_ids from trace_accesses order by deployment, place",
            [],
        )

    def kv_events(self) -> pl.DataFrame | None:
        """KV events of an imported recording, in its order: deployment, and the columns of EVENTS_SCHEMA."""
        return self._if_there(
            "select deployment, sequence, event_index, emitted_at, data_parallel_rank, event, block_hash, "
            "parent_hash, block_size_tokens, medium from trace_kv_events order by deployment, place",
            [],
        )

    def deployments_with_kv_events(self) -> list[str]:
        """Names of those whose KV events are stored."""
        found = self._if_there("select distinct deployment from trace_kv_events", [])
        return [] if found is None else found["deployment"].to_list()

    def reuse_histograms(self, since: datetime) -> pl.DataFrame:
        """Reuse distances that cache servers exported: deployment, bounds and counts added up."""
        return self._warehouse.read(
            """
            select scrape.deployment, bounds_id, any_value(bounds.upper_bounds) as upper_bounds,
                histogram_merge(list(bucket_increments)) as counts
            from int_latency_minutes as latency
            inner join int_scrape_minutes as scrape using (target, minute_at)
            inner join stg_histogram_bounds as bounds using (bounds_id)
            where metric = 'kv_block_reuse_distance_blocks' and minute_at >= ? and scrape.deployment is not null
            group by scrape.deployment, bounds_id
            """,
            [since],
        )

    def _if_there(self, sql: str, params: list[object]) -> pl.DataFrame | None:
        try:
            return self._warehouse.read(sql, params)
        except duckdb.CatalogException:
            return None
