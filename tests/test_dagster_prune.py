"""Pruning bounds Dagster's storage and forgets nothing that anybody could still look at."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from resources.dagster_home.prune import REFRESH_TAG, prune
from resources.dagster_home.stack import prepare_home

HOUR = timedelta(hours=1)


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """The real SQLite instance with the settings that `optiinfra up` writes."""
    prepare_home(tmp_path)
    with dg.DagsterInstance.from_config(str(tmp_path)) as made:
        yield made


def refresh_job(tags: dict[str, str]) -> dg.JobDefinition:
    @dg.asset
    def made() -> None: ...

    definitions = dg.Definitions([made], jobs=[dg.define_asset_job("job", tags=tags)])
    return definitions.resolve_job_def("job")


def later(instance: dg.DagsterInstance, hours: float) -> object:
    return prune(instance, now=datetime.now(UTC) + hours * HOUR, keep=HOUR, keep_failures=24 * HOUR)


def test_the_newest_report_of_each_asset_survives(instance: dg.DagsterInstance) -> None:
    for rows in range(5):
        instance.report_runless_asset_event(dg.AssetMaterialization("raw", metadata={"rows": rows}))

    pruned = later(instance, 2)

    assert pruned.events == 4
    newest = instance.get_latest_materialization_event(dg.AssetKey("raw"))
    assert newest.asset_materialization.metadata["rows"].value == 4
    assert later(instance, 3).events == 0


def test_old_refreshes_go_with_their_events_but_the_run_behind_an_asset_stays(instance: dg.DagsterInstance) -> None:
    runs = [refresh_job(REFRESH_TAG).execute_in_process(instance=instance).run_id for _ in range(3)]

    assert later(instance, 2).runs == 2
    assert [run.run_id for run in instance.get_runs()] == runs[-1:]
    assert [bool(instance.all_logs(run_id)) for run_id in runs] == [False, False, True]
    assert instance.get_latest_materialization_event(dg.AssetKey("made")) is not None


def test_a_persons_run_is_never_pruned(instance: dg.DagsterInstance) -> None:
    """Only runs marked as refreshes may be forgotten; rollouts and rebuilds are history."""
    for _ in range(2):
        refresh_job({}).execute_in_process(instance=instance)

    assert later(instance, 1000).runs == 0
    assert len(instance.get_runs()) == 2


def test_what_is_young_stays(instance: dg.DagsterInstance) -> None:
    for _ in range(2):
        refresh_job(REFRESH_TAG).execute_in_process(instance=instance)
        instance.report_runless_asset_event(dg.AssetMaterialization("raw"))

    pruned = later(instance, 0.5)

    assert (pruned.runs, pruned.events) == (0, 0)


def test_another_storage_is_told_apart() -> None:
    with dg.DagsterInstance.ephemeral() as memory, pytest.raises(TypeError, match="SQLite"):
        prune(memory, now=datetime.now(UTC), keep=HOUR, keep_failures=HOUR)
