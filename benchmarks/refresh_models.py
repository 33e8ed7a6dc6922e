"""What a refresh of all SQL models costs, and what a day's p95 costs from the roll-up.

    python benchmarks/refresh_models.py                      # 200 replicas, 24 h: some minutes, some GB of memory
    python benchmarks/refresh_models.py --replicas 1 --hours 1

Synthetic data, said so: full-width raw rows every 5 s for the last --raw-minutes; the minutes before that are made
directly in the minute tables, since no refresh reads their raw rows any more. Roll-ups are made from the minutes by
the models themselves. Prints measured wall and CPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import duckdb

from optiinfra_pipelines.sql.loader import load_models
from optiinfra_pipelines.sql.models import Models, Window
from optiinfra_pipelines.sql.refresh import prepare, refresh, refresh_all
from optiinfra_pipelines.sql.sources import RawTable, raw_tables

T = TypeVar("T")

END = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
TICK_SECONDS = 5
# The bounds of vLLM's time to first token, and the histograms one vLLM 0.32 rank exposes that we keep.
BOUNDS = [.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560, float("inf")]  # fmt: skip # noqa: E501
METRICS = [
    "time_to_first_token_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds",
    "request_duration_seconds", "queue_seconds", "prefill_seconds", "decode_seconds", "inference_seconds",
    "prompt_tokens", "generation_tokens", "max_tokens_param", "step_tokens",
]  # fmt: skip
P95_OVER_A_DAY = """
    with buckets as (
        select target, bounds_id, unnest(bucket_increments) as n, unnest(range(1, len(bucket_increments) + 1)) as place
        from fct_latency_5m
        where metric = 'time_to_first_token_seconds' and period_at >= ?
    ),
    added as (select target, bounds_id, place, sum(n) as n from buckets group by all),
    merged as (select target, bounds_id, list(n order by place) as counts from added group by all)
    select target, histogram_quantile(0.95, upper_bounds, counts) as p95_seconds
    from merged join stg_histogram_bounds using (bounds_id)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=200)
    parser.add_argument("--hours", type=int, default=24)
    parser.add_argument("--raw-minutes", type=int, default=70)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    models, load_seconds = timed(load_models)
    print(f"duckdb {duckdb.__version__}, {arguments.threads} threads, {arguments.replicas} replicas (synthetic)")
    print(f"load and check {len(models)} models: {load_seconds[1]:.2f} s CPU")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "warehouse.duckdb"
        with duckdb.connect() as con:
            con.execute(f"attach '{path}' as warehouse (storage_version 'v1.5.0'); use warehouse")
            con.execute(f"set threads = {arguments.threads}")
            fill(con, models, arguments.replicas, arguments.hours, arguments.raw_minutes)
            measure(con, models, arguments.hours)
        print(f"file: {path.stat().st_size / 1e6:.0f} MB")


def fill(con: duckdb.DuckDBPyConnection, models: Models, replicas: int, hours: int, raw_minutes: int) -> None:
    """Raw rows, minutes, then every roll-up up to a minute before END."""
    raw_from = END - timedelta(minutes=raw_minutes)
    for table in raw_tables().values():
        con.execute(table.create_sql())
    con.execute("insert into raw_histogram_bounds values (1, ?)", [BOUNDS])
    for name, things in (
        ("raw_scrapes", replicas), ("raw_engine_samples", replicas), ("raw_gpu_samples", replicas),
        ("raw_host_samples", max(1, replicas // 8)), ("raw_host_devices", max(1, replicas // 8)),
    ):  # fmt: skip
        fill_raw(con, raw_tables()[name], things, raw_from)
    fill_raw_histograms(con, replicas, raw_from)
    for model in models.values():
        prepare(con, model)
    minutes = hours * 60 - raw_minutes
    if minutes > 0:
        fill_minutes(con, replicas, END - timedelta(hours=hours), minutes)
    upto = END - timedelta(minutes=1)
    _, cost = timed(
        lambda: [
            refresh(con, model, Window(start=start_of(model.name, hours, raw_minutes), end=upto))
            for model in models.values()
        ]
    )
    print(f"first fill of {hours} h (raw {raw_minutes} min): {cost[0]:.1f} s wall, {cost[1]:.1f} s CPU")


def start_of(name: str, hours: int, raw_minutes: int) -> datetime:
    """Minutes are made from the raw rows there are, roll-ups from all minutes."""
    is_minute = name.startswith("int_")
    return END - (timedelta(minutes=raw_minutes) if is_minute else timedelta(hours=hours))


def fill_raw(con: duckdb.DuckDBPyConnection, table: RawTable, things: int, start: datetime) -> None:
    """Every column of a raw table: constants for text, ramps for counters, noise for gauges."""
    identity = {
        "target": "'replica-' || thing", "host": "'host-' || thing // 8", "gpu_uuid": "'GPU-' || thing",
        "mig_instance": "''", "engine_rank": "'0'", "device": "'eth0'", "kind": "'network'",
        "config_hash": "'c0ffee'", "vantage": "'engine'", "source": "'simulated'", "boot_id": "'b'",
        "deployment": "'deployment-' || thing // 10", "is_up": "true", "health": "'ok'",
        "process_started_at": "timestamptz '2026-11-01 00:00:00+00'",
        "booted_at": "timestamptz '2026-11-01 00:00:00+00'",
    }  # fmt: skip
    if table.name.startswith("raw_host"):
        identity["host"] = "'host-' || thing"

    def value(name: str, sql_type: str) -> str:
        if name == table.time:
            return "moment"
        if name in identity:
            return identity[name]
        if name.endswith("_total"):
            return "tick * 40 + thing + floor(random() * 20)"
        if name.endswith("_ratio"):
            return "random()"
        return {"DOUBLE": "floor(random() * 100)", "VARCHAR": "null", "BOOLEAN": "false"}.get(sql_type, "1")

    columns = ", ".join(f'({value(n, c.sql_type)})::{c.sql_type} as "{n}"' for n, c in table.columns.items())
    con.execute(f'insert into "{table.name}" select {columns} from ({ticks(things, start)})')


def ticks(things: int, start: datetime) -> str:
    """One row per thing and tick from `start` to END."""
    count = int((END - start).total_seconds()) // TICK_SECONDS
    moment = f"timestamptz '{start.isoformat()}' + to_milliseconds(tick * {TICK_SECONDS * 1000} + thing)"
    return f"select tick, thing, {moment} as moment from range({count}) as a(tick), range({things}) as b(thing)"


def fill_raw_histograms(con: duckdb.DuckDBPyConnection, replicas: int, start: datetime) -> None:
    last = len(BOUNDS)
    con.execute(f"""
        insert into raw_engine_histograms by name
        select
            moment as scraped_at, 'replica-' || thing as target, '0' as engine_rank, metric, 'engine' as vantage,
            metric as source_metric, false as is_proxy, 1::ubigint as bounds_id,
            list_transform(range(1, {last + 1}), lambda k: (tick * k + thing)::double) as bucket_counts,
            tick * 7.5 as sum_value, (tick * {last} + thing)::double as count_value
        from ({ticks(replicas, start)}), (select unnest({METRICS}) as metric)
    """)


def fill_minutes(con: duckdb.DuckDBPyConnection, replicas: int, start: datetime, minutes: int) -> None:
    """Minute rows before the raw ones: the columns that roll-ups read most."""
    grid = f"""
        select 'replica-' || thing as target, thing, '0' as engine_rank,
            timestamptz '{start.isoformat()}' + to_minutes(m) as minute_at
        from range({minutes}) as a(m), range({replicas}) as b(thing)
    """
    con.execute(f"""
        insert into int_latency_minutes by name
        select
            target, engine_rank, metric, 1::ubigint as bounds_id, minute_at, 'engine' as vantage,
            metric as source_metric, false as is_proxy, 12 as sample_count, 60.0 as observed_seconds,
            5.0 as gap_seconds, {len(BOUNDS)} * 12.0 as observation_count, 90.0 as observation_sum,
            list_transform(range(1, {len(BOUNDS) + 1}), lambda k: k * (10 + thing % 7)::double) as bucket_increments
        from ({grid}), (select unnest({METRICS}) as metric)
    """)
    con.execute(f"""
        insert into int_engine_minutes by name
        select
            target, engine_rank, minute_at, 'vllm' as engine, 'engine' as vantage, 12 as sample_count,
            60.0 as observed_seconds, 5.0 as gap_seconds, 4.0 as requests_running_mean, 1.0 as requests_waiting_mean,
            random() as kv_cache_usage_mean_ratio, 480.0 as prompt_tokens, 480.0 as generation_tokens,
            12.0 as requests_finished
        from ({grid})
    """)
    con.execute(f"""
        insert into int_scrape_minutes by name
        select target, minute_at, 'simulated' as source, 12 as scrape_count, 12 as up_count, true as is_up_last
        from ({grid})
    """)
    con.execute(f"""
        insert into int_gpu_minutes by name
        select 'host-' || thing // 8 as host, 'GPU-' || thing as gpu_uuid, '' as mig_instance, minute_at,
            12 as sample_count, random() as gpu_utilization_mean_ratio, random() as sm_active_mean_ratio
        from ({grid})
    """)


def measure(con: duckdb.DuckDBPyConnection, models: Models, hours: int) -> None:
    results, cost = timed(lambda: refresh_all(con, models, END))
    print(f"refresh of one new minute, all models: {cost[0]:.2f} s wall, {cost[1]:.2f} s CPU (goal 3 s wall)")
    for result in sorted(results, key=lambda result: -result.seconds)[:8]:
        print(f"    {result.model:28} {result.seconds * 1000:7.0f} ms  {result.rows} rows")
    start = END - timedelta(hours=hours)
    costs = [timed(lambda: con.execute(P95_OVER_A_DAY, [start]).fetchall()) for _ in range(5)]
    print(
        f"p95 of time to first token per replica over {hours} h, {len(costs[0][0])} replicas: "
        f"{statistics.median(c[1][0] for c in costs) * 1000:.0f} ms wall, "
        f"{statistics.median(c[1][1] for c in costs) * 1000:.0f} ms CPU, median of 5 (goal 150 ms wall)"
    )


def timed(work: Callable[[], T]) -> tuple[T, tuple[float, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    done = work()
    return done, (time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    main()
