"""What the live file holds: hot tables, the views over hot and cold, and the warehouse's own books.

Here: DDL, schema evolution, which tables have a time and how long they live, the list of visible cold files.
Not here: rows of batches (`batches`), Parquet (`cold`). Every function takes an open connection.

    hot.<table>          rows not yet moved; what writers write to
    main.<table>         what readers read: hot rows and the rows of every listed cold file
    store.cold_files     the list; the view is made from it in the transaction that changes it
    store.batches        batch ids already stored, with the span of their rows
    store.tables         model tables that were registered
    store.state          key and value: database_id, layout, published_at
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import duckdb

from optiinfra_pipelines.sql.sources import RawTable, raw_tables
from resources.warehouse.database import identifier, quoted
from resources.warehouse.errors import WarehouseError, WarehouseFileError

Unit = Literal["hour", "day"]
Layer = Literal["raw", "minute", "five_minute", "hour"]

_BOOKS = """
create schema if not exists hot;
create schema if not exists store;
create table if not exists store.state (key varchar, value varchar);
create table if not exists store.batches (
    batch_id varchar, stored_at timestamptz, row_count bigint, earliest_at timestamptz, latest_at timestamptz);
create table if not exists store.tables (
    table_name varchar, time_column varchar, grain varchar[], layer varchar, unit varchar);
create table if not exists store.cold_files (
    table_name varchar, path varchar, start_at timestamptz, end_at timestamptz, row_count bigint, size_bytes bigint,
    earliest_at timestamptz, latest_at timestamptz, columns varchar, moved_at timestamptz,
    retired_at timestamptz, missing_at timestamptz);
"""
# Changes when the books or the views get another shape, so that an old file is brought up to date once.
_BOOKS_VERSION = 2


@dataclass(frozen=True)
class TimedTable:
    """A table whose rows grow old. `unit`: what is moved to Parquet at once; None when it stays in the file."""

    name: str
    time_column: str
    grain: tuple[str, ...]
    layer: Layer
    unit: Unit | None

    @property
    def storage(self) -> str:
        """Where writers write, as SQL: tables that move lie in `hot`, under a view of their name."""
        return f"{'main' if self.unit is None else 'hot'}.{identifier(self.name)}"


@contextmanager
def transaction(connection: duckdb.DuckDBPyConnection, mode: str = "") -> Iterator[None]:
    connection.execute(f"BEGIN TRANSACTION {mode}")
    try:
        yield
    except BaseException:
        # A fatal error has ended the transaction already; the first error is the one to tell.
        with suppress(duckdb.Error):
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def ensure(connection: duckdb.DuckDBPyConnection, root: Path, new_id: str) -> None:
    """Bring the file to what sources.yml says: new tables, new columns, views. Cheap when nothing changed.

    new_id: the identity a new database gets; cold files carry it in their names.
    """
    wanted = _layout_fingerprint(root)
    if _state(connection, "layout") == wanted:
        return
    with transaction(connection):
        connection.execute(_BOOKS)
        stored = _hot_types(connection)
        for raw in raw_tables().values():
            if raw.name in stored:
                _evolve(connection, raw, stored[raw.name])
            else:
                connection.execute(raw.create_sql().replace("EXISTS ", "EXISTS hot.", 1))
            refresh_view(connection, root, raw.name)
        for table in registered(connection):
            if table.unit is not None:
                refresh_view(connection, root, table.name)
        if _state(connection, "database_id") is None:
            set_state(connection, "database_id", new_id)
        set_state(connection, "layout", wanted)


def _layout_fingerprint(root: Path) -> str:
    tables = "\n".join(raw.create_sql() for raw in raw_tables().values())
    return hashlib.sha256(f"{_BOOKS_VERSION}\n{root}\n{tables}".encode()).hexdigest()


def _hot_types(connection: duckdb.DuckDBPyConnection) -> dict[str, dict[str, str]]:
    """Every table in `hot` -> its columns and their types; one look at the catalog for all."""
    rows = connection.execute(
        "select table_name, column_name, data_type from duckdb_columns() "
        "where database_name = current_database() and schema_name = 'hot'"
    ).fetchall()
    found: dict[str, dict[str, str]] = {}
    for table, column, kind in rows:
        found.setdefault(table, {})[column] = kind
    return found


def _evolve(connection: duckdb.DuckDBPyConnection, raw: RawTable, stored: Mapping[str, str]) -> None:
    """Add the columns an older file lacks (NULL there) and widen changed types. Columns are never dropped."""
    for name, column in raw.columns.items():
        if name not in stored:
            connection.execute(
                f"ALTER TABLE hot.{identifier(raw.name)} ADD COLUMN {identifier(name)} {column.sql_type}"
            )
            continue
        wanted = str(duckdb.type(column.sql_type))
        if stored[name] == wanted:
            continue
        try:
            connection.execute(
                f"ALTER TABLE hot.{identifier(raw.name)} ALTER COLUMN {identifier(name)} TYPE {column.sql_type}"
            )
        except duckdb.Error as error:
            raise WarehouseFileError(
                f"{raw.name}.{name} is stored as {stored[name]}, sources.yml now says {wanted}, and its rows do not "
                f"fit that: name another state directory, or give the column a new name ({error})"
            ) from error


def column_types(connection: duckdb.DuckDBPyConnection, schema: str, table: str) -> dict[str, str]:
    """Column name -> DuckDB type, in order; empty when there is no such table (a view is none)."""
    rows = connection.execute(
        "select column_name, data_type from duckdb_columns() where database_name = current_database() "
        "and schema_name = ? and table_name = ? order by column_index",
        [schema, table],
    ).fetchall()
    return dict(rows)


def refresh_view(connection: duckdb.DuckDBPyConnection, root: Path, table: str) -> None:
    """Make main.<table> from hot and the files listed now; call it in the transaction that changed the list.

    Files are grouped by their columns: one written before a column existed gives NULL for it, and binding a query
    opens one file a group, not all.
    """
    groups = connection.execute(
        "select list(path order by start_at, path) from store.cold_files "
        "where table_name = ? and retired_at is null and missing_at is null group by columns order by columns",
        [table],
    ).fetchall()
    parts = [f"select * from hot.{identifier(table)}"]
    for (paths,) in groups:
        files = ", ".join(quoted(str(root / path)) for path in paths)
        parts.append(f"select * from read_parquet([{files}], hive_partitioning = false)")
    together = " union all by name ".join(parts)
    # A column that a model has lost since is in older files only.
    columns = ", ".join(map(identifier, column_types(connection, "hot", table)))
    connection.execute(f"create or replace view main.{identifier(table)} as select {columns} from ({together})")


def has_moved(connection: duckdb.DuckDBPyConnection, table: str, start_at: datetime, end_at: datetime) -> bool:
    """Do rows of a window of this table lie in listed files?"""
    rows = connection.execute(
        "select 1 from store.cold_files where table_name = ? and retired_at is null and missing_at is null "
        "and start_at < ? and end_at > ? limit 1",
        [table, end_at, start_at],
    ).fetchall()
    return bool(rows)


def timed_tables(connection: duckdb.DuckDBPyConnection) -> list[TimedTable]:
    """Raw tables with a time, then registered model tables."""
    raw = [
        TimedTable(table.name, table.time, table.grain, "raw", "hour")
        for table in raw_tables().values()
        if table.time is not None
    ]
    return raw + registered(connection)


def registered(connection: duckdb.DuckDBPyConnection) -> list[TimedTable]:
    rows = connection.execute(
        "select table_name, time_column, grain, layer, unit from store.tables order by table_name"
    ).fetchall()
    return [TimedTable(name, time, tuple(grain), layer, unit) for name, time, grain, layer, unit in rows]


def register(connection: duckdb.DuckDBPyConnection, root: Path, table: TimedTable) -> None:
    """Remember a model table; one that moves to cold is taken from `main` to `hot` under a view of its name."""
    if table.name in raw_tables():
        raise WarehouseError(f"{table.name} is a raw table and registered by sources.yml; register model tables only")
    known = {other.name: other for other in registered(connection)}.get(table.name)
    if known == table:
        return
    if known is not None and known.unit is not None and table.unit is None:
        raise WarehouseError(f"{table.name} moves by {known.unit}; forget() it before it stays in the file")
    source = "main" if known is None or known.unit is None else "hot"
    columns = column_types(connection, source, table.name)
    missing = [name for name in (table.time_column, *table.grain) if name not in columns]
    if not columns or missing:
        raise WarehouseError(
            f"{table.name} cannot be registered: "
            + (f"it has no column {missing}" if columns else f"there is no table {source}.{table.name}; build it first")
        )
    name = identifier(table.name)
    with transaction(connection):
        connection.execute("delete from store.tables where table_name = ?", [table.name])
        connection.execute(
            "insert into store.tables values (?, ?, ?, ?, ?)",
            [table.name, table.time_column, list(table.grain), table.layer, table.unit],
        )
        if table.unit is not None and source == "main":
            connection.execute(f"create table hot.{name} as from main.{name}")
            connection.execute(f"drop table main.{name}")
        if table.unit is not None:
            refresh_view(connection, root, table.name)


def forget(connection: duckdb.DuckDBPyConnection, table: str, now: datetime) -> None:
    """Drop a registered table and its view; its cold files are retired, and deleted when no copy names them."""
    known = {other.name: other for other in registered(connection)}.get(table)
    if known is None:
        raise WarehouseError(f"{table} is not a registered model table; there is nothing to forget")
    with transaction(connection):
        if known.unit is not None:
            connection.execute(f"drop view main.{identifier(table)}")
        connection.execute(f"drop table {known.storage}")
        connection.execute("delete from store.tables where table_name = ?", [table])
        connection.execute(
            "update store.cold_files set retired_at = ? where table_name = ? and retired_at is null", [now, table]
        )


def _state(connection: duckdb.DuckDBPyConnection, key: str) -> str | None:
    try:
        rows = connection.execute("select value from store.state where key = ?", [key]).fetchall()
    except duckdb.CatalogException:
        return None
    return str(rows[0][0]) if rows else None


def set_state(connection: duckdb.DuckDBPyConnection, key: str, value: str) -> None:
    connection.execute("delete from store.state where key = ?", [key])
    connection.execute("insert into store.state values (?, ?)", [key, value])


def database_id(connection: duckdb.DuckDBPyConnection) -> str:
    return str(_state(connection, "database_id"))


def published_at(connection: duckdb.DuckDBPyConnection) -> datetime | None:
    text = _state(connection, "published_at")
    return None if text is None else datetime.fromisoformat(text)
