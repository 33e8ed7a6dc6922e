"""Rows that grow old: the move to Parquet, retention, the read copy, and what a start repairs."""

from __future__ import annotations

import random
import shutil
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.domain.fleet import Retention
from optiinfra_pipelines.sql.sources import raw_tables
from resources.warehouse import Warehouse, WarehouseError

START = datetime(2026, 3, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
KEEP_ALL = Retention(raw_hours=24 * 365)


class Clock:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def warehouse(tmp_path: Path, clock: Clock) -> Warehouse:
    return Warehouse(tmp_path / "state", clock=clock, rng=random.Random(1), min_free_bytes=0)


def scrapes(at: datetime, *targets: str) -> dict[str, pl.DataFrame]:
    rows: list[dict[str, object]] = [{"scraped_at": at, "target": target} for target in targets]
    return {"raw_scrapes": raw_tables()["raw_scrapes"].frame(rows)}


def targets(warehouse: Warehouse, table: str = "raw_scrapes") -> list[str]:
    return warehouse.read(f"select target from {table} order by target")["target"].to_list()


def fill(warehouse: Warehouse, hours: int) -> list[str]:
    """One batch an hour, target named after it."""
    for hour in range(hours):
        warehouse.append(f"fill {hour}", scrapes(START + hour * HOUR + HOUR / 2, f"{hour:03}"))
    return [f"{hour:03}" for hour in range(hours)]


def cold_files(warehouse: Warehouse) -> list[Path]:
    return sorted((warehouse.root / "cold").rglob("*.parquet"))


def test_closed_hours_move_and_every_row_stays_visible(warehouse: Warehouse) -> None:
    """An hour moves once it ended five minutes ago; its file lies under its date and hour, sorted by grain."""
    names = fill(warehouse, 3)
    warehouse.append("more", scrapes(START + HOUR / 2, "zz", "aa"))
    moved = warehouse.move_closed_hours(START + 2 * HOUR + timedelta(minutes=4, seconds=59))

    assert [(one.table, one.start_at, one.rows) for one in moved] == [("raw_scrapes", START, 3)]
    assert moved[0].path.parent == warehouse.root / "cold/raw_scrapes/date=2026-03-01/hour=00"
    assert pl.read_parquet(moved[0].path)["target"].to_list() == ["000", "aa", "zz"]
    assert targets(warehouse) == sorted([*names, "aa", "zz"])
    assert targets(warehouse, "hot.raw_scrapes") == ["001", "002"]


def test_a_late_row_of_a_moved_hour_is_seen_and_moves_later(warehouse: Warehouse) -> None:
    """A spooled batch may arrive after its hour has gone; it gets a second file."""
    fill(warehouse, 1)
    warehouse.move_closed_hours(START + 2 * HOUR)
    warehouse.append("late", scrapes(START + HOUR / 4, "late"))
    assert targets(warehouse) == ["000", "late"]

    assert [one.rows for one in warehouse.move_closed_hours(START + 2 * HOUR)] == [1]
    assert targets(warehouse) == ["000", "late"]
    assert len(cold_files(warehouse)) == 2
    assert warehouse.move_closed_hours(START + 2 * HOUR) == []


def test_rows_that_arrive_during_the_export_are_not_deleted_with_it(warehouse: Warehouse) -> None:
    """The switch happens only over exactly the rows that were exported; otherwise the slice is exported again."""
    fill(warehouse, 1)
    asked: list[Path] = []

    def free_after_an_append(path: Path) -> int:
        # The move asks for free space when it begins, and again between reading rows and writing them.
        asked.append(path)
        if len(asked) == 2:
            warehouse.append("late", scrapes(START, "late"))
        return 2**40

    moving = Warehouse(warehouse.root, clock=lambda: START, disk_free=free_after_an_append)

    assert [one.rows for one in moving.move_closed_hours(START + 2 * HOUR)] == [2]
    assert targets(warehouse) == ["000", "late"]
    assert len(asked) == 3
    assert len(cold_files(warehouse)) == 1


def test_a_reader_sees_every_row_once_while_hours_move(warehouse: Warehouse) -> None:
    """Readers of the live file and of the copy count the same total before, during and after the move."""
    names = fill(warehouse, 6)
    seen: set[tuple[int, int]] = set()
    is_over = threading.Event()

    def count() -> None:
        while not is_over.is_set():
            with warehouse.connect() as connection:
                rows = connection.execute("select count(*), count(distinct target) from raw_scrapes").fetchall()
            seen.add(rows[0])

    reader = threading.Thread(target=count)
    reader.start()
    moved = warehouse.move_closed_hours(START + 24 * HOUR)
    is_over.set()
    reader.join()

    assert len(moved) == 6
    assert seen == {(len(names), len(names))}


def test_tables_with_maps_lists_and_no_time(warehouse: Warehouse) -> None:
    """Maps stay maps and lists lists in Parquet; dimensions never move."""
    kept, bounds = raw_tables()["raw_kept_samples"], raw_tables()["raw_histogram_bounds"]
    row = {"scraped_at": START, "target": "t", "name": "n", "labels": [{"key": "k", "value": "v"}], "value": 1.0}
    histogram = {"scraped_at": START, "target": "t", "engine_rank": "0", "metric": "m", "bucket_counts": [1.0, 2.0]}
    warehouse.append(
        "1",
        {
            "raw_kept_samples": pl.DataFrame([row], schema=kept.polars_schema),
            "raw_histogram_bounds": bounds.frame([{"bounds_id": 1, "upper_bounds": [1.0]}]),
            "raw_engine_histograms": raw_tables()["raw_engine_histograms"].frame([histogram]),
        },
    )
    assert {one.table for one in warehouse.move_closed_hours(START + 2 * HOUR)} == {
        "raw_kept_samples",
        "raw_engine_histograms",
    }

    assert warehouse.read("select labels['k'] from raw_kept_samples").item() == "v"
    assert warehouse.read("select bucket_counts from raw_engine_histograms").item().to_list() == [1.0, 2.0]
    assert warehouse.read("select count(*) from raw_histogram_bounds").item() == 1


def test_cold_files_of_an_older_version_give_null_for_a_new_column(warehouse: Warehouse) -> None:
    """Files keep the columns they were written with; the view fills up by name."""
    fill(warehouse, 2)
    warehouse.move_closed_hours(START + 1.5 * HOUR)
    with duckdb.connect(warehouse.live_path) as connection:
        [(path,)] = connection.execute("select path from store.cold_files").fetchall()
        file = warehouse.root / path
        connection.execute(f"copy (select scraped_at, target from '{file}') to '{file}.new' (format parquet)")
        Path(f"{file}.new").replace(file)
        connection.execute(
            "update store.cold_files set columns = 'older'; delete from store.state where key = 'layout'"
        )
    moved = Warehouse(warehouse.root.rename(warehouse.root.with_name("moved")), clock=lambda: START, min_free_bytes=0)
    moved.move_closed_hours(START + 3 * HOUR)

    assert moved.read("select target, engine from raw_scrapes order by 1").rows() == [("000", None), ("001", None)]


def test_the_copy_is_whole_and_its_readers_are_left_in_peace(warehouse: Warehouse, clock: Clock) -> None:
    """A session on the old copy answers as before, a new one sees the new rows, and no write fails meanwhile."""
    fill(warehouse, 2)
    warehouse.move_closed_hours(START + 1.5 * HOUR)
    with duckdb.connect(warehouse.publish().path, read_only=True) as session:
        fill(warehouse, 4)
        assert warehouse.append("more", scrapes(START, "more")).status == "stored"
        published = warehouse.publish()
        assert published.is_new
        assert session.execute("select count(*) from raw_scrapes").fetchall() == [(2,)]
    with duckdb.connect(published.path, read_only=True) as session:
        assert session.execute("select count(*) from raw_scrapes").fetchall() == [(5,)]
        told = session.execute("select value from store.state where key = 'published_at'").fetchall()
    assert told == [(clock.now.isoformat(),)]


def test_a_folder_in_the_copys_place_is_named(warehouse: Warehouse) -> None:
    fill(warehouse, 1)
    warehouse.read_path.mkdir()

    with pytest.raises(WarehouseError, match=r"read\.duckdb is a folder"):
        warehouse.publish()


def test_an_unchanged_file_is_not_copied_again(warehouse: Warehouse) -> None:
    """A refresh that found nothing new costs no disk writes; questions change nothing."""
    fill(warehouse, 1)
    first = warehouse.publish()
    targets(warehouse)
    second = warehouse.publish()
    warehouse.append("more", scrapes(START, "more"))

    assert (first.is_new, second.is_new, warehouse.publish().is_new) == (True, False, True)


def test_retention_takes_files_off_the_list_first_and_deletes_them_later(warehouse: Warehouse, clock: Clock) -> None:
    """A session on the copy of before still finds its files; after a new copy and an hour they are gone."""
    fill(warehouse, 6)
    warehouse.move_closed_hours(START + 5.5 * HOUR)
    warehouse.append("late", scrapes(START + HOUR / 4, "late"))
    copy = warehouse.publish().path
    clock.now = START + 6 * HOUR
    with duckdb.connect(copy, read_only=True) as session:
        result = warehouse.apply_retention(Retention(raw_hours=3), clock.now)
        assert (result.retired_files, result.deleted_files, result.deleted_rows) == (3, 0, {"raw_scrapes": 1})
        assert targets(warehouse) == ["003", "004", "005"]
        clock.now += 2 * HOUR
        assert warehouse.apply_retention(Retention(raw_hours=5), clock.now).deleted_files == 0
        assert session.execute("select count(*) from raw_scrapes").fetchall() == [(7,)]
    warehouse.publish()

    assert warehouse.apply_retention(Retention(raw_hours=5), clock.now).deleted_files == 3
    assert [path.parent.name for path in cold_files(warehouse)] == ["hour=03", "hour=04"]
    assert not (warehouse.root / "cold/raw_scrapes/date=2026-03-01/hour=00").exists()


def test_model_tables_live_as_long_as_their_layer(warehouse: Warehouse) -> None:
    """Minutes 14 days and hours two years, by default; a table nobody registered is left alone."""
    now = START + timedelta(days=800)
    with warehouse.connect() as connection:
        for name in ("minutes", "hours", "others"):
            days = f"create table {name} as select ?::timestamptz - interval 1 day * d as at from range(900) t(d)"
            connection.execute(days, [now])
    warehouse.register("minutes", time_column="at", layer="minute")
    warehouse.register("hours", time_column="at", layer="hour")

    deleted = warehouse.apply_retention(Retention(), now).deleted_rows
    assert deleted == {"minutes": 900 - 15, "hours": 900 - 731}
    assert warehouse.read("select count(*) from others").item() == 900


def test_a_model_table_moves_by_day_and_comes_back_for_a_rebuild(warehouse: Warehouse) -> None:
    """It keeps its name for readers; a writer asks where to write, and recalls a window before rewriting it."""
    with warehouse.connect() as connection:
        connection.execute(
            "create table loads as select ?::timestamptz + interval 1 minute * m as minute_at, 'a' as target "
            "from range(3 * 1440) t(m)",
            [START],
        )
    warehouse.register("loads", time_column="minute_at", layer="minute", grain=("target", "minute_at"), cold="day")
    assert (warehouse.storage_name("loads"), warehouse.storage_name("others")) == ('hot."loads"', 'main."others"')
    moved = warehouse.move_closed_hours(START + timedelta(days=2, hours=1))
    assert [(one.rows, one.path.parent.name) for one in moved] == [(1440, "date=2026-03-01"), (1440, "date=2026-03-02")]
    count = "select count(*), count(distinct minute_at) from loads"
    assert warehouse.read(count).row(0) == (4320, 4320)

    assert warehouse.recall("loads", START + timedelta(hours=5), START + timedelta(hours=6)) == 1440
    with warehouse.connect() as connection:
        connection.execute("delete from hot.loads where minute_at < ?", [START + timedelta(hours=6)])
    assert warehouse.read(count).row(0) == (3960, 3960)
    assert [one.rows for one in warehouse.move_closed_hours(START + timedelta(days=2, hours=1))] == [1080]
    assert warehouse.read(count).row(0) == (3960, 3960)

    warehouse.forget("loads")
    with warehouse.connect() as connection:
        connection.execute("create table loads (minute_at timestamptz)")
    with pytest.raises(WarehouseError, match="has no column"):
        warehouse.register("loads", time_column="at", layer="minute")


def test_a_start_deletes_what_killed_processes_left_and_nothing_else(warehouse: Warehouse) -> None:
    """Temporaries without a writer and Parquet files that no switch listed; a stranger's files stay."""
    names = fill(warehouse, 2)
    [moved] = warehouse.move_closed_hours(START + 1.5 * HOUR)
    orphan = moved.path.with_name(moved.path.name.split("-")[0] + "-00.parquet")
    shutil.copy(moved.path, orphan)
    gone = 2**22 + 1  # above the largest process id
    leftovers = [
        orphan,
        warehouse.root / f"read.duckdb.{gone}.0.tmp",
        warehouse.root / f"spool/000000000001-ab.zip.{gone}.0.tmp",
        moved.path.with_name(f"x.parquet.{gone}.0.tmp"),
    ]
    for path in leftovers[1:]:
        path.write_text("half")
    notes = warehouse.root / "notes.txt"
    notes.write_text("mine")

    assert set(warehouse.sweep().deleted) == set(leftovers)
    assert not any(path.exists() for path in leftovers)
    assert notes.exists()
    assert targets(warehouse) == names


def test_closed_hours_survive_the_loss_of_the_live_file(warehouse: Warehouse) -> None:
    """Whoever moves a damaged file away and starts again gets every moved hour back."""
    fill(warehouse, 3)
    warehouse.move_closed_hours(START + 2.5 * HOUR)
    warehouse.live_path.unlink()
    assert targets(warehouse) == []

    assert len(warehouse.sweep().adopted) == 2
    assert targets(warehouse) == ["000", "001"]
    assert warehouse.sweep().adopted == ()


def test_a_cold_file_that_vanished_costs_its_rows_and_no_more(warehouse: Warehouse, tmp_path: Path) -> None:
    """The start names it and takes it off the view, and takes it back when it is put back."""
    fill(warehouse, 3)
    moved = warehouse.move_closed_hours(START + 2.5 * HOUR)
    aside = tmp_path / "aside.parquet"
    shutil.move(moved[0].path, aside)

    assert warehouse.sweep().missing == (moved[0].path,)
    assert targets(warehouse) == ["001", "002"]
    shutil.move(aside, moved[0].path)
    assert warehouse.sweep().missing == ()
    assert targets(warehouse) == ["000", "001", "002"]


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["append", "late", "again", "move", "expire", "publish", "sweep"]), st.integers(0, 90)),
    min_size=6,
    max_size=14,
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, is_grouped=st.booleans())
def test_no_order_of_work_loses_or_doubles_a_row(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step], is_grouped: bool
) -> None:
    """Whatever the order of appends, late rows, repeats, moves, retention, publication and sweeps: what was
    acknowledged and is young enough is there once, and what is there was acknowledged.
    """
    clock = Clock()
    interval = 3600.0 if is_grouped else 0.0
    root = tmp_path_factory.mktemp("state")
    warehouse = Warehouse(root, clock=clock, min_free_bytes=0, commit_interval_seconds=interval)
    sent: list[tuple[str, datetime]] = []
    keep = Retention(raw_hours=4)
    for work, minutes in steps:
        clock.now += timedelta(minutes=minutes)
        if work in ("append", "late"):
            at = clock.now - (timedelta(minutes=3 * minutes) if work == "late" else timedelta(0))
            sent.append((f"{len(sent)}", at))
            warehouse.append(sent[-1][0], scrapes(at, sent[-1][0]))
        elif work == "again" and sent:
            name, at = sent[minutes % len(sent)]
            warehouse.append(name, scrapes(at, name))
        elif work == "move":
            warehouse.move_closed_hours(clock.now)
        elif work == "expire":
            warehouse.apply_retention(keep, clock.now)
        elif work == "publish":
            warehouse.publish()
        else:
            warehouse.sweep()
    # Repeats of what retention has deleted may bring it back; rows within retention are the promise.
    young = [name for name, at in sent if at >= clock.now - timedelta(hours=keep.raw_hours)]
    found = Counter(targets(warehouse))

    assert {name for name in young if found[name] != 1} == set()
    assert set(found) <= {name for name, _ in sent}
    assert max(found.values(), default=1) == 1
