"""Refreshing the models over a real warehouse: rows that come late, and clocks that go wrong."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from optiinfra_pipelines.sql.loader import load_models
from optiinfra_pipelines.sql.models import Models
from optiinfra_pipelines.sql.sources import raw_tables
from resources.model_runner import ModelRunner
from resources.warehouse import Warehouse

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture(scope="module")
def models() -> Models:
    return load_models()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def runner(tmp_path: Path, clock: Clock, models: Models) -> tuple[ModelRunner, Warehouse]:
    warehouse = Warehouse(tmp_path, clock=clock, min_free_bytes=0)
    return ModelRunner(models, warehouse, clock), warehouse


def scrapes(*times: datetime) -> dict[str, pl.DataFrame]:
    """A scrape of one target at each time."""
    rows = [{"scraped_at": at, "target": "a", "source": "live", "is_up": True} for at in times]
    return {"raw_scrapes": raw_tables()["raw_scrapes"].frame(rows)}


def test_a_late_batch_is_announced_once(runner: tuple[ModelRunner, Warehouse], clock: Clock) -> None:
    """Rows that waited for an hour are named at the first look after they landed, and not again."""
    models, warehouse = runner
    warehouse.append("in time", scrapes(NOW - timedelta(seconds=3)))
    assert models.redo_late_rows() is None

    clock.now = NOW + timedelta(minutes=1)
    warehouse.append("late", scrapes(NOW - timedelta(hours=1)))
    assert models.redo_late_rows() == NOW - timedelta(hours=1)
    assert models.redo_late_rows() is None


def test_late_rows_are_found_after_a_clock_was_set_back(runner: tuple[ModelRunner, Warehouse], clock: Clock) -> None:
    """A look that was made an hour ahead of time does not hide what lands before that hour has passed."""
    models, warehouse = runner
    clock.now = NOW + timedelta(hours=1)
    warehouse.append("ahead", scrapes(clock.now))
    assert models.redo_late_rows() is None

    clock.now = NOW
    warehouse.append("late", scrapes(NOW - timedelta(minutes=30)))
    assert models.redo_late_rows() == NOW - timedelta(minutes=30)


def minutes(warehouse: Warehouse) -> list[tuple[datetime, int]]:
    return warehouse.read("select minute_at, up_count from int_scrape_minutes order by minute_at").rows()


def test_closed_days_of_minutes_move_to_parquet_and_late_rows_bring_them_back(
    runner: tuple[ModelRunner, Warehouse], clock: Clock
) -> None:
    """Readers see every minute once, before the move, after it, and after a minute of the moved day was redone."""
    models, warehouse = runner
    model = models.models["int_scrape_minutes"]
    yesterday, midnight = datetime(2026, 11, 20, 23, 50, tzinfo=UTC), datetime(2026, 11, 21, tzinfo=UTC)
    clock.now = midnight + timedelta(minutes=8)
    warehouse.append("both days", scrapes(*(yesterday + timedelta(minutes=n) for n in range(18))))
    models.redo_late_rows()
    models.refresh(models.models["stg_scrapes"])
    models.refresh(model)
    models.refresh(model)  # the second knows the table and puts it under retention
    before = minutes(warehouse)

    moved = [one for one in warehouse.move_closed_hours(clock.now) if one.table == "int_scrape_minutes"]
    assert [one.rows for one in moved] == [10]
    assert minutes(warehouse) == before
    assert warehouse.read("select count(*) from hot.int_scrape_minutes").item() == 8

    clock.now += timedelta(minutes=1)
    models.refresh(model)  # a routine one brings nothing back
    assert warehouse.read("select count(*) from hot.int_scrape_minutes").item() == 8

    clock.now += timedelta(minutes=1)
    warehouse.append("late", scrapes(yesterday + timedelta(minutes=3, seconds=20)))
    assert models.redo_late_rows() == yesterday + timedelta(minutes=3, seconds=20)
    models.refresh(model)
    after = minutes(warehouse)
    assert [at for at, _ in after] == [at for at, _ in before]
    assert [up for _, up in after] == [2 if n == 3 else 1 for n in range(18)]


def test_a_file_of_before_keeps_its_minutes_where_they_were_until_they_move(
    runner: tuple[ModelRunner, Warehouse], clock: Clock
) -> None:
    """A table that an earlier version registered to stay is taken under the move with all its rows."""
    models, warehouse = runner
    model = models.models["int_scrape_minutes"]
    warehouse.append("now", scrapes(NOW - timedelta(minutes=1)))
    models.refresh(models.models["stg_scrapes"])
    models.refresh(model)
    warehouse.register(model.name, time_column="minute_at", layer="minute", grain=model.grain, cold=None)

    models.refresh(model)
    assert warehouse.storage_name(model.name) == 'hot."int_scrape_minutes"'
    assert len(minutes(warehouse)) == 1
