"""Run the tests of a model's rows: each is one query that returns the rows that fail.

Reads through the connection it is given; writes nothing. What the kinds mean: `sql.models.DataTest`.
"""

from __future__ import annotations

import duckdb

from optiinfra_pipelines.sql.models import DataTest, Model, TestResult, Window

# Enough to recognize what went wrong, little enough to print.
SAMPLE_ROWS = 5


def run_tests(con: duckdb.DuckDBPyConnection, model: Model, window: Window) -> list[TestResult]:
    """Every test of a model, over the rows of [window.start, window.end) where it has a time column, else over all."""
    return [_run(con, model, test, window) for test in model.tests]


def _run(con: duckdb.DuckDBPyConnection, model: Model, test: DataTest, window: Window) -> TestResult:
    sql = failing_rows_sql(model, test, window)
    found = con.execute(f"select *, count(*) over () as failing_rows from ({sql}) limit {SAMPLE_ROWS}")
    names = [column[0] for column in found.description or []]
    rows = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    failing = int(str(rows[0]["failing_rows"])) if rows else 0
    sample = tuple({name: value for name, value in row.items() if name != "failing_rows"} for row in rows)
    return TestResult(
        model=model.name,
        name=test.name,
        passed=not rows,
        failing_rows=failing,
        sample=sample,
        sql=sql,
        severity=test.severity,
    )


def failing_rows_sql(model: Model, test: DataTest, window: Window) -> str:
    """The query that returns the rows of a model that fail a test; it can be run as it is."""
    rows = f'"{model.name}"'
    if model.time and test.kind != "freshness":
        rows = (
            f'(select * from "{model.name}" where "{model.time}" >= {_moment(window, "start")}'
            f' and "{model.time}" < {_moment(window, "end")})'
        )
    column = f'"{test.column}"'
    match test.kind:
        case "not_null":
            return f"select * from {rows} where {column} is null"
        case "unique":
            key = ", ".join(f'"{name}"' for name in test.columns)
            return f"select {key}, count(*) as row_count from {rows} group by {key} having count(*) > 1"
        case "accepted_values":
            allowed = ", ".join(_literal(value) for value in test.values)
            return f"select * from {rows} where {column} not in ({allowed})"
        case "accepted_range":
            bounds = [f"{column} < {test.min}"] if test.min is not None else []
            bounds += [f"{column} > {test.max}"] if test.max is not None else []
            return f"select * from {rows} where {' or '.join(bounds)}"
        case "relationships":
            known = f'select "{test.field}" from "{test.to}" where "{test.field}" is not null'
            return f"select * from {rows} where {column} is not null and {column} not in ({known})"
        case "expression_is_true":
            return f"select * from {rows} where not ({test.expression})"
        case "freshness":
            limit = f"{_moment(window, 'end')} - to_seconds({(test.within_minutes or 0) * 60})"
            newest = f"select max({column}) as newest_at from {rows}"
            awaited = f'exists (select "{test.field}" from "{test.to}")' if test.to else "true"
            return f"select * from ({newest}) where coalesce(newest_at < {limit}, true) and {awaited}"


def _moment(window: Window, edge: str) -> str:
    moment = window.start if edge == "start" else window.end
    return f"timestamptz '{moment.isoformat()}'"


def _literal(value: str | int | float | bool) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)
