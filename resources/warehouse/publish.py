"""The read copy: a whole, checkpointed copy of the live file, swapped in under the name people open.

Here: making and swapping it. Not here: who asks for it and when.
Sessions on the previous copy keep their file (it has no name any more); they neither block nor break.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from resources.warehouse.catalog import set_state, transaction
from resources.warehouse.database import Database
from resources.warehouse.errors import WarehouseFileError, WarehouseLockedError
from resources.warehouse.files import Layout, commit_file, temporary_beside

_RETRY_SECONDS = 0.02


@dataclass(frozen=True)
class Publication:
    """The copy that readers now get. is_new: False when nothing had changed since the one before."""

    path: Path
    size_bytes: int
    seconds: float
    is_new: bool


def publish(
    layout: Layout, database: Database, rng: random.Random, now: datetime, deadline_seconds: float
) -> Publication:
    """Copy the live file to read.duckdb, unless that is the same already. Callers hold `Layout.maintenance`."""
    begun = time.monotonic()
    if layout.published.is_dir():
        raise WarehouseFileError(f"{layout.published} is a folder, and the read copy goes there: move the folder away")
    with database.alone(deadline_seconds):
        if _is_current(layout):
            return Publication(layout.published, layout.published.stat().st_size, time.monotonic() - begun, False)
        temporary = temporary_beside(layout.published, rng)
        try:
            while not _copied(layout, database, now, deadline_seconds, temporary):
                if time.monotonic() - begun > deadline_seconds:
                    raise WarehouseLockedError(
                        f"{layout.live} was busy for {deadline_seconds:g} s, so {layout.published.name} is still the "
                        "one before; close other sessions on the live file"
                    )
                time.sleep(_RETRY_SECONDS)
            commit_file(temporary, layout.published)
        finally:
            temporary.unlink(missing_ok=True)
    return Publication(layout.published, layout.published.stat().st_size, time.monotonic() - begun, True)


def _log_of(live: Path) -> Path:
    return live.with_name(live.name + ".wal")


def _is_current(layout: Layout) -> bool:
    """The copy carries the size and modification time of what it was made from."""
    if not layout.published.exists() or _log_of(layout.live).exists():
        return False
    live, copy = layout.live.stat(), layout.published.stat()
    return (live.st_size, live.st_mtime_ns) == (copy.st_size, copy.st_mtime_ns)


def _copied(layout: Layout, database: Database, now: datetime, deadline_seconds: float, temporary: Path) -> bool:
    """Checkpoint, then copy under a shared lock; False when another process wrote in between.

    Reading the live file's bytes is safe only here: no session of this process is up, so closing the descriptor drops
    no lock but our own.
    """
    with database.session_alone(deadline_seconds) as connection:
        with transaction(connection):
            set_state(connection, "published_at", now.isoformat())
        connection.execute("CHECKPOINT")
    with layout.live.open("rb") as source:
        try:
            fcntl.lockf(source, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        log = _log_of(layout.live)
        if log.exists() and log.stat().st_size > 0:
            return False
        layout.require_space(layout.live.stat().st_size, "a read copy")
        with temporary.open("wb") as target:
            _copy_bytes(source, target)
        stat = os.fstat(source.fileno())
        os.utime(temporary, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return True


def _copy_bytes(source: BinaryIO, target: BinaryIO) -> None:
    """In the kernel where it can (which shares blocks on XFS and Btrfs), through memory where it cannot."""
    left = os.fstat(source.fileno()).st_size
    try:
        while left > 0:
            copied = os.copy_file_range(source.fileno(), target.fileno(), left)
            if copied == 0:
                break
            left -= copied
    except (OSError, AttributeError):
        source.seek(0)
        target.seek(0)
        target.truncate()
        shutil.copyfileobj(source, target, 2**20)
