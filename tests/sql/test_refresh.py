"""Refreshing: what is new is added, what is late is caught up, what cannot be made again is kept."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import duckdb
import pytest

from optiinfra_pipelines.sql import refresh as refreshing
from optiinfra_pipelines.sql.data_tests import run_tests
from optiinfra_pipelines.sql.models import DataTest, ModelColumn, ModelError, Models, Window
from optiinfra_pipelines.sql.refresh import next_window, refresh, refresh_all, rewind
from optiinfra_pipelines.sql.sources import raw_tables
from tests.sql.harness import insert

START = datetime(2026, 11, 20, 10, 0, tzinfo=UTC)
STARTED = START - timedelta(days=1)


def scrape(con: duckdb.DuckDBPyConnection, since: datetime, until: datetime, every_seconds: int = 10) -> None:
    """A replica that makes one token a second and one request every ten."""
    at = since
    while at < until:
        counted = (at - STARTED).total_seconds()
        insert(con, "raw_scrapes", [{"scraped_at": at, "target": "a", "is_up": True, "process_started_at": STARTED}])
        insert(
            con,
            "raw_engine_samples",
            [{"scraped_at": at, "target": "a", "engine_rank": "0", "generation_tokens_total": counted}],
        )
        insert(
            con,
            "raw_engine_histograms",
            [{"scraped_at": at, "target": "a", "engine_rank": "0", "metric": "queue_seconds", "bounds_id": 1,
              "bucket_counts": [counted // 10, counted // 5], "sum_value": counted, "count_value": counted // 5}],
        )  # fmt: skip
        at += timedelta(seconds=every_seconds)


def everything(con: duckdb.DuckDBPyConnection, models: Models) -> dict[str, list[tuple[object, ...]]]:
    """All rows of all stored models, in a fixed order."""
    return {
        name: con.execute(f'select * from "{name}" order by all').fetchall()
        for name, model in models.items()
        if model.is_stored
    }


def test_refreshing_bit_by_bit_gives_what_one_refresh_gives(con: duckdb.DuckDBPyConnection, models: Models) -> None:
    """Refreshes at odd moments during collection and one at its end leave the same rows in every model."""
    moments = [START + timedelta(seconds=seconds) for seconds in (0, 77, 95, 310, 624)]
    with duckdb.connect() as other:
        for since, until in pairwise(moments):
            scrape(con, since, until)
            refresh_all(con, models, until)
        refresh_all(con, models, moments[-1] + timedelta(minutes=1))
        _copy_raw(con, other)
        refresh_all(other, models, moments[-1] + timedelta(minutes=1))

        assert everything(con, models) == everything(other, models)


def test_a_second_refresh_changes_nothing(con: duckdb.DuckDBPyConnection, models: Models) -> None:
    """Replacing a window is idempotent."""
    scrape(con, START, START + timedelta(minutes=3))
    refresh_all(con, models, START + timedelta(minutes=3))
    before = everything(con, models)
    refresh_all(con, models, START + timedelta(minutes=3))

    assert everything(con, models) == before


def test_a_refresh_costs_what_is_new(con: duckdb.DuckDBPyConnection, models: Models) -> None:
    """After the back-fill, a refresh a minute later writes minutes of the overlap, not of the past."""
    scrape(con, START, START + timedelta(minutes=30))
    first = {r.model: r.rows for r in refresh_all(con, models, START + timedelta(minutes=30))}
    scrape(con, START + timedelta(minutes=30), START + timedelta(minutes=31))
    second = {r.model: r.rows for r in refresh_all(con, models, START + timedelta(minutes=31))}

    assert first["int_engine_minutes"] == 30
    assert second["int_engine_minutes"] == 3
    assert con.execute("select sum(generation_tokens) from int_engine_minutes").fetchone() == (31 * 60 - 10,)


def test_late_rows_are_caught_up_after_a_rewind(con: duckdb.DuckDBPyConnection, models: Models) -> None:
    """A spooled batch from half an hour ago is counted once it is announced, and the sum is exact."""
    scrape(con, START, START + timedelta(minutes=5))
    scrape(con, START + timedelta(minutes=15), START + timedelta(minutes=40))
    refresh_all(con, models, START + timedelta(minutes=40))
    scrape(con, START + timedelta(minutes=5), START + timedelta(minutes=15))
    rewind(con, START + timedelta(minutes=5))
    refresh_all(con, models, START + timedelta(minutes=40))

    minutes = con.execute(
        "select count(*), sum(generation_tokens), max(gap_seconds) from int_engine_minutes"
    ).fetchone()
    assert minutes == (40, 40 * 60 - 10, 10)
    assert con.execute("select sum(generation_tokens) from fct_replica_load_1h").fetchone() == (40 * 60 - 10,)


def test_rows_inside_the_overlap_reach_hours_that_had_just_ended(
    con: duckdb.DuckDBPyConnection, models: Models
) -> None:
    """Nearly two minutes late is not late: a refresh just after the hour leaves the hour open for the next one."""
    hour = START + timedelta(hours=1)
    scrape(con, hour - timedelta(minutes=10), hour - timedelta(seconds=110))
    refresh_all(con, models, hour + timedelta(seconds=1))
    scrape(con, hour - timedelta(seconds=110), hour + timedelta(minutes=3))
    refresh_all(con, models, hour + timedelta(minutes=3))

    with duckdb.connect() as other:
        _copy_raw(con, other)
        refresh_all(other, models, hour + timedelta(minutes=3))
        assert everything(con, models) == everything(other, models)


def test_a_clock_set_back_leaves_no_gap(con: duckdb.DuckDBPyConnection, models: Models) -> None:
    """After an hour ahead by mistake, refreshes go on from the corrected time and miss no minute."""
    scrape(con, START, START + timedelta(minutes=5))
    refresh_all(con, models, START + timedelta(minutes=65))
    for minutes in (10, 20):
        scrape(con, START + timedelta(minutes=minutes - 5), START + timedelta(minutes=minutes + 5))
        refresh_all(con, models, START + timedelta(minutes=minutes + 5))

    with duckdb.connect() as other:
        _copy_raw(con, other)
        refresh_all(other, models, START + timedelta(minutes=25))
        assert everything(con, models) == everything(other, models)


def test_rows_of_a_clock_that_began_in_1970_do_not_hold_up_today(
    con: duckdb.DuckDBPyConnection, models: Models
) -> None:
    """The 57 empty years between two stretches of rows cost nothing, and both stretches are made."""
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    insert(con, "raw_scrapes", [{"scraped_at": epoch, "target": "a", "is_up": True}])
    scrape(con, START, START + timedelta(minutes=5))
    began = time.monotonic()
    refresh_all(con, models, START + timedelta(minutes=5))

    assert time.monotonic() - began < 30
    minutes = con.execute("select min(minute_at), count(*), sum(scrape_count) from int_scrape_minutes").fetchall()
    assert minutes == [(epoch, 6, 31)]


def test_yesterday_can_be_rebuilt(con: duckdb.DuckDBPyConnection, models: Models) -> None:
    """A past window is made again from what is stored, and the mark of how far we are does not move."""
    scrape(con, START, START + timedelta(hours=3), every_seconds=60)
    now = START + timedelta(hours=3)
    refresh_all(con, models, now)
    truth = everything(con, models)
    window = Window(start=START + timedelta(minutes=30), end=START + timedelta(minutes=60))
    con.execute("delete from int_engine_minutes where minute_at >= ? and minute_at < ?", [window.start, window.end])
    for model in models.values():
        refresh(con, model, window)

    assert everything(con, models) == truth
    assert next_window(con, models["int_engine_minutes"], now) == Window(start=now - refreshing.OVERLAP, end=now)


def test_a_window_whose_raw_rows_are_gone_is_kept(con: duckdb.DuckDBPyConnection, models: Models) -> None:
    """Rebuilding past the retention of raw rows must not delete minutes that cannot be made again."""
    scrape(con, START, START + timedelta(hours=3), every_seconds=60)
    refresh_all(con, models, START + timedelta(hours=3))
    truth = everything(con, models)
    for table in ("raw_scrapes", "raw_engine_samples", "raw_engine_histograms"):
        con.execute(f"delete from {table} where scraped_at < ?", [START + timedelta(hours=2, seconds=30)])
    results = {
        model.name: refresh(con, model, Window(start=START, end=START + timedelta(minutes=150)))
        for model in models.values()
    }

    assert everything(con, models)["int_engine_minutes"][:-60] == truth["int_engine_minutes"][:-60]
    assert results["int_engine_minutes"].window == Window(
        start=START + timedelta(hours=2, minutes=1), end=START + timedelta(minutes=150)
    )
    gone = refresh(con, models["int_engine_minutes"], Window(start=START, end=START + timedelta(minutes=60)))
    assert gone.window is None


def test_a_failed_refresh_leaves_the_rows_of_before(con: duckdb.DuckDBPyConnection, models: Models) -> None:
    """Delete and insert are one transaction: when the insert fails, nothing was deleted."""
    scrape(con, START, START + timedelta(minutes=3))
    refresh_all(con, models, START + timedelta(minutes=3))
    before = everything(con, models)
    model = models["int_engine_minutes"]
    broken = model.model_copy(update={"sql": f"select * from ({model.sql}) where error('broken') is null"})
    with pytest.raises(duckdb.Error, match="broken"):
        refresh(con, broken, Window(start=START, end=START + timedelta(minutes=3)))

    assert everything(con, models) == before
    assert con.execute("select count(*) from int_engine_minutes").fetchone() == (3,)


def test_the_session_time_zone_does_not_matter(con: duckdb.DuckDBPyConnection, models: Models) -> None:
    """Minutes, hours and days are UTC, also for a session half an hour off."""
    scrape(con, START, START + timedelta(minutes=3))
    con.execute("set timezone = 'Asia/Kolkata'")
    refresh_all(con, models, START + timedelta(minutes=3))

    assert con.execute("select min(epoch(hour_at)) from fct_replica_load_1h").fetchone() == (START.timestamp(),)


def test_a_column_added_to_a_model_is_null_in_rows_of_before(con: duckdb.DuckDBPyConnection, models: Models) -> None:
    """History survives a change of the SQL: new columns are added, lost ones dropped, other types refused."""
    scrape(con, START, START + timedelta(minutes=3))
    refresh_all(con, models, START + timedelta(minutes=3))
    model = models["int_scrape_minutes"]
    added = ModelColumn(name="novelty", sql_type="INTEGER", unit=None, description="New.")
    kept = tuple(column for column in model.columns if column.name != "breaker_state_last")
    select = model.sql.replace(
        "select * from minutes", "select * exclude (breaker_state_last), 1 as novelty from minutes"
    )
    newer = model.model_copy(update={"sql": select, "fingerprint": "newer", "columns": (*kept, added)})
    refresh(con, newer, Window(start=START + timedelta(minutes=2), end=START + timedelta(minutes=3)))

    assert con.execute("select novelty from int_scrape_minutes order by minute_at").fetchall() == [
        (None,),
        (None,),
        (1,),
    ]
    other = tuple(c.model_copy(update={"sql_type": "VARCHAR"}) if c.name == "up_count" else c for c in model.columns)
    with pytest.raises(ModelError, match="returns up_count as VARCHAR, but the stored table has BIGINT"):
        refresh(
            con,
            model.model_copy(update={"fingerprint": "other", "columns": other}),
            Window(start=START, end=START),
        )


def test_nothing_to_read_is_nothing_to_do(con: duckdb.DuckDBPyConnection, models: Models) -> None:
    """An empty warehouse refreshes to empty models, and later rows are still found from their beginning."""
    refresh_all(con, models, START)
    assert all(rows == [] for rows in everything(con, models).values())

    scrape(con, START - timedelta(minutes=30), START)
    refresh_all(con, models, START)
    assert con.execute("select count(*) from int_engine_minutes").fetchone() == (30,)


@pytest.mark.parametrize(
    ("test", "failing"),
    [
        (DataTest(kind="not_null", column="engine"), 3),
        (DataTest(kind="unique", columns=("target",)), 1),
        (DataTest(kind="unique", columns=("target", "minute_at")), 0),
        (DataTest(kind="accepted_values", column="target", values=("b", "it's")), 3),
        (DataTest(kind="accepted_values", column="target", values=("a",)), 0),
        (DataTest(kind="accepted_range", column="up_count", max=5), 3),
        (DataTest(kind="accepted_range", column="up_count", min=6, max=6), 0),
        (DataTest(kind="relationships", column="target", to="stg_fleet_targets", field="target"), 3),
        (DataTest(kind="relationships", column="target", to="stg_scrapes", field="target"), 0),
        (DataTest(kind="expression_is_true", expression="up_count > scrape_count"), 3),
        (DataTest(kind="expression_is_true", expression="engine = 'vllm'"), 0),
        (DataTest(kind="freshness", column="minute_at", within_minutes=1), 0),
        (DataTest(kind="freshness", column="minute_at", within_minutes=0.5), 1),
        (DataTest(kind="freshness", column="minute_at", within_minutes=0.5, to="stg_scrapes", field="target"), 1),
        (DataTest(kind="freshness", column="minute_at", within_minutes=0.5, to="stg_fleet_targets", field="target"), 0),
    ],
    ids=lambda value: f"{value.kind} {value.column or ''}" if isinstance(value, DataTest) else "",
)
def test_a_data_test_returns_the_rows_that_fail(
    con: duckdb.DuckDBPyConnection, models: Models, test: DataTest, failing: int
) -> None:
    """Each kind on three minutes of six good scrapes; the query it reports returns the same rows."""
    scrape(con, START, START + timedelta(minutes=3))
    refresh_all(con, models, START + timedelta(minutes=3))
    model = models["int_scrape_minutes"].model_copy(update={"tests": (test,)})
    (result,) = run_tests(con, model, Window(start=START, end=START + timedelta(minutes=3)))

    assert (result.passed, result.failing_rows) == (failing == 0, failing)
    assert len(con.execute(result.sql).fetchall()) == failing
    assert len(result.sample) == min(failing, 5)


def test_data_tests_look_at_their_window_only(con: duckdb.DuckDBPyConnection, models: Models) -> None:
    """A fault of an hour ago does not fail the window of now, and does fail its own."""
    scrape(con, START, START + timedelta(minutes=3))
    refresh_all(con, models, START + timedelta(minutes=3))
    con.execute("insert into int_scrape_minutes by name select * from int_scrape_minutes where minute_at = ?", [START])
    model = models["int_scrape_minutes"]

    def failed(start: datetime, end: datetime) -> set[str]:
        return {r.name for r in run_tests(con, model, Window(start=start, end=end)) if not r.passed}

    assert failed(START, START + timedelta(minutes=1)) == {"unique_target_minute_at"}
    assert failed(START + timedelta(minutes=1), START + timedelta(minutes=3)) == set()


def test_a_window_needs_a_time_zone_and_an_order() -> None:
    """A naive time or an end before its start is refused."""
    with pytest.raises(ValueError, match="has no time zone"):
        Window(start=datetime(2026, 11, 20), end=START)  # noqa: DTZ001
    with pytest.raises(ValueError, match="before its start"):
        Window(start=START, end=START - timedelta(seconds=1))


def _copy_raw(source: duckdb.DuckDBPyConnection, target: duckdb.DuckDBPyConnection) -> None:
    for table in raw_tables().values():
        target.execute(table.create_sql())
        frame = source.sql(f'select * from "{table.name}"').pl()
        if not frame.is_empty():
            target.register("frame", frame)
            target.execute(f'insert into "{table.name}" by name select * from frame')
            target.unregister("frame")
