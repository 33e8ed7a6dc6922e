"""How long rows live, and what is left over when a process was killed.

Here: retiring and deleting cold files, deleting old hot and model rows, sweeping leftovers, taking files in that an
earlier database wrote. Not here: making cold files (`cold`).

A cold file is first taken off the list, and deleted only after a grace period and a later publication: a session on
an older read copy still names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import duckdb
import structlog

from optiinfra_pipelines.domain.fleet import Retention
from resources.warehouse.catalog import (
    Layer,
    TimedTable,
    database_id,
    published_at,
    refresh_view,
    timed_tables,
    transaction,
)
from resources.warehouse.database import Database, identifier, quoted
from resources.warehouse.files import Layout, stale_temporaries

_log = structlog.get_logger(__name__)
# A query that began on the old copy is long over by then.
GRACE = timedelta(hours=1)


@dataclass(frozen=True)
class Retained:
    """What a retention run did: rows deleted by table, files taken off the list, files deleted."""

    deleted_rows: Mapping[str, int]
    retired_files: int
    deleted_files: int


@dataclass(frozen=True)
class Swept:
    """What a start found: leftovers deleted, files of an earlier database taken in, listed files that are gone."""

    deleted: tuple[Path, ...]
    adopted: tuple[Path, ...]
    missing: tuple[Path, ...]


@dataclass(frozen=True)
class Keeper:
    """Retention and sweep of one warehouse. Callers hold `Layout.maintenance`."""

    layout: Layout
    database: Database
    deadline_seconds: float

    def apply(self, retention: Retention, now: datetime) -> Retained:
        ages: dict[Layer, timedelta] = {
            "raw": timedelta(hours=retention.raw_hours),
            "minute": timedelta(days=retention.minute_days),
            "five_minute": timedelta(days=retention.five_minute_days),
            "hour": timedelta(days=retention.hour_days),
        }
        deleted: dict[str, int] = {}
        retired = 0
        with self.database.session(self.deadline_seconds) as connection:
            for table in timed_tables(connection):
                with transaction(connection):
                    rows, files = self._expire(connection, table, now - ages[table.layer], now)
                retired += files
                if rows:
                    deleted[table.name] = rows
            # A delivery repeated later than the rows themselves live has nothing left to double.
            connection.execute("delete from store.batches where stored_at < ?", [now - ages["raw"]])
            gone = self._delete_retired(connection, now)
        return Retained(deleted, retired, gone)

    def _expire(
        self, connection: duckdb.DuckDBPyConnection, table: TimedTable, cutoff: datetime, now: datetime
    ) -> tuple[int, int]:
        """Whole files older than the cutoff leave the list; single rows are deleted where they lie in the file."""
        files = connection.execute(
            "update store.cold_files set retired_at = ? where table_name = ? and retired_at is null and latest_at < ? "
            "returning path",
            [now, table.name, cutoff],
        ).fetchall()
        if files:
            refresh_view(connection, self.layout.root, table.name)
        deleted = connection.execute(
            f"delete from {table.storage} where {identifier(table.time_column)} < ?", [cutoff]
        ).fetchall()
        return int(deleted[0][0]), len(files)

    def _delete_retired(self, connection: duckdb.DuckDBPyConnection, now: datetime) -> int:
        last = published_at(connection) if self.layout.published.exists() else now
        rows = connection.execute(
            "select path from store.cold_files where retired_at <= ? and retired_at <= ?", [now - GRACE, last]
        ).fetchall()
        for (path,) in rows:
            file = self.layout.root / path
            file.unlink(missing_ok=True)
            _remove_empty_folders(file.parent, self.layout.cold)
            connection.execute("delete from store.cold_files where path = ?", [path])
        return len(rows)

    def sweep(self, now: datetime) -> Swept:
        """Delete leftovers of killed processes, take in files of an earlier database, unlist files that are gone."""
        adopted: list[Path] = []
        with self.database.session(self.deadline_seconds) as connection:
            deleted = stale_temporaries(self.layout.root)
            for path in deleted:
                path.unlink(missing_ok=True)
            own = f"{database_id(connection)}-"
            rows = connection.execute("select path from store.cold_files").fetchall()
            listed = {self.layout.root / path for (path,) in rows}
            for path in sorted(self.layout.cold.rglob("*.parquet")):
                if path in listed:
                    continue
                if path.name.startswith(own):
                    path.unlink()
                    deleted.append(path)
                elif self._adopt(connection, path, now):
                    adopted.append(path)
            missing = self._mark_missing(connection, now)
        if adopted:
            _log.warning("cold_files_of_an_earlier_database_taken_in", files=len(adopted))
        for path in missing:
            _log.error(
                "cold_file_missing", path=str(path), remedy="put it back and restart; its rows are absent meanwhile"
            )
        return Swept(tuple(deleted), tuple(adopted), tuple(missing))

    def _adopt(self, connection: duckdb.DuckDBPyConnection, path: Path, now: datetime) -> bool:
        """List a file that another database wrote: the live file was lost, its closed hours need not be."""
        table = {table.name: table for table in timed_tables(connection)}.get(
            path.relative_to(self.layout.cold).parts[0]
        )
        if table is None:
            _log.warning("cold_file_of_unknown_table", path=str(path), remedy="register its model, then restart")
            return False
        source = f"read_parquet({quoted(str(path))}, hive_partitioning = false)"
        time = identifier(table.time_column)
        try:
            described = connection.execute(f"describe select * from {source}").fetchall()
            [(rows, earliest_at, latest_at)] = connection.execute(
                f"select count(*), min({time})::timestamptz, max({time})::timestamptz from {source}"
            ).fetchall()
        except duckdb.Error as error:
            _log.error("cold_file_unreadable", path=str(path), cause=str(error), remedy="move it out of cold/")
            return False
        if rows == 0:
            return False
        columns = ", ".join(f"{identifier(name)} {kind}" for name, kind, *_ in described)
        with transaction(connection):
            connection.execute(
                "insert into store.cold_files values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, null, null)",
                [
                    table.name, str(path.relative_to(self.layout.root)),
                    earliest_at, latest_at + timedelta(microseconds=1), rows, path.stat().st_size,
                    earliest_at, latest_at, columns, now,
                ],
            )  # fmt: skip
            refresh_view(connection, self.layout.root, table.name)
        return True

    def _mark_missing(self, connection: duckdb.DuckDBPyConnection, now: datetime) -> list[Path]:
        """A view that names a missing file answers nothing at all; without it, it answers all the rest."""
        rows = connection.execute(
            "select table_name, path, missing_at is not null from store.cold_files where retired_at is null"
        ).fetchall()
        missing = [self.layout.root / path for _, path, _ in rows if not (self.layout.root / path).exists()]
        changed = [row for row in rows if (self.layout.root / row[1]).exists() == row[2]]
        if changed:
            with transaction(connection):
                for _, path, was_missing in changed:
                    at = None if was_missing else now
                    connection.execute("update store.cold_files set missing_at = ? where path = ?", [at, path])
                for table in {row[0] for row in changed}:
                    refresh_view(connection, self.layout.root, table)
        return missing


def _remove_empty_folders(folder: Path, top: Path) -> None:
    while folder != top and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
