"""The raw tables as external assets: collection sensors fill them, nothing here runs.

Names, groups, owners, schemas and freshness only. Which sensor reports which table is `REPORTED_BY`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import dagster as dg

from optiinfra_pipelines.defs.schema import table_metadata
from optiinfra_pipelines.sql.sources import RawTable, raw_tables

# Each sensor reports its tables: at its very first report all of them, then the first always and the rest when they
# got rows.
REPORTED_BY: Mapping[str, tuple[str, ...]] = {
    "scrape_engines": (
        "raw_scrapes",
        "raw_engine_samples",
        "raw_engine_histograms",
        "raw_engine_configs",
        "raw_histogram_bounds",
        "raw_kv_tier_samples",
        "raw_kept_samples",
        "raw_fleet_targets",
        "raw_fleet_deployments",
        "raw_fleet_hosts",
    ),
    "sample_gpus": ("raw_gpu_collections", "raw_gpu_samples", "raw_gpu_processes"),
    "sample_hosts": ("raw_host_collections", "raw_host_samples", "raw_host_devices", "raw_host_processes"),
}
_KIND = {"scrape_engines": "prometheus", "sample_gpus": "nvml", "sample_hosts": "psutil"}

# A sensor reports once a minute: two missed reports warn, four fail.
_FRESHNESS = dg.FreshnessPolicy.time_window(fail_window=timedelta(minutes=5), warn_window=timedelta(minutes=3))


def raw_assets() -> list[dg.AssetSpec]:
    """One external asset per raw table, in the order of sources.yml."""
    sensor_of = {table: sensor for sensor, tables in REPORTED_BY.items() for table in tables}
    return [_spec(table, sensor_of[table.name]) for table in raw_tables().values()]


def _spec(table: RawTable, sensor: str) -> dg.AssetSpec:
    return dg.AssetSpec(
        key=table.name,
        group_name="raw",
        description=f"{table.description} Filled by sensor `{sensor}`. One row per {', '.join(table.grain)}.",
        kinds={"duckdb", _KIND[sensor]},
        owners=["team:platform"],
        tags={"layer": "raw"},
        metadata=table_metadata(table.name, table.columns),
        freshness_policy=_FRESHNESS if REPORTED_BY[sensor][0] == table.name else None,
    )
