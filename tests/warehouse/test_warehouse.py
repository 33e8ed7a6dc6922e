"""The warehouse's write path: what is accepted, once and only once, and what happens while others have the file."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import polars as pl
import pytest
from structlog.testing import capture_logs

from optiinfra_pipelines.sql.sources import raw_tables
from resources.warehouse import (
    BatchError,
    DiskNearlyFullError,
    SpoolFullError,
    Warehouse,
    WarehouseFileError,
    WarehouseLockedError,
)

WRITER = Path(__file__).with_name("writer.py")
NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


def scrapes(*targets: str, at: datetime = NOW) -> dict[str, pl.DataFrame]:
    rows: list[dict[str, object]] = [{"scraped_at": at, "target": target, "is_up": True} for target in targets]
    return {"raw_scrapes": raw_tables()["raw_scrapes"].frame(rows)}


def bounds(number: int) -> dict[str, pl.DataFrame]:
    rows: list[dict[str, object]] = [{"bounds_id": number, "upper_bounds": [1.0, float("inf")]}]
    return {"raw_histogram_bounds": raw_tables()["raw_histogram_bounds"].frame(rows)}


def kept(labels: list[list[dict[str, str | None]]]) -> dict[str, pl.DataFrame]:
    rows = [{"scraped_at": NOW, "target": "t", "name": "n", "labels": pairs, "value": 1.0} for pairs in labels]
    return {"raw_kept_samples": pl.DataFrame(rows, schema=raw_tables()["raw_kept_samples"].polars_schema)}


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(tmp_path / "state", clock=lambda: NOW, lock_deadline_seconds=0.2)


def targets(warehouse: Warehouse) -> list[str]:
    return warehouse.read("select target from raw_scrapes order by target")["target"].to_list()


@contextmanager
def another_process(root: Path, mode: str) -> Iterator[None]:
    """A process that has the live file open until the block ends."""
    hold = (
        "import duckdb, sys; connection = duckdb.connect(sys.argv[1], read_only=sys.argv[2] == 'read');"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(root / "warehouse.duckdb"), mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield
        finally:
            process.stdin.close()


def test_every_raw_table_can_be_read_before_the_first_row(warehouse: Warehouse) -> None:
    """Models bind against tables that exist from the first moment, with the columns of sources.yml in order."""
    for table in raw_tables().values():
        assert warehouse.read(f"select * from {table.name}").columns == list(table.columns)


def test_every_type_comes_back_as_it_went_in(warehouse: Warehouse) -> None:
    """Times are UTC, unsigned hashes whole, +Inf stays +Inf, an absent map is NULL and an empty one empty."""
    warehouse.append("1", {**kept([[{"key": "le", "value": "+Inf"}], []]), **bounds(2**64 - 1), **scrapes("a")})

    assert warehouse.read("select bounds_id, upper_bounds from raw_histogram_bounds").row(0) == (
        2**64 - 1,
        [1.0, float("inf")],
    )
    assert warehouse.read("select scraped_at, engine from raw_scrapes").row(0) == (NOW, None)
    assert warehouse.read("select labels['le'], len(map_keys(labels)) from raw_kept_samples").rows() == [
        ("+Inf", 1),
        (None, 0),
    ]


def test_a_batch_delivered_twice_is_stored_once(warehouse: Warehouse) -> None:
    """A tick may be repeated after a crash; its batch id is the same and its rows are not added again."""
    assert warehouse.append("tick 1", scrapes("a")).status == "stored"
    assert warehouse.append("tick 1", scrapes("a", "b")).status == "duplicate"

    assert targets(warehouse) == ["a"]


def test_dimension_rows_are_kept_once_per_grain(warehouse: Warehouse) -> None:
    """Bucket bounds arrive with every scrape; the table holds each of them once, also twice in one batch."""
    twice = {"raw_histogram_bounds": pl.concat([*bounds(1).values(), *bounds(1).values()])}
    for number, tables in enumerate([twice, bounds(1), bounds(2)]):
        warehouse.append(str(number), tables)

    assert warehouse.read("select bounds_id from raw_histogram_bounds order by 1")["bounds_id"].to_list() == [1, 2]


@pytest.mark.parametrize(
    ("tables", "cause"),
    [
        ({"raw_scrape": scrapes("a")["raw_scrapes"]}, "no raw table raw_scrape;"),
        ({"raw_scrapes": scrapes("a")["raw_scrapes"].with_columns(x=1)}, "raw_scrapes has no column x;"),
        ({"raw_scrapes": scrapes("a")["raw_scrapes"].drop("target")}, "lacks target"),
        ({"raw_scrapes": scrapes("a")["raw_scrapes"].cast({"is_up": pl.Int8})}, "is_up is Int8 in the batch"),
        (
            {"raw_scrapes": scrapes("a")["raw_scrapes"].with_columns(pl.col("scraped_at").dt.replace_time_zone(None))},
            "raw_scrapes.scraped_at is Datetime",
        ),
        (
            {
                "raw_scrapes": scrapes("a")["raw_scrapes"].with_columns(
                    scraped_at=pl.lit(None, pl.Datetime("us", "UTC"))
                )
            },
            "scraped_at is NULL in 1 rows",
        ),
        (kept([[], [{"key": "a", "value": "1"}, {"key": "a", "value": "2"}]]), "repeated key in row 1"),
        (kept([[{"key": None, "value": "1"}]]), "missing or repeated key in row 0"),
    ],
)
def test_a_wrong_frame_is_named_before_anything_is_written(
    warehouse: Warehouse, tables: Mapping[str, pl.DataFrame], cause: str
) -> None:
    """Rows of a good table in the same batch are not stored either, and the id stays free."""
    with pytest.raises(BatchError, match=cause):
        warehouse.append("1", {**bounds(7), **tables})

    assert warehouse.read("select count(*) from raw_histogram_bounds").item() == 0
    assert warehouse.append("1", bounds(7)).status == "stored"


def test_a_batch_without_rows_costs_nothing(warehouse: Warehouse) -> None:
    """A tick that found nothing opens no file and waits for nobody."""
    assert warehouse.append("1", {"raw_scrapes": raw_tables()["raw_scrapes"].empty()}).rows == 0
    assert not warehouse.root.exists()


def test_a_column_left_out_or_untyped_is_null(warehouse: Warehouse) -> None:
    """An engine that exposes little gives a frame with little in it."""
    frame = scrapes("a")["raw_scrapes"].select("scraped_at", "target", engine=pl.lit(None))
    warehouse.append("1", {"raw_scrapes": frame})

    assert warehouse.read("select engine, is_up from raw_scrapes").row(0) == (None, None)


@pytest.mark.parametrize("mode", ["write", "read"])
def test_rows_wait_on_disk_while_another_process_has_the_file(warehouse: Warehouse, mode: str) -> None:
    """A notebook left open on the live file costs the deadline once a batch and loses nothing."""
    warehouse.append("0", scrapes("a"))
    with another_process(warehouse.root, mode):
        results = [warehouse.append(str(n), scrapes(name)) for n, name in [(1, "b"), (2, "c"), (1, "b"), (0, "a")]]
        with pytest.raises(WarehouseLockedError, match="another process"), warehouse.connect(deadline_seconds=0.1):
            pass
    assert [result.status for result in results] == ["spooled"] * 4
    assert min(result.waited_seconds for result in results) >= 0.1
    assert warehouse.backlog().batches == 3

    assert warehouse.append("3", scrapes("d")).status == "stored"
    assert targets(warehouse) == ["a", "b", "c", "d"]
    assert warehouse.backlog().batches == 0


def test_a_held_file_is_told_once_and_its_release_too(warehouse: Warehouse) -> None:
    """Not once a tick: a night under a forgotten notebook is two lines in the log."""
    warehouse.append("0", scrapes("a"))
    with capture_logs() as told:
        with another_process(warehouse.root, "read"):
            warehouse.append("1", scrapes("b"))
            warehouse.append("2", scrapes("c"))
        warehouse.append("3", scrapes("d"))

    assert [line["event"] for line in told] == ["warehouse_held", "warehouse_free"]


def test_the_lock_survives_whatever_the_warehouse_does_itself(warehouse: Warehouse) -> None:
    """POSIX locks end when a process closes any descriptor of the file: no step may do that while a session is up."""
    with warehouse.connect() as connection:
        warehouse.append("1", scrapes("a"))
        warehouse.read("select 1")
        warehouse.sweep()
        with pytest.raises(WarehouseLockedError, match="another thread"):
            warehouse.publish(deadline_seconds=0.1)
        probe = "import duckdb, sys; duckdb.connect(sys.argv[1])"
        second = subprocess.run(
            [sys.executable, "-c", probe, str(warehouse.live_path)], capture_output=True, text=True, check=False
        )
        assert connection.execute("select count(*) from raw_scrapes").fetchall() == [(1,)]
    assert "Could not set lock" in second.stderr


def test_sooner_than_the_commit_interval_batches_go_in_together(tmp_path: Path) -> None:
    """Acknowledged rows that wait are in every answer, and a repeated one is still stored once."""
    warehouse = Warehouse(tmp_path, clock=lambda: NOW, commit_interval_seconds=3600)
    first = warehouse.append("0", scrapes("a")).status
    rest = [warehouse.append(str(n), scrapes(name)).status for n, name in [(1, "b"), (2, "c"), (0, "a"), (2, "c")]]
    assert (first, set(rest)) == ("stored", {"spooled"})

    assert targets(warehouse) == ["a", "b", "c"]
    stored = warehouse.read("select batch_id, earliest_at, row_count from store.batches order by batch_id").rows()
    assert stored == [("0", NOW, 1), ("1", NOW, 1), ("2", NOW, 1)]


def test_a_damaged_waiting_file_does_not_hold_up_the_others(tmp_path: Path) -> None:
    """It is set aside for a person, and the batches behind it are stored."""
    warehouse = Warehouse(tmp_path, clock=lambda: NOW, commit_interval_seconds=3600)
    for number, name in enumerate("abcd"):
        warehouse.append(str(number), scrapes(name))
    damaged = sorted((tmp_path / "spool").glob("*.zip"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-40])

    assert targets(warehouse) == ["a", "b", "d"]
    assert [path.name for path in (tmp_path / "spool").iterdir()] == [damaged.name + ".rejected"]


def test_a_full_spool_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    """The refused batch is not acknowledged: its sender knows, and sends it again."""
    warehouse = Warehouse(tmp_path, clock=lambda: NOW, commit_interval_seconds=3600, max_spool_bytes=20_000)
    warehouse.append("first", scrapes("first"))
    accepted: list[str] = []
    while warehouse.backlog().size_bytes < 15_000:
        accepted.append(f"t{len(accepted):02}")
        assert warehouse.append(accepted[-1], scrapes(accepted[-1])).status == "spooled"
    large = scrapes(*(f"u{number}" for number in range(2_000)))
    with pytest.raises(SpoolFullError, match="may hold 20,000"):
        warehouse.append("large", large)

    assert targets(warehouse) == ["first", *accepted]
    assert warehouse.append("large", scrapes("u")).status == "spooled"


def test_a_nearly_full_disk_refuses_and_collection_resumes_by_itself(tmp_path: Path) -> None:
    """Nothing is written below the limit, reading goes on, and no restart is needed once there is room."""
    free = 10_000
    warehouse = Warehouse(tmp_path, clock=lambda: NOW, min_free_bytes=5_000, disk_free=lambda _: free)
    warehouse.append("1", scrapes("a"))
    free = 4_999
    refused: list[Callable[[], object]] = [
        lambda: warehouse.append("2", scrapes("b")),
        lambda: warehouse.publish(),
        lambda: warehouse.move_closed_hours(NOW + timedelta(days=1)),
    ]
    for act in refused:
        with pytest.raises(DiskNearlyFullError, match=r"4,999 bytes are free.*limit of 5,000"):
            act()
    assert targets(warehouse) == ["a"]
    free = 10_000

    assert warehouse.append("2", scrapes("b")).status == "stored"


def test_threads_share_the_file_and_store_each_batch_once(tmp_path: Path) -> None:
    """Three sensors and a model run in one process write side by side; the same batch from two threads is one."""
    warehouse = Warehouse(tmp_path, clock=lambda: NOW)
    statuses: list[str] = []

    def collect(name: str) -> None:
        for number in range(6):
            statuses.append(warehouse.append(f"{number}", scrapes(f"{number}")).status)
            statuses.append(warehouse.append(f"{name} {number}", scrapes(f"{name} {number}")).status)

    threads = [threading.Thread(target=collect, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    with warehouse.connect() as connection:
        connection.execute("create table model as select 1 as x")
    for thread in threads:
        thread.join()

    assert (statuses.count("stored"), statuses.count("duplicate")) == (24, 12)
    assert len(targets(warehouse)) == 24


def test_two_processes_take_turns(tmp_path: Path) -> None:
    """Neither loses a row; who waits too long spools."""
    warehouse = Warehouse(tmp_path, clock=lambda: NOW, lock_deadline_seconds=0.3)
    command = [sys.executable, str(WRITER), "append", str(tmp_path), "other", "6"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "stored other-0\n"
        for number in range(6):
            warehouse.append(f"own-{number}", scrapes(f"own-{number}"))
        told = other.stdout.read().splitlines()
        assert [line for line in told if line.startswith("stored ")] == [f"stored other-{n}" for n in range(1, 6)]

    assert targets(warehouse) == sorted(f"{name}-{number}" for name in ("other", "own") for number in range(6))


def test_a_file_of_an_older_version_gets_the_missing_tables_and_columns(warehouse: Warehouse) -> None:
    """Its rows stay, with NULL where they knew nothing, and a column that sources.yml dropped is kept."""
    warehouse.append("0", bounds(1))
    with duckdb.connect(warehouse.live_path) as connection:
        connection.execute("drop view raw_scrapes; drop table hot.raw_gpu_samples; drop table hot.raw_scrapes")
        connection.execute("create table hot.raw_scrapes (scraped_at timestamptz, target varchar, old integer)")
        connection.execute("alter table hot.raw_host_samples alter column cpu_count type smallint")
        connection.execute("insert into hot.raw_scrapes values (?, 'a', 1)", [NOW])
        connection.execute("delete from store.state where key = 'layout'")
    moved = warehouse.root.rename(warehouse.root.with_name("moved"))
    later = Warehouse(moved, clock=lambda: NOW)
    later.append("1", scrapes("b"))

    assert later.read("select target, is_up, old from raw_scrapes order by 1").rows() == [
        ("a", None, 1),
        ("b", True, None),
    ]
    assert later.read("select count(*) from raw_gpu_samples").item() == 0
    assert later.read("select typeof(any_value(cpu_count)) from raw_host_samples").item() == "INTEGER"


def _newer(path: Path) -> None:
    with duckdb.connect(path) as connection:
        connection.execute("create table t as select 1")
    content = bytearray(path.read_bytes())
    content[4096 * 2 - 1] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda path: path.write_text("hello, this is a letter " * 999), "is not a DuckDB file: move it away"),
        (lambda path: path.write_bytes(b""), "is not a DuckDB file: move it away"),
        (_newer, "is damaged: move it and its .wal away"),
        (lambda path: path.mkdir(), "cannot be opened"),
        (lambda path: path.with_name("warehouse.duckdb.wal").write_bytes(b"x"), "is there without warehouse.duckdb"),
    ],
)
def test_an_unusable_file_is_named_with_its_remedy_and_left_alone(
    tmp_path: Path, spoil: Callable[[Path], object], cause: str
) -> None:
    """Neither is it overwritten, nor are rows acknowledged that could not be stored."""
    live = tmp_path / "warehouse.duckdb"
    spoil(live)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    warehouse = Warehouse(tmp_path, clock=lambda: NOW)

    with pytest.raises(WarehouseFileError, match=cause) as caught:
        warehouse.append("1", scrapes("a"))
    assert str(tmp_path / "warehouse.duckdb") in str(caught.value)
    assert {path: path.read_bytes() for path in before} == before


def test_a_state_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    """The remedy is in the message."""
    (tmp_path / "state").write_text("")

    with pytest.raises(WarehouseFileError, match=r"state is a file.*move it away"):
        Warehouse(tmp_path / "state", clock=lambda: NOW).append("1", scrapes("a"))


@pytest.mark.parametrize("name", ["what?", "back\\slash"])
def test_a_path_that_duckdb_misreads_is_named_before_anything_is_made(tmp_path: Path, name: str) -> None:
    """DuckDB takes `?` for the start of options and a backslash for a separator; it fails at the first commit."""
    with pytest.raises(WarehouseFileError, match="name another directory"):
        Warehouse(tmp_path / name, clock=lambda: NOW).append("1", scrapes("a"))
    assert not (tmp_path / name).exists()


def test_the_file_is_written_in_the_format_of_the_oldest_supported_duckdb(warehouse: Warehouse) -> None:
    """DuckDB 2's own format, marker 999, cannot be opened by 1.5.5; number 68 can, by both."""
    warehouse.append("1", scrapes("a"))
    published = warehouse.publish().path

    assert int.from_bytes(published.read_bytes()[12:20], "little") in range(64, 69)


def test_reading_cannot_write(warehouse: Warehouse) -> None:
    """A question asked in SQL changes nothing."""
    with pytest.raises(duckdb.Error, match="read-only"):
        warehouse.read("delete from hot.raw_scrapes")
