"""Objectives over the warehouse: count good requests, judge, keep the states as a table.

Here: queries and DDL. Not here: edges, budgets and burn rates (`optiinfra_pipelines.analysis.objectives`,
`optiinfra_pipelines.analysis.burn_rate`).

    objective_status   one row per refresh, deployment and objective, kept for 90 days
    goodput_bounds     one row per deployment with two latency objectives, of the newest refresh
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import duckdb
import polars as pl

from optiinfra_pipelines.analysis.findings.latency_share import METRICS
from optiinfra_pipelines.analysis.objectives import (
    COUNTS,
    Counted,
    Vantage,
    evaluate,
    evaluate_goodput,
    goodput_bounds,
    merge_edges,
    objectives_of,
)
from optiinfra_pipelines.domain.fleet import Deployment, Fleet, Objective
from optiinfra_pipelines.domain.objectives import GoodputBounds, ObjectiveStatus
from optiinfra_pipelines.domain.thresholds import threshold_values
from resources.warehouse import Warehouse

# The longest short window of a burn-rate pair at 30 days is 6 h: minutes reach a little farther, hours the rest.
MINUTES_REACH = timedelta(hours=8)
KEEP = timedelta(days=90)

_TABLES = """
create table if not exists objective_status (
    judged_at timestamptz, deployment varchar, objective varchar, kind varchar, state varchar, vantage varchar,
    edge_seconds double, good double, total double, good_ratio double, remaining_ratio double, covered_days double,
    unseen_requests double, is_default boolean, default_source varchar, notes varchar[], document varchar);
create table if not exists goodput_bounds (
    judged_at timestamptz, deployment varchar, kinds varchar[], lower_ratio double, upper_ratio double, reason varchar);
"""
_BOUNDS = """
select distinct vantage, bounds_id, upper_bounds, is_proxy
from fct_latency_1h
inner join stg_histogram_bounds using (bounds_id)
where target in (select unnest($targets::varchar[])) and metric = $metric and hour_at >= $since - interval 1 hour
    and vantage in ('engine', 'frontend') and bucket_increments is not null
"""
_SHARES = """
with

edges as (select unnest($ids::ubigint[]) as bounds_id, unnest($places::bigint[]) as place),

steps as (

    select vantage, bounds_id, minute_at as at_, bucket_increments
    from int_latency_minutes
    where target in (select unnest($targets::varchar[])) and metric = $metric and minute_at >= $recent

    union all

    select vantage, bounds_id, hour_at, bucket_increments
    from fct_latency_1h
    where target in (select unnest($targets::varchar[])) and metric = $metric
        and hour_at >= $since and hour_at < $recent

)

select vantage, at_ as "at", sum(bucket_increments[place]) as good, sum(bucket_increments[-1]) as total
from steps
inner join edges using (bounds_id)
where bucket_increments is not null and vantage in ('engine', 'frontend')
group by all
"""
# A request may be counted as failed by the engine and as 5xx by its HTTP server: the larger count holds both.
_ANSWERS = """
with

steps as (

    select vantage, minute_at as at_, requests_finished, requests_failed, requests_rejected,
        http_requests, http_4xx, http_5xx
    from int_engine_minutes
    where target in (select unnest($targets::varchar[])) and minute_at >= $recent

    union all

    select vantage, hour_at, requests_finished, requests_failed, requests_rejected,
        http_requests, http_4xx, http_5xx
    from fct_replica_load_1h
    where target in (select unnest($targets::varchar[])) and hour_at >= $since and hour_at < $recent

),

counted as (

    select
        vantage,
        at_,
        case when $with_rejected then coalesce(requests_rejected, 0) else 0 end as rejected,
        greatest(http_requests - coalesce(http_4xx, 0), requests_finished + coalesce(requests_failed, 0) + rejected)
            as total,
        coalesce(greatest(http_5xx, requests_failed + rejected), rejected) as bad

    from steps

    where vantage in ('engine', 'frontend')

)

select vantage, at_ as "at", sum(total - least(bad, total)) as good, sum(total) as total
from counted
where total is not null
group by all
"""


@dataclass(frozen=True)
class Judged:
    """One refresh of every objective, and the goodput bounds (or why there are none) by deployment."""

    at: datetime
    statuses: tuple[ObjectiveStatus, ...]
    goodput: Mapping[str, GoodputBounds | str]
    # Where a deployment's objectives come from, or why it has none.
    sources: Mapping[str, str]


class ObjectiveStore:
    """Judge the objectives of a fleet and keep what came out."""

    def __init__(self, fleet: Fleet, warehouse: Warehouse, clock: Callable[[], datetime]) -> None:
        self._fleet = fleet
        self._warehouse = warehouse
        self._clock = clock

    def refresh(self) -> Judged:
        """Every objective at the clock's now, stored."""
        now, values = self._clock(), threshold_values(self._fleet.thresholds)
        statuses: list[ObjectiveStatus] = []
        goodput: dict[str, GoodputBounds | str] = {}
        sources: dict[str, str] = {}
        with self._warehouse.connect() as connection:
            connection.execute(_TABLES)
            for deployment in self._fleet.deployments:
                objectives, sources[deployment.name] = objectives_of(deployment)
                own = [
                    evaluate(deployment.name, one, self._count(connection, deployment, one, now), now, values)
                    for one in objectives
                    if one.kind != "goodput"
                ]
                own += [evaluate_goodput(deployment.name, o, own, now) for o in objectives if o.kind == "goodput"]
                goodput[deployment.name] = goodput_bounds(own)
                statuses += own
            judged = Judged(now, tuple(statuses), goodput, sources)
            _save(connection, judged, {one.name for one in self._fleet.deployments if not one.objectives})
        return judged

    def _count(
        self, connection: duckdb.DuckDBPyConnection, deployment: Deployment, objective: Objective, now: datetime
    ) -> Counted:
        targets = [target for target in self._fleet.targets if target.deployment == deployment.name]
        names = [target.name for target in targets]
        since = now - timedelta(days=objective.window_days)
        recent = (now - MINUTES_REACH).replace(minute=0, second=0, microsecond=0)
        reach = {"targets": names, "since": since, "recent": recent}
        answers = connection.sql(_ANSWERS, params={**reach, "with_rejected": objective.kind != "error_ratio"}).pl()
        counts = _by_vantage(answers)
        requests = {vantage: float(frame["total"].sum()) for vantage, frame in counts.items()}
        if objective.threshold_seconds is None:
            return Counted(counts, engine=deployment.engine, requests=requests)
        metric = METRICS[objective.kind]
        asked = {"targets": names, "metric": metric, "since": since}
        known = connection.execute(_BOUNDS, asked).fetchall()
        bounds = {bounds_id: tuple(upper) for _, bounds_id, upper, _ in known}
        engine = deployment.engine or _engine(connection, names)
        edges, lowest = merge_edges(objective.threshold_seconds, bounds, engine)
        if not edges:
            empty: dict[Vantage, pl.DataFrame] = {"engine": pl.DataFrame(schema=COUNTS)} if bounds else {}
            return Counted(empty, engine=engine, requests=requests)
        places = [list(bounds[key]).index(edge.edge) + 1 for key, edge in edges.items()]
        params = {**reach, "metric": metric, "ids": list(edges), "places": places}
        shares = connection.sql(_SHARES, params=params).pl()
        is_proxy = any(proxy for *_, proxy in known)
        return Counted(_by_vantage(shares), lowest, engine, is_proxy, requests)


def _engine(connection: duckdb.DuckDBPyConnection, targets: list[str]) -> str | None:
    """The engine that the deployment's pages show."""
    # fetchall, not fetchone: a result that is not read to its end keeps the connection busy.
    [(engine,)] = connection.execute(
        "select max(engine) from dim_targets where vantage = 'engine' and target in (select unnest($1::varchar[]))",
        [targets],
    ).fetchall()
    return str(engine) if engine is not None else None


def _by_vantage(frame: pl.DataFrame) -> dict[Vantage, pl.DataFrame]:
    found: dict[Vantage, pl.DataFrame] = {}
    vantages: tuple[Vantage, ...] = ("engine", "frontend")
    for vantage in vantages:
        rows = frame.filter(pl.col("vantage") == vantage).select("at", "good", "total").cast(COUNTS).sort("at")
        if rows.height:
            found[vantage] = rows
    return found


def _save(connection: duckdb.DuckDBPyConnection, judged: Judged, defaults: set[str]) -> None:
    rows = [
        [
            *(judged.at, one.deployment, one.key, one.objective.kind, one.state, one.vantage, one.edge_seconds),
            *(one.good, one.total, one.good_ratio, one.remaining_ratio, one.covered_days, one.unseen_requests),
            *(one.deployment in defaults, judged.sources[one.deployment], list(one.notes), one.model_dump_json()),
        ]
        for one in judged.statuses
    ]
    connection.execute("begin transaction")
    try:
        connection.execute("delete from objective_status where judged_at < $1", [judged.at - KEEP])
        connection.execute("delete from goodput_bounds")
        if rows:
            connection.executemany(f"insert into objective_status values ({', '.join('?' * 17)})", rows)
        for deployment, bounds in judged.goodput.items():
            row = (
                [judged.at, deployment, list(bounds.kinds), bounds.lower, bounds.upper, None]
                if isinstance(bounds, GoodputBounds)
                else [judged.at, deployment, [], None, None, bounds]
            )
            connection.execute("insert into goodput_bounds values (?, ?, ?, ?, ?, ?)", row)
    except BaseException:
        connection.execute("rollback")
        raise
    connection.execute("commit")
