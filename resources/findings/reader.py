"""Read from the warehouse what a diagnosis looks at: one window for each target, GPU, host and deployment.

Here: queries and their cutting into windows. Not here: judging (`analysis.findings.diagnosis`), or storing
what was found (`resources.findings.store`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import duckdb
import polars as pl

from optiinfra_pipelines.analysis.findings.deployment import DeploymentWindow
from optiinfra_pipelines.analysis.findings.gpu import GpuWindow
from optiinfra_pipelines.analysis.findings.host import HostWindow
from optiinfra_pipelines.analysis.findings.window import Capacity, EngineWindow, HitHistory, cleaned
from optiinfra_pipelines.domain.base import Source
from optiinfra_pipelines.domain.fleet import Fleet, Target

# Long enough for two refreshes to overlap at the default cadence, short enough to be about now.
ENGINE_WINDOW = timedelta(minutes=5)
# GPUs and hosts are judged on an hour of minutes, as idleness and throttling need.
HARDWARE_WINDOW = timedelta(hours=1)
# How far back the scrape before the window is looked for, as the SQL macro scrape_steps has it.
LOOK_BACK = timedelta(hours=1)
HISTORY = timedelta(days=14)
METRICS = (
    "queue_seconds",
    "prefill_seconds",
    "decode_seconds",
    "time_to_first_token_seconds",
    "time_per_output_token_seconds",
    "inter_token_latency_seconds",
    "request_duration_seconds",
    "step_tokens",
)

_NEAR = (
    "select * from {table} where {time} > $start and {time} <= $now{more} "
    "union all by name "
    "select * from {table} semi join (select target, max({time}) as {time} from {table} "
    "where {time} > $before and {time} <= $start group by target) using (target, {time}) where true{more}"
)
_CAPACITY = """
select deployment, count(*) as period_count, quantile_cont(generation_tokens_per_second, 0.9) as tokens_per_second
from fct_replica_load_5m
where period_at >= $since and period_at < $start and requests_waiting_mean >= 1 and vantage = 'engine'
    and generation_tokens_per_second is not null
group by deployment
"""
_HITS = """
select target, list(prefix_cache_hits / prefix_cache_queries order by period_at) as ratios
from fct_replica_load_5m
where period_at >= $since and period_at < $start and prefix_cache_queries >= $fewest
group by target
"""


_CURVES = """
select deployment, capacity_tokens, token_hit_ratio
from kv_reuse_curve
where measured_at > ? and measured_at <= ? and capacity_tokens is not null and token_hit_ratio is not null
qualify measured_at = max(measured_at) over (partition by deployment)
"""


@dataclass(frozen=True)
class Windows:
    """Everything there is to judge at one moment."""

    at: datetime
    engines: tuple[EngineWindow, ...]
    deployments: tuple[DeploymentWindow, ...]
    gpus: tuple[GpuWindow, ...]
    hosts: tuple[HostWindow, ...]


def read_windows(
    connection: duckdb.DuckDBPyConnection, fleet: Fleet, now: datetime, values: Mapping[str, float]
) -> Windows:
    """Windows that end at `now`, for every target, deployment and host of the fleet and every GPU seen lately."""
    engines = _engine_windows(connection, fleet, now, values)
    # As a list of entries, which is how frames hold a map.
    configs = connection.sql("select * replace (map_entries(settings) as settings) from stg_engine_configs").pl()
    hosts = _hosts_at_work(fleet, engines)
    return Windows(
        at=now,
        engines=engines,
        deployments=tuple(
            DeploymentWindow(
                deployment=deployment.name,
                end=now,
                replicas=[w for t, w in zip(fleet.targets, engines, strict=True) if t.deployment == deployment.name],
                configs=configs,
            )
            for deployment in fleet.deployments
        ),
        gpus=_gpu_windows(connection, fleet, now, hosts),
        hosts=_host_windows(connection, fleet, now, hosts),
    )


def _engine_windows(
    connection: duckdb.DuckDBPyConnection, fleet: Fleet, now: datetime, values: Mapping[str, float]
) -> tuple[EngineWindow, ...]:
    start = now - ENGINE_WINDOW
    scrapes = _near(connection, "stg_scrapes", start, now)
    samples = cleaned(_near(connection, "stg_engine_samples", start, now))
    wanted = ", ".join(f"'{metric}'" for metric in METRICS)
    histograms = _near(connection, "stg_engine_histograms", start, now, f" and metric in ({wanted})")
    bounds = dict(connection.execute("select bounds_id, upper_bounds from stg_histogram_bounds").fetchall())
    times = {"since": now - HISTORY, "start": start}
    capacity = {
        name: Capacity(tokens_per_second=speed, period_count=count)
        for name, count, speed in connection.execute(_CAPACITY, times).fetchall()
    }
    fewest = {**times, "since": now - timedelta(days=1), "fewest": values["cache_query_tokens"]}
    hits = dict(connection.execute(_HITS, fewest).fetchall())
    seen_before = {
        name
        for (name,) in connection.execute(
            "select distinct target from int_scrape_minutes where minute_at < $1 and up_count > 0",
            [start - timedelta(minutes=1)],
        ).fetchall()
    }
    attainable = _attainable(connection, fleet, samples, now)
    ready = _ready_engines(fleet, scrapes, now - timedelta(seconds=values["stale_after_seconds"]))
    objectives = {deployment.name: deployment.objectives for deployment in fleet.deployments}
    parts = [_by(frame, "target") for frame in (scrapes, samples, histograms)]
    return tuple(
        EngineWindow(
            target=target.name,
            start=start,
            end=now,
            source=target.source,
            scrapes=parts[0].get(target.name, scrapes.clear()),
            samples=parts[1].get(target.name, samples.clear()),
            histograms=parts[2].get(target.name, histograms.clear()),
            is_clean=True,
            is_new=target.name not in seen_before,
            bounds=bounds,
            ready_replicas=ready.get(target.deployment or "") or None,
            objectives=objectives.get(target.deployment or "", ()),
            capacity=capacity.get(target.deployment or ""),
            hits=HitHistory(tuple(hits.get(target.name, ())), attainable.get(target.name)),
        )
        for target in fleet.targets
    )


def _attainable(
    connection: duckdb.DuckDBPyConnection, fleet: Fleet, samples: pl.DataFrame, now: datetime
) -> dict[str, float]:
    """Hit ratio that each target's own cache size allows its workload, by the newest reuse curve of its deployment.

    Read off the curve at the next smaller size, as if one replica served all: routing by prefix reaches more.
    """
    try:
        curves = connection.execute(_CURVES, [now - timedelta(days=7), now]).fetchall()
    except duckdb.CatalogException:
        return {}
    sizes = samples.group_by("target", "scraped_at").agg(pl.col("kv_cache_capacity_tokens").sum())
    held = dict(sizes.group_by("target").agg(pl.col("kv_cache_capacity_tokens").max()).iter_rows())
    found: dict[str, float] = {}
    for target in fleet.targets:
        known = [(tokens, hits) for name, tokens, hits in curves if name == target.deployment]
        under = [hits for tokens, hits in known if tokens <= (held.get(target.name) or 0)]
        if under:
            found[target.name] = max(under)
    return found


def _near(
    connection: duckdb.DuckDBPyConnection, table: str, start: datetime, now: datetime, more: str = ""
) -> pl.DataFrame:
    """Rows of the window, and of each target those of the last scrape before it."""
    sql = _NEAR.format(table=table, time="scraped_at", more=more)
    frame: pl.DataFrame = connection.sql(sql, params={"start": start, "now": now, "before": start - LOOK_BACK}).pl()
    return frame


def _by(frame: pl.DataFrame, column: str) -> dict[str, pl.DataFrame]:
    return {str(key[0]): part for key, part in frame.partition_by(column, as_dict=True).items()}


def _ready_engines(fleet: Fleet, scrapes: pl.DataFrame, since: datetime) -> dict[str, int]:
    """Engine replicas of each deployment that were read lately."""
    fresh = scrapes.filter(pl.col("is_up"), pl.col("vantage") == "engine", pl.col("scraped_at") >= since)
    names = set(fresh["target"].to_list())
    found: dict[str, int] = {}
    for target in fleet.targets:
        if target.deployment and target.name in names:
            found[target.deployment] = found.get(target.deployment, 0) + 1
    return found


def _hosts_at_work(fleet: Fleet, engines: tuple[EngineWindow, ...]) -> dict[str, float | None]:
    """Most requests that engines of a host ran or queued at once; None where no engine of it told."""
    most: dict[str, float | None] = {}
    for target, window in zip(fleet.targets, engines, strict=True):
        if target.host is None:
            continue
        seen = [
            (step.gauge("requests_running") or 0) + (step.gauge("requests_waiting") or 0)
            for step in window.steps
            if step.gauge("requests_running") is not None
        ]
        now = most.get(target.host)
        most[target.host] = max([*seen, *([now] if now is not None else [])], default=None)
    return most


def _gpu_windows(
    connection: duckdb.DuckDBPyConnection, fleet: Fleet, now: datetime, work: Mapping[str, float | None]
) -> tuple[GpuWindow, ...]:
    start = now - HARDWARE_WINDOW
    known = connection.execute(
        "select host, gpu_uuid, mig_instance, max(source) from int_gpu_minutes where minute_at >= $1 group by all "
        "order by all",
        [now - timedelta(days=1)],
    ).fetchall()
    minutes = _minutes(connection, "int_gpu_minutes", start, now)
    names = {host.name for host in fleet.hosts}
    return tuple(
        GpuWindow(
            host=host,
            gpu_uuid=gpu,
            mig_instance=slice_,
            start=start,
            end=now,
            source=_source(source),
            minutes=minutes.filter(
                pl.col("host") == host, pl.col("gpu_uuid") == gpu, pl.col("mig_instance") == slice_
            ).sort("minute_at"),
            requests=work.get(host),
        )
        for host, gpu, slice_, source in known
        if host in names
    )


def _host_windows(
    connection: duckdb.DuckDBPyConnection, fleet: Fleet, now: datetime, work: Mapping[str, float | None]
) -> tuple[HostWindow, ...]:
    start = now - ENGINE_WINDOW - timedelta(minutes=1)
    minutes = _minutes(connection, "int_host_minutes", start, now)
    processes = _minutes(connection, "int_host_process_minutes", start, now)
    return tuple(
        HostWindow(
            host=host.name,
            start=start,
            end=now,
            source=host.source,
            minutes=minutes.filter(pl.col("host") == host.name).sort("minute_at"),
            processes=processes.filter(pl.col("host") == host.name),
            is_serving=None if work.get(host.name) is None else bool(work[host.name]),
        )
        for host in fleet.hosts
        if host.local or host.node_exporter or host.node_series
    )


def _minutes(connection: duckdb.DuckDBPyConnection, table: str, start: datetime, now: datetime) -> pl.DataFrame:
    sql = f"select * from {table} where minute_at >= $1 and minute_at <= $2"
    frame: pl.DataFrame = connection.sql(sql, params=[start, now]).pl()
    return frame


def _source(value: object) -> Source:
    return "recorded" if value == "recorded" else "simulated" if value == "simulated" else "live"


def deployments_of(targets: tuple[Target, ...]) -> dict[str, str]:
    return {target.name: target.deployment for target in targets if target.deployment}
