"""Dagster's own storage, made small: one file per kind, one connection kept open, every fact once.

Here: three storage classes that dagster.yaml names, each Dagster's SQLite class with less to write. Not here: deleting
what is old (`resources.dagster_home.prune`).

As it comes, Dagster stores an event twice and an output's metadata a third time, a file per run, a row per tick and
every look at every automation condition; and it opens and closes a database at each statement, which makes SQLite copy
its log back each time. Watching one host grew it by 510 MB a day and handed 240 MB to the disk in five minutes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, cast

import sqlalchemy as sa
from dagster import DagsterEventType
from dagster._core.definitions.asset_key import EntityKey
from dagster._core.definitions.assets.job.asset_job import IMPLICIT_ASSET_JOB_NAME
from dagster._core.definitions.declarative_automation.serialized_objects import (
    AutomationConditionEvaluationWithRunIds,
)
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.definitions.sensor_definition import SensorType
from dagster._core.events.log import EventLogEntry
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorTick,
    SensorInstigatorData,
    TickData,
    TickStatus,
)
from dagster._core.storage.event_log import ConsolidatedSqliteEventLogStorage
from dagster._core.storage.event_log.schema import SqlEventLogStorageTable
from dagster._core.storage.runs import SqliteRunStorage
from dagster._core.storage.schedules import SqliteScheduleStorage
from dagster._core.storage.schedules.schema import AssetDaemonAssetEvaluationsTable
from dagster._serdes import ConfigurableClassData
from watchdog.events import FileSystemEvent, PatternMatchingEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

# Under contention a writer waits this long for its turn, as Dagster's own classes do.
BUSY_SECONDS = 30.0
# A sensor's quiet ticks share a row for this long, and its state is written at least this often.
QUIET_SECONDS = 60.0


class OpenEngine:
    """One SQLAlchemy engine per process for one SQLite file: its connections stay open between statements.

    Closing a file's last connection makes SQLite copy the write-ahead log into the file and delete it. Kept open, that
    happens every 4 MB. With NORMAL, a power cut may lose the last commits of Dagster's history but never its order.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._engine: sa.Engine | None = None
        self._pid = 0

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A connection in a transaction that is committed at the end."""
        if self._engine is None or self._pid != os.getpid():
            self._engine = sa.create_engine(self._url, connect_args={"timeout": BUSY_SECONDS})
            sa.event.listen(self._engine, "connect", _be_calm)
            self._pid = os.getpid()
        with self._engine.begin() as connection:
            yield connection


def _be_calm(connection: Any, _: object) -> None:
    connection.execute("PRAGMA synchronous=NORMAL")


class LeanRunStorage(SqliteRunStorage):
    """Runs, in one file that stays open."""

    def __init__(self, conn_string: str, inst_data: ConfigurableClassData | None = None) -> None:
        self._open = OpenEngine(conn_string)
        super().__init__(conn_string, inst_data)

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> LeanRunStorage:
        return cls.from_local(inst_data=inst_data, **config_value)

    @contextmanager
    def connect(self) -> Iterator[sa.Connection]:
        with self._open.begin() as connection:
            yield connection


class LeanEventLogStorage(ConsolidatedSqliteEventLogStorage):
    """Events of all runs in one file: each event once, and what it repeats of another left out."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        self._open: OpenEngine | None = None
        self._observer: BaseObserver | None = None
        super().__init__(base_dir, inst_data)

    @contextmanager
    def index_connection(self) -> Iterator[sa.Connection]:
        if self._open is None:
            self._open = OpenEngine(self._conn_string)
        with self._open.begin() as connection:
            yield connection

    def run_connection(self, run_id: str | None) -> AbstractContextManager[sa.Connection]:
        return self.index_connection()

    def store_event(self, event: EventLogEntry) -> None:
        happened = event.dagster_event
        if happened is not None and happened.event_type is DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED:
            # The table of check results has it, until the result takes its place.
            self.store_asset_check_event(without_repetition(event), None)
        elif is_passed_check(event):
            # Likewise, at its place among the events: by these numbers Dagster tells what is newer.
            self.store_asset_check_event(without_repetition(event), self._newest_event_id())
        elif not is_empty_output(event) and not is_stage_direction(event):
            super().store_event(without_repetition(event))

    def _newest_event_id(self) -> int:
        with self.index_connection() as connection:
            return connection.execute(sa.select(sa.func.max(SqlEventLogStorageTable.c.id))).scalar() or 0

    def _tags_for_asset_event(self, event: EventLogEntry) -> Mapping[str, str]:
        """A second copy of an event's tags, by which partitions are found; an asset without any has no use for it."""
        happened = event.dagster_event
        if happened is None or happened.partition is None:
            return {}
        return super()._tags_for_asset_event(event)

    def watch(self, run_id: str, cursor: str | None, callback: Any) -> None:
        """As the parent's, which looks at the database file alone: what is new stands in its write-ahead log."""
        if self._observer is None:
            self._observer = Observer()
            self._observer.start()
            self._observer.schedule(_LogWatchdog(self), self._base_dir)
        self._watchers[run_id][callback] = cursor

    def dispose(self) -> None:
        if self._observer is not None:
            self._observer.stop()
            self._observer.join(timeout=15)


class _LogWatchdog(PatternMatchingEventHandler):
    def __init__(self, storage: LeanEventLogStorage) -> None:
        super().__init__(patterns=[f"{storage.get_db_path()}*"])  # type: ignore[no-untyped-call]
        self._storage = storage

    def on_modified(self, event: FileSystemEvent) -> None:
        self._storage.on_modified()  # type: ignore[no-untyped-call]


def is_empty_output(event: EventLogEntry) -> bool:
    """An asset of ours hands nothing on: that its step yielded nothing is said by its materialization.

    Outputs of other jobs' ops are needed to run them again from a failure.
    """
    happened = event.dagster_event
    return (
        happened is not None
        and happened.event_type is DagsterEventType.STEP_OUTPUT
        and event.job_name == IMPLICIT_ASSET_JOB_NAME
    )


def is_passed_check(event: EventLogEntry) -> bool:
    """The table of check results holds the whole event; a failed check stands in its run's log as well."""
    happened = event.dagster_event
    return (
        happened is not None
        and happened.event_type is DagsterEventType.ASSET_CHECK_EVALUATION
        and happened.asset_check_evaluation_data.passed
    )


_STAGE_DIRECTIONS = frozenset(
    {DagsterEventType.ENGINE_EVENT, DagsterEventType.RESOURCE_INIT_STARTED, DagsterEventType.RESOURCE_INIT_SUCCESS}
)


def is_stage_direction(event: EventLogEntry) -> bool:
    """Which process runs a refresh and that its resources are there: of no use when it went well. Errors are kept."""
    happened = event.dagster_event
    return (
        happened is not None
        and happened.event_type in _STAGE_DIRECTIONS
        and event.job_name == IMPLICIT_ASSET_JOB_NAME
        and event.error_info is None
        and getattr(happened.event_specific_data, "error", None) is None
    )


def without_repetition(event: EventLogEntry) -> EventLogEntry:
    """Logging tags are the other columns again."""
    happened = event.dagster_event
    return event if happened is None else event._replace(dagster_event=happened._replace(logging_tags={}))


class _Held(NamedTuple):
    """A sensor's state as it is, and as it was written."""

    state: InstigatorState
    written: InstigatorState


class LeanScheduleStorage(SqliteScheduleStorage):
    """Ticks, sensors' states and automation's evaluations.

    A tick that did nothing shares one row with the others of its minute. The state of a sensor whose cursor has not
    changed is written once a minute, and known to this process meanwhile; whatever another process writes counts.
    Of the evaluations of an asset the newest is kept, which says why it does not run now.
    """

    def __init__(self, conn_string: str, inst_data: ConfigurableClassData | None = None) -> None:
        self._open = OpenEngine(conn_string)
        self._quiet: dict[str, InstigatorTick] = {}
        self._held: dict[str, _Held] = {}
        self._there: set[str] = set()
        super().__init__(conn_string, inst_data)

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, str]
    ) -> LeanScheduleStorage:
        return cast("LeanScheduleStorage", cls.from_local(inst_data=inst_data, **config_value))

    @contextmanager
    def connect(self) -> Iterator[sa.Connection]:
        with self._open.begin() as connection:
            yield connection

    def has_instigators_table(self) -> bool:
        """Asked several times a tick, as is the next; what is there once stays."""
        return self._is_there("instigators", super().has_instigators_table)

    def has_built_index(self, migration_name: str) -> bool:
        return self._is_there(migration_name, lambda: super(LeanScheduleStorage, self).has_built_index(migration_name))

    def _is_there(self, name: str, look: Callable[[], bool]) -> bool:
        if name not in self._there and look():
            self._there.add(name)
        return name in self._there

    # ---- ticks ----

    def create_tick(self, tick_data: TickData) -> InstigatorTick:
        quiet = self._quiet.get(tick_data.selector_id or "")
        if quiet is not None and _may_share(tick_data) and _is_within(quiet.timestamp, tick_data.timestamp):
            return InstigatorTick(quiet.tick_id, tick_data)
        return super().create_tick(tick_data)

    def update_tick(self, tick: InstigatorTick) -> InstigatorTick:
        selector = tick.selector_id or ""
        if tick.status is not TickStatus.SKIPPED or not _may_share(tick.tick_data):
            # Something happened: it has its row from now on, and a restart must find the sensor's state.
            self._quiet.pop(selector, None)
            self._write_held(selector)
            return super().update_tick(tick)
        quiet = self._quiet.get(selector)
        if quiet is None or quiet.tick_id != tick.tick_id:
            super().update_tick(tick)
            self._quiet[selector] = tick
        return tick

    # ---- states ----

    def update_instigator_state(self, state: InstigatorState) -> InstigatorState:
        held = self._held.get(state.selector_id)
        if held is not None and _differs_in_times_only(held.written, state):
            self._held[state.selector_id] = held._replace(state=state)
            return state
        super().update_instigator_state(state)
        self._held[state.selector_id] = _Held(state, written=state)
        return state

    def get_instigator_state(self, origin_id: str, selector_id: str) -> InstigatorState | None:
        state = super().get_instigator_state(origin_id, selector_id)
        return None if state is None else self._newest(state)

    def all_instigator_state(self, *args: Any, **kwargs: Any) -> Sequence[InstigatorState]:
        return [self._newest(state) for state in super().all_instigator_state(*args, **kwargs)]

    def _newest(self, stored: InstigatorState) -> InstigatorState:
        held = self._held.get(stored.selector_id)
        if held is None:
            return stored
        if held.written == stored:
            return held.state
        del self._held[stored.selector_id]  # another process wrote: a person stopped it, or set its cursor
        return stored

    def _write_held(self, selector: str) -> None:
        held = self._held.get(selector)
        if held is not None and held.state != held.written:
            super().update_instigator_state(held.state)
            self._held[selector] = _Held(held.state, written=held.state)

    # ---- evaluations ----

    def add_auto_materialize_asset_evaluations(
        self, evaluation_id: int, asset_evaluations: Sequence[AutomationConditionEvaluationWithRunIds[EntityKey]]
    ) -> None:
        if not asset_evaluations:
            return
        table = AssetDaemonAssetEvaluationsTable
        keys = [evaluation.key.to_db_string() for evaluation in asset_evaluations]
        with self.connect() as connection:
            connection.execute(sa.delete(table).where(table.c.asset_key.in_(keys)))
        super().add_auto_materialize_asset_evaluations(evaluation_id, asset_evaluations)


def _may_share(tick: TickData) -> bool:
    """Ticks of our sensors that asked for no run; automation's own ticks number its evaluations."""
    return (
        tick.instigator_type is InstigatorType.SENSOR
        and tick.auto_materialize_evaluation_id is None
        and not tick.run_requests
        and not tick.run_ids
        and tick.error is None
    )


def _differs_in_times_only(written: InstigatorState, state: InstigatorState) -> bool:
    """Is it the same sensor with the same cursor, seen again within a minute?"""
    before, after = written.instigator_data, state.instigator_data
    if not isinstance(before, SensorInstigatorData) or not isinstance(after, SensorInstigatorData):
        return False
    if after.sensor_type is not SensorType.STANDARD:
        return False
    retimed = before._replace(
        last_tick_timestamp=after.last_tick_timestamp,
        last_tick_start_timestamp=after.last_tick_start_timestamp,
        last_tick_success_timestamp=after.last_tick_success_timestamp,
    )
    since, now = before.last_tick_start_timestamp or 0.0, after.last_tick_start_timestamp or 0.0
    return written.with_data(retimed) == state and _is_within(since, now)


def _is_within(earlier: float, later: float) -> bool:
    """A clock that was set back starts a new minute."""
    return 0 <= later - earlier < QUIET_SECONDS
