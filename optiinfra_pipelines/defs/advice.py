"""What the advice assets share: group, schema, cadence, and the metadata of a run. No sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dagster as dg
import polars as pl

from optiinfra_pipelines.defs.automation import refresh_condition
from optiinfra_pipelines.defs.models import WAREHOUSE_POOL
from optiinfra_pipelines.defs.schema import Metadata, preview, table_metadata
from resources.advice.store import advice_tables

GROUP = "advice"
# Load is forecast in steps of 10 minutes and replicas take minutes to start: an hour old is still of use, and a run
# costs a process of its own.
HOURLY_MINUTES = 60


def advice_asset(
    table: str, deps: list[str], automation: dg.AutomationCondition[Any] | None = None
) -> Callable[[Callable[..., dg.MaterializeResult[None]]], dg.AssetsDefinition]:
    """The decorator of the asset that fills an advice table; hourly where no other condition is given."""
    known = advice_tables()[table]
    return dg.asset(
        name=table,
        deps=deps,
        group_name=GROUP,
        description=f"{known.description} One row per {', '.join(known.grain)}.",
        kinds={"duckdb", "python"},
        owners=["team:platform"],
        tags={"layer": GROUP},
        metadata=table_metadata(table, known.columns),
        pool=WAREHOUSE_POOL,
        automation_condition=automation or refresh_condition(HOURLY_MINUTES),
    )


def result(rows: pl.DataFrame, shown: list[str], **headline: Metadata) -> dg.MaterializeResult[None]:
    """The run's headline numbers beside a few rows of the named columns; why nothing is known, where nothing is."""
    metadata: dict[str, Metadata] = {
        "dagster/row_count": rows.height,
        **preview(rows.select(shown), "rows"),
        **headline,
    }
    if rows.is_empty():
        metadata["abstention"] = "fleet.yaml names no deployment, or none has a row of load yet"
    return dg.MaterializeResult(metadata=metadata)
