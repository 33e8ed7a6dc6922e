"""Run the SQL models over the warehouse: one short connection per model, late rows redone.

Here: windows, late rows, the figures of a refresh. Not here: what a model is and how one window is replaced
(`optiinfra_pipelines.sql`), or when it happens (`optiinfra_pipelines.defs`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import duckdb
import polars as pl

from optiinfra_pipelines.sql.data_tests import run_tests
from optiinfra_pipelines.sql.models import Materialization, Model, Models, TestResult, Window
from optiinfra_pipelines.sql.refresh import OVERLAP, next_window, refresh, rewind
from resources.warehouse import Warehouse

NEWEST_ROWS = 3


@dataclass(frozen=True)
class Refreshed:
    """What a refresh of one model did. `newest`: a few of its newest rows, where asked for."""

    rows_written: int
    row_count: int | None
    seconds: float
    newest: pl.DataFrame | None


class ModelRunner:
    """Refresh, rebuild and test models against one warehouse."""

    def __init__(self, models: Models, warehouse: Warehouse, clock: Callable[[], datetime]) -> None:
        self.models = models
        self._warehouse = warehouse
        self._clock = clock
        self._under_retention: set[str] = set()

    def redo_late_rows(self) -> datetime | None:
        """Batches that had to wait may land after their minutes were made: have those minutes redone.

        Returns the earliest late row, None when there was none. To be called before a refresh.
        """
        with self._warehouse.connect() as connection:
            earliest = _earliest_late(connection, self._clock())
            if earliest is not None:
                rewind(connection, earliest)
        return earliest

    def refresh(self, model: Model, *, with_newest: bool = False) -> Refreshed:
        """Bring one model up to now, and read back a few of its newest rows. Collection gets its turn in between."""
        now = self._clock()
        self._put_under_retention(model)
        with self._warehouse.connect() as connection:
            window = next_window(connection, model, now) or Window(start=now, end=now)
            result = refresh(connection, model, window)
            return Refreshed(
                result.rows,
                _row_count(connection, model) if model.is_stored else None,
                result.seconds,
                _newest(connection, model) if with_newest else None,
            )

    def _put_under_retention(self, model: Model) -> None:
        """Tell the warehouse how long a stored model's rows live, once per process, when its table is there."""
        if model.time is None or model.retention is None or model.name in self._under_retention:
            return
        with self._warehouse.connect() as connection:
            is_built = bool(
                connection.execute("select 1 from duckdb_tables() where table_name = ?", [model.name]).fetchall()
            )
        if is_built:
            self._warehouse.register(
                model.name, time_column=model.time, layer=model.retention, grain=model.grain, cold=None
            )
            self._under_retention.add(model.name)

    def rebuild(self, model: Model, window: Window) -> int:
        """Make a past window of an incremental model anew; returns the rows written."""
        with self._warehouse.connect() as connection:
            return refresh(connection, model, window).rows

    def test(self, model: Model) -> list[TestResult]:
        """Every data test of a model on the rows of now."""
        now = self._clock()
        with self._warehouse.connect() as connection:
            return run_tests(connection, model, Window(start=now, end=now))

    @property
    def incremental(self) -> tuple[Model, ...]:
        return tuple(m for m in self.models.values() if m.materialization is Materialization.INCREMENTAL)


def count_marts(read_copy: Path) -> int:
    """Tables of the marts layer that a reader of the copy finds; 0 when it cannot be opened."""
    try:
        with duckdb.connect(str(read_copy), read_only=True) as connection:
            [(count,)] = connection.execute(
                "select count(*) from duckdb_tables() where table_name like 'fct_%' or table_name like 'dim_%'"
            ).fetchall()
    except duckdb.Error:
        return 0
    return int(count)


def _earliest_late(connection: duckdb.DuckDBPyConnection, now: datetime) -> datetime | None:
    """The oldest row of the batches stored since the last look that came later than a refresh allows for.

    A look in the future is one before the clock was set back, and counts for nothing.
    """
    connection.execute("create table if not exists late_rows_seen (until_at TIMESTAMPTZ)")
    row = connection.execute(
        """
        select min(earliest_at) filter (where earliest_at < stored_at - cast(? as interval)), max(stored_at)
        from store.batches
        where stored_at > coalesce(
            (select max(until_at) from late_rows_seen where until_at <= ?), timestamptz '1970-01-01 00:00:00+00'
        )
        """,
        [OVERLAP, now],
    ).fetchone()
    earliest, seen_until = row if row else (None, None)
    if seen_until is not None:
        connection.execute("delete from late_rows_seen")
        connection.execute("insert into late_rows_seen values (?)", [min(seen_until, now)])
    late: datetime | None = earliest
    return late


def _row_count(connection: duckdb.DuckDBPyConnection, model: Model) -> int:
    # fetchall, not fetchone: a result that is not read to its end keeps the connection busy.
    [(count,)] = connection.execute(f'select count(*) from "{model.name}"').fetchall()
    return int(count)


def _newest(connection: duckdb.DuckDBPyConnection, model: Model) -> pl.DataFrame:
    newest = f'order by "{model.time}" desc' if model.time else ""
    frame: pl.DataFrame = connection.sql(f'select * from "{model.name}" {newest} limit {NEWEST_ROWS}').pl()
    return frame
