"""The warehouse: one DuckDB file that is never held for long, closed hours in Parquet, a copy for people.

Here: what the rest of the project calls. How each part works is told where it is done: `database` (locks), `catalog`
(tables and views), `batches` and `spool` (writing), `cold`, `retention`, `publish`.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import duckdb
import polars as pl
import structlog

from optiinfra_pipelines.domain.fleet import Retention
from resources.warehouse import catalog
from resources.warehouse import publish as publishing
from resources.warehouse.batches import Batch, checked_batch, store
from resources.warehouse.catalog import Layer, TimedTable, Unit, ensure, registered, transaction
from resources.warehouse.cold import Cold, Moved
from resources.warehouse.database import Database, identifier
from resources.warehouse.errors import BatchError, WarehouseFileError, WarehouseLockedError
from resources.warehouse.files import Layout, disk_nearly_full, free_bytes
from resources.warehouse.retention import Keeper, Retained, Swept
from resources.warehouse.spool import Backlog, DamagedBatchError, Spool

_log = structlog.get_logger(__name__)

# Room for a checkpoint and a temporary of ordinary size, and for the host's own logs.
MIN_FREE_BYTES = 2**30
# A day of one host, or twenty minutes of 1,000 targets.
MAX_SPOOL_BYTES = 4 * 2**30
# A model refresh may have to wait for a move or a publication, which take seconds.
CONNECT_DEADLINE_SECONDS = 60.0
# An hour's last rows come with a slow scrape or wait in the spool for a refresh to end; later ones get a second file.
SETTLE = timedelta(minutes=5)
# Waiting batches go in together up to this size: one commit for many.
_DRAIN_BYTES = 64 * 2**20
# What DuckDB raises when rows, and not the file or the machine, are at fault.
_UNFIT = (duckdb.DataError, duckdb.IntegrityError, duckdb.ProgrammingError)


@dataclass(frozen=True)
class AppendResult:
    """The batch is acknowledged. stored: in the database; spooled: on disk, and in the database at the next chance;
    duplicate: it was acknowledged before, and nothing was written.
    """

    status: Literal["stored", "spooled", "duplicate"]
    rows: int
    waited_seconds: float


class Warehouse:
    """Everything stored under one state directory.

    root: the directory; made when missing. clock: now, timezone-aware. lock_deadline_seconds: how long an append waits
    for another process before it spools. commit_interval_seconds: an append that comes sooner after this process's
    last commit goes to the spool at once (durable, and seen by every connect, read and publish, which empty it first);
    one commit for several ticks costs a fraction of one each. 0 commits every batch by itself.
    disk_free: free bytes of a path. Nothing is touched before the first call.
    """

    def __init__(
        self,
        root: Path,
        *,
        clock: Callable[[], datetime],
        lock_deadline_seconds: float = 2.0,
        commit_interval_seconds: float = 0.0,
        rng: random.Random | None = None,
        min_free_bytes: int = MIN_FREE_BYTES,
        max_spool_bytes: int = MAX_SPOOL_BYTES,
        memory_limit_bytes: int | None = None,
        disk_free: Callable[[Path], int] = free_bytes,
    ) -> None:
        self._clock = clock
        self._lock_deadline_seconds = lock_deadline_seconds
        self._commit_interval_seconds = commit_interval_seconds
        self._rng = rng or random.Random()
        self._layout = Layout(Path(root).resolve(), min_free_bytes, disk_free)
        self._database = Database.shared(self._layout, memory_limit_bytes, self._rng)
        self._spool = Spool(self._layout.spool, max_spool_bytes, self._rng)

    @property
    def root(self) -> Path:
        return self._layout.root

    @property
    def live_path(self) -> Path:
        """The live file, for messages only: nobody but the warehouse opens it."""
        return self._layout.live

    @property
    def read_path(self) -> Path:
        """The published copy, for everybody."""
        return self._layout.published

    def append(self, batch_id: str, tables: Mapping[str, pl.DataFrame]) -> AppendResult:
        """Store rows once and only once per batch_id; when it returns, they survive a kill.

        tables: raw table -> frame with columns of sources.yml; a column left out is NULL.
        Raises BatchError, DiskNearlyFullError, SpoolFullError, WarehouseFileError: then nothing was acknowledged.
        """
        batch = checked_batch(batch_id, tables)
        if not batch.frames:
            return AppendResult("stored", 0, 0.0)
        begun = time.monotonic()
        self._layout.prepare()
        self._layout.require_space(0, "storing a batch")
        with _full_disk_named(self.root):
            status = self._append(batch, begun + self._lock_deadline_seconds)
        return AppendResult(status, batch.row_count, time.monotonic() - begun)

    def _append(self, batch: Batch, until: float) -> Literal["stored", "spooled", "duplicate"]:
        if self._may_wait():
            return self._keep(batch)
        if not self._database.append_lock.acquire(timeout=max(0.0, until - time.monotonic())):
            return self._keep(batch)
        try:
            with self._session(max(0.0, until - time.monotonic())) as connection:
                if not self._drain(connection, time.monotonic() + self._lock_deadline_seconds):
                    return self._keep(batch)
                duplicates = _stored(connection, batch, self._clock())
                self._database.committed_at = time.monotonic()
                self._tell_held(None)
                return "duplicate" if duplicates else "stored"
        except (WarehouseLockedError, duckdb.TransactionException) as error:
            # Held too long, or two transactions of this process touched the same thing: both pass by waiting. A commit
            # that found the disk full is neither, and is named when its batch finds no room to wait either.
            if "No space left" not in str(error):
                self._tell_held(str(error))
            return self._keep(batch)
        finally:
            self._database.append_lock.release()

    def _tell_held(self, cause: str | None) -> None:
        """Log that the file is held, and that it no longer is, once each and not at every tick."""
        if cause is not None and not self._database.is_held:
            _log.warning("warehouse_held", cause=cause, meanwhile="batches wait on disk; nothing is lost")
        elif cause is None and self._database.is_held:
            _log.info("warehouse_free", meanwhile="waiting batches are stored")
        self._database.is_held = cause is not None

    def _may_wait(self) -> bool:
        last = self._database.committed_at
        return last is not None and time.monotonic() - last < self._commit_interval_seconds

    def _keep(self, batch: Batch) -> Literal["spooled"]:
        self._spool.write(batch)
        return "spooled"

    def backlog(self) -> Backlog:
        """Batches that wait on disk for the database."""
        return self._spool.backlog()

    @contextmanager
    def connect(self, deadline_seconds: float = CONNECT_DEADLINE_SECONDS) -> Iterator[duckdb.DuckDBPyConnection]:
        """A read-write connection for models and small state; every acknowledged row is in. Keep it short.

        Transactions are the caller's: without one each statement commits by itself. The connection is closed at the
        end. WarehouseLockedError past the deadline.
        """
        with self._session(deadline_seconds) as connection:
            self._drain_all(connection)
            yield connection

    def read(self, sql: str, params: Sequence[object] = ()) -> pl.DataFrame:
        """The answer of one query on the live file, all acknowledged rows included. It cannot write."""
        with self.connect() as connection, transaction(connection, "READ ONLY"):
            frame: pl.DataFrame = connection.sql(sql, params=list(params)).pl()
            return frame

    def read_published(self, sql: str, params: Sequence[object] = ()) -> pl.DataFrame | None:
        """The answer of one query on the published copy; waits for nobody. None before the first publication.

        WarehouseFileError when the copy cannot be asked that.
        """
        if not self.read_path.exists():
            return None
        try:
            with duckdb.connect(str(self.read_path), read_only=True) as connection:
                connection.execute("set TimeZone = 'UTC'")
                frame: pl.DataFrame = connection.sql(sql, params=list(params)).pl()
                return frame
        except duckdb.Error as error:
            raise WarehouseFileError(f"{self.read_path} does not answer: {error}") from error

    def publish(self, deadline_seconds: float = CONNECT_DEADLINE_SECONDS) -> publishing.Publication:
        """Swap in a fresh read.duckdb. DiskNearlyFullError when a copy does not fit: the one before stays."""
        self._layout.prepare()
        self._layout.require_space(0, "a read copy")
        with _full_disk_named(self.root), self._layout.maintenance(deadline_seconds):
            with self.connect(deadline_seconds):
                pass
            return publishing.publish(self._layout, self._database, self._rng, self._clock(), deadline_seconds)

    def move_closed_hours(self, now: datetime, settle: timedelta = SETTLE) -> list[Moved]:
        """Rows of hours (days, for models so registered) that ended `settle` ago or earlier go to Parquet."""
        self._layout.prepare()
        self._layout.require_space(0, "moving closed hours")
        with _full_disk_named(self.root), self._layout.maintenance(CONNECT_DEADLINE_SECONDS):
            with self.connect():
                pass
            return self._cold().move_closed(now, settle)

    def recall(self, table: str, start_at: datetime, end_at: datetime) -> int:
        """Bring moved rows of a window back to where writers write, to rebuild it; returns how many.

        Whole files come back, so rows just outside the window may too; the next move takes them out again. A window
        that no file overlaps costs one look at the list.
        """
        self._layout.prepare()
        with self.connect() as connection:
            if not catalog.has_moved(connection, table, start_at, end_at):
                return 0
        with _full_disk_named(self.root), self._layout.maintenance(CONNECT_DEADLINE_SECONDS):
            with self.connect():
                pass
            return self._cold().recall(table, start_at, end_at, self._clock())

    def apply_retention(self, retention: Retention, now: datetime) -> Retained:
        """Delete what is older than its layer may be. It frees space, so a full disk does not stop it."""
        self._layout.prepare()
        with self._layout.maintenance(CONNECT_DEADLINE_SECONDS), self._session(CONNECT_DEADLINE_SECONDS):
            return self._keeper().apply(retention, now)

    def sweep(self) -> Swept:
        """To be called at every start: deletes what killed processes left, lists what is usable."""
        self._layout.prepare()
        with self._layout.maintenance(CONNECT_DEADLINE_SECONDS), self._session(CONNECT_DEADLINE_SECONDS):
            return self._keeper().sweep(self._clock())

    def register(
        self,
        table: str,
        *,
        time_column: str,
        layer: Layer,
        grain: Sequence[str] = (),
        cold: Unit | None = None,
    ) -> None:
        """Put a built model table under retention (`layer` tells how long) and, with `cold`, under the hourly or daily
        move. A table that moves is written as `storage_name(table)` and read by its own name, which becomes a view.
        """
        with self.connect() as connection:
            catalog.register(connection, self.root, TimedTable(table, time_column, tuple(grain), layer, cold))

    def storage_name(self, table: str) -> str:
        """Where a writer of this model table writes, as SQL: main."t", or hot."t" for one registered to move."""
        with self.connect() as connection:
            known = {one.name: one.storage for one in registered(connection)}
        return known.get(table, f"main.{identifier(table)}")

    def forget(self, table: str) -> None:
        """Drop a registered model table with all its rows, moved ones too, so that it can be built anew."""
        with self._layout.maintenance(CONNECT_DEADLINE_SECONDS), self.connect() as connection:
            catalog.forget(connection, table, self._clock())

    @contextmanager
    def _session(self, deadline_seconds: float) -> Iterator[duckdb.DuckDBPyConnection]:
        with self._database.session(deadline_seconds) as connection:
            with self._database.check_lock:
                if not self._database.is_checked:
                    ensure(connection, self.root, f"{self._rng.getrandbits(32):08x}")
                    self._database.is_checked = True
            yield connection

    def _drain_all(self, connection: duckdb.DuckDBPyConnection) -> None:
        if not self._spool.paths():
            return
        with self._database.append_lock:
            self._drain(connection, float("inf"))

    def _drain(self, connection: duckdb.DuckDBPyConnection, until: float) -> bool:
        """Store waiting batches in order, many to a commit; False when time ran out first."""
        waiting = self._spool.paths()
        while waiting:
            if time.monotonic() > until:
                return False
            group: dict[Path, Batch] = {}
            size = 0.0
            while waiting and size < _DRAIN_BYTES:
                path = waiting.pop(0)
                try:
                    batch = self._spool.read(path)
                except DamagedBatchError as error:
                    self._reject(path, error)
                    continue
                if batch is not None:
                    group[path] = batch
                    size += sum(frame.estimated_size() for frame in batch.frames.values())
            self._store_group(connection, group)
            self._database.committed_at = time.monotonic()
        return True

    def _store_group(self, connection: duckdb.DuckDBPyConnection, group: Mapping[Path, Batch]) -> None:
        """Together, or where one does not fit the tables, each by itself so that only that one is set aside."""
        now = self._clock()
        try:
            if group:
                store(connection, list(group.values()), now)
        except _UNFIT:
            for path, batch in group.items():
                try:
                    store(connection, [batch], now)
                except _UNFIT as error:
                    self._reject(path, error)
        self._spool.remove(list(group))

    def _reject(self, path: Path, error: Exception) -> None:
        aside = self._spool.reject(path)
        _log.error("spooled_batch_rejected", path=str(aside), cause=str(error), remedy="report it; the file is kept")

    def _cold(self) -> Cold:
        return Cold(self._layout, self._database, self._rng, CONNECT_DEADLINE_SECONDS)

    def _keeper(self) -> Keeper:
        return Keeper(self._layout, self._database, CONNECT_DEADLINE_SECONDS)


def _stored(connection: duckdb.DuckDBPyConnection, batch: Batch, now: datetime) -> set[str]:
    try:
        return store(connection, [batch], now)
    except _UNFIT as error:
        raise BatchError(f"batch {batch.batch_id} does not fit the raw tables: {error}") from error


@contextmanager
def _full_disk_named(root: Path) -> Iterator[None]:
    """A disk that fills up in the middle of a write is the same news as one that was full before."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise disk_nearly_full(root, str(error)) from error
    except duckdb.Error as error:
        if "No space left" not in str(error):
            raise
        raise disk_nearly_full(root, str(error)) from error
