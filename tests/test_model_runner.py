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
