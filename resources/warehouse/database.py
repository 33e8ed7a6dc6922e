"""The one place that opens the live DuckDB file: sharing inside a process, taking turns between processes.

Here: opening with retry up to a deadline, session settings, what each refusal of DuckDB means.
Not here: tables (`catalog`), rows (`batches`), other files.

DuckDB lets one process at a time open a file for writing, and guards that by a POSIX lock. Such a lock dies when the
process closes *any* descriptor of the file, also one of its own `open()`. So no code of this process may open the live
file while a session is up; who must read its bytes (`publish`) does so inside `Database.alone`.
"""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import duckdb

from resources.warehouse.errors import WarehouseFileError, WarehouseLockedError
from resources.warehouse.files import SPILL_FOLDER, Layout, temporary_beside

# Read by DuckDB 1.5.5 and everything newer; 2.0's own default is not readable by 1.5.5.
STORAGE_VERSION = "v1.5.0"
# Two threads: the collector shares its host with an inference engine's scheduler; more saved nothing on ticks.
_THREADS = 2
# Large model queries spill to disk past this; an engine host's memory belongs to the engine.
_MEMORY_SHARE, _MEMORY_CAP_BYTES = 0.25, 4 * 2**30
# Waits between two tries for the lock: a holder's transaction takes 20-60 ms.
_RETRY_SECONDS = (0.01, 0.1)


def quoted(text: str) -> str:
    """`text` as an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """`name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def default_memory_limit_bytes() -> int:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(physical * _MEMORY_SHARE, _MEMORY_CAP_BYTES))


class Database:
    """The live file of one state directory in this process; use `Database.shared`, not the constructor.

    Sessions of several threads share one DuckDB instance. It opens with the first and closes (and checkpoints) with
    the last, so that between two of them another process has its turn.
    """

    _all: ClassVar[weakref.WeakValueDictionary[Path, Database]] = weakref.WeakValueDictionary()
    _all_lock = threading.Lock()

    def __init__(self, layout: Layout, memory_limit_bytes: int, rng: random.Random) -> None:
        self._layout = layout
        self._rng = rng
        self._config: dict[str, str | bool | int | float | list[str]] = {
            "threads": _THREADS,
            "memory_limit": f"{memory_limit_bytes}B",
            "temp_directory": str(layout.root / SPILL_FOLDER),
            "autoinstall_known_extensions": False,
        }
        self._turn = threading.Condition()
        self._instance: duckdb.DuckDBPyConnection | None = None
        self._sessions = 0
        self._is_changing = False
        # One append at a time: looking a batch id up and writing it are two statements.
        self.append_lock = threading.Lock()
        # Whether the tables of the file now open were brought up to date; another file may lie there at the next open.
        self.is_checked = False
        self.check_lock = threading.Lock()
        # Whether the last append found the file held by someone else; told once per change.
        self.is_held = False
        # time.monotonic() of this process's last commit of raw rows; None before the first.
        self.committed_at: float | None = None

    @classmethod
    def shared(cls, layout: Layout, memory_limit_bytes: int | None, rng: random.Random) -> Database:
        """This process's Database of that root; settings are those of whoever asked first."""
        with cls._all_lock:
            database = cls._all.get(layout.live)
            if database is None:
                database = cls(layout, memory_limit_bytes or default_memory_limit_bytes(), rng)
                cls._all[layout.live] = database
            return database

    @contextmanager
    def session(self, deadline_seconds: float) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection of its own transaction state, UTC. WarehouseLockedError past the deadline."""
        connection = self._enter(time.monotonic() + deadline_seconds, deadline_seconds)
        try:
            yield connection
        finally:
            connection.close()
            self._leave()

    @contextmanager
    def alone(self, deadline_seconds: float) -> Iterator[None]:
        """No session of this process is up and none starts: its bytes may be read. Other processes are not kept out."""
        until = time.monotonic() + deadline_seconds
        self._claim(until, deadline_seconds, lambda: self._sessions == 0)
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def session_alone(self, deadline_seconds: float) -> Iterator[duckdb.DuckDBPyConnection]:
        """Inside `alone`: the only connection of this process; closing it checkpoints."""
        connection = self._open(time.monotonic() + deadline_seconds, deadline_seconds)
        try:
            yield connection
        finally:
            connection.close()

    def _enter(self, until: float, deadline_seconds: float) -> duckdb.DuckDBPyConnection:
        self._claim(until, deadline_seconds, lambda: True)
        try:
            if self._instance is None:
                self._instance = self._open(until, deadline_seconds)
                self.is_checked = False
            connection = self._instance.cursor()
            self._sessions += 1
            return connection
        finally:
            self._release()

    def _leave(self) -> None:
        self._claim(None, 0, lambda: True)
        try:
            self._sessions -= 1
            if self._sessions == 0 and self._instance is not None:
                instance, self._instance = self._instance, None
                instance.close()
        finally:
            self._release()

    def _claim(self, until: float | None, deadline_seconds: float, is_ready: Callable[[], bool]) -> None:
        """Become the one who opens, closes or stays alone; a flag and not a lock, so that waiters keep deadlines."""
        with self._turn:
            timeout = None if until is None else max(0.0, until - time.monotonic())
            if not self._turn.wait_for(lambda: not self._is_changing and is_ready(), timeout):
                raise WarehouseLockedError(
                    f"{self._layout.live}: another thread of this process kept it for longer than "
                    f"{deadline_seconds:g} s; close the connection it holds"
                )
            self._is_changing = True

    def _release(self) -> None:
        with self._turn:
            self._is_changing = False
            self._turn.notify_all()

    def _open(self, until: float, deadline_seconds: float) -> duckdb.DuckDBPyConnection:
        self._create_if_missing(deadline_seconds)
        while True:
            try:
                connection = duckdb.connect(self._layout.live, config=self._config)
                # TimeZone cannot be given at connect: its extension is loaded only after.
                connection.execute("SET GLOBAL TimeZone = 'UTC'")
                return connection
            except duckdb.Error as error:
                if not is_lock_conflict(error):
                    raise explained(error, self._layout.live) from error
                pause = self._rng.uniform(*_RETRY_SECONDS)
                if time.monotonic() + pause > until:
                    raise WarehouseLockedError(
                        f"{self._layout.live} was held by another process for longer than {deadline_seconds:g} s; "
                        f"close that session, and look at the data in {self._layout.published.name}. "
                        f"DuckDB says: {error}"
                    ) from error
            time.sleep(pause)

    def _create_if_missing(self, deadline_seconds: float) -> None:
        """Make an empty database under a temporary name first: a kill leaves a whole file or none."""
        live = self._layout.live
        if live.exists():
            return
        self._layout.prepare()
        with self._layout.creation(deadline_seconds):
            if live.exists():
                return
            log = live.with_name(live.name + ".wal")
            if log.exists():
                raise WarehouseFileError(
                    f"{log} is there without {live.name}: its rows belong to a database that was moved or deleted; "
                    "put that file back, or move the .wal away too"
                )
            temporary = temporary_beside(live, self._rng)
            try:
                with duckdb.connect(":memory:") as connection:
                    connection.execute(
                        f"ATTACH {quoted(str(temporary))} AS created (STORAGE_VERSION {quoted(STORAGE_VERSION)})"
                    )
                    connection.execute("DETACH created")
                temporary.replace(live)
            except (duckdb.Error, OSError) as error:
                temporary.unlink(missing_ok=True)
                raise explained(error, live) from error


def is_lock_conflict(error: Exception) -> bool:
    """True when another process has the file open; everything else is no reason to try again."""
    return isinstance(error, duckdb.IOException) and "Could not set lock on file" in str(error)


def explained(error: Exception, path: Path) -> WarehouseFileError:
    """DuckDB's or the system's refusal to open `path`, with the remedy that fits."""
    text = str(error)
    remedies = {
        "version number": "a newer DuckDB than this one wrote it: upgrade duckdb, or name another state directory",
        "not a valid DuckDB database": "it is not a DuckDB file: move it away, or name another state directory",
        "orrupt": "it is damaged: move it and its .wal away and start again; rows of closed hours are safe in cold/, "
        "and read.duckdb holds the state of its last publication",
        "bytes from file": "it is cut short: move it away and start again; rows of closed hours are safe in cold/",
        "replaying WAL": "its log is damaged: move the .wal file away to go on without its last seconds",
        "Permission denied": "give this user read and write permission on it and on its directory",
        "Read-only file system": "name a state directory on a writable file system",
        "different configuration": "other code of this process opened it: use connect() or read() of the warehouse",
    }  # fmt: skip
    remedy = next((remedy for sign, remedy in remedies.items() if sign in text), "nothing in it was changed")
    return WarehouseFileError(f"{path} cannot be opened: {remedy}. The cause in full: {text}")
