"""Where everything meets: the one code location that Dagster loads.

The only module that imports all the others. `assemble` makes the definitions of any fleet; `defs` is the fleet that
the environment names (OPTIINFRA_FLEET, OPTIINFRA_HOME), as the UI and runs load it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime

import dagster as dg

from optiinfra_pipelines.defs.automation import automation_sensor
from optiinfra_pipelines.defs.maintenance import maintenance
from optiinfra_pipelines.defs.models import model_assets, model_checks
from optiinfra_pipelines.defs.raw import raw_assets
from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.thresholds import threshold_values
from optiinfra_pipelines.settings import Paths, find_paths, load_fleet
from optiinfra_pipelines.sql.loader import load_models
from resources.alert_outlet import AlertOutlet
from resources.collectors import Collectors
from resources.logs import configure_logging
from resources.model_runner import ModelRunner
from resources.warehouse import Warehouse
from sensors.collection import collection_sensors
from sensors.watch import alerts_asset, watch_sensor

# Ticks of three sensors come every 5 s: one commit for what came in 12 s costs a fraction of one each. What waits is
# on disk already, and every reader sees it.
COMMIT_INTERVAL_SECONDS = 12.0


def utc_now() -> datetime:
    """The clock of the running product; tests and replays pass their own."""
    return datetime.now(UTC)


def open_warehouse(fleet: Fleet, paths: Paths, clock: Callable[[], datetime] = utc_now) -> Warehouse:
    """The fleet's warehouse with its thresholds; no file is touched before the first call."""
    return Warehouse(
        paths.warehouse_dir,
        clock=clock,
        commit_interval_seconds=COMMIT_INTERVAL_SECONDS,
        min_free_bytes=int(threshold_values(fleet.thresholds)["disk_free_minimum_bytes"]),
    )


def assemble(fleet: Fleet, paths: Paths, clock: Callable[[], datetime] = utc_now) -> dg.Definitions:
    """Every asset, check, sensor, job and schedule of one fleet. Opens nothing: that happens in ticks and runs."""
    warehouse = open_warehouse(fleet, paths, clock)
    collectors = Collectors(fleet, clock)
    runner = ModelRunner(load_models(), warehouse, clock)
    jobs, schedules = maintenance(runner, warehouse, clock, fleet.retention)
    return dg.Definitions(
        assets=[*raw_assets(), alerts_asset(), *model_assets(runner, warehouse, fleet.cadence.refresh_minutes)],
        asset_checks=[model_checks(runner)],
        jobs=jobs,
        schedules=schedules,
        sensors=[
            *collection_sensors(collectors, warehouse, fleet.cadence.collect_seconds),
            watch_sensor(
                collectors.recent,
                AlertOutlet(fleet.alerts.webhook),
                threshold_values(fleet.thresholds),
                fleet.cadence.collect_seconds,
            ),
            automation_sensor(),
        ],
        # One process per run: a process per step costs four times the CPU and every one of them opens the warehouse.
        executor=dg.in_process_executor,
    )


@dg.definitions
def defs() -> dg.Definitions:
    """The fleet of this environment. A fleet.yaml that cannot be used shows its error in the UI."""
    configure_logging(os.environ)
    paths = find_paths(os.environ)
    return assemble(load_fleet(paths.fleet_file, os.environ), paths)
