"""Batches that could not reach the database yet: one zip file each, in order of arrival, whole or not there.

Here: writing, listing, reading back and removing those files, and their limit. Not here: when to (`store`).
A zip holds one Arrow IPC stream per table and `batch.json`; its checksums tell a damaged file from a good one.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from resources.warehouse.batches import Batch, checked_batch
from resources.warehouse.errors import BatchError, SpoolFullError
from resources.warehouse.files import commit_file, temporary_beside

_SUFFIX = ".zip"
_REJECTED = ".rejected"


class DamagedBatchError(Exception):
    """A spooled file that cannot be read back; the cause is in the message."""


@dataclass(frozen=True)
class Backlog:
    """What waits: number of batches and their bytes on disk."""

    batches: int
    size_bytes: int


@dataclass(frozen=True)
class Spool:
    """The waiting batches of one state directory."""

    directory: Path
    max_bytes: int
    rng: random.Random

    def paths(self) -> list[Path]:
        """Waiting files, oldest first."""
        return sorted(self.directory.glob(f"*{_SUFFIX}"))

    def backlog(self) -> Backlog:
        sizes = [_size(path) for path in self.paths()]
        return Backlog(len(sizes), sum(sizes))

    def write(self, batch: Batch) -> bool:
        """Keep the batch on disk, flushed; False when it already waits here. SpoolFullError at the limit."""
        waiting = self.paths()
        digest = hashlib.sha256(batch.batch_id.encode()).hexdigest()[:32]
        if any(path.stem.endswith(digest) for path in waiting):
            return False
        content = _packed(batch)
        held = sum(_size(path) for path in waiting)
        if held + len(content) > self.max_bytes:
            raise SpoolFullError(
                f"{self.directory} holds {held:,} bytes in {len(waiting)} batches and may hold {self.max_bytes:,}: "
                f"batch {batch.batch_id} was refused. Something has kept warehouse.duckdb open all that time: "
                "close it (its process id is in the log), and the spool empties by itself"
            )
        number = int(waiting[-1].name.split("-")[0]) + 1 if waiting else 1
        final = self.directory / f"{number:012d}-{digest}{_SUFFIX}"
        temporary = temporary_beside(final, self.rng)
        try:
            temporary.write_bytes(content)
            commit_file(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def read(self, path: Path) -> Batch | None:
        """The batch in a file; None when another process stored it meanwhile. DamagedBatchError otherwise."""
        try:
            with zipfile.ZipFile(path) as archive:
                batch_id = json.loads(archive.read("batch.json"))["batch_id"]
                frames = {
                    name.removesuffix(".arrow"): pl.read_ipc_stream(io.BytesIO(archive.read(name)))
                    for name in archive.namelist()
                    if name.endswith(".arrow")
                }
            return checked_batch(batch_id, frames)
        except FileNotFoundError:
            return None
        except (zipfile.BadZipFile, EOFError, KeyError, ValueError, BatchError, pl.exceptions.PolarsError) as error:
            raise DamagedBatchError(f"{path}: {error}") from error

    def remove(self, paths: list[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)

    def reject(self, path: Path) -> Path:
        """Put a file that will never be stored out of the way, for a person to look at."""
        aside = path.with_name(path.name + _REJECTED)
        if path.exists():
            path.replace(aside)
        return aside


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _packed(batch: Batch) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("batch.json", json.dumps({"batch_id": batch.batch_id}))
        for name, frame in batch.frames.items():
            member = io.BytesIO()
            frame.write_ipc_stream(member, compression="lz4")
            archive.writestr(f"{name}.arrow", member.getvalue())
    return buffer.getvalue()
