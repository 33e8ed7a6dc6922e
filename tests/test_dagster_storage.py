"""What our storage leaves out is said elsewhere, and what another process or a restart needs is there."""

import threading
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.definitions.sensor_definition import SensorType
from dagster._core.events import EngineEventData
from dagster._core.remote_origin import InProcessCodeLocationOrigin, RemoteInstigatorOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    SensorInstigatorData,
    TickData,
    TickStatus,
)
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._utils.error import SerializableErrorInfo

from resources.dagster_home.stack import prepare_home
from resources.dagster_home.storage import LeanScheduleStorage

ORIGIN = RemoteInstigatorOrigin(
    RemoteRepositoryOrigin(InProcessCodeLocationOrigin(LoadableTargetOrigin()), "repository"), "scrape"
)
SELECTOR = ORIGIN.get_selector().get_id()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    prepare_home(tmp_path)
    return tmp_path


@pytest.fixture
def instance(home: Path) -> Iterator[dg.DagsterInstance]:
    """The real SQLite instance with the settings that `optiinfra up` writes."""
    with dg.DagsterInstance.from_config(str(home)) as made:
        yield made


def ticks(storage: LeanScheduleStorage) -> list[tuple[TickStatus, str | None]]:
    """Stored ticks, oldest first: status and reason."""
    return [
        (tick.status, tick.tick_data.skip_reason) for tick in reversed(storage.get_ticks(ORIGIN.get_id(), SELECTOR))
    ]


def tick(storage: LeanScheduleStorage, at: float, reason: str, status: TickStatus = TickStatus.SKIPPED) -> None:
    """One whole tick as Dagster's daemon stores it."""
    data = TickData(ORIGIN.get_id(), "scrape", InstigatorType.SENSOR, TickStatus.STARTED, at, selector_id=SELECTOR)
    error = SerializableErrorInfo(reason, [], None) if status is TickStatus.FAILURE else None
    why = {"error": error} if error else {"skip_reason": reason}
    storage.update_tick(storage.create_tick(data).with_status(status, **why))


def state(at: float, cursor: str, status: InstigatorStatus = InstigatorStatus.RUNNING) -> InstigatorState:
    data = SensorInstigatorData(
        last_tick_start_timestamp=at, last_tick_success_timestamp=at, cursor=cursor, sensor_type=SensorType.STANDARD
    )
    return InstigatorState(ORIGIN, InstigatorType.SENSOR, status, data)


@pytest.fixture
def storage(home: Path) -> LeanScheduleStorage:
    return LeanScheduleStorage.from_config_value(None, {"base_dir": str(home / "schedules")})


def stored_by_another_process(home: Path) -> InstigatorState | None:
    """What a process that holds nothing in memory reads."""
    other = LeanScheduleStorage.from_config_value(None, {"base_dir": str(home / "schedules")})
    return other.get_instigator_state(ORIGIN.get_id(), SELECTOR)


def test_quiet_ticks_of_a_minute_share_a_row(storage: LeanScheduleStorage) -> None:
    for second in range(0, 125, 5):
        tick(storage, 1000.0 + second, f"at {second}")

    assert ticks(storage) == [
        (TickStatus.SKIPPED, "at 0"),
        (TickStatus.SKIPPED, "at 60"),
        (TickStatus.SKIPPED, "at 120"),
    ]


def test_a_failed_tick_has_its_row(storage: LeanScheduleStorage) -> None:
    tick(storage, 1000.0, "quiet")
    tick(storage, 1005.0, "broken", TickStatus.FAILURE)
    tick(storage, 1010.0, "quiet again")

    assert [status for status, _ in ticks(storage)] == [TickStatus.FAILURE, TickStatus.SKIPPED]


def test_a_state_whose_times_alone_change_is_written_once_a_minute(home: Path, storage: LeanScheduleStorage) -> None:
    storage.add_instigator_state(state(1000.0, "a"))
    for second in range(0, 60, 5):
        storage.update_instigator_state(state(1000.0 + second, "a"))

    assert storage.get_instigator_state(ORIGIN.get_id(), SELECTOR) == state(1055.0, "a")
    assert stored_by_another_process(home) == state(1000.0, "a")
    storage.update_instigator_state(state(1060.0, "a"))
    assert stored_by_another_process(home) == state(1060.0, "a")


def test_a_new_cursor_is_written_at_once(home: Path, storage: LeanScheduleStorage) -> None:
    storage.add_instigator_state(state(1000.0, "a"))
    storage.update_instigator_state(state(1005.0, "a"))
    storage.update_instigator_state(state(1010.0, "b"))

    assert stored_by_another_process(home) == state(1010.0, "b")


def test_a_sensor_stopped_in_the_ui_is_stopped(home: Path, storage: LeanScheduleStorage) -> None:
    """The web server writes; the daemon, which remembers a newer state, sees it at its next look."""
    storage.add_instigator_state(state(1000.0, "a"))
    storage.update_instigator_state(state(1000.0, "a"))
    storage.update_instigator_state(state(1005.0, "a"))
    web_server = LeanScheduleStorage.from_config_value(None, {"base_dir": str(home / "schedules")})
    web_server.update_instigator_state(state(1000.0, "a", InstigatorStatus.STOPPED))

    [seen] = storage.all_instigator_state()
    assert seen.status is InstigatorStatus.STOPPED


def test_runs_asked_for_are_on_disk_with_the_state_before_they_are_launched(
    home: Path, storage: LeanScheduleStorage
) -> None:
    """A daemon killed in between takes that tick up again."""
    storage.add_instigator_state(state(1000.0, "a"))
    storage.update_instigator_state(state(1000.0, "a"))
    storage.update_instigator_state(state(1005.0, "a"))
    data = TickData(ORIGIN.get_id(), "scrape", InstigatorType.SENSOR, TickStatus.STARTED, 1005.0, selector_id=SELECTOR)
    begun = storage.create_tick(data)
    storage.update_tick(begun.with_run_requests([dg.RunRequest(run_key="one")], reserved_run_ids=["run"], cursor=None))

    assert stored_by_another_process(home) == state(1005.0, "a")
    [kept] = storage.get_ticks(ORIGIN.get_id(), SELECTOR)
    assert [request.run_key for request in kept.tick_data.run_requests or []] == ["one"]


def test_an_event_is_stored_once_and_an_empty_output_not_at_all(instance: dg.DagsterInstance) -> None:
    @dg.asset
    def made() -> dg.MaterializeResult[None]:
        return dg.MaterializeResult(metadata={"rows": 7})

    run = dg.Definitions([made]).resolve_implicit_global_asset_job_def().execute_in_process(instance=instance)

    events = [log.dagster_event.event_type_value for log in instance.all_logs(run.run_id) if log.dagster_event]
    assert events.count("ASSET_MATERIALIZATION") == 1
    assert not {"STEP_OUTPUT", "ENGINE_EVENT", "RESOURCE_INIT_STARTED", "RESOURCE_INIT_SUCCESS"} & set(events)
    assert {"STEP_START", "STEP_SUCCESS", "RUN_SUCCESS"} <= {event.replace("PIPELINE", "RUN") for event in events}
    newest = instance.get_latest_materialization_event(dg.AssetKey("made"))
    assert newest is not None
    assert newest.asset_materialization is not None
    assert newest.asset_materialization.metadata["rows"].value == 7


def test_tags_are_stored_again_for_partitions_alone(instance: dg.DagsterInstance) -> None:
    """What was read for an asset stays in its event; the table that finds partitions by tags holds partitions."""

    @dg.asset
    def upstream() -> None: ...

    @dg.asset(deps=[upstream], partitions_def=dg.StaticPartitionsDefinition(["a"]))
    def parted() -> None: ...

    job = dg.Definitions([upstream, parted]).resolve_implicit_global_asset_job_def()
    job.execute_in_process(instance=instance, asset_selection=[upstream.key])
    job.execute_in_process(instance=instance, asset_selection=[parted.key], partition_key="a")

    newest = instance.get_latest_materialization_event(upstream.key)
    assert newest is not None
    assert newest.asset_materialization is not None
    assert newest.asset_materialization.tags is not None
    assert "dagster/data_version" in newest.asset_materialization.tags
    assert list(instance.get_event_tags_for_asset(upstream.key)) == []
    [tags] = instance.get_event_tags_for_asset(parted.key)
    assert "dagster/data_version" in tags


@pytest.mark.parametrize("is_good", [True, False])
def test_a_check_is_planned_in_the_table_of_results_alone(instance: dg.DagsterInstance, is_good: bool) -> None:
    """Its result takes the plan's place; one whose run ended before it stays planned and is seen so."""

    @dg.asset
    def made() -> None: ...

    @dg.asset_check(asset=made)
    def well() -> dg.AssetCheckResult:
        if not is_good:
            raise RuntimeError("out of memory")
        return dg.AssetCheckResult(passed=True)

    definitions = dg.Definitions([made], asset_checks=[well])
    job = definitions.resolve_implicit_global_asset_job_def()
    run = job.execute_in_process(instance=instance, raise_on_error=False)

    events = [log.dagster_event.event_type_value for log in instance.all_logs(run.run_id) if log.dagster_event]
    assert "ASSET_CHECK_EVALUATION_PLANNED" not in events
    [record] = instance.event_log_storage.get_asset_check_execution_history(well.check_key, limit=5)
    assert record.run_id == run.run_id
    assert record.status.value == ("SUCCEEDED" if is_good else "PLANNED")


def test_a_passed_check_stands_in_the_table_of_results_alone(instance: dg.DagsterInstance) -> None:
    """A failed one is in its run's log too, and one that passes after it is the newer."""
    verdicts = iter([False, True])

    @dg.asset
    def made() -> None: ...

    @dg.asset_check(asset=made)
    def well() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=next(verdicts), metadata={"rows": 7})

    job = dg.Definitions([made], asset_checks=[well]).resolve_implicit_global_asset_job_def()
    logged = []
    for _ in range(2):
        run = job.execute_in_process(instance=instance)
        events = [log.dagster_event.event_type_value for log in instance.all_logs(run.run_id) if log.dagster_event]
        logged.append("ASSET_CHECK_EVALUATION" in events)

    storage = instance.event_log_storage
    assert logged == [True, False]
    history = storage.get_asset_check_execution_history(well.check_key, limit=5)
    assert [record.status.value for record in history] == ["SUCCEEDED", "FAILED"]
    assert history[0].event is not None
    assert history[0].event.dagster_event is not None
    assert history[0].event.dagster_event.asset_check_evaluation_data.metadata["rows"].value == 7
    [newest] = storage.get_asset_check_partition_info([well.check_key])
    assert newest.latest_execution_status.value == "SUCCEEDED"
    assert newest.latest_materialization_storage_id == newest.latest_target_materialization_storage_id


def test_an_error_of_the_engine_is_kept(instance: dg.DagsterInstance) -> None:
    """A run that could not be started says so."""
    error = SerializableErrorInfo("no memory", [], None)
    for given in (None, error):
        instance.report_engine_event(
            "starting", run_id="run", job_name="__ASSET_JOB", engine_event_data=EngineEventData(error=given)
        )

    [kept] = instance.all_logs("run")
    assert kept.dagster_event is not None
    assert kept.dagster_event.engine_event_data.error == error


def test_what_an_op_hands_on_is_stored(instance: dg.DagsterInstance) -> None:
    """A job of ops can be run again from its failure."""

    @dg.op
    def first() -> int:
        return 1

    @dg.job
    def handing() -> None:
        first()

    run = handing.execute_in_process(instance=instance)

    assert any(log.dagster_event and log.dagster_event.is_successful_output for log in instance.all_logs(run.run_id))


def test_an_open_run_page_is_told_of_events_that_are_in_the_log_alone(instance: dg.DagsterInstance) -> None:
    """SQLite writes ahead to a file beside the database; the page's watcher looks there, too."""
    told = threading.Event()
    instance.event_log_storage.watch("run", None, lambda *_: told.set())
    instance.report_engine_event("hello", job_name="job", run_id="run")

    assert told.wait(10)
    instance.event_log_storage.dispose()
