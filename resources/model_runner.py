"""Run the SQL models over the warehouse: one short connection per model, late rows redone.

Here: windows, late rows, the figures of a refresh. Not here: what a model is and how one window is replaced
(`optiinfra_pipelines.sql`), or when it happens (`optiinfra_pipelines.defs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import duckdb
import polars as pl

from optiinfra_pipelines.sql.data_tests import run_tests
from optiinfra_pipelines.sql.models import Materialization, Model, Models, TestResult, Window
from optiinfra_pipelines.sql.refresh import OVERLAP, Storage, next_window, own_table, refresh, rewind
from resources.warehouse import Warehouse
from resources.warehouse.catalog import Layer, TimedTable, Unit, has_moved, refresh_view, register

NEWEST_ROWS = 3
# Closed days of these layers go to Parquet, as raw hours do: a fleet of hundreds of replicas makes a gigabyte of
# minutes a day, and the read copy is the live file. Hours are few.
_MOVES: Mapping[Layer, Unit | None] = {"minute": "day", "five_minute": "day", "hour": None}


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
        # Models under retention, and whether their closed days move to Parquet.
        self._moves: dict[str, bool] = {}

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
        with self._warehouse.connect() as connection:
            self._put_under_retention(connection, model)
            window = next_window(connection, model, now) or Window(start=now, end=now)
            if not self._has_moved(connection, model, window):
                return self._refreshed(connection, model, window, with_newest=with_newest)
        self._bring_back(model, window)
        with self._warehouse.connect() as connection:
            return self._refreshed(connection, model, window, with_newest=with_newest)

    def rebuild(self, model: Model, window: Window) -> int:
        """Make a past window of an incremental model anew; returns the rows written."""
        with self._warehouse.connect() as connection:
            self._put_under_retention(connection, model)
        self._bring_back(model, window)
        with self._warehouse.connect() as connection:
            return refresh(connection, model, window, self._storage(connection, model)).rows

    def _refreshed(
        self, connection: duckdb.DuckDBPyConnection, model: Model, window: Window, *, with_newest: bool
    ) -> Refreshed:
        result = refresh(connection, model, window, self._storage(connection, model))
        return Refreshed(
            result.rows,
            _row_count(connection, model) if model.is_stored else None,
            result.seconds,
            _newest(connection, model) if with_newest else None,
        )

    def _put_under_retention(self, connection: duckdb.DuckDBPyConnection, model: Model) -> None:
        """Tell the warehouse how long a stored model's rows live, once per process, when its table is there."""
        if model.time is None or model.retention is None or model.name in self._moves:
            return
        is_built = connection.execute("select 1 from duckdb_tables() where table_name = ?", [model.name]).fetchall()
        if is_built:
            unit = _MOVES[model.retention]
            register(
                connection, self._warehouse.root, TimedTable(model.name, model.time, model.grain, model.retention, unit)
            )
            self._moves[model.name] = unit is not None

    def _storage(self, connection: duckdb.DuckDBPyConnection, model: Model) -> Storage:
        if not self._moves.get(model.name, False):
            return own_table(model)
        return Storage(f'hot."{model.name}"', lambda: refresh_view(connection, self._warehouse.root, model.name))

    def _has_moved(self, connection: duckdb.DuckDBPyConnection, model: Model, window: Window) -> bool:
        whole = window.rounded_out(model.step_seconds)
        return self._moves.get(model.name, False) and has_moved(connection, model.name, whole.start, whole.end)

    def _bring_back(self, model: Model, window: Window) -> None:
        """Rows that lie in Parquet cannot be rewritten there. A routine refresh finds none of its window moved."""
        whole = window.rounded_out(model.step_seconds)
        self._warehouse.recall(model.name, whole.start, whole.end)

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
