"""Jobs that keep the house: move closed hours, apply retention, prune Dagster's storage, rebuild a past window.

Names, config and schedules only; the work is `resources.warehouse`, `dagster_home.prune` and `model_runner`.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from pydantic import Field

from optiinfra_pipelines.defs.models import READ_COPY, WAREHOUSE_POOL
from optiinfra_pipelines.domain.fleet import Retention
from optiinfra_pipelines.sql.models import Window
from resources.dagster_home.prune import REFRESH_TAG, prune
from resources.model_runner import ModelRunner
from resources.warehouse import Warehouse

Job = dg.JobDefinition | UnresolvedAssetJobDefinition


class PruneConfig(dg.Config):
    """How much of Dagster's own history stays."""

    keep_hours: float = Field(4.0, gt=0, description="Ticks, run-less events and refresh runs younger than this stay.")
    keep_failure_days: float = Field(7.0, gt=0, description="Failed ticks and runs stay this long.")


class RebuildConfig(dg.Config):
    """Which stretch of time to compute anew, and for which models."""

    start: str = Field(description="First moment, such as 2026-11-19T00:00:00+00:00; without a zone it is UTC.")
    end: str = Field(description="The moment after the last, in the same form.")
    models: list[str] = Field(default_factory=list, description="Names of incremental models; all of them when empty.")


def maintenance(
    runner: ModelRunner, warehouse: Warehouse, clock: Callable[[], datetime], retention: Retention
) -> tuple[list[Job], list[dg.ScheduleDefinition]]:
    """Jobs `maintain_warehouse`, `prune_dagster_storage`, `rebuild_window` and `test_models`, and their schedules."""

    @dg.op(pool=WAREHOUSE_POOL, description="Move closed hours to Parquet, then delete what is past its retention.")
    def move_and_retain(context: dg.OpExecutionContext) -> None:
        now = clock()
        moved = warehouse.move_closed_hours(now)
        warehouse.apply_retention(retention, now)
        rows = sum(step.rows for step in moved)
        context.log.info("moved %d rows of %d table hours to Parquet", rows, len(moved))
        context.add_output_metadata({"table_hours": len(moved), "rows": rows})

    @dg.op(description="Delete old ticks, run-less events and refresh runs from Dagster's own storage.")
    def prune_storage(context: dg.OpExecutionContext, config: PruneConfig) -> None:
        pruned = prune(
            context.instance,
            now=clock(),
            keep=timedelta(hours=config.keep_hours),
            keep_failures=timedelta(days=config.keep_failure_days),
        )
        context.add_output_metadata(
            {
                "deleted_events": pruned.events,
                "deleted_runs": pruned.runs,
                "deleted_check_results": pruned.check_results,
                "bytes_before": pruned.bytes_before,
                "bytes_after": pruned.bytes_after,
            }
        )

    @dg.op(pool=WAREHOUSE_POOL, description="Compute a past window of incremental models anew from what is stored.")
    def rebuild_models(context: dg.OpExecutionContext, config: RebuildConfig) -> None:
        window = Window(start=_moment(config.start, "start"), end=_moment(config.end, "end"))
        known = {model.name: model for model in runner.incremental}
        strange = [name for name in config.models if name not in known]
        if strange:
            raise dg.Failure(f"no incremental model is called {', '.join(strange)}; these are: {', '.join(known)}")
        for name in known:
            if not config.models or name in config.models:
                context.log.info("%s: %d rows", name, runner.rebuild(known[name], window))

    @dg.job(tags=REFRESH_TAG, description="Hourly: closed hours to Parquet, retention, Dagster's own history.")
    def maintain_warehouse() -> None:
        move_and_retain()
        prune_storage()

    @dg.job(description="Delete Dagster's own old history now; the warehouse is not touched.")
    def prune_dagster_storage() -> None:
        prune_storage()

    @dg.job(description="Compute a past window anew, for example after late rows or a change of a model's SQL.")
    def rebuild_window() -> None:
        rebuild_models()

    check_job = dg.define_asset_job(
        "test_models",
        selection=dg.AssetSelection.all_asset_checks() - dg.AssetSelection.checks_for_assets(dg.AssetKey(READ_COPY)),
        tags=REFRESH_TAG,
        description="Run all data tests.",
    )
    running = dg.DefaultScheduleStatus.RUNNING
    schedules = [
        dg.ScheduleDefinition(
            name="hourly_maintenance", job=maintain_warehouse, cron_schedule="7 * * * *", default_status=running
        ),
    ]
    return [maintain_warehouse, prune_dagster_storage, rebuild_window, check_job], schedules


def _moment(text: str, key: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise dg.Failure(f"{key}: {text!r} is no time; write it as 2026-11-19T00:00:00+00:00") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
