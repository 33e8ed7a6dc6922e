"""Pruning bounds Dagster's storage and forgets nothing that anybody could still look at."""

import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from resources.dagster_home.prune import REFRESH_TAG, prune, trim_logs
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


def test_a_long_log_keeps_its_last_whole_lines_and_its_writer_goes_on(tmp_path: Path) -> None:
    """The process holds the file open, as a child of the supervisor does; the short log beside it stays as it is."""
    short, long = tmp_path / "web.log", tmp_path / "daemon.log"
    short.write_bytes(b"one line\n")
    writer = "import sys\nfor n in range(100): print(f'line {n:3d}')\n" * 2
    writer = writer.replace("\nimport", "\nsys.stdout.flush(); sys.stdin.readline()\nimport")
    with (
        long.open("ab") as log,
        subprocess.Popen([sys.executable, "-c", writer], stdin=subprocess.PIPE, stdout=log) as child,
    ):
        while long.stat().st_size < 900:
            assert child.poll() is None
        trim_logs(tmp_path, most=500, keep=95)
        child.communicate(b"\n")

    lines = long.read_text().splitlines()
    assert lines[0] == "(older lines were cut)"
    assert lines[1:11] == [f"line {n:3d}" for n in range(90, 100)]
    assert lines[11:] == [f"line {n:3d}" for n in range(100)]
    assert short.read_bytes() == b"one line\n"
