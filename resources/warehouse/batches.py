"""A batch of rows: does it fit the raw tables, and how it gets into the hot ones once and only once.

Here: checking frames against sources.yml, the inserts, the books of batch ids. Not here: when and under which lock
(`store`), or a batch that has to wait (`spool`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache

import duckdb
import polars as pl

from optiinfra_pipelines.sql.sources import RawTable, raw_tables
from resources.warehouse.catalog import transaction
from resources.warehouse.database import identifier
from resources.warehouse.errors import BatchError


@dataclass(frozen=True)
class Batch:
    """Rows that are stored together or not at all. `frames`: by raw table, checked, none empty."""

    batch_id: str
    frames: Mapping[str, pl.DataFrame]

    @property
    def row_count(self) -> int:
        return sum(frame.height for frame in self.frames.values())

    @property
    def span(self) -> tuple[datetime | None, datetime | None]:
        """Earliest and latest time of its rows; None when no table of it has a time."""
        times = [
            frame[time]
            for name, frame in self.frames.items()
            if (time := raw_tables()[name].time) is not None
        ]  # fmt: skip
        joined = pl.concat(column.rename("at") for column in times) if times else pl.Series("at", [], pl.Datetime)
        earliest, latest = joined.min(), joined.max()
        return (
            earliest if isinstance(earliest, datetime) else None,
            latest if isinstance(latest, datetime) else None,
        )


def checked_batch(batch_id: str, tables: Mapping[str, pl.DataFrame]) -> Batch:
    """The batch, or BatchError that names table, column and what was expected.

    A column that a frame does not have becomes NULL, but for grain and time, which it must have.
    """
    if not batch_id:
        raise BatchError("a batch needs an id that a repeated delivery would have again, such as sensor and tick time")
    return Batch(batch_id, {name: _checked(name, frame) for name, frame in tables.items() if frame.height})


def _checked(name: str, frame: pl.DataFrame) -> pl.DataFrame:
    table = raw_tables().get(name)
    if table is None:
        raise BatchError(f"there is no raw table {name}; sources.yml has {', '.join(raw_tables())}")
    stray = [column for column in frame.columns if column not in table.columns]
    if stray:
        raise BatchError(f"{name} has no column {', '.join(stray)}; sources.yml lists what it has")
    required = {*table.grain, *([table.time] if table.time else [])}
    absent = [column for column in sorted(required) if column not in frame.columns]
    if absent:
        raise BatchError(f"a batch for {name} lacks {', '.join(absent)}, which tells its rows apart")
    for column, found in frame.schema.items():
        wanted = table.columns[column].polars_type
        if found not in (wanted, pl.Null):
            raise BatchError(f"{name}.{column} is {found} in the batch and {wanted} in sources.yml; cast it")
        if table.columns[column].sql_type.startswith("MAP") and found != pl.Null:
            _check_map_keys(name, frame[column])
    if table.time is not None and frame[table.time].null_count():
        raise BatchError(
            f"{name}.{table.time} is NULL in {frame[table.time].null_count()} rows; every row needs a time"
        )
    untyped = [column for column, found in frame.schema.items() if found == pl.Null]
    return frame.cast({column: table.columns[column].polars_type for column in untyped}) if untyped else frame


def _check_map_keys(table: str, entries: pl.Series) -> None:
    """DuckDB refuses a map with a NULL or repeated key; told here, before anything is written."""
    keys = entries.list.eval(pl.element().struct.field("key"))
    is_bad = keys.list.eval(pl.element().is_null() | pl.element().is_duplicated()).list.any()
    if is_bad.any():
        row = is_bad.fill_null(False).arg_true()[0]
        raise BatchError(f"{table}.{entries.name} has a missing or repeated key in row {row}: {entries[row].to_list()}")


def store(connection: duckdb.DuckDBPyConnection, batches: Sequence[Batch], now: datetime) -> set[str]:
    """Insert the batches in one transaction; ids that were stored before are skipped and returned."""
    with transaction(connection):
        marks = ", ".join("?" * len(batches))
        known = connection.execute(
            f"select batch_id from store.batches where batch_id in ({marks})", [batch.batch_id for batch in batches]
        ).fetchall()
        seen = {str(row[0]) for row in known}
        duplicates = set(seen)
        fresh: list[Batch] = []
        for batch in batches:
            if batch.batch_id not in seen:
                seen.add(batch.batch_id)
                fresh.append(batch)
        for name in raw_tables():
            frames = [batch.frames[name] for batch in fresh if name in batch.frames]
            if frames:
                _insert(connection, raw_tables()[name], _stacked(frames))
        if fresh:
            connection.execute(
                "insert into store.batches values " + ", ".join("(?, ?, ?, ?, ?)" for _ in fresh),
                [value for batch in fresh for value in (batch.batch_id, now, batch.row_count, *batch.span)],
            )
    return duplicates


def _stacked(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Frames of one table under each other; those of an older version may lack columns."""
    is_alike = all(frame.columns == frames[0].columns for frame in frames)
    return pl.concat(frames, how="vertical" if is_alike else "diagonal", rechunk=True)


def _insert(connection: duckdb.DuckDBPyConnection, table: RawTable, frame: pl.DataFrame) -> None:
    connection.register("batch", frame)
    try:
        connection.execute(_insert_sql(table.name, tuple(frame.columns)))
    finally:
        # In a failed transaction this fails too, and would hide why.
        with suppress(duckdb.TransactionException):
            connection.unregister("batch")


@cache
def _insert_sql(name: str, columns: tuple[str, ...]) -> str:
    """Tables with a time take every row; those without are dimensions and keep the first row of each grain."""
    table = raw_tables()[name]
    target = f"hot.{identifier(name)}"
    selected = ", ".join(
        f"map_from_entries({identifier(column)}) as {identifier(column)}"
        if table.columns[column].sql_type.startswith("MAP")
        else identifier(column)
        for column in columns
    )
    if table.time is not None:
        return f"insert into {target} by name select {selected} from batch"
    same = " and ".join(f"old.{identifier(key)} is not distinct from new.{identifier(key)}" for key in table.grain)
    grain = ", ".join(identifier(key) for key in table.grain)
    return (
        f"insert into {target} by name select * from (select distinct on ({grain}) {selected} from batch) as new "
        f"where not exists (select 1 from {target} as old where {same})"
    )
