"""Read what the rules and the ledger look at: windows of samples, configurations, GPUs, five-minute rows of effects.

Here: the queries and the frames they give. Not here: what is made of them (`analysis.recommendations.measures`,
`analysis.ledger.effect`) or where recommendations are kept (`resources.ledger.store`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import duckdb
import polars as pl

from optiinfra_pipelines.analysis.ledger.effect import EARLY, SETTLED, SIGNALS, Scale, SignalSource
from optiinfra_pipelines.analysis.ledger.life import ConfigChange
from optiinfra_pipelines.analysis.recommendations.context import GpuFacts
from optiinfra_pipelines.analysis.recommendations.measures import HISTOGRAMS, SAMPLE_COLUMNS, Measures
from optiinfra_pipelines.domain.findings import Finding
from optiinfra_pipelines.domain.kv_cache import TierAdvice


@dataclass(frozen=True)
class Reuse:
    """How far a workload shares prefixes, and the tiers that pay for keeping them; None: not known."""

    ceiling_ratio: float | None
    tiers: tuple[TierAdvice, ...] | None


@dataclass(frozen=True)
class WindowRows:
    """Everything of one window. settings: (target, config hash) -> what the page prints."""

    samples: pl.DataFrame
    histograms: pl.DataFrame
    settings: Mapping[tuple[str, str], Mapping[str, str]]


def read_window(connection: duckdb.DuckDBPyConnection, start: datetime, end: datetime) -> WindowRows:
    """Rows scraped from `start` to `end`, both included."""
    columns = ", ".join(f'"{name}"' for name in SAMPLE_COLUMNS)
    samples = connection.sql(
        f"select {columns} from stg_engine_samples where scraped_at between ? and ?", params=[start, end]
    ).pl()
    histograms = connection.sql(_HISTOGRAMS, params=[start, end]).pl()
    return WindowRows(samples, histograms, read_settings(connection))


def read_day(connection: duckdb.DuckDBPyConnection, start: datetime, end: datetime) -> dict[str, Measures]:
    """The measures of a long window that the daily rules look at, from five-minute rows, by target.

    A restart in it, or another configuration, makes the day no steady state.
    """
    rows = connection.execute(
        """
        select
            target, any_value(engine), any_value(vantage), min(period_at), max(period_at),
            arg_max(config_hash, period_at), count(distinct config_hash), sum(restart_count),
            max(kv_cache_usage_max_ratio), max(requests_waiting_max), avg(requests_waiting_mean),
            avg(requests_running_mean), count(*)
        from fct_replica_load_5m where period_at >= ? and period_at < ? group by target
        """,
        [start, end],
    ).fetchall()
    found = {}
    for target, engine, vantage, first, last, config_hash, hashes, restarts, kv, most, waiting, running, count in rows:
        unusable = None
        if restarts or hashes > 1:
            unusable = "the engine restarted in the day" if restarts else "the configuration changed in the day"
        found[target] = Measures(
            target=target,
            engine=engine,
            vantage=vantage,
            window_start=first,
            window_end=last,
            config_hash=config_hash,
            ranks=1,
            unusable=unusable,
            values={
                # Periods that were seen, not the span: an hour without samples is an hour not looked at.
                "window_seconds": count * SETTLED.period.total_seconds(),
                "kv_usage_max_ratio": kv,
                "waiting_max": most,
                "waiting_mean": waiting,
                "running_mean": running,
            },
        )
    return found


def read_settings(connection: duckdb.DuckDBPyConnection) -> dict[tuple[str, str], dict[str, str]]:
    """(target, config hash) -> settings as the page prints them, of every configuration ever seen."""
    rows = connection.execute("select target, config_hash, settings from stg_engine_configs").fetchall()
    return {(target, config_hash): dict(settings) for target, config_hash, settings in rows}


def read_versions(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """Target -> engine version, of those whose page told one."""
    rows = connection.execute(
        "select target, arg_max(engine_version, first_seen_at) from stg_engine_configs "
        "where engine_version is not null group by target"
    ).fetchall()
    return dict(rows)


def read_changes(connection: duckdb.DuckDBPyConnection, since: datetime, until: datetime) -> list[ConfigChange]:
    """Changes of configuration, first sights left out; one a target and moment, whatever its ranks."""
    rows = connection.execute(
        "select target, changed_at, any_value(previous_config_hash), any_value(config_hash) from int_config_changes "
        "where changed_at > ? and changed_at <= ? and previous_config_hash is not null "
        "group by target, changed_at order by changed_at, target",
        [since, until],
    ).fetchall()
    return [ConfigChange(*row) for row in rows]


def read_findings(connection: duckdb.DuckDBPyConnection, start: datetime, end: datetime) -> list[Finding]:
    """Findings that held at some moment of a window; none where findings are not kept."""
    try:
        rows = connection.execute(
            "select document from findings where since <= ? and last_seen_at >= ? order by since, id", [end, start]
        ).fetchall()
    except duckdb.CatalogException:
        return []
    return [Finding.model_validate_json(document) for (document,) in rows]


def read_gpus(connection: duckdb.DuckDBPyConnection, start: datetime, end: datetime) -> dict[str, GpuFacts]:
    """Host -> its GPUs in a window: the least free, the busiest; names only where they are all one."""
    rows = connection.execute(
        """
        select
            host, case when count(distinct name) = 1 then any_value(name) end, min(memory_total_bytes),
            min(memory_free_min_bytes), quantile_cont(dram_active_mean_ratio, 0.95),
            quantile_cont(tensor_active_mean_ratio, 0.95), avg(power_mean_watts), min(power_limit_watts),
            min(sm_clock_max_mhz)
        from int_gpu_minutes
        where minute_at >= ? and minute_at < ? and mig_instance = ''
        group by host
        """,
        [start, end],
    ).fetchall()
    return {host: GpuFacts(*facts) for host, *facts in rows}


def read_reuse(connection: duckdb.DuckDBPyConnection, until: datetime) -> dict[str, Reuse]:
    """Deployment -> what its newest cache advice of the week before `until` says; none where none is kept."""
    try:
        rows = connection.execute(_REUSE, [until - timedelta(days=7), until]).fetchall()
    except duckdb.CatalogException:
        return {}
    return {
        deployment: Reuse(
            ceiling_ratio=ceiling,
            tiers=None if undecided else tuple(TierAdvice.model_validate(tier) for tier in tiers or ()),
        )
        for deployment, ceiling, undecided, tiers in rows
    }


def read_effect_rows(
    connection: duckdb.DuckDBPyConnection,
    signal: str,
    targets: Sequence[str],
    changed: Sequence[str],
    window: tuple[datetime, datetime],
    scale: Scale,
) -> pl.DataFrame:
    """Rows of a signal for `measure_effect`, in the scale's periods; no rows for a signal that is not measured.

    A replica that had nothing to do in a period (a spare, a candidate before its share) is not in it.
    """
    source = SIGNALS.get(signal)
    if source is None:
        return pl.DataFrame(schema=_EFFECT_SCHEMA)
    query = _effect_minutes(source) if scale is EARLY else _effect_periods(source)
    frame: pl.DataFrame = connection.sql(
        query, params={"changed": list(changed), "targets": list(targets), "start": window[0], "end": window[1]}
    ).pl()
    return frame


def _effect_periods(source: SignalSource) -> str:
    over = f"s.{source.column} / nullif(s.{source.per}, 0)" if source.per else f"s.{source.column}"
    table = "fct_latency_5m" if source.metric else "fct_replica_load_5m"
    metric = f" and s.metric = '{source.metric}'" if source.metric else ""
    return f"""
        with load as (
            select
                *, requests_running_mean + requests_waiting_mean as in_flight,
                {_ARRIVALS.format(requests="requests_finished", seconds="observed_seconds", at="period_at")}
            from fct_replica_load_5m
            where list_contains($targets, target) and period_at >= $start and period_at < $end
        )
        select
            l.target, l.period_at, list_contains($changed, l.target) as is_changed, ({over})::double as value,
            l.arrivals_per_second, l.prompt_tokens / nullif(l.requests_finished, 0) as prompt_tokens_per_request,
            l.generation_tokens / nullif(l.requests_finished, 0) as generation_tokens_per_request
        from load l
        inner join {table} s on s.target = l.target and s.period_at = l.period_at{metric}
        where (l.restart_count = 0 or l.restart_count is null)
            and not coalesce(l.requests_running_max = 0 and coalesce(l.generation_tokens, 0) = 0, false)
        """


def _effect_minutes(source: SignalSource) -> str:
    """The same from minutes, of which there is one row a rank: sizes, requests and tokens of ranks add up."""
    table = "int_latency_minutes" if source.metric else "int_engine_minutes"
    column = f"sum({source.column})"
    over = f"{column} / nullif(sum({source.per}), 0)" if source.per else column
    metric = f" and metric = '{source.metric}'" if source.metric else ""
    return f"""
        with wanted as (
            select target, minute_at, ({over})::double as value
            from {table}
            where list_contains($targets, target) and minute_at >= $start and minute_at < $end{metric}
            group by all
        ),
        summed as (
            select
                target, minute_at, sum(requests_running_mean) + sum(requests_waiting_mean) as in_flight,
                sum(restart_count) as restart_count, max(observed_seconds) as seconds,
                max(requests_running_max) as running, sum(requests_finished) as requests,
                sum(prompt_tokens) as prompts, sum(generation_tokens) as outputs
            from int_engine_minutes
            where list_contains($targets, target) and minute_at >= $start and minute_at < $end
            group by target, minute_at
        ),
        load as (
            select *, {_ARRIVALS.format(requests="requests", seconds="seconds", at="minute_at")} from summed
        )
        select
            target, minute_at as period_at, list_contains($changed, target) as is_changed, value,
            arrivals_per_second,
            (prompts / nullif(requests, 0))::double as prompt_tokens_per_request,
            (outputs / nullif(requests, 0))::double as generation_tokens_per_request
        from load inner join wanted using (target, minute_at)
        where (restart_count = 0 or restart_count is null)
            and not coalesce(running = 0 and coalesce(outputs, 0) = 0, false)
        """


def read_changed_targets(
    connection: duckdb.DuckDBPyConnection, targets: Sequence[str], applied_at: datetime, until: datetime
) -> tuple[list[str], list[str]]:
    """Of `targets`: those changed (or restarted) within the warm-up after `applied_at`, and those left alone since.

    One that changed later belongs to neither.
    """
    rows = connection.execute(
        "select target, min(touched_at) from ("
        "select target, changed_at as touched_at from int_config_changes where previous_config_hash is not null "
        "union all select target, period_at from fct_replica_load_5m where restart_count > 0) "
        "where touched_at > $1 and touched_at <= $2 and list_contains($3, target) group by target",
        [applied_at - SETTLED.period - timedelta(seconds=1), until, list(targets)],
    ).fetchall()
    touched = dict(rows)
    changed = [target for target in targets if target in touched and touched[target] <= applied_at + SETTLED.warm_up]
    return changed, [target for target in targets if target not in touched]


# Requests that came in a period: those finished, and by how many more are in flight than in the one before. A replica's
# first period has none before it and counts those finished; where what is in flight is not told, nothing is known.
_ARRIVALS = """
    ((
        {requests} + in_flight - coalesce(lag(in_flight) over (partition by target order by {at}), in_flight)
    ) / nullif({seconds}, 0))::double as arrivals_per_second
"""
_EFFECT_SCHEMA: dict[str, type[pl.DataType] | pl.DataType] = {
    "target": pl.String,
    "period_at": pl.Datetime("us", "UTC"),
    "is_changed": pl.Boolean,
    "value": pl.Float64,
    "arrivals_per_second": pl.Float64,
    "prompt_tokens_per_request": pl.Float64,
    "generation_tokens_per_request": pl.Float64,
}
# A tier that nobody can weigh for lack of a price leaves the question open.
_REUSE = """
    with newest as (
        select * from kv_cache_recommendations
        where decided_at > ? and decided_at <= ?
        qualify decided_at = max(decided_at) over (partition by deployment)
    )
    select
        deployment, max(coalesce(token_ceiling_ratio, block_ceiling_ratio)), bool_or(tier is null or pays is null),
        list({
            tier: tier, size_bytes: size_bytes, hit_ratio_before: hit_ratio_before, hit_ratio_after: hit_ratio_after,
            saved_prefill_seconds_per_hour: saved_prefill_seconds_per_hour,
            saved_gpu_usd_per_hour: saved_gpu_usd_per_hour, memory_usd_per_hour: memory_usd_per_hour, pays: pays,
            reason: reason
        }) filter (pays)
    from newest
    group by deployment
"""
_METRICS = ", ".join(f"'{name}'" for name in HISTOGRAMS)
# First and last state of each histogram in a window.
_HISTOGRAMS = f"""
    select
        h.target, h.engine_rank, h.metric, any_value(b.upper_bounds) as upper_bounds,
        arg_min(h.bucket_counts, h.scraped_at) as first_counts,
        arg_max(h.bucket_counts, h.scraped_at) as last_counts,
        arg_min(h.sum_value, h.scraped_at) as first_sum, arg_max(h.sum_value, h.scraped_at) as last_sum,
        arg_min(h.count_value, h.scraped_at) as first_count, arg_max(h.count_value, h.scraped_at) as last_count
    from stg_engine_histograms h
    left join stg_histogram_bounds b using (bounds_id)
    where h.scraped_at between ? and ? and h.metric in ({_METRICS}) and h.vantage = 'engine'
    group by h.target, h.engine_rank, h.metric, h.bounds_id
"""
