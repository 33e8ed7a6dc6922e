"""Every given/expected case of tests/models: rows into the raw tables or into models, one refresh, rows out.

A case: model, window [start, end), given (rows by relation, columns that are not named are NULL, `defaults` fills in),
expected (rows in the order of the model's grain; only the columns that are named are compared). Times of day are UTC
on 2026-11-20; a whole date may be given too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest
import yaml

from optiinfra_pipelines.sql.models import Materialization, Models, Window
from optiinfra_pipelines.sql.refresh import prepare, refresh
from optiinfra_pipelines.sql.sources import raw_tables
from tests.sql.harness import insert

FOLDER = Path(__file__).parent.parent / "models"


def cases() -> Iterator[Any]:
    for path in sorted(FOLDER.glob("*.yml")):
        content = yaml.safe_load(path.read_text())
        for case in content["cases"]:
            case["defaults"] = content.get("defaults", {})
            yield pytest.param(case, id=f"{case['model']}: {case['name']}")


def moment(text: object) -> datetime:
    """A time of day on the day of the cases, or a whole ISO time, in UTC."""
    words = str(text)
    return datetime.fromisoformat(words if len(words) > 12 else f"2026-11-20 {words}").replace(tzinfo=UTC)


def ancestors(models: Models, name: str) -> set[str]:
    """All that a model reads, directly or through others."""
    reads = {read for read in models[name].depends_on if read in models}
    return reads.union(*(ancestors(models, read) for read in reads))


def types_of(models: Models, relation: str) -> Mapping[str, str]:
    if relation in models:
        return {column.name: column.sql_type for column in models[relation].columns}
    return {name: column.sql_type for name, column in raw_tables()[relation].columns.items()}


@pytest.mark.parametrize("case", list(cases()))
def test_given_rows_make_the_expected_rows(
    con: duckdb.DuckDBPyConnection, models: Models, case: dict[str, Any]
) -> None:
    """What the case says; its name is the fact."""
    model = models[case["model"]]
    window = Window(start=moment(case["window"][0]), end=moment(case["window"][1]))
    needed = ancestors(models, model.name)
    for name, upstream in models.items():
        if name in needed:
            prepare(con, upstream)
    for relation, rows in case["given"].items():
        types, defaults = types_of(models, relation), case["defaults"].get(relation, {})
        insert(con, relation, ({k: _typed(v, types[k]) for k, v in {**defaults, **row}.items()} for row in rows))
    for name, upstream in models.items():
        if name in needed and name not in case["given"]:
            refresh(con, upstream, window)
    refresh(con, model, window)

    order = ", ".join(f'"{name}"' for name in model.grain)
    found = con.execute(f'select * from "{model.name}" order by {order}')
    names = [column[0] for column in found.description or []]
    rows_found = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    types = types_of(models, model.name)
    expected = [{k: _typed(v, types[k]) for k, v in row.items()} for row in case["expected"]]
    shown = [
        {k: row[k] for k in (expected[place] if place < len(expected) else row)} for place, row in enumerate(rows_found)
    ]
    assert shown == [
        {k: pytest.approx(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in row.items()}
        for row in expected
    ]


def test_every_stored_model_and_every_mart_has_a_case(models: Models) -> None:
    """An incremental model or a mart without a given/expected case is not done."""
    tested = {case.values[0]["model"] for case in cases()}
    due = {
        name
        for name, model in models.items()
        if model.materialization is Materialization.INCREMENTAL or model.layer == "marts"
    }

    assert due - tested == set()


def _typed(value: object, sql_type: str) -> object:
    is_time = sql_type in ("TIMESTAMPTZ", "TIMESTAMP WITH TIME ZONE")
    return moment(value) if is_time and value is not None else value
