"""The job `import_trace`: a public trace into a warehouse of its own, and what the advice assets make of it there.

Launchpad config and metadata only; the import is `resources.traces.importer`, the advice the very assets of a fleet.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
from pydantic import Field

from optiinfra_pipelines.analysis.traces import TraceError
from optiinfra_pipelines.defs.forecast import forecast_assets
from optiinfra_pipelines.defs.kv_cache import kv_cache_assets
from optiinfra_pipelines.defs.scaling import scaling_assets
from resources.advice.store import AdviceStore, advice_tables
from resources.traces.files import TraceFormat
from resources.traces.importer import ImportedTrace, ImportRefusedError, import_trace, read_marker
from resources.warehouse import Warehouse

# An imported trace tells nothing of replicas: capacity is taken so that its busiest minute needs so many.
REPLICAS_AT_PEAK = 20
# Clients of a ServeGen fleet over its days are some 230,000 rows: a minute of CPU, once and on demand.
BOOSTED_ROWS = 500_000


class TraceConfig(dg.Config):
    """Which trace, and where to."""

    source: str = Field(
        description="The trace's file; for ServeGen the folder of one fleet, for LMCache also that of its log."
    )
    format: TraceFormat = Field(description="mooncake, azure, burstgpt, lmcache, servegen or kv_events.")
    into: str = Field(description="A new folder for the trace's own state; never the live one.")
    deployment: str = Field("trace", description="Name to give the deployment whose load it is.")
    model: str = Field("unknown", description="Its model, as fleet.yaml names it: cache sizes then come in bytes.")
    keep_duplicates: bool = Field(False, description="Lines wholly the same are requests that look alike.")
    analyze: bool = Field(True, description="Forecast, back-test and size caches on it; up to a minute of CPU.")


@dataclass(frozen=True)
class TraceAdvice:
    """What the advice assets made of a trace: their tables, and the metadata of each asset's run."""

    tables: Mapping[str, pl.DataFrame]
    metadata: Mapping[str, Mapping[str, dg.MetadataValue[Any]]]


def analyze_trace(home: Path, replicas_at_peak: int = REPLICAS_AT_PEAK) -> TraceAdvice:
    """Materialize every advice asset on an imported trace, at the trace's end.

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
        made = dg.materialize(
            assets,
            instance=instance,
            run_config={
                "ops": {"scaling_backtest": {"config": backtest}},
                "loggers": {"console": {"config": {"log_level": "WARNING"}}},
            },
        )
    warehouse.publish()
    store = AdviceStore(warehouse)
    return TraceAdvice(
        {table: store.newest(table) for table in advice_tables()},
        {
            event.materialization.asset_key.to_user_string(): event.materialization.metadata
            for event in made.get_asset_materialization_events()
        },
    )


def trace_jobs(live_home: Path, clock: Callable[[], datetime]) -> list[dg.JobDefinition]:
    """`import_trace`; `live_home`: the state folder that no trace may enter."""

    @dg.op(description="Read the trace, store it as if scraped, bring the models over it up to date, and advise on it.")
    def read_trace(context: dg.OpExecutionContext, config: TraceConfig) -> None:
        try:
            imported = import_trace(
                Path(config.source),
                config.format,
                Path(config.into),
                live_home=live_home,
                ends_at=clock(),
                deployment=config.deployment,
                model=config.model,
                keep_duplicates=config.keep_duplicates,
            )
            advice = analyze_trace(Path(config.into)).metadata if config.analyze else {}
        except (ImportRefusedError, TraceError) as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        context.add_output_metadata(_imported(imported) | _advised(advice) | {"ask": _ask(config)})

    @dg.job(name="import_trace", description="Import a public trace beside the live fleet, to try the advice on it.")
    def import_trace_job() -> None:
        read_trace()

    return [import_trace_job]


def _imported(imported: ImportedTrace) -> dict[str, Any]:
    return {
        "requests": imported.requests,
        "accesses": imported.accesses,
        "clients": imported.clients,
        "kv_events": imported.kv_events,
        "repeated": imported.repeated,
        "unfinished": imported.unfinished,
        "minutes": (imported.last_at - imported.first_at).total_seconds() / 60,
    }


def _advised(metadata: Mapping[str, Mapping[str, dg.MetadataValue[Any]]]) -> dict[str, Any]:
    """Every entry of every asset under the asset's name: the run's page shows what the assets' pages would."""
    return {
        f"{asset}: {entry.removeprefix('dagster/')}": value
        for asset, entries in metadata.items()
        for entry, value in entries.items()
    }


def _ask(config: TraceConfig) -> str:
    return f'optiinfra --home {config.into} sql "select * from int_load_minutes"'
