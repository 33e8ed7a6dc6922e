"""Findings as tables: what stands now, its evidence, and what could not be judged.

Here: DDL, reading the findings that may go on, replacing what changed, one refresh from reading to storing. Not here:
judging (`optiinfra_pipelines.analysis`), what is read for it (`resources.findings.reader`).

    findings              one row per finding ever made, replaced as it goes on
    finding_evidence      one row per finding and signal, with the SQL that fetches the value again
    finding_abstentions   one row per subject and kind that the newest refresh could not judge
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import duckdb
import polars as pl

from optiinfra_pipelines.analysis.findings.deployment import diagnose_deployment
from optiinfra_pipelines.analysis.findings.diagnosis import diagnose
from optiinfra_pipelines.analysis.findings.gpu import diagnose_gpu
from optiinfra_pipelines.analysis.findings.host import diagnose_host
from optiinfra_pipelines.analysis.findings.links import link_causes
from optiinfra_pipelines.analysis.findings.update import update_findings
from optiinfra_pipelines.domain.evidence import Signal
from optiinfra_pipelines.domain.findings import Abstention, Diagnosis, Finding
from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.thresholds import threshold_values
from resources.findings.reader import Windows, deployments_of, read_windows
from resources.warehouse import Warehouse

_TABLES = """
create table if not exists findings (
    id varchar, subject_kind varchar, subject_name varchar, kind varchar, cause varchar, severity varchar,
    since timestamptz, until timestamptz, last_seen_at timestamptz, source varchar, summary varchar,
    consequences varchar, caused_by varchar, updated_at timestamptz, document varchar);
create table if not exists finding_evidence (
    finding_id varchar, place integer, name varchar, value double, unit varchar, window_start timestamptz,
    window_end timestamptz, threshold double, table_name varchar, keys varchar, column_name varchar,
    statistic varchar, sql varchar);
create table if not exists finding_abstentions (
    judged_at timestamptz, subject_kind varchar, subject_name varchar, kind varchar, reason varchar);
"""


@dataclass(frozen=True)
class Refreshed:
    """One refresh: every finding that stands or may come back, what could not be judged, and how long it took."""

    at: datetime
    findings: tuple[Finding, ...]
    abstentions: tuple[Abstention, ...]
    subject_count: int


class FindingsStore:
    """Derive, keep and read findings. Opens the warehouse for each call only."""

    def __init__(self, fleet: Fleet, warehouse: Warehouse, clock: Callable[[], datetime]) -> None:
        self._fleet = fleet
        self._warehouse = warehouse
        self._clock = clock

    def refresh(self) -> Refreshed:
        """Judge the whole fleet at the clock's now and store what stands."""
        now, values = self._clock(), threshold_values(self._fleet.thresholds)
        with self._warehouse.connect() as connection:
            connection.execute(_TABLES)
            windows = read_windows(connection, self._fleet, now, values)
            previous = _previous(connection, now - timedelta(seconds=values["reopen_within_seconds"]))
        diagnoses = diagnose_all(windows, values)
        standing = link_causes(
            update_findings(previous, diagnoses, now, values),
            host_of={target.name: target.host for target in self._fleet.targets if target.host},
            deployment_of=deployments_of(self._fleet.targets),
            frontends=frozenset(window.target for window in windows.engines if window.vantage == "frontend"),
        )
        abstentions = tuple(abstention for diagnosis in diagnoses for abstention in diagnosis.abstentions)
        with self._warehouse.connect() as connection:
            _save(connection, standing, abstentions, now)
        return Refreshed(now, standing, abstentions, len(diagnoses))

    def open_findings(self) -> tuple[Finding, ...]:
        """What stands now, worst first."""
        with self._warehouse.connect() as connection:
            connection.execute(_TABLES)
            rows = connection.execute("select document from findings where until is null").fetchall()
        order = {"critical": 0, "warning": 1, "info": 2}
        found = (Finding.model_validate_json(document) for (document,) in rows)
        return tuple(sorted(found, key=lambda one: (order[one.severity], one.since, one.id)))


def diagnose_all(windows: Windows, values: Mapping[str, float]) -> list[Diagnosis]:
    """A diagnosis of every subject, targets first."""
    return [
        *(diagnose(window, values) for window in windows.engines),
        *(diagnose_deployment(window, values) for window in windows.deployments),
        *(diagnose_gpu(window, values) for window in windows.gpus),
        *(diagnose_host(window, values) for window in windows.hosts),
    ]


def _previous(connection: duckdb.DuckDBPyConnection, since: datetime) -> list[Finding]:
    rows = connection.execute(
        "select document from findings where until is null or last_seen_at >= $1", [since]
    ).fetchall()
    return [Finding.model_validate_json(document) for (document,) in rows]


def _save(
    connection: duckdb.DuckDBPyConnection, findings: Sequence[Finding], abstentions: Sequence[Abstention], now: datetime
) -> None:
    """Replace what these findings were, in one transaction; findings that are over stay as they ended."""
    connection.execute("begin transaction")
    try:
        ids = [one.id for one in findings]
        connection.execute("delete from findings where id in (select unnest($1::varchar[]))", [ids])
        connection.execute("delete from finding_evidence where finding_id in (select unnest($1::varchar[]))", [ids])
        connection.execute("delete from finding_abstentions")
        _insert(connection, "findings", [_finding_row(one, now) for one in findings])
        evidence = [_signal_row(one.id, n, s) for one in findings for n, s in enumerate(one.evidence)]
        _insert(connection, "finding_evidence", evidence)
        _insert(connection, "finding_abstentions", [_abstention_row(one, now) for one in abstentions])
    except BaseException:
        connection.execute("rollback")
        raise
    connection.execute("commit")


def _insert(connection: duckdb.DuckDBPyConnection, table: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Rows by column name. As one frame: a thousand single inserts take seconds."""
    if not rows:
        return
    connection.register("new_rows", pl.DataFrame(rows, infer_schema_length=None))
    connection.execute(f"insert into {table} by name select * from new_rows")
    connection.unregister("new_rows")


def _finding_row(one: Finding, now: datetime) -> dict[str, object]:
    return {
        "id": one.id,
        "subject_kind": one.subject.kind,
        "subject_name": one.subject.name,
        "kind": one.kind.value,
        "cause": one.cause,
        "severity": one.severity.value,
        "since": one.since,
        "until": one.until,
        "last_seen_at": one.last_seen_at,
        "source": one.source,
        "summary": one.summary,
        "consequences": json.dumps([effect.model_dump(mode="json") for effect in one.consequences]),
        "caused_by": one.caused_by,
        "updated_at": now,
        "document": one.model_dump_json(),
    }


def _signal_row(finding_id: str, place: int, signal: Signal) -> dict[str, object]:
    return {
        "finding_id": finding_id,
        "place": place,
        "name": signal.name,
        "value": signal.value,
        "unit": signal.unit,
        "window_start": signal.window_start,
        "window_end": signal.window_end,
        "threshold": signal.threshold,
        "table_name": signal.table,
        "keys": json.dumps(dict(signal.keys)),
        "column_name": signal.column,
        "statistic": signal.statistic,
        "sql": signal.sql(),
    }


def _abstention_row(one: Abstention, now: datetime) -> dict[str, object]:
    return {
        "judged_at": now,
        "subject_kind": one.subject.kind,
        "subject_name": one.subject.name,
        "kind": one.kind.value,
        "reason": one.reason,
    }
