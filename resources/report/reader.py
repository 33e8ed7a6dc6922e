"""Fetch what a fleet report is made of, from the live warehouse or from the copy for people.

Here: running `report.data.QUERIES`, and the claims that other assets have stored. A table that does not exist yet is
None, so that a report can be had from the first minute on. Not here: what is made of it (`analysis.report.sections`).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import polars as pl

from optiinfra_pipelines.analysis.report.data import QUERIES, Advice, ReportData
from optiinfra_pipelines.analysis.report.waste import COSTS, GPU_STATES, TABLES
from optiinfra_pipelines.domain.base import Frozen
from optiinfra_pipelines.domain.findings import Abstention, Finding, FindingKind, Subject
from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.insights import Insight
from optiinfra_pipelines.domain.objectives import ObjectiveStatus
from optiinfra_pipelines.domain.recommendations import Accuracy, ChangeKind, Recommendation, RuleAbstention
from resources.warehouse import Warehouse

_Noun = TypeVar("_Noun", bound=Frozen)


def read_report(warehouse: Warehouse, fleet: Fleet, since: datetime, until: datetime) -> ReportData:
    """A report's data over [since, until) from the live file."""
    with warehouse.connect() as connection:
        return report_of(connection, fleet, since, until)


def read_published_report(read_copy: Path, fleet: Fleet, since: datetime, until: datetime) -> ReportData:
    """The same from the read copy, for which nobody has to wait. duckdb.Error when it cannot be opened."""
    with duckdb.connect(str(read_copy), read_only=True) as connection:
        return report_of(connection, fleet, since, until)


def report_of(connection: duckdb.DuckDBPyConnection, fleet: Fleet, since: datetime, until: datetime) -> ReportData:
    """What the open database tells; what it does not have is None."""
    connection.execute("SET TimeZone = 'UTC'")
    window = {"since": since, "until": until}
    wasted = {title: _frame(connection, query, window) for title, query in TABLES.items()}
    return ReportData(
        made_at=until,
        since=since,
        deployments=fleet.deployments,
        advice=read_advice(connection),
        frames={name: _frame(connection, query, window) for name, query in QUERIES.items()},
        waste={title: frame for title, frame in wasted.items() if frame is not None},
        gpu_states=_frame(connection, GPU_STATES, window),
        cost=_frame(connection, COSTS, window),
    )


def read_advice(connection: duckdb.DuckDBPyConnection) -> Advice:
    """The newest claims: objectives, open findings and recommendations, what was not judged or advised, how right past
    advice was, and the insight.
    """
    objectives = _frame(
        connection,
        "select document from objective_status where judged_at = (select max(judged_at) from objective_status) "
        "order by deployment, objective",
    )
    findings = _frame(connection, "select document from findings where until is null order by since, id")
    declined = _frame(
        connection, "select subject_kind, subject_name, kind, reason from finding_abstentions order by all"
    )
    advised = _frame(connection, "select document from recommendations where state = 'open' order by score desc, id")
    refused = _frame(connection, "select * from recommendation_abstentions order by all")
    accuracy = _frame(connection, "select * from fct_recommendation_accuracy order by all")
    insight = _frame(connection, "select insight from insights order by written_at desc limit 1")
    return Advice(
        objectives=_nouns(ObjectiveStatus, objectives),
        findings=_nouns(Finding, findings),
        abstentions=None if declined is None else [_abstention(row) for row in declined.iter_rows(named=True)],
        recommendations=_nouns(Recommendation, advised),
        refusals=None if refused is None else [_refusal(row) for row in refused.iter_rows(named=True)],
        accuracy=None if accuracy is None else [Accuracy.model_validate(row) for row in accuracy.iter_rows(named=True)],
        insight=next(iter(_nouns(Insight, insight) or ()), None),
    )


def _nouns(kind: type[_Noun], frame: pl.DataFrame | None) -> list[_Noun] | None:
    """The nouns of a table that keeps each as a JSON document."""
    return None if frame is None else [kind.model_validate_json(text) for text in frame.to_series()]


def _subject(row: Mapping[str, Any]) -> Subject:
    return Subject(kind=row["subject_kind"], name=row["subject_name"])


def _abstention(row: Mapping[str, Any]) -> Abstention:
    return Abstention(subject=_subject(row), kind=FindingKind(row["kind"]), reason=row["reason"])


def _refusal(row: Mapping[str, Any]) -> RuleAbstention:
    kind = None if row["kind"] is None else ChangeKind(row["kind"])
    return RuleAbstention(subject=_subject(row), rule=row["rule"], kind=kind, at=row["judged_at"], reason=row["reason"])


def _frame(
    connection: duckdb.DuckDBPyConnection, query: str, params: Mapping[str, object] | None = None
) -> pl.DataFrame | None:
    try:
        frame: pl.DataFrame = connection.sql(query, params=dict(params) if params else None).pl()
    except duckdb.CatalogException:
        # No such table or macro: the models, or the asset that writes it, have not run yet.
        return None
    return frame
