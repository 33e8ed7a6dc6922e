"""The ledger as tables: recommendations, what happened to each, what it did, and how right they have been.

Here: DDL, one refresh from reading to storing, what other parts ask and report. Not here: stepping over windows
(`resources.ledger.derive`), deciding (`optiinfra_pipelines.analysis`).

    recommendations               one row per recommendation ever made, replaced as its life goes on
    recommendation_evidence       one row per recommendation and signal, with the SQL that fetches the value again
    recommendation_ledger         one row per event, append-only
    recommendation_effects        the newest measured effect of each applied recommendation
    recommendation_abstentions    why rules proposed nothing in the newest window, one row per subject and rule
    fct_recommendation_accuracy   one row per kind and rule, and one for all
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import duckdb

from optiinfra_pipelines.analysis.ledger import life as ledger
from optiinfra_pipelines.analysis.ledger.accuracy import accuracy
from optiinfra_pipelines.analysis.ledger.held import held_spans
from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.recommendations import (
    FINAL,
    Accuracy,
    LedgerEntry,
    LedgerEvent,
    LedgerState,
    RealizedEffect,
    Recommendation,
    RuleAbstention,
)
from optiinfra_pipelines.domain.rollouts import Change, Rollout
from optiinfra_pipelines.domain.thresholds import threshold_values
from optiinfra_pipelines.rollout.present import present_flags
from resources.ledger.derive import Deriver, Ledger, Standing
from resources.warehouse import Warehouse

# Rows of a window may land this late: a slow scrape, or a batch that waited in the spool.
SETTLE = timedelta(seconds=30)
# A first look, or one after a long pause, goes back so far: the raw rows' own retention is 48 h.
BACKFILL = timedelta(hours=24)
# Windows of one session; collection gets its turn in between.
CHUNK = 24

_TABLES = """
create table if not exists recommendations (
    id varchar, subject_kind varchar, subject_name varchar, rule varchar, kind varchar, knob_group varchar,
    direction varchar, engine varchar, config_hash varchar, source varchar, made_at timestamptz,
    last_seen_at timestamptz, state varchar, state_at timestamptz, applied_at timestamptz, replaced_by varchar,
    change_text varchar, effect_signal varchar, effect_unit varchar, effect_before double, effect_low double,
    effect_high double, effect_basis varchar, score double, usd_per_hour_change double, risk varchar,
    quality_gate varchar, finding_ids varchar[], document varchar, changing_since timestamptz);
alter table recommendations add column if not exists changing_since timestamptz;
create table if not exists recommendation_evidence (
    recommendation_id varchar, place integer, name varchar, value double, unit varchar, window_start timestamptz,
    window_end timestamptz, threshold double, table_name varchar, keys varchar, sql varchar);
create table if not exists recommendation_ledger (
    recommendation_id varchar, happened_at timestamptz, kind varchar, reason varchar, detail varchar,
    state_after varchar);
create table if not exists recommendation_effects (
    recommendation_id varchar, signal varchar, unit varchar, change double, change_low double, change_high double,
    grade varchar, measured_at timestamptz, usd_per_hour double, document varchar);
create table if not exists recommendation_abstentions (
    judged_at timestamptz, subject_kind varchar, subject_name varchar, rule varchar, kind varchar, reason varchar);
create table if not exists fct_recommendation_accuracy (
    kind varchar, rule varchar, n integer, minimum_n integer, is_enough boolean, right_sign_share_ratio double,
    right_sign_low_ratio double, right_sign_high_ratio double, coverage_share_ratio double,
    coverage_low_ratio double, coverage_high_ratio double, concurrent_n integer, applied_n integer,
    unverifiable_n integer, realized_usd_per_hour double, says varchar);
create table if not exists recommendation_progress (derived_until timestamptz, standing varchar);
"""


@dataclass(frozen=True)
class Derived:
    """One refresh: the windows looked at, what is open now, what the rules refused in the newest window.

    from_rollouts: events that rollouts gave.
    """

    windows: int
    until: datetime | None
    opened: tuple[Recommendation, ...]
    standing: tuple[LedgerEntry, ...]
    abstentions: tuple[RuleAbstention, ...]
    from_rollouts: int = 0


class LedgerStore:
    """Derive, keep and read recommendations. Opens the warehouse for each call only.

    Rules look at windows of `advice_window_seconds`; a candidate must stand in `advice_windows` of them in a row.
    """

    def __init__(self, fleet: Fleet, warehouse: Warehouse, clock: Callable[[], datetime]) -> None:
        self._warehouse = warehouse
        self._clock = clock
        values = threshold_values(fleet.thresholds)
        window = timedelta(seconds=values["advice_window_seconds"])
        self._deriver = Deriver(fleet, window, in_a_row=int(values["advice_windows"]))

    def refresh(self, rollouts: Sequence[Rollout] = ()) -> Derived:
        """Look at every closed window since the last refresh, then count how right the advice has been.

        rollouts: all there are. What those of recommendations have come to is taken over first, and while one is open
        nothing else marks its recommendation applied.
        """
        reported = self._report_rollouts(rollouts)
        deployments = {one.deployment for one in rollouts}
        present = {name: present_flags(rollouts, name) for name in deployments}
        until = self._clock() - SETTLE
        opened: list[Recommendation] = []
        windows = 0
        with self._session() as connection:
            until_before, standing = _progress(connection)
            after = until_before or _first_sample(connection)
        if after is None:
            return Derived(0, None, (), (), (), reported)
        pending = self._deriver.windows(max(after, until - BACKFILL), until)
        for start in range(0, len(pending), CHUNK):
            part = pending[start : start + CHUNK]
            with self._session() as connection:
                book = replace(_load(connection), held=held_spans(rollouts), present=present)
                for end in part:
                    if until_before != end - self._deriver.window:
                        standing = {}
                    standing = self._deriver.step(connection, end, book, standing)
                    until_before = end
                _save(connection, book, (part[-1], standing))
            opened += book.new
            windows += len(part)
        with self._session() as connection:
            book = _load(connection)
            _save_accuracy(connection, accuracy(list(book.entries.values()), book.realized))
            abstentions = _abstentions(connection)
        alive = tuple(entry for entry in book.entries.values() if entry.state not in FINAL)
        return Derived(windows, pending[-1] if pending else after, tuple(opened), alive, abstentions, reported)

    def entries(self, *states: LedgerState) -> list[LedgerEntry]:
        """Entries in these states (all when none is named), best first."""
        with self._session() as connection:
            found = _load(connection).entries.values()
        wanted = [entry for entry in found if not states or entry.state in states]
        return sorted(wanted, key=lambda one: (-one.recommendation.score, one.recommendation.id))

    def open_recommendations(self) -> tuple[Recommendation, ...]:
        """What is advised now, best first."""
        return tuple(entry.recommendation for entry in self.entries(LedgerState.OPEN))

    def find_change(self, recommendation_id: str) -> Change:
        """The change of a recommendation, for a rollout.

        ValueError when it is unknown, no change of flags, or not open any more: then its evidence is of another load
        or another configuration.
        """
        found = {entry.recommendation.id: entry for entry in self.entries()}.get(recommendation_id)
        if found is None:
            raise ValueError(f"there is no recommendation {recommendation_id}; `recommendations` lists what there is")
        if found.state not in (LedgerState.OPEN, LedgerState.PROPOSED):
            instead = f"; {found.replaced_by} took its place" if found.replaced_by else ""
            raise ValueError(f"recommendation {recommendation_id} is {found.state.value}{instead}; choose an open one")
        return found.recommendation.to_change()

    def accuracy(self) -> list[Accuracy]:
        """How right recommendations have been, as of now."""
        with self._session() as connection:
            book = _load(connection)
        return accuracy(list(book.entries.values()), book.realized)

    def report(self, event: LedgerEvent) -> ledger.Move:
        """Something that happened to a recommendation, as a person or another part tells it; once however often told.

        ValueError for an unknown recommendation. A move that cannot be is returned with its refusal, not stored.
        """
        with self._session() as connection:
            book = _load(connection)
            entry = book.entries.get(event.recommendation_id)
            if entry is None:
                raise ValueError(f"there is no recommendation {event.recommendation_id}")
            move = ledger.transition(entry.state, event.kind)
            if move.refusal is None:
                book.add(event)
                _save(connection, book, None)
        return move

    def _report_rollouts(self, rollouts: Iterable[Rollout]) -> int:
        """Take over what rollouts of recommendations have come to; returns how many events that gave."""
        speaking = ledger.spokesmen(rollouts)
        if not speaking:
            return 0
        with self._session() as connection:
            book = _load(connection)
            for rollout in speaking:
                entry = book.entries.get(rollout.proposal.recommendation_id or "")
                event = None if entry is None else ledger.from_rollout(entry, rollout)
                if event is not None:
                    book.add(event)
            if book.events:
                _save(connection, book, None)
        return len(book.events)

    @contextmanager
    def _session(self) -> Iterator[duckdb.DuckDBPyConnection]:
        with self._warehouse.connect() as connection:
            connection.execute(_TABLES)
            yield connection


def _progress(connection: duckdb.DuckDBPyConnection) -> tuple[datetime | None, Standing]:
    rows = connection.execute("select derived_until, standing from recommendation_progress").fetchall()
    if not rows:
        return None, {}
    [(until, standing)] = rows
    return until, {(subject, rule): count for subject, rule, count in json.loads(standing)}


def _first_sample(connection: duckdb.DuckDBPyConnection) -> datetime | None:
    [(first,)] = connection.execute("select min(scraped_at) from stg_engine_samples").fetchall()
    known: datetime | None = first
    return known


def _load(connection: duckdb.DuckDBPyConnection) -> Ledger:
    rows = connection.execute(
        "select document, state, state_at, last_seen_at, applied_at, replaced_by, changing_since from recommendations "
        "order by id"
    ).fetchall()
    entries = {}
    for document, state, state_at, last_seen_at, applied_at, replaced_by, changing_since in rows:
        recommendation = Recommendation.model_validate_json(document)
        entries[recommendation.id] = LedgerEntry(
            recommendation=recommendation,
            state=LedgerState(state),
            state_at=state_at,
            last_seen_at=last_seen_at,
            applied_at=applied_at,
            replaced_by=replaced_by,
            changing_since=changing_since,
        )
    documents = connection.execute("select document from recommendation_effects").fetchall()
    realized = [RealizedEffect.model_validate_json(document) for (document,) in documents]
    return Ledger(entries, {one.recommendation_id: one for one in realized})


def _save(connection: duckdb.DuckDBPyConnection, book: Ledger, progress: tuple[datetime, Standing] | None) -> None:
    """Everything of a run of windows in one transaction: a kill leaves all of it or none."""
    connection.execute("begin transaction")
    try:
        ids = list(book.entries)
        connection.execute("delete from recommendations where id in (select unnest($1::varchar[]))", [ids])
        _insert(connection, "recommendations", [_row(entry) for entry in book.entries.values()])
        new = [one.id for one in book.new]
        connection.execute(
            "delete from recommendation_evidence where recommendation_id in (select unnest($1::varchar[]))", [new]
        )
        _insert(connection, "recommendation_evidence", [row for one in book.new for row in _evidence_rows(one)])
        _insert(connection, "recommendation_ledger", [_event_row(event, state) for event, state in book.events])
        measured = list(book.realized)
        connection.execute(
            "delete from recommendation_effects where recommendation_id in (select unnest($1::varchar[]))", [measured]
        )
        _insert(connection, "recommendation_effects", [_effect_row(one) for one in book.realized.values()])
        if progress is not None:
            connection.execute("delete from recommendation_abstentions")
            _insert(connection, "recommendation_abstentions", [_abstention_row(one) for one in book.abstentions])
            connection.execute("delete from recommendation_progress")
            connection.execute(
                "insert into recommendation_progress values (?, ?)",
                [progress[0], json.dumps(sorted((*key, count) for key, count in progress[1].items()))],
            )
    except BaseException:
        connection.execute("rollback")
        raise
    connection.execute("commit")


def _save_accuracy(connection: duckdb.DuckDBPyConnection, rows: Sequence[Accuracy]) -> None:
    connection.execute("begin transaction")
    connection.execute("delete from fct_recommendation_accuracy")
    _insert(connection, "fct_recommendation_accuracy", [tuple(one.model_dump().values()) for one in rows])
    connection.execute("commit")


def _abstentions(connection: duckdb.DuckDBPyConnection) -> tuple[RuleAbstention, ...]:
    rows = connection.execute(
        "select judged_at, subject_kind, subject_name, rule, kind, reason from recommendation_abstentions order by all"
    ).fetchall()
    return tuple(
        RuleAbstention.model_validate(
            {
                "at": at,
                "subject": {"kind": subject_kind, "name": name},
                "rule": rule,
                "kind": kind,
                "reason": reason,
            }
        )
        for at, subject_kind, name, rule, kind, reason in rows
    )


def _insert(connection: duckdb.DuckDBPyConnection, table: str, rows: Sequence[tuple[object, ...]]) -> None:
    if rows:
        places = ", ".join("?" * len(rows[0]))
        connection.executemany(f"insert into {table} values ({places})", [list(row) for row in rows])


def _row(entry: LedgerEntry) -> tuple[object, ...]:
    one, effect = entry.recommendation, entry.recommendation.effects[0]
    return (
        *(one.id, one.subject.kind, one.subject.name, one.rule, one.kind.value, one.knob_group.value, one.direction),
        *(one.engine, one.config_hash, one.source, one.made_at, entry.last_seen_at, entry.state.value),
        *(entry.state_at, entry.applied_at, entry.replaced_by, one.change_text, effect.signal, effect.unit),
        *(effect.before, effect.change_low, effect.change_high, effect.basis.value, one.score),
        *(one.usd_per_hour_change, one.risk, one.quality_gate, list(one.finding_ids), one.model_dump_json()),
        entry.changing_since,
    )


def _evidence_rows(one: Recommendation) -> Iterator[tuple[object, ...]]:
    for place, signal in enumerate(one.evidence):
        yield (
            *(one.id, place, signal.name, signal.value, signal.unit, signal.window_start, signal.window_end),
            *(signal.threshold, signal.table, json.dumps(dict(signal.keys)), signal.sql()),
        )


def _event_row(event: LedgerEvent, state: LedgerState) -> tuple[object, ...]:
    return (event.recommendation_id, event.at, event.kind.value, event.reason, json.dumps(event.detail), state.value)


def _effect_row(one: RealizedEffect) -> tuple[object, ...]:
    return (
        *(one.recommendation_id, one.signal, one.unit, one.change, one.change_low, one.change_high),
        *(one.grade.value, one.measured_at, one.usd_per_hour, one.model_dump_json()),
    )


def _abstention_row(one: RuleAbstention) -> tuple[object, ...]:
    kind = None if one.kind is None else one.kind.value
    return (one.at, one.subject.kind, one.subject.name, one.rule, kind, one.reason)
