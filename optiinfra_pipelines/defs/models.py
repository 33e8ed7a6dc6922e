"""The SQL models as assets: one op refreshes them in order, one publishes the read copy, one runs their tests.

Names, dependencies, groups and metadata only; what a model is and how it is refreshed is `optiinfra_pipelines.sql`.
"""

from collections.abc import Iterator, Sequence

import dagster as dg

from optiinfra_pipelines.defs.automation import hourly_condition, rebuild_condition, refresh_condition
from optiinfra_pipelines.defs.schema import Metadata, preview, table_metadata
from optiinfra_pipelines.sql.models import Layer, Model, Severity, TestResult
from resources.model_runner import ModelRunner, Refreshed, count_marts
from resources.warehouse import Warehouse

# DuckDB takes one writing process at a time: runs that write share this pool of one.
WAREHOUSE_POOL = "warehouse"
READ_COPY = "read_copy"
OPENS = "opens"
# Marts whose newest rows a person wants to see at a glance; a table in every event of every mart is 3 kB three times.
PREVIEWED = {"fct_scrape_health", "fct_replica_load_5m", "fct_latency_5m", "dim_replicas"}


def model_assets(
    runner: ModelRunner, warehouse: Warehouse, refresh_minutes: int, also_published: Sequence[str] = ()
) -> list[dg.AssetsDefinition]:
    """The refresh of every model, and the read copy that people ask.

    also_published: other assets whose tables must be in the copy: where they are part of a run, it is made after them.
    """
    marts = [model.name for model in runner.models.values() if model.layer is Layer.MARTS]
    return [_refresh(runner, refresh_minutes), _read_copy([*marts, *also_published], warehouse, refresh_minutes)]


def model_checks(runner: ModelRunner) -> dg.AssetChecksDefinition:
    """The data tests of every model as asset checks, one per model and kind of test, run by one op.

    One per test would be 300 events an hour that say the same thing.
    """
    specs = [
        dg.AssetCheckSpec(
            kind,
            asset=model.name,
            description=f"{', '.join(names)}, as the YAML of {model.name} states.",
            # With a condition of its own a check does not ride along with every refresh of its asset.
            automation_condition=hourly_condition(),
        )
        for model in runner.models.values()
        for kind, names in _tests_by_kind(model).items()
    ]

    @dg.multi_asset_check(name="check_models", specs=specs, can_subset=True)
    def check_models(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        selected = {(key.asset_key.to_user_string(), key.name) for key in context.selected_asset_check_keys}
        for model in runner.models.values():
            if any(name == model.name for name, _ in selected):
                found = {result.name: result for result in runner.test(model)}
                for kind, names in _tests_by_kind(model).items():
                    if (model.name, kind) in selected:
                        yield _check_result(model.name, kind, [found[name] for name in names])

    return check_models


def _tests_by_kind(model: Model) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for test in model.tests:
        names.setdefault(test.kind, []).append(test.name)
    return names


def _refresh(runner: ModelRunner, refresh_minutes: int) -> dg.AssetsDefinition:
    @dg.multi_asset(
        name="refresh_models",
        specs=[_spec(model, refresh_minutes) for model in runner.models.values()],
        can_subset=True,
        pool=WAREHOUSE_POOL,
    )
    def refresh_models(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
        late = runner.redo_late_rows()
        if late is not None:
            context.log.debug("late rows from %s on: their minutes are made anew", late.isoformat())
        for model in runner.models.values():
            key = dg.AssetKey(model.name)
            if key in context.selected_asset_keys:
                refreshed = runner.refresh(model, with_newest=model.name in PREVIEWED)
                yield dg.MaterializeResult(asset_key=key, metadata=_metadata(refreshed))

    return refresh_models


def _metadata(refreshed: Refreshed) -> dict[str, Metadata]:
    metadata: dict[str, Metadata] = {
        "seconds": round(refreshed.seconds, 4),
        "rows_written": refreshed.rows_written,
    }
    if refreshed.row_count is not None:
        metadata["dagster/row_count"] = refreshed.row_count
    if refreshed.newest is not None:
        metadata |= preview(refreshed.newest)
    return metadata


def _spec(model: Model, refresh_minutes: int) -> dg.AssetSpec:
    return dg.AssetSpec(
        key=model.name,
        deps=list(model.depends_on),
        group_name=model.layer.value,
        description=model.description,
        kinds={"duckdb", "sql"},
        owners=["team:platform"],
        tags={"layer": model.layer.value, "materialization": model.materialization.value},
        code_version=model.fingerprint,
        metadata={
            **table_metadata(model.name, {column.name: column for column in model.columns}),
            "sql": dg.MetadataValue.md(f"```sql\n{model.sql}\n```"),
        },
        automation_condition=refresh_condition(refresh_minutes) if model.is_stored else rebuild_condition(),
    )


def _read_copy(published: Sequence[str], warehouse: Warehouse, refresh_minutes: int) -> dg.AssetsDefinition:
    @dg.asset(
        name=READ_COPY,
        deps=list(published),
        group_name="published",
        kinds={"duckdb"},
        owners=["team:platform"],
        pool=WAREHOUSE_POOL,
        automation_condition=refresh_condition(refresh_minutes),
        description="The copy of the warehouse that people and notebooks open; swapped in whole after each refresh, "
        "so an open session neither blocks collection nor breaks.",
        # The one check that rides along: a run whose list of checks is empty would run those of all its assets.
        check_specs=[dg.AssetCheckSpec(OPENS, asset=READ_COPY, description="The copy opens and its marts answer.")],
    )
    def read_copy() -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
        copy = warehouse.publish()
        yield dg.MaterializeResult(
            metadata={
                "path": dg.MetadataValue.path(copy.path),
                "bytes": copy.size_bytes,
                "seconds": round(copy.seconds, 4),
            }
        )
        marts = count_marts(copy.path)
        yield dg.AssetCheckResult(check_name=OPENS, passed=marts > 0, metadata={"marts": marts})

    return read_copy


def _check_result(model: str, kind: str, results: list[TestResult]) -> dg.AssetCheckResult:
    failed = [result for result in results if not result.passed]
    metadata: dict[str, Metadata] = {
        "tests": len(results),
        "failed_tests": len(failed),
        "failing_rows": sum(result.failing_rows for result in failed),
    }
    for result in failed:
        rows = "\n".join(f"- `{dict(row)}`" for row in result.sample)
        metadata[result.name] = dg.MetadataValue.md(f"{rows}\n\n```sql\n{result.sql}\n```")
    is_error = any(result.severity is Severity.ERROR for result in failed)
    return dg.AssetCheckResult(
        check_name=kind,
        asset_key=model,
        passed=not failed,
        severity=dg.AssetCheckSeverity.ERROR if is_error else dg.AssetCheckSeverity.WARN,
        metadata=metadata,
    )
