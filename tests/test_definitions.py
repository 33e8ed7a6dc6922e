"""The graph loads, hangs together, refreshes by its own condition, and its sensors report what they stored."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest

from optiinfra_pipelines.definitions import assemble
from optiinfra_pipelines.domain.fleet import Fleet, Host, Target
from optiinfra_pipelines.settings import Paths
from optiinfra_pipelines.sql.sources import raw_tables
from resources.warehouse import Warehouse


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(
        home=tmp_path,
        warehouse_dir=tmp_path / "warehouse",
        dagster_home=tmp_path / "dagster",
        reports_dir=tmp_path / "reports",
        rollouts_dir=tmp_path / "rollouts",
        fleet_file=tmp_path / "fleet.yaml",
    )


GROUPS = {"raw", "staging", "intermediate", "marts", "published", "watch", "judged", "advised", "advice", "rollouts"}
FLEET = Fleet(
    hosts=(Host(name="here", local=True),),
    # Nothing listens on port 1: a down target is a row, not an exception.
    targets=(Target(name="gone", url="http://127.0.0.1:1/metrics"),),
)


def now() -> datetime:
    return datetime.now(UTC)


def sensor(definitions: dg.Definitions, name: str) -> dg.SensorDefinition:
    return definitions.resolve_sensor_def(name)


def tick(definitions: dg.Definitions, name: str, instance: dg.DagsterInstance, cursor: str | None) -> dg.SensorResult:
    context = dg.build_sensor_context(instance=instance, cursor=cursor)
    result = sensor(definitions, name).evaluate_tick(context)
    for event in result.asset_events:
        instance.report_runless_asset_event(event)
    return result


def test_every_definition_loads_and_every_asset_has_a_home(paths: Paths) -> None:
    """One code location: unique names, known groups, owners, descriptions and a column schema on every table."""
    definitions = assemble(FLEET, paths, now)
    dg.Definitions.validate_loadable(definitions)

    graph = definitions.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.group_name in GROUPS, key
        assert node.description, key
        assert node.owners, key
    raw = {key.to_user_string() for key in graph.get_all_asset_keys() if graph.get(key).group_name == "raw"}
    assert raw == set(raw_tables())


def test_nothing_in_the_launchpad_names_a_path_or_a_cadence(paths: Paths) -> None:
    """Launchpad config is what a job is about: no job offers resources, paths or intervals to edit."""
    definitions = assemble(FLEET, paths, now)

    offered = {
        job.name: sorted(
            field for node in job.nodes for field in getattr(node.definition.config_schema.config_type, "fields", {})
        )
        for job in definitions.resolve_all_job_defs()
        if job.name not in ("__ASSET_JOB", "test_models")
    }

    assert offered["prune_dagster_storage"] == ["keep_failure_days", "keep_hours"]
    assert offered["rebuild_window"] == ["end", "models", "start"]


def test_the_sensors_run_from_the_first_start_a_second_under_five(paths: Paths) -> None:
    """An interval of 5 s would alias with the daemon's own 5 s loop and give 8 s."""
    definitions = assemble(FLEET, paths, now)

    for name in ("scrape_engines", "sample_gpus", "sample_hosts"):
        assert sensor(definitions, name).minimum_interval_seconds == 4
        assert sensor(definitions, name).default_status is dg.DefaultSensorStatus.RUNNING
    assert sensor(definitions, "refresh_assets").default_status is dg.DefaultSensorStatus.RUNNING


def test_a_tick_stores_at_once_and_reports_once_a_minute(paths: Paths) -> None:
    """Two ticks within a minute: rows of both are stored, one report is made; a down target is in its metadata."""
    at = [datetime(2026, 11, 20, 12, 0, 1, tzinfo=UTC)]
    definitions = assemble(FLEET, paths, lambda: at[0])
    with dg.DagsterInstance.ephemeral() as instance:
        first = tick(definitions, "scrape_engines", instance, None)
        at[0] = at[0].replace(second=6)
        second = tick(definitions, "scrape_engines", instance, first.cursor)
        at[0] = at[0].replace(minute=1)
        third = tick(definitions, "scrape_engines", instance, first.cursor)

    reported = {event.asset_key.to_user_string(): event for event in first.asset_events}
    assert reported["raw_scrapes"].metadata["down"].value == "gone: connect_refused"
    assert second.asset_events == []
    assert third.asset_events[0].metadata["ticks"].value == 2
    stored = Warehouse(paths.warehouse_dir, clock=now).read("select count(*) as n from raw_scrapes")
    assert stored["n"].item() == 3


def test_derived_assets_are_requested_at_once_and_then_at_the_cadence(paths: Paths) -> None:
    """Never made: at the first look. Checks wait for their hour: they must not ride along with every refresh."""
    definitions = assemble(FLEET, paths, now)
    with dg.DagsterInstance.ephemeral() as instance:
        first = dg.evaluate_automation_conditions(defs=definitions, instance=instance)

    graph = definitions.resolve_asset_graph()
    for key in graph.materializable_asset_keys:
        assert first.get_num_requested(key) == 1, key
    for check in graph.asset_check_keys - {dg.AssetCheckKey(dg.AssetKey("read_copy"), "opens")}:
        assert first.get_num_requested(check) == 0, check
        assert graph.get(check).automation_condition is not None, check


def test_rollouts_are_in_the_launchpad_and_cost_nothing_until_one_is_proposed(paths: Paths) -> None:
    """Eight jobs and two sensors that run from the first start; without a proposal a tick touches no disk."""
    definitions = assemble(FLEET, paths, now)
    wanted = ("propose", "approve", "reject", "execute", "pause", "resume", "abort", "rollback")
    names = {job.name for job in definitions.resolve_all_job_defs()}

    assert {f"{verb}_rollout" for verb in wanted} <= names
    with dg.DagsterInstance.ephemeral() as instance:
        for name, why in (("dispatch_rollouts", "nothing is approved"), ("watch_rollouts", "no rollout")):
            found = sensor(definitions, name)
            assert found.default_status is dg.DefaultSensorStatus.RUNNING
            context = dg.build_sensor_context(instance=instance, definitions=definitions)
            assert found.evaluate_tick(context).skip_message == why
    assert not paths.rollouts_dir.exists()


def test_the_watch_is_quick_enough_for_the_lease(paths: Paths) -> None:
    """Lease and one interval of the watch (the daemon's loop is 5 s) are the 45 s in which traffic is off."""
    definitions = assemble(FLEET, paths, now)

    interval = sensor(definitions, "watch_rollouts").minimum_interval_seconds or 0

    assert FLEET.rollouts.lease_seconds + interval + 5 <= 45


def test_loading_the_graph_imports_no_numerical_library() -> None:
    """Every run and the code server load it: scipy, numba and matplotlib are seconds of CPU and 150 MB each time."""
    code = "import sys, optiinfra_pipelines.definitions; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert {"scipy", "numba", "matplotlib", "kubernetes", "lightgbm"} & set(done.stdout.split()) == set()
