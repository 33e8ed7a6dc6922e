"""`optiinfra import-trace`: a public trace into a state folder of its own, and what the advice makes of it.

`--analyze` materializes the very assets that watch a live fleet, on the imported load, and prints what they found.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import dagster as dg
import polars as pl
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from optiinfra_pipelines.analysis.traces import TraceError
from optiinfra_pipelines.commands.console import console, print_table
from optiinfra_pipelines.defs.forecast import forecast_assets
from optiinfra_pipelines.defs.kv_cache import kv_cache_assets
from optiinfra_pipelines.defs.scaling import scaling_assets
from resources.advice.store import AdviceStore, advice_tables
from resources.traces.files import TraceFormat
from resources.traces.importer import ImportedTrace, ImportRefusedError, import_trace, read_marker
from resources.warehouse import Warehouse, WarehouseError

# An imported trace tells nothing of replicas: capacity is taken so that its busiest minute needs so many.
REPLICAS_AT_PEAK = 20
# Clients of a ServeGen fleet over its days are some 230,000 rows: a minute of CPU, once and on demand.
BOOSTED_ROWS = 500_000


def run(
    source: Path,
    form: TraceFormat,
    into: Path,
    *,
    live_home: Path,
    now: datetime,
    deployment: str,
    analyze: bool,
) -> None:
    """Import, and with `analyze` print forecast skill, back-test and reuse. Raises click.ClickException."""
    columns = (TextColumn("reading {task.fields[name]}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=1.0, name=source.name)
            imported = import_trace(
                source,
                form,
                into,
                live_home=live_home,
                ends_at=now,
                deployment=deployment,
                progress=lambda share: progress.update(task, completed=share),
            )
        _tell(imported, into)
        if analyze:
            show(materialize_advice(into))
    except (ImportRefusedError, TraceError, WarehouseError) as error:
        raise click.ClickException(str(error)) from error
    console.print(f'\nask more: optiinfra --home {into} sql "select * from int_load_minutes limit 5"')


def materialize_advice(home: Path, replicas_at_peak: int = REPLICAS_AT_PEAK) -> Mapping[str, pl.DataFrame]:
    """Materialize every advice asset on an imported trace, at the trace's end; the rows of each table.

    ImportRefusedError when the folder holds no finished import; dg.Failure's text comes out as it is.
    """
    imported = read_marker(home)
    if imported is None:
        raise ImportRefusedError(f"{home} holds no finished import of a trace; run `optiinfra import-trace` into it")
    warehouse = Warehouse(home / "warehouse", clock=lambda: imported.last_at)
    given = (warehouse, lambda: imported.last_at, imported.fleet)
    assets = [
        *forecast_assets(*given, boosted_rows=BOOSTED_ROWS),
        *scaling_assets(*given),
        *kv_cache_assets(*given),
    ]
    days = max((imported.last_at - imported.first_at).total_seconds() / 86_400, 0.1)
    backtest: dict[str, Any] = {"replicas_at_peak": replicas_at_peak, "window_days": min(days, 14.0)}
    with dg.DagsterInstance.ephemeral() as instance:
        dg.materialize(
            assets,
            instance=instance,
            run_config={
                "ops": {"scaling_backtest": {"config": backtest}},
                "loggers": {"console": {"config": {"log_level": "WARNING"}}},
            },
        )
    warehouse.publish()
    store = AdviceStore(warehouse)
    return {table: store.newest(table) for table in advice_tables()}


def show(advice: Mapping[str, pl.DataFrame]) -> None:
    """Forecast skill, back-test and reuse as tables; where there is nothing, why."""
    forecasts = advice["load_forecast"]
    print_table(
        forecasts.select(
            "measure", "horizon_seconds", "p10", "p50", "p90", "model", "skill_ratio", "coverage_ratio", "reason"
        ),
        title="Forecast: skill over the last value, share of outcomes under P90",
        empty="no whole step of load",
    )
    replays = advice["scaling_backtest"]
    print_table(
        replays.sort("replica_hours", nulls_last=True).select(
            "policy_name", "replica_hours", "cost_ratio", "attainment_ratio", "longest_wait_seconds", "is_advised"
        ),
        title="Back-test: replica-hours in those of perfect knowledge, share of demand within the wait bound",
    )
    for reason in replays["reason"].unique().drop_nulls():
        console.print(reason)
    curve, sizes = advice["kv_reuse_curve"], advice["kv_cache_recommendations"]
    known = curve.drop_nulls("capacity_blocks")
    print_table(
        known.gather_every(max(known.height // 12, 1)).select(
            "capacity_blocks", "capacity_tokens", "block_hit_ratio", "token_hit_ratio", "request_hit_ratio"
        ),
        title="Prefix reuse by cache size",
        empty=", ".join(curve["reason"].drop_nulls()) or "nothing is known of it",
    )
    print_table(
        sizes.select(
            "token_ceiling_ratio", "blocks_for_half", "blocks_for_80", "blocks_for_95", "blocks_for_99", "reason"
        ),
        title="Cache size that reaches 50, 80, 95 and 99 % of the ceiling",
    )


def _tell(imported: ImportedTrace, into: Path) -> None:
    minutes = (imported.last_at - imported.first_at).total_seconds() / 60
    parts = [f"{imported.requests:,} requests over {minutes:,.0f} minutes"]
    if imported.accesses:
        parts.append(f"block ids of {imported.accesses:,} requests")
    if imported.clients:
        parts.append(f"{imported.clients} clients")
    console.print(f"imported {', '.join(parts)} into {into}")
