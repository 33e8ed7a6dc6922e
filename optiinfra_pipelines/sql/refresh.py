"""Bring stored models up to date: replace one window of an incremental model, remake a table, create a view.

A connection to the warehouse comes in, with the raw tables in it; nothing is opened or closed here, and the clock is
an argument.

How a window reaches the SQL: as the DuckDB variables `window_start` and `window_end`, which a model reads with
`getvariable`. By hand: `set variable window_start = timestamptz '2026-11-20 10:00:00+00'`, the same for `window_end`,
then the model's file as it is.

What is new: each incremental model remembers how far it has come (`model_state.high_water_at`: the moment of the
refresh, not the end of the step under way). The next window starts OVERLAP before that, because rows of one moment do
not land at one moment, and ends now; the step under way is filled as far as it has come, and redone next time. Rows
that land later than that are announced with `rewind`. The first window begins with the oldest row that can be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

import duckdb

from optiinfra_pipelines.sql.loader import create_table_sql
from optiinfra_pipelines.sql.macros import install_macros, macros_fingerprint
from optiinfra_pipelines.sql.models import (
    Materialization,
    Model,
    ModelError,
    Models,
    RefreshResult,
    Window,
    floor_time,
)

# A tick takes at most its deadline (2.5 s) plus the wait for the file's lock (a minute) before it is spooled instead.
OVERLAP = timedelta(minutes=2)

# Steps replaced in one transaction: 1 h of minutes. Bounds the memory of a back-fill and the work a crash loses.
CHUNK_STEPS = 60

# Up to here it costs less to make every chunk than to ask which have rows.
FEW_CHUNKS = 4

# Raw rows live two hours at the least, and the steps that hours are made from live for days, so a routine window
# shorter than this can always be made again in full, rounded out to the whole steps that it touches.
ALWAYS_READABLE = timedelta(hours=1)

# A clock found set back was set back after the refresh before, which is at most the longest cadence ago.
LONGEST_CADENCE = timedelta(days=1)

_MACROS = "(macros)"


def _nothing() -> None:
    """A table read by its own name shows its new columns by itself."""


@dataclass(frozen=True)
class Storage:
    """Where the rows of a model are written, if that is not the relation readers read by the model's name.

    relation: as SQL. renew_view: to be called when the relation's columns have changed, before the model is read.
    """

    relation: str
    renew_view: Callable[[], None] = _nothing


def own_table(model: Model) -> Storage:
    """A table of the model's name."""
    return Storage(f'"{model.name}"')


def refresh(
    con: duckdb.DuckDBPyConnection, model: Model, window: Window, storage: Storage | None = None
) -> RefreshResult:
    """Make a model right for [window.start, window.end); everything outside stays as it is.

    The window is rounded out to whole rows and cut to what the relations it reads still hold: rows that cannot be
    made again are not deleted. Each chunk is one transaction. A view or a table knows no window.
    ModelError where the stored table has a column of another type than the model returns.
    storage: of an incremental model; left out, a table of its name.
    """
    started = time.perf_counter()
    written_to = storage or own_table(model)
    high_water = prepare(con, model, written_to)
    done: Window | None = None
    rows = 0
    if model.materialization is Materialization.TABLE:
        con.execute(f'create or replace table "{model.name}" as {model.sql}')
        rows = _count(con, f'select count(*) from "{model.name}"')
    elif model.materialization is Materialization.INCREMENTAL:
        done = _readable(con, model, window, high_water)
        for chunk in _chunks(con, model, done) if done else ():
            rows += _replace(con, model, written_to.relation, chunk, min(chunk.end, window.end))
    return RefreshResult(model=model.name, rows=rows, seconds=time.perf_counter() - started, window=done)


def refresh_all(con: duckdb.DuckDBPyConnection, models: Models, now: datetime) -> list[RefreshResult]:
    """Bring every model up to `now`, in order. Models that have nothing to read yet are left alone."""
    results = []
    for model in models.values():
        window = next_window(con, model, now) or Window(start=now, end=now)
        results.append(refresh(con, model, window))
    return results


def next_window(con: duckdb.DuckDBPyConnection, model: Model, now: datetime) -> Window | None:
    """What a refresh at `now` has to do; None where there is nothing to read yet, or no window to speak of.

    A mark ahead of `now` means that the clock was set back: the mark goes back with it, and the last day is redone.
    """
    if model.materialization is not Materialization.INCREMENTAL:
        return None
    high_water = _state(con).get(model.name, (None, None))[1]
    if high_water and high_water > now:
        con.execute("update model_state set high_water_at = ? where model = ?", [now, model.name])
        return Window(start=now - LONGEST_CADENCE, end=now)
    start = high_water - OVERLAP if high_water else _edge(con, model, "min")
    return Window(start=min(start, now), end=now) if start else None


def rewind(con: duckdb.DuckDBPyConnection, earliest: datetime) -> None:
    """Rows as old as `earliest` have just landed (a spooled batch): have every model redone from there on."""
    _state(con)
    con.execute(
        "update model_state set high_water_at = ? where high_water_at > ?",
        [earliest + OVERLAP, earliest + OVERLAP],
    )


def prepare(con: duckdb.DuckDBPyConnection, model: Model, storage: Storage | None = None) -> datetime | None:
    """See that macros, state and the model's own view or table are there; how far an incremental model has come."""
    state = _state(con)
    if state.get(_MACROS, ("",))[0] != macros_fingerprint():
        install_macros(con)
        _remember(con, _MACROS, macros_fingerprint(), None)
    fingerprint, high_water = state.get(model.name, (None, None))
    if fingerprint != model.fingerprint:
        if model.materialization is Materialization.VIEW:
            con.execute(f'create or replace view "{model.name}" as {model.sql}')
        elif model.materialization is Materialization.INCREMENTAL:
            if storage is None or storage == own_table(model):
                con.execute(create_table_sql(model.name, model.columns))
            _evolve(con, model, storage or own_table(model))
        _remember(con, model.name, model.fingerprint, high_water)
    return high_water


def _evolve(con: duckdb.DuckDBPyConnection, model: Model, storage: Storage) -> None:
    """Add the columns a model has gained since its table was made, NULL in rows of before; drop those it has lost."""
    table = storage.relation
    stored = {row[0]: str(row[1]) for row in con.execute(f"describe {table}").fetchall()}
    for column in model.columns:
        if column.name not in stored:
            con.execute(f'alter table {table} add column "{column.name}" {column.sql_type}')
        elif stored[column.name] != column.sql_type:
            raise ModelError(
                f"{model.path} returns {column.name} as {column.sql_type}, but the stored table has "
                f"{stored[column.name]}; cast it back, or drop the table {model.name} to have it made anew"
            )
    for gone in stored.keys() - {column.name for column in model.columns}:
        con.execute(f'alter table {table} drop column "{gone}"')
    storage.renew_view()


def _replace(con: duckdb.DuckDBPyConnection, model: Model, table: str, window: Window, until: datetime) -> int:
    """Delete a window of a model and write it again, with the mark of how far it has come, in one transaction."""
    inside = f"\"{model.time}\" >= getvariable('window_start') and \"{model.time}\" < getvariable('window_end')"
    con.execute("begin transaction")
    try:
        _set_window(con, window)
        con.execute(f"delete from {table} where {inside}")
        written = _count(con, f"insert into {table} by name select * from ({model.sql}) where {inside}")
        con.execute(
            "update model_state set high_water_at = greatest(coalesce(high_water_at, ?), ?) where model = ?",
            [until, until, model.name],
        )
        con.execute("commit")
    except BaseException:
        con.execute("rollback")
        raise
    return written


def _set_window(con: duckdb.DuckDBPyConnection, window: Window) -> None:
    """The window as variables of the connection, in UTC whatever time zone its session has."""
    con.execute(
        f"set variable window_start = timestamptz '{window.start.isoformat()}';"
        f"set variable window_end = timestamptz '{window.end.isoformat()}'"
    )


def _readable(
    con: duckdb.DuckDBPyConnection, model: Model, window: Window, high_water: datetime | None
) -> Window | None:
    """The window in whole steps, without the past that is gone from what the model reads; None if all of it is."""
    rounded = window.rounded_out(model.step_seconds)
    is_routine = window.end - window.start <= ALWAYS_READABLE and (not high_water or rounded.end >= high_water)
    if is_routine or not high_water:
        return rounded if rounded.start < rounded.end else None
    oldest = _edge(con, model, "max")
    if oldest is None:
        return None
    first = floor_time(oldest, model.step_seconds)
    if first < oldest:
        first += timedelta(seconds=model.step_seconds)
    return Window(start=max(rounded.start, first), end=rounded.end) if first < rounded.end else None


def _edge(con: duckdb.DuckDBPyConnection, model: Model, which: str) -> datetime | None:
    """The oldest moment among what a model reads ('min'), or the oldest that all of it reaches back to ('max')."""
    oldest = " union all ".join(
        f'select min("{column}") as oldest_at from "{name}"' for name, column in model.times.items()
    )
    row = con.execute(f"select {which}(oldest_at) from ({oldest})").fetchone() if oldest else None
    edge: datetime | None = row[0] if row else None
    return edge


def _chunks(con: duckdb.DuckDBPyConnection, model: Model, window: Window) -> list[Window]:
    """The window in chunks. Of a long one only those with rows to read or to replace, and the last.

    Rows of a host that booted with its clock at 1970 lie half a million empty chunks before today's.
    """
    width = timedelta(seconds=model.step_seconds * CHUNK_STEPS)
    count = -((window.start - window.end) // width)
    numbers: Iterable[int] = range(count)
    if count > FEW_CHUNKS:
        times = {**model.times, model.name: model.time}
        rows = " union ".join(
            f'select epoch_us("{column}") // 1000000 as second from "{name}" '
            f"where \"{column}\" >= getvariable('window_start') and \"{column}\" < getvariable('window_end')"
            for name, column in times.items()
        )
        _set_window(con, window)
        found = con.execute(
            f"select distinct (second - {int(window.start.timestamp())}) // {int(width.total_seconds())} from ({rows})"
        ).fetchall()
        numbers = sorted({count - 1, *(int(number) for (number,) in found)})
    return [
        Window(start=window.start + number * width, end=min(window.start + (number + 1) * width, window.end))
        for number in numbers
    ]


def _state(con: duckdb.DuckDBPyConnection) -> dict[str, tuple[str | None, datetime | None]]:
    """Fingerprint and high-water mark of every model that was ever prepared here."""
    con.execute(
        "create table if not exists model_state (model VARCHAR, fingerprint VARCHAR, high_water_at TIMESTAMPTZ)"
    )
    rows = con.execute("select model, fingerprint, high_water_at from model_state").fetchall()
    return {model: (fingerprint, high_water) for model, fingerprint, high_water in rows}


def _remember(con: duckdb.DuckDBPyConnection, name: str, fingerprint: str, high_water: datetime | None) -> None:
    con.execute("delete from model_state where model = ?", [name])
    con.execute("insert into model_state values (?, ?, ?)", [name, fingerprint, high_water])


def _count(con: duckdb.DuckDBPyConnection, sql: str) -> int:
    row = con.execute(sql).fetchone()
    return int(row[0]) if row else 0
