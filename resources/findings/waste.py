"""Waste, costs, trends and the packing plan as tables, made anew from the last week or month of marts.

Here: DDL by frame, queries, one refresh. Not here: what a state, a cost or a trend is (`optiinfra_pipelines.analysis`).

    fct_gpu_waste            one row per UTC day, host, GPU and state: GPU-hours and dollars
    fct_deployment_costs     one row per deployment: what its tokens cost over the last days
    fct_signal_trends        one row per subject, name and signal: slope, interval, when it is full, season
    consolidation_plan       one row per replica with its place in the plan, or one row that says why there is none
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import duckdb
import polars as pl

from optiinfra_pipelines.analysis.consolidation import Gpu, NoPlan, Plan, Replica, consolidate
from optiinfra_pipelines.analysis.trends import trends
from optiinfra_pipelines.analysis.waste import deployment_costs, gpu_hours, gpu_states
from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.prices import GpuPrice, price_of
from resources.warehouse import Warehouse

# A week holds every day of it.
LOOK_BACK = timedelta(days=7)
TREND_BACK = timedelta(days=28)
# Signals that are full somewhere. Others have a slope and no end.
CAPACITIES = {"kv_cache_usage_ratio": 1.0, "memory_used_ratio": 1.0, "cpu_busy_ratio": 1.0}

_GPUS = """
select
    host, gpu_uuid, mig_instance, name, period_at, sample_count, unhealthy_count, gpu_utilization_max_ratio,
    sm_active_mean_ratio, dram_active_mean_ratio, memory_used_max_bytes, memory_total_bytes, memory_reserved_bytes,
    process_count_max, energy_joules, health_last
from fct_gpu_utilization_5m where period_at >= $since
"""
_HOST_REQUESTS = """
select t.host, l.period_at, sum(l.requests_running_mean) as requests_running_mean
from fct_replica_load_5m l inner join dim_targets t using (target)
where t.host is not null and l.vantage = 'engine' and l.period_at >= $since group by t.host, l.period_at
"""
_LOAD = """
with spent as (
    select target, period_at, metric, sum(observation_sum) as observation_sum
    from fct_latency_5m where metric in ('prefill_seconds', 'decode_seconds') and period_at >= $since
    group by target, period_at, metric
)
select
    l.deployment, l.period_at, l.target, l.prompt_tokens, coalesce(l.realtime_tokens, l.generation_tokens)
        as generation_tokens,
    coalesce(p.observation_sum, l.prefill_seconds) as prefill_seconds,
    coalesce(d.observation_sum, l.decode_seconds) as decode_seconds
from fct_replica_load_5m l
left join spent p on p.target = l.target and p.period_at = l.period_at and p.metric = 'prefill_seconds'
left join spent d on d.target = l.target and d.period_at = l.period_at and d.metric = 'decode_seconds'
where l.deployment is not null and l.vantage = 'engine' and l.period_at >= $since
"""
_TRENDS = """
select subject, name, signal, period_at, mean_value
from fct_utilization_trends where period = 'hour' and period_at >= $since
"""


@dataclass(frozen=True)
class Wasted:
    """One refresh: GPU-hours by state, costs by deployment, trends, and the plan or why there is none."""

    hours: pl.DataFrame
    costs: pl.DataFrame
    trends: pl.DataFrame
    plan: Plan | NoPlan


class WasteStore:
    """Make the tables anew. needs: deployment -> bytes a replica needs on each GPU, for the packing plan."""

    def __init__(
        self,
        fleet: Fleet,
        warehouse: Warehouse,
        clock: Callable[[], datetime],
        needs: Mapping[str, float] | None = None,
    ) -> None:
        self._fleet = fleet
        self._warehouse = warehouse
        self._clock = clock
        self._needs = needs or {}

    def refresh(self) -> Wasted:
        now = self._clock()
        with self._warehouse.connect() as connection:
            gpus = _read(connection, _GPUS, now - LOOK_BACK)
            requests = _read(connection, _HOST_REQUESTS, now - LOOK_BACK)
            load = _read(connection, _LOAD, now - LOOK_BACK)
            hourly = _read(connection, _TRENDS, now - TREND_BACK)
        states = gpu_states(gpus, requests)
        hours = gpu_hours(
            states.with_columns(day=pl.col("period_at").dt.date()), self._prices(states), ("day", "host", "gpu_uuid")
        )
        costs = deployment_costs(load, self._deployments(), self._energy(states, load))
        found = pl.DataFrame(trends(hourly, ["subject", "name"], CAPACITIES), schema=_TREND_SCHEMA)
        plan = consolidate(*self._placed(states))
        with self._warehouse.connect() as connection:
            _replace(connection, "fct_gpu_waste", hours)
            _replace(connection, "fct_deployment_costs", costs)
            _replace(connection, "fct_signal_trends", found)
            _replace(connection, "consolidation_plan", _plan_rows(plan))
        return Wasted(hours, costs, found, plan)

    def _prices(self, states: pl.DataFrame) -> dict[str, GpuPrice | None]:
        """Price by product name; an operator's own where every deployment that names this GPU says the same."""
        found: dict[str, GpuPrice | None] = {}
        for name in states["name"].drop_nulls().unique():
            table = price_of(name)
            own = {
                one.price_usd_per_gpu_hour
                for one in self._fleet.deployments
                if one.price_usd_per_gpu_hour is not None and one.gpu and price_of(one.gpu) == table
            }
            found[name] = price_of(name, own.pop() if len(own) == 1 else None)
        return found

    def _deployments(self) -> pl.DataFrame:
        rows = []
        for one in self._fleet.deployments:
            price = price_of(one.gpu, one.price_usd_per_gpu_hour)
            rows.append((one.name, one.gpus_per_replica, None if price is None else price.usd_per_gpu_hour))
        schema = {"deployment": pl.String, "gpus_per_replica": pl.Int64, "usd_per_gpu_hour": pl.Float64}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def _energy(self, states: pl.DataFrame, load: pl.DataFrame) -> pl.DataFrame:
        """Energy of hosts that serve one deployment with all their GPUs; of others nobody knows whose it was."""
        served: dict[str, set[str | None]] = {}
        for target in self._fleet.targets:
            if target.host is not None:
                served.setdefault(target.host, set()).add(target.deployment)
        alone = {host: next(iter(names)) for host, names in served.items() if len(names) == 1}
        deployments = set(load["deployment"].unique())
        whole = {
            name: [host for host, owner in alone.items() if owner == name]
            for name in deployments
            if all(target.host in alone for target in self._fleet.targets if target.deployment == name)
        }
        rows = []
        for name, hosts in whole.items():
            joules = states.filter(pl.col("host").is_in(hosts))["energy_joules"]
            if joules.len() and not joules.null_count():
                rows.append((name, float(joules.sum())))
        return pl.DataFrame(rows, schema={"deployment": pl.String, "energy_joules": pl.Float64}, orient="row")

    def _placed(self, states: pl.DataFrame) -> tuple[list[Gpu], list[Replica]]:
        """GPUs, and the replicas on them, where one host serves one replica or its GPUs can be told apart."""
        series = (
            states.sort("period_at")
            .group_by("host", "gpu_uuid", maintain_order=True)
            .agg(
                pl.col("memory_total_bytes").last(),
                pl.col("memory_reserved_bytes").last(),
                pl.col("health_last").last(),
                pl.col("sm_active_mean_ratio"),
                pl.col("dram_active_mean_ratio"),
                pl.col("state").last(),
            )
        )
        gpus, by_host = [], dict[str, list[dict[str, object]]]()
        for row in series.to_dicts():
            by_host.setdefault(row["host"], []).append(row)
            if row["memory_total_bytes"] is not None:
                reserved = row["memory_reserved_bytes"] or 0.0
                gpus.append(
                    Gpu(row["host"], row["gpu_uuid"], row["memory_total_bytes"], reserved, row["health_last"] == "ok")
                )
        replicas = []
        for target in self._fleet.targets:
            deployment = next((one for one in self._fleet.deployments if one.name == target.deployment), None)
            if deployment is None or deployment.gpus_per_replica < 1 or target.host is None:
                continue
            shared = [one for one in self._fleet.targets if one.host == target.host]
            cards = by_host.get(target.host, [])
            is_told = len(shared) == 1 and len(cards) == deployment.gpus_per_replica
            replicas.append(
                Replica(
                    name=target.name,
                    deployment=deployment.name,
                    on=tuple(str(card["gpu_uuid"]) for card in cards) if is_told else (),
                    bytes_per_gpu=self._needs.get(deployment.name),
                    sm_active=_busiest(cards, "sm_active_mean_ratio"),
                    dram_active=_busiest(cards, "dram_active_mean_ratio"),
                )
            )
        return gpus, replicas


def _busiest(cards: list[dict[str, object]], column: str) -> tuple[float, ...] | None:
    """The busiest card of a replica at each moment; None when one does not tell one of them."""
    series = [card[column] for card in cards]
    lists = [one for one in series if isinstance(one, list) and None not in one]
    if not lists or len(lists) < len(series) or len({len(one) for one in lists}) > 1:
        return None
    return tuple(max(moment) for moment in zip(*lists, strict=True))


def _plan_rows(plan: Plan | NoPlan) -> pl.DataFrame:
    schema: dict[str, type[pl.DataType] | pl.DataType] = {
        "replica": pl.String,
        "gpus": pl.List(pl.String),
        "is_moved": pl.Boolean,
        "saved_gpus": pl.Int64,
        "reason": pl.String,
    }
    if isinstance(plan, NoPlan):
        return pl.DataFrame([(None, None, None, 0, plan.reason)], schema=schema, orient="row")
    rows = [
        (name, list(places), name in plan.moved, plan.saved_gpus, None)
        for name, places in sorted(plan.placement.items())
    ]
    return pl.DataFrame(rows, schema=schema, orient="row")


def _read(connection: duckdb.DuckDBPyConnection, sql: str, since: datetime) -> pl.DataFrame:
    frame: pl.DataFrame = connection.sql(sql, params={"since": since}).pl()
    return frame


def _replace(connection: duckdb.DuckDBPyConnection, table: str, frame: pl.DataFrame) -> None:
    connection.register("new_rows", frame)
    connection.execute(f"create or replace table {table} as select * from new_rows")
    connection.unregister("new_rows")


_TREND_SCHEMA: dict[str, type[pl.DataType] | pl.DataType] = {
    "subject": pl.String,
    "name": pl.String,
    "signal": pl.String,
    "points": pl.Int64,
    "level": pl.Float64,
    "slope_per_day": pl.Float64,
    "slope_low_per_day": pl.Float64,
    "slope_high_per_day": pl.Float64,
    "is_clear": pl.Boolean,
    "saturates_at": pl.Datetime("us", "UTC"),
    "saturates_earliest": pl.Datetime("us", "UTC"),
    "saturates_latest": pl.Datetime("us", "UTC"),
    "season": pl.String,
    "season_skill_ratio": pl.Float64,
    "reason": pl.String,
}
