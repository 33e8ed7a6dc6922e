"""Where the warehouse's files lie, and the few file operations that must survive a kill at any moment.

Here: paths, atomic replacement, temporaries and who left them, the maintenance lock, free space.
Not here: what is in the files (`database`, `cold`, `spool`, `publish`).
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from resources.warehouse.errors import DiskNearlyFullError, WarehouseFileError, WarehouseLockedError

_TEMPORARY = ".tmp"
# Where DuckDB spills what does not fit in memory.
SPILL_FOLDER = "duckdb_temp"
# How often a waiter asks again for the maintenance lock; a holder keeps it for tens of milliseconds to seconds.
_POLL_SECONDS = 0.02
# DuckDB reads a path from its first ? on as options (and puts the log's name before it), and \\ as a separator.
_UNUSABLE_CHARACTERS = "?\\"


def free_bytes(path: Path) -> int:
    """Bytes an unprivileged writer may still use on the file system of `path`."""
    return shutil.disk_usage(path).free


@dataclass(frozen=True)
class Layout:
    """Paths under one state directory, and the guard of its free space."""

    root: Path
    min_free_bytes: int
    disk_free: Callable[[Path], int]

    @property
    def live(self) -> Path:
        return self.root / "warehouse.duckdb"

    @property
    def published(self) -> Path:
        return self.root / "read.duckdb"

    @property
    def cold(self) -> Path:
        return self.root / "cold"

    @property
    def spool(self) -> Path:
        return self.root / "spool"

    def prepare(self) -> None:
        """Make the directories. WarehouseFileError when the root is a file, not writable, or no path for DuckDB."""
        unusable = [character for character in _UNUSABLE_CHARACTERS if character in str(self.root)]
        if unusable:
            raise WarehouseFileError(
                f"{self.root} has a {' and a '.join(unusable)} in it, which DuckDB cannot open; name another directory"
            )
        try:
            for directory in (self.root, self.cold, self.spool):
                directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise WarehouseFileError(
                f"{error.filename} is a file, and the warehouse needs a directory there; "
                "move it away, or name another state directory"
            ) from error
        except OSError as error:
            raise WarehouseFileError(
                f"{error.filename} cannot be made ({error.strerror}); "
                "give this user write permission there, or name another state directory"
            ) from error

    def require_space(self, needed_bytes: int, purpose: str) -> None:
        """DiskNearlyFullError unless `needed_bytes` can be written and `min_free_bytes` still be left."""
        free = self.disk_free(self.root)
        if free < self.min_free_bytes + needed_bytes:
            raise disk_nearly_full(
                self.root, f"{free:,} bytes are free, {purpose} needs {needed_bytes:,} beside the limit of "
                f"{self.min_free_bytes:,}"
            )  # fmt: skip

    def maintenance(self, deadline_seconds: float) -> AbstractContextManager[None]:
        """Held by move, retention, recall, publish and sweep, one at a time over all processes."""
        return _file_lock(self.root / "maintenance.lock", deadline_seconds)

    def creation(self, deadline_seconds: float) -> AbstractContextManager[None]:
        """Held by the one process that makes the live file."""
        return _file_lock(self.root / "creation.lock", deadline_seconds)


@contextmanager
def _file_lock(path: Path, deadline_seconds: float) -> Iterator[None]:
    """An exclusive lock over processes and threads. The kernel lets go of it when the holder dies."""
    until = time.monotonic() + deadline_seconds
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise WarehouseLockedError(
                        f"{path}: another process or thread has been at it for longer than {deadline_seconds:g} s "
                        "(a move, retention, publication or sweep); try again when it has ended"
                    ) from None
                time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def disk_nearly_full(path: Path, cause: str) -> DiskNearlyFullError:
    return DiskNearlyFullError(
        f"{path}: disk nearly full: {cause}; free some space or shorten `retention` in fleet.yaml. "
        "Nothing was written, and collection resumes by itself"
    )


def temporary_beside(path: Path, rng: random.Random) -> Path:
    """A name in the same directory, so that a rename is atomic; it tells the writer's process id."""
    return path.with_name(f"{path.name}.{os.getpid()}.{rng.getrandbits(32):08x}{_TEMPORARY}")


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the disk. Never for the live database: closing it here would drop DuckDB's lock."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_file(temporary: Path, final: Path) -> None:
    """Flush, rename and flush the directory: after this the file is there whole, before it not at all."""
    sync_file(temporary)
    temporary.replace(final)
    sync_file(final.parent)


def stale_temporaries(root: Path) -> list[Path]:
    """Temporaries whose writer is gone: no such process, or one that started after the file was last written.

    Call it with a session up: then no other process has the database open, and what DuckDB spilled to disk before this
    process began is nobody's.
    """
    ours = [path for path in root.rglob(f"*.*.*{_TEMPORARY}") if path.is_file() and not _has_writer(path)]
    began = psutil.Process().create_time()
    spilled = [path for path in (root / SPILL_FOLDER).glob("*") if path.is_file() and path.stat().st_mtime < began]
    return ours + spilled


def _has_writer(path: Path) -> bool:
    try:
        pid = int(path.name.split(".")[-3])
    except ValueError:
        return True  # not a name of `temporary_beside`
    try:
        return psutil.Process(pid).create_time() <= path.stat().st_mtime
    except (OSError, psutil.Error):
        return False
