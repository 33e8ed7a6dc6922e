"""`optiinfra import-trace`: a public trace into a state folder of its own, and what the advice makes of it.

`--analyze` materializes the very assets that watch a live fleet, on the imported load, and prints what they found.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import click
import polars as pl
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from optiinfra_pipelines.analysis.traces import TraceError
from optiinfra_pipelines.commands.console import console, print_table
from optiinfra_pipelines.defs.traces import REPLICAS_AT_PEAK, TraceAdvice, analyze_trace
from resources.traces.files import TraceFormat
from resources.traces.importer import ImportedTrace, ImportRefusedError, import_trace
from resources.warehouse import WarehouseError

PICTURES = "pictures"
EVENT_COLUMNS = (
    "stored_blocks",
    "unique_blocks",
    "max_live_blocks",
    "median_residency_seconds",
    "restored_blocks",
    "restored_tokens",
    "extra_blocks_for_half",
    "extra_blocks_for_80",
    "extra_blocks_for_95",
    "extra_blocks_for_all",
)
_PNG = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")


def run(
    source: Path,
    form: TraceFormat,
    into: Path,
    *,
    live_home: Path,
    now: datetime,
    deployment: str,
    model: str,
    keep_duplicates: bool,
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
                model=model,
                keep_duplicates=keep_duplicates,
                progress=lambda share: progress.update(task, completed=share),
            )
        _tell(imported, into)
        if analyze:
            advice = analyze_trace(into)
            show(advice.tables)
            console.print(f"\npictures: {', '.join(map(str, write_pictures(advice, into))) or 'none'}")
    except (ImportRefusedError, TraceError, WarehouseError) as error:
        raise click.ClickException(str(error)) from error
    console.print(f'ask more: optiinfra --home {into} sql "select * from int_load_minutes limit 5"')


def materialize_advice(home: Path, replicas_at_peak: int = REPLICAS_AT_PEAK) -> Mapping[str, pl.DataFrame]:
    """The rows of each advice table, made on an imported trace; see `analyze_trace`."""
    return analyze_trace(home, replicas_at_peak).tables


def write_pictures(advice: TraceAdvice, home: Path) -> list[Path]:
    """The pictures that the assets' pages in the UI show, as PNG files in the trace's folder."""
    written = []
    for asset, entries in advice.metadata.items():
        for name, entry in entries.items():
            found = _PNG.search(str(entry.value))
            if found:
                path = home / PICTURES / f"{asset}_{name}.png"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(base64.b64decode(found.group(1)))
                written.append(path)
    return written


def show(advice: Mapping[str, pl.DataFrame]) -> None:
    """Forecast skill, back-test and reuse as tables; where there is nothing, why."""
    forecasts = advice["load_forecast"]
    shown = ("measure", "horizon_seconds", "p10", "p50", "p90", "model", "skill_ratio", "coverage_ratio", "reason")
    print_table(
        forecasts.drop_nulls("p50").select(shown),
        title="Forecast: skill over the last value, share of outcomes under P90",
        empty="no whole step of load" if forecasts.is_empty() else "none can be made",
    )
    declined = forecasts.filter(pl.col("p50").is_null()).select("horizon_seconds", "reason").unique(maintain_order=True)
    for seconds, reason in declined.iter_rows():
        console.print(f"{seconds / 60:.0f} min ahead: {reason}")
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
    known = curve.drop_nulls("capacity_blocks").sort("capacity_blocks", descending=True)
    print_table(
        known.gather_every(max(known.height // 12, 1))
        .reverse()
        .select("capacity_blocks", "capacity_tokens", "block_hit_ratio", "token_hit_ratio", "request_hit_ratio"),
        title="Prefix reuse by cache size",
        empty=", ".join(curve["reason"].drop_nulls()) or "nothing is known of it",
    )
    print_table(
        sizes.select(
            "token_ceiling_ratio", "blocks_for_half", "blocks_for_80", "blocks_for_95", "blocks_for_99", "reason"
        ),
        title="Cache size that reaches 50, 80, 95 and 99 % of the ceiling",
    )
    _show_events(advice["kv_working_set"])


def _show_events(found: pl.DataFrame) -> None:
    """What KV events show; nothing where none were imported, which is most traces."""
    known = found.drop_nulls("batches")
    if known.is_empty():
        return
    shown = known.select(pl.col("medium").fill_null("one cache"), *EVENT_COLUMNS)
    print_table(
        shown.transpose(include_header=True, header_name="KV events", column_names="medium"),
        title="What the cache held; stores of blocks it had removed, and how many blocks more would have kept those",
    )
    for reason in known["reason"]:
        console.print(reason)


def _tell(imported: ImportedTrace, into: Path) -> None:
    minutes = (imported.last_at - imported.first_at).total_seconds() / 60
    parts = [f"{imported.requests:,} requests over {minutes:,.0f} minutes"]
    if imported.accesses:
        parts.append(f"block ids of {imported.accesses:,} requests")
    if imported.clients:
        parts.append(f"{imported.clients} clients")
    if imported.kv_events:
        parts = [f"{imported.kv_events:,} KV events over {minutes:,.0f} minutes, without token ids"]
    if imported.repeated:
        parts.append(f"{imported.repeated:,} of them wholly like an earlier one, kept")
    if imported.unfinished:
        parts.append(f"{imported.unfinished} last line left out that its writer had not ended")
    console.print(f"imported {', '.join(parts)} into {into}")
