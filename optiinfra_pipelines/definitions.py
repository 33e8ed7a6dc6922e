"""Where everything meets: the one code location that Dagster loads.

The only module that imports all the others. `assemble` makes the definitions of any fleet; `defs` is the fleet that
the environment names (OPTIINFRA_FLEET, OPTIINFRA_HOME), as the UI and runs load it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import dagster as dg

from optiinfra_pipelines.analysis.insights.evidence import make_pack
from optiinfra_pipelines.defs.automation import automation_sensor
from optiinfra_pipelines.defs.findings import finding_assets
from optiinfra_pipelines.defs.forecast import forecast_assets
from optiinfra_pipelines.defs.insights import insights_asset
from optiinfra_pipelines.defs.kv_cache import kv_cache_assets
from optiinfra_pipelines.defs.maintenance import maintenance
from optiinfra_pipelines.defs.models import model_assets, model_checks
from optiinfra_pipelines.defs.raw import raw_assets
from optiinfra_pipelines.defs.recommendations import recommendation_assets
from optiinfra_pipelines.defs.report import fleet_report_asset
from optiinfra_pipelines.defs.rollouts import rollout_assets, rollout_jobs
from optiinfra_pipelines.defs.scaling import scaling_assets, scaling_jobs
from optiinfra_pipelines.defs.traces import trace_jobs
from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.insights import EvidencePack
from optiinfra_pipelines.domain.thresholds import threshold_values
from optiinfra_pipelines.settings import Paths, find_paths, load_fleet
from optiinfra_pipelines.sql.loader import load_models
from resources.alert_outlet import AlertOutlet
from resources.collectors import Collectors
from resources.findings.objectives import ObjectiveStore
from resources.findings.store import FindingsStore
from resources.findings.waste import WasteStore
from resources.insights.store import InsightStore
from resources.insights.writer import InsightWriter
from resources.ledger.store import LedgerStore
from resources.logs import configure_logging
from resources.model_runner import ModelRunner
from resources.report.reader import read_advice, read_report
from resources.rollouts.budgets import from_published
from resources.rollouts.clock import beside
from resources.rollouts.desk import Rollouts
from resources.rollouts.gpu_watch import from_live
from resources.rollouts.slots import IdleSlots
from resources.warehouse import Warehouse
from sensors.collection import collection_sensors
from sensors.rollouts import rollout_sensors
from sensors.watch import alerts_asset, watch_sensor

# Ticks of three sensors come every 5 s: one commit for what came in 12 s costs a fraction of one each. What waits is
# on disk already, and every reader sees it.
COMMIT_INTERVAL_SECONDS = 12.0


# Assets whose tables people ask in the read copy; an insight may take 30 s and is not waited for.
ADVICE = (
    "findings",
    "objectives",
    "recommendations",
    "fct_gpu_waste",
    "load_forecast",
    "scaling_recommendations",
    "kv_cache_recommendations",
)


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


def open_rollouts(
    fleet: Fleet, paths: Paths, warehouse: Warehouse, clock: Callable[[], datetime], environ: Mapping[str, str]
) -> Rollouts:
    """Everything rollouts of this fleet are done with; no file is touched before the first proposal.

    environ: where the secrets of approvers are (OPTIINFRA_APPROVER_SECRET_<NAME>).
    """
    return Rollouts(
        fleet,
        fleet.rollouts,
        paths.rollouts_dir,
        environ=environ,
        clock=beside(clock),
        read_history=from_published(warehouse),
        read_live=from_live(warehouse),
    )


def assemble(
    fleet: Fleet, paths: Paths, clock: Callable[[], datetime] = utc_now, environ: Mapping[str, str] = os.environ
) -> dg.Definitions:
    """Every asset, check, sensor, job and schedule of one fleet. Opens nothing: that happens in ticks and runs.

    environ: where secrets of services (GROQ_API_KEY) and of approvers come from.
    """
    warehouse = open_warehouse(fleet, paths, clock)
    collectors = Collectors(fleet, clock, IdleSlots(fleet, paths.rollouts_dir))
    runner = ModelRunner(load_models(), warehouse, clock)
    jobs, schedules = maintenance(runner, warehouse, clock, fleet.retention)
    cadence = fleet.cadence
    ledger = LedgerStore(fleet, warehouse, clock)
    rollouts = open_rollouts(fleet, paths, warehouse, clock, environ)
    return dg.Definitions(
        assets=[
            *raw_assets(),
            alerts_asset(),
            *model_assets(runner, warehouse, cadence.refresh_minutes, also_published=ADVICE),
            *_judgment(fleet, paths, warehouse, clock, environ),
            *recommendation_assets(ledger, WasteStore(fleet, warehouse, clock), cadence.refresh_minutes, rollouts.all),
            *forecast_assets(warehouse, clock, fleet),
            *scaling_assets(warehouse, clock, fleet),
            *kv_cache_assets(warehouse, clock, fleet),
            *rollout_assets(),
        ],
        asset_checks=[model_checks(runner)],
        jobs=[
            *jobs,
            *scaling_jobs(),
            *trace_jobs(paths.home, clock),
            *rollout_jobs(rollouts, ledger.find_change),
        ],
        schedules=schedules,
        sensors=[
            *collection_sensors(collectors, warehouse, cadence.collect_seconds),
            watch_sensor(
                collectors.recent,
                AlertOutlet(fleet.alerts.webhook),
                threshold_values(fleet.thresholds),
                cadence.collect_seconds,
            ),
            automation_sensor(),
            *rollout_sensors(rollouts, AlertOutlet(fleet.alerts.webhook)),
        ],
        # One process per run: a process per step costs four times the CPU and every one of them opens the warehouse.
        executor=dg.in_process_executor,
    )


def _judgment(
    fleet: Fleet, paths: Paths, warehouse: Warehouse, clock: Callable[[], datetime], environ: Mapping[str, str]
) -> list[dg.AssetsDefinition]:
    """What is wrong, in words and in one report."""
    minutes = fleet.cadence.refresh_minutes
    roster = [*(t.name for t in fleet.targets), *(d.name for d in fleet.deployments), *(h.name for h in fleet.hosts)]

    def evidence() -> EvidencePack:
        with warehouse.connect() as connection:
            advice = read_advice(connection)
        return make_pack(
            advice.findings or [],
            advice.recommendations or [],
            advice.abstentions or [],
            roster=roster,
        )

    return [
        *finding_assets(FindingsStore(fleet, warehouse, clock), ObjectiveStore(fleet, warehouse, clock), minutes),
        insights_asset(InsightWriter(InsightStore(warehouse), environ, clock), evidence, minutes),
        fleet_report_asset(lambda since, until: read_report(warehouse, fleet, since, until), paths.reports_dir, clock),
    ]


@dg.definitions
def defs() -> dg.Definitions:
    """The fleet of this environment. A fleet.yaml that cannot be used shows its error in the UI."""
    configure_logging(os.environ)
    paths = find_paths(os.environ)
    return assemble(load_fleet(paths.fleet_file, os.environ), paths)
