"""Bound Dagster's own storage: it keeps events for ever.

Here: deleting old ticks, run-less events, finished refresh runs and the beginnings of long process logs. What is never
deleted: the newest event of each asset, the run that holds it, and every run that is not marked as a refresh (rollouts,
rebuilds, what a person launched). Uses two tables of Dagster's SQLite storage that have no public API; a test holds
them. A database file does not shrink: what is deleted makes room for what comes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import dagster as dg
import sqlalchemy as sa
from dagster._core.scheduler.instigation import TickStatus
from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable, SqlEventLogStorageTable

from resources.dagster_home.storage import LeanEventLogStorage

# Where the supervisor keeps what its processes print; a folder of DAGSTER_HOME.
PROCESS_LOGS = "process_logs"
# Runs that carry this tag may be forgotten: what they made is in the warehouse.
REFRESH_TAG = {"optiinfra/kind": "refresh"}
# Runs deleted by one call: each costs about 10 ms and the job should not hold a slot for long.
MAX_RUNS = 2000

# A process writes some kilobytes of log a day when all is well; one that complains all day is cut to its last words.
MAX_LOG_BYTES, KEPT_LOG_BYTES = 16 << 20, 4 << 20

_FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_RUNLESS_TYPES = ("ASSET_MATERIALIZATION", "ASSET_OBSERVATION", "FRESHNESS_STATE_CHANGE")


@dataclass(frozen=True)
class Pruned:
    """What one call deleted, and the size of Dagster's folder before and after."""

    events: int
    runs: int
    check_results: int
    bytes_before: int
    bytes_after: int


def prune(instance: dg.DagsterInstance, *, now: datetime, keep: timedelta, keep_failures: timedelta) -> Pruned:
    """Delete history older than `keep` (failed ticks and runs: older than `keep_failures`).

    Raises TypeError when the instance does not store as ours does: other stores have retention of their own.
    """
    storage = instance.event_log_storage
    if not isinstance(storage, LeanEventLogStorage):
        raise TypeError(f"pruning knows our own SQLite storage only, this instance uses {type(storage).__name__}")
    home = Path(instance.root_directory)
    before = folder_bytes(home)
    cutoff = now - keep
    _prune_ticks(instance, cutoff, now - keep_failures)
    events = _prune_runless_events(storage, cutoff)
    runs = _prune_runs(instance, cutoff, now - keep_failures)
    checks = _prune_check_results(storage, cutoff)
    trim_logs(home / PROCESS_LOGS)
    return Pruned(events, runs, checks, before, folder_bytes(home))


def trim_logs(folder: Path, *, most: int = MAX_LOG_BYTES, keep: int = KEPT_LOG_BYTES) -> None:
    """Cut each log longer than `most` bytes to whole lines of its last `keep` bytes, under the process that writes it.

    The writer appends, so it goes on where the file now ends; a line it writes in the moment of the cut may be lost.
    """
    for path in folder.glob("*.log"):
        if path.stat().st_size <= most:
            continue
        with path.open("r+b", buffering=0) as log:
            log.seek(-keep, os.SEEK_END)
            _, _, tail = log.read().partition(b"\n")
            log.truncate(0)
        with path.open("ab", buffering=0) as log:
            log.write(b"(older lines were cut)\n" + tail)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder; a file that goes away meanwhile counts as nothing."""
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        try:
            yield path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue


def _prune_ticks(instance: dg.DagsterInstance, cutoff: datetime, failure_cutoff: datetime) -> None:
    quiet = [TickStatus.SKIPPED, TickStatus.SUCCESS, TickStatus.STARTED]
    for state in instance.all_instigator_state():
        origin, selector = state.instigator_origin_id, state.selector_id
        instance.purge_ticks(origin, selector, cutoff.timestamp(), quiet)
        instance.purge_ticks(origin, selector, failure_cutoff.timestamp(), [TickStatus.FAILURE])


def _prune_runless_events(storage: LeanEventLogStorage, cutoff: datetime) -> int:
    table = SqlEventLogStorageTable
    newest = (
        sa.select(sa.func.max(table.c.id))
        .where(table.c.run_id == "")
        .group_by(table.c.asset_key, table.c.dagster_event_type, table.c.partition)
    )
    doomed = sa.delete(table).where(
        table.c.run_id == "",
        table.c.dagster_event_type.in_(_RUNLESS_TYPES),
        table.c.timestamp < cutoff.replace(tzinfo=None),
        table.c.id.notin_(newest),
    )
    with storage.index_connection() as connection:
        return int(connection.execute(doomed).rowcount)


def _prune_runs(instance: dg.DagsterInstance, cutoff: datetime, failure_cutoff: datetime) -> int:
    newest = (record.asset_entry.last_materialization for record in instance.get_asset_records())
    holders = {event.run_id for event in newest if event is not None}
    finished = dg.RunsFilter(tags=REFRESH_TAG, statuses=_FINISHED, updated_before=cutoff)
    deleted = 0
    for record in instance.get_run_records(finished, limit=MAX_RUNS, ascending=True):
        run = record.dagster_run
        has_failed = run.status is not dg.DagsterRunStatus.SUCCESS
        if run.run_id in holders or (has_failed and record.update_timestamp > failure_cutoff):
            continue
        instance.delete_run(run.run_id)
        shutil.rmtree(Path(instance.storage_directory()) / run.run_id, ignore_errors=True)
        deleted += 1
    return deleted


def _prune_check_results(storage: LeanEventLogStorage, cutoff: datetime) -> int:
    table = AssetCheckExecutionsTable
    newest = sa.select(sa.func.max(table.c.id)).group_by(table.c.asset_key, table.c.check_name)
    doomed = sa.delete(table).where(table.c.create_timestamp < cutoff.replace(tzinfo=None), table.c.id.notin_(newest))
    with storage.index_connection() as connection:
        return int(connection.execute(doomed).rowcount)
