"""Closed hours and days: out of the DuckDB file into sorted Parquet, and back when a window must be rebuilt.

Here: which slices are closed, the export, the transaction in which readers switch, the way back.
Not here: deleting what is too old (`retention`), leftovers of a kill (`sweep`).

A slice moves in three steps: its rows are read (a short session), sorted and written to a file (no session: others
write meanwhile), and then, in one transaction, the file is listed, the view made anew and the rows deleted, provided
they are still exactly those that were read. A kill before the last step leaves an unlisted file, after it nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import duckdb
import polars as pl
import structlog

from resources.warehouse.catalog import (
    TimedTable,
    column_types,
    database_id,
    refresh_view,
    timed_tables,
    transaction,
)
from resources.warehouse.database import Database, identifier, quoted
from resources.warehouse.files import Layout, commit_file, temporary_beside

_log = structlog.get_logger(__name__)
_UNITS = {"hour": timedelta(hours=1), "day": timedelta(days=1)}
# Rows in one file: a slice is held in memory while it is sorted, and 400,000 histogram rows of 25 buckets are 130 MB.
_SLICE_ROWS = 400_000
# A slice that changes while it is written is tried again; after these it waits for the next move.
_ATTEMPTS = 3


@dataclass(frozen=True)
class Moved:
    """One slice that now lies in Parquet. Times are UTC, end exclusive."""

    table: str
    path: Path
    start_at: datetime
    end_at: datetime
    rows: int
    size_bytes: int


@dataclass(frozen=True)
class _Slice:
    table: TimedTable
    start_at: datetime
    end_at: datetime
    expected_rows: int


@dataclass(frozen=True)
class _Snapshot:
    """The rows of a slice and what tells them from any other rows."""

    rows: pl.DataFrame
    fingerprint: tuple[object, ...]
    columns: str


@dataclass(frozen=True)
class Cold:
    """The Parquet side of one warehouse. Callers hold `Layout.maintenance`."""

    layout: Layout
    database: Database
    rng: random.Random
    deadline_seconds: float

    def move_closed(self, now: datetime, settle: timedelta) -> list[Moved]:
        """Move every hour (day) that ended at least `settle` ago; see the module's text for how."""
        with self.database.session(self.deadline_seconds) as connection:
            owner = database_id(connection)
            slices = [
                piece
                for table in timed_tables(connection)
                if table.unit is not None
                for piece in _closed_slices(connection, table, now - settle)
            ]
        return [one for group in _groups(slices) for one in self._move(owner, group, now)]

    def recall(self, table: str, start_at: datetime, end_at: datetime, now: datetime) -> int:
        """Take the files that overlap [start_at, end_at) back into `hot`, so that their rows can be rewritten."""
        with self.database.session(self.deadline_seconds) as connection, transaction(connection):
            files = connection.execute(
                "select path, row_count from store.cold_files where table_name = ? and retired_at is null "
                "and missing_at is null and start_at < ? and end_at > ?",
                [table, end_at, start_at],
            ).fetchall()
            # A column that the table has lost since stays in the file.
            columns = list(column_types(connection, "hot", table))
            for path, _ in files:
                source = quoted(str(self.layout.root / path))
                connection.execute(
                    f"insert into hot.{identifier(table)} by name "
                    f"select columns(lambda name: name in {columns}) "
                    f"from read_parquet({source}, hive_partitioning = false)"
                )
                connection.execute("update store.cold_files set retired_at = ? where path = ?", [now, path])
            if files:
                refresh_view(connection, self.layout.root, table)
        return sum(rows for _, rows in files)

    def _move(self, owner: str, group: list[_Slice], now: datetime) -> list[Moved]:
        """Read, write and switch a group of slices; those that changed meanwhile are tried again."""
        moved: list[Moved] = []
        left = group
        for _ in range(_ATTEMPTS):
            with self.database.session(self.deadline_seconds) as connection:
                snapshots = [(piece, _read(connection, piece)) for piece in left]
            # Compressed rows are never larger than they are in memory.
            size = sum(snapshot.rows.estimated_size() for _, snapshot in snapshots)
            self.layout.require_space(int(size), "moving closed hours")
            with duckdb.connect(":memory:", config={"threads": 1}) as writer:
                writer.execute("SET TimeZone = 'UTC'")
                written = [
                    (piece, snapshot, self._write(writer, owner, piece, snapshot.rows))
                    for piece, snapshot in snapshots
                    if snapshot.rows.height
                ]
            left = []
            with self.database.session(self.deadline_seconds) as connection:
                for piece, snapshot, path in written:
                    if self._switch(connection, piece, snapshot, path, now):
                        rows, size_bytes = snapshot.rows.height, path.stat().st_size
                        moved.append(Moved(piece.table.name, path, piece.start_at, piece.end_at, rows, size_bytes))
                    else:
                        path.unlink(missing_ok=True)
                        left.append(piece)
            if not left:
                return moved
        for piece in left:
            _log.warning("slice_kept_changing", table=piece.table.name, start_at=piece.start_at.isoformat())
        return moved

    def _write(self, writer: duckdb.DuckDBPyConnection, owner: str, piece: _Slice, rows: pl.DataFrame) -> Path:
        """Sort by grain and write: the rows of one series lie together, which halves the file and prunes by target."""
        parts = [f"date={piece.start_at:%Y-%m-%d}"]
        if piece.table.unit == "hour":
            parts.append(f"hour={piece.start_at:%H}")
        folder = self.layout.cold.joinpath(piece.table.name, *parts)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{owner}-{self.rng.getrandbits(64):016x}.parquet"
        temporary = temporary_beside(path, self.rng)
        order = ", ".join(identifier(name) for name in dict.fromkeys((*piece.table.grain, piece.table.time_column)))
        writer.register("slice", rows)
        try:
            writer.execute(
                f"COPY (select * from slice order by {order}) TO {quoted(str(temporary))} "
                "(FORMAT parquet, COMPRESSION zstd)"
            )
            commit_file(temporary, path)
        finally:
            writer.unregister("slice")
            temporary.unlink(missing_ok=True)
        return path

    def _switch(
        self, connection: duckdb.DuckDBPyConnection, piece: _Slice, snapshot: _Snapshot, path: Path, now: datetime
    ) -> bool:
        """List the file and delete its rows in one transaction; False when the rows are no longer those read."""
        with transaction(connection):
            if _fingerprint(connection, piece) != snapshot.fingerprint:
                return False
            rows, _, earliest_at, latest_at = snapshot.fingerprint
            connection.execute(
                "insert into store.cold_files values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, null, null)",
                [
                    piece.table.name,
                    str(path.relative_to(self.layout.root)),
                    piece.start_at,
                    piece.end_at,
                    rows,
                    path.stat().st_size,
                    earliest_at,
                    latest_at,
                    snapshot.columns,
                    now,
                ],
            )
            refresh_view(connection, self.layout.root, piece.table.name)
            connection.execute(f"delete from {_rows(piece)}", [piece.start_at, piece.end_at])
        return True


def _closed_slices(connection: duckdb.DuckDBPyConnection, table: TimedTable, until: datetime) -> Iterator[_Slice]:
    """The hours (days) with hot rows that ended by `until`; a large one in equal stretches of time."""
    unit = _UNITS[str(table.unit)]
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    cutoff = epoch + (until - epoch) // unit * unit
    time = identifier(table.time_column)
    periods = connection.execute(
        f"select date_trunc('{table.unit}', {time}::timestamptz), count(*) from {table.storage} "
        f"where {time} < ? group by 1 order by 1",
        [cutoff],
    ).fetchall()
    for begin, rows in periods:
        start_at = begin.astimezone(UTC)
        pieces = -(-rows // _SLICE_ROWS)
        edges = [start_at + unit * number / pieces for number in range(pieces + 1)]
        for left, right in pairwise(edges):
            yield _Slice(table, left, right, rows // pieces)


def _groups(slices: list[_Slice]) -> list[list[_Slice]]:
    """Slices that together hold about as many rows as one large one: small tables share their two sessions."""
    groups: list[list[_Slice]] = [[]]
    held = 0
    for piece in slices:
        if groups[-1] and held + piece.expected_rows > _SLICE_ROWS:
            groups.append([])
            held = 0
        groups[-1].append(piece)
        held += piece.expected_rows
    return [group for group in groups if group]


def _rows(piece: _Slice) -> str:
    """FROM and WHERE of a slice; two parameters: start and end."""
    time = identifier(piece.table.time_column)
    return f"{piece.table.storage} as slice_row where {time} >= ? and {time} < ?"


def _fingerprint(connection: duckdb.DuckDBPyConnection, piece: _Slice) -> tuple[object, ...]:
    """Number of rows, sum of their hashes, earliest and latest time: equal only for the same rows."""
    time = identifier(piece.table.time_column)
    # All rows are fetched, also of one: DuckDB 2 refuses the next query over an unfinished result.
    rows: list[tuple[object, ...]] = connection.execute(
        f"select count(*), sum(hash(slice_row)), min({time})::timestamptz, max({time})::timestamptz "
        f"from {_rows(piece)}",
        [piece.start_at, piece.end_at],
    ).fetchall()
    return rows[0]


def _read(connection: duckdb.DuckDBPyConnection, piece: _Slice) -> _Snapshot:
    schema, table = ("main" if piece.table.unit is None else "hot"), piece.table.name
    with transaction(connection, "READ ONLY"):
        fingerprint = _fingerprint(connection, piece)
        rows = connection.sql(f"select * from {_rows(piece)}", params=[piece.start_at, piece.end_at]).pl()
        types = column_types(connection, schema, table)
    return _Snapshot(rows, fingerprint, ", ".join(f"{identifier(name)} {kind}" for name, kind in types.items()))
