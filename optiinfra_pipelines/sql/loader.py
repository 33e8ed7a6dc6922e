"""Read the models of `dbt_like_sql`: SQL files with YAML beside them, checked against each other and put in order.

Each layer is a folder with one YAML file of its own name: `marts/marts.yml` describes `marts/<model>.sql`. All that
is wrong is a `ModelError` that names the file, the thing and the remedy. No Dagster; nothing is stored or run but an
empty in-memory database in which every model is bound.

A model's entry: description (its last clause tells the grain), materialized, grain, time and step_seconds (see
`sql.models.Model`), retention, like (relations whose columns of the same name need no second description), columns
(name: {unit, description}), tests. Tests that follow by themselves: the grain is unique and, but for the columns in
nullable_grain, never NULL; a `_ratio` lies within 0 and 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Literal

import duckdb
import yaml
from pydantic import Field, ValidationError

from optiinfra_pipelines.sql.dependencies import relations_read
from optiinfra_pipelines.sql.macros import install_macros, table_macros
from optiinfra_pipelines.sql.models import (
    DataTest,
    Layer,
    Materialization,
    Model,
    ModelColumn,
    ModelError,
    Models,
    Noun,
    Severity,
)
from optiinfra_pipelines.sql.sources import raw_tables

# A name that ends so promises a unit; without one a reader has to guess (seconds or milliseconds, bytes or GiB).
UNIT_SUFFIXES = (
    "_seconds", "_bytes", "_ratio", "_watts", "_joules", "_celsius", "_mhz", "_tokens", "_per_second", "_cores",
)  # fmt: skip

# The same safe loader in C where PyYAML was built with it: 1 ms a file instead of 40.
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

NEEDED_FIELDS: Mapping[str, tuple[str, ...]] = {
    "not_null": ("column",),
    "unique": ("columns",),
    "accepted_values": ("column", "values"),
    "accepted_range": ("column",),
    "relationships": ("column", "to", "field"),
    "expression_is_true": ("expression",),
    "freshness": ("column", "within_minutes"),
}


class ColumnSpec(Noun):
    description: str = Field(min_length=1)
    unit: str | None = None


class ModelSpec(Noun):
    """A model's entry in the YAML file of its layer."""

    description: str = Field(min_length=1)
    materialized: Materialization
    grain: tuple[str, ...] = Field(min_length=1)
    nullable_grain: tuple[str, ...] = ()
    time: str | None = None
    step_seconds: int = Field(0, ge=0)
    retention: Literal["minute", "five_minute", "hour"] | None = None
    like: tuple[str, ...] = ()
    columns: Mapping[str, ColumnSpec] = Field(default_factory=dict)
    tests: tuple[DataTest, ...] = ()


class Draft(Noun):
    """A model before it is bound: its file, its text, what YAML says and what the text reads."""

    name: str
    layer: Layer
    path: str
    yaml_path: str
    sql: str
    spec: ModelSpec
    depends_on: tuple[str, ...]


def load_models(folder: Traversable | None = None) -> Models:
    """Every model, each after all that it reads. `folder`: laid out like `dbt_like_sql`, which is the default.

    ModelError on anything that SQL and YAML do not agree on.
    """
    root = folder or resources.files("dbt_like_sql")
    with duckdb.connect() as con:
        drafts = {draft.name: draft for layer in Layer for draft in _read_layer(con, root, layer)}
        ordered = _in_order(drafts)
        return _bind(con, ordered)


def _read_layer(con: duckdb.DuckDBPyConnection, root: Traversable, layer: Layer) -> Iterator[Draft]:
    home = root / layer.value
    yaml_path = f"dbt_like_sql/{layer.value}/{layer.value}.yml"
    yaml_file = home / f"{layer.value}.yml"
    described = _yaml(yaml_path, yaml_file.read_text(encoding="utf-8")) if yaml_file.is_file() else {}
    written = {
        entry.name.removesuffix(".sql"): entry.read_text(encoding="utf-8")
        for entry in sorted(home.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".sql")
    }
    for name in sorted(written.keys() - described.keys()):
        raise ModelError(
            f"dbt_like_sql/{layer.value}/{name}.sql has no entry in {yaml_path}; "
            f"describe it there (description, materialized, grain, columns), or delete the file"
        )
    for name in described:
        path = f"dbt_like_sql/{layer.value}/{name}.sql"
        if name not in written:
            raise ModelError(f"{yaml_path} describes {name}, but there is no {path}; write it, or drop the entry")
        spec = _spec(yaml_path, name, described[name])
        yield Draft(
            name=name,
            layer=layer,
            path=path,
            yaml_path=yaml_path,
            sql=written[name].strip().rstrip(";"),
            spec=spec,
            depends_on=_reads(con, path, written[name]),
        )


def _yaml(yaml_path: str, text: str) -> dict[str, object]:
    try:
        content = yaml.load(text, Loader=_YAML)
    except yaml.YAMLError as error:
        raise ModelError(f"{yaml_path} is not YAML: {error}") from None
    if content is not None and not isinstance(content, dict):
        raise ModelError(f"{yaml_path} is not a mapping of models; give each model's name its entry")
    return content or {}


def _spec(yaml_path: str, name: str, entry: object) -> ModelSpec:
    if not isinstance(entry, dict):
        raise ModelError(f"{yaml_path}: {name} is not a mapping; give it description, materialized, grain and columns")
    if not entry.get("grain"):
        raise ModelError(f"{yaml_path}: {name} has no grain; list the columns that identify one of its rows")
    try:
        spec = ModelSpec.model_validate(entry)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ModelError(f"{yaml_path}: {name} is not a model's entry: {faults}") from None
    if spec.materialized is Materialization.INCREMENTAL and not (spec.time and spec.step_seconds and spec.retention):
        raise ModelError(
            f"{yaml_path}: {name} is incremental and needs time, step_seconds and retention; "
            "without them no window of it can be replaced or let go"
        )
    for test in spec.tests:
        missing = [field for field in NEEDED_FIELDS[test.kind] if getattr(test, field) in (None, ())]
        if missing:
            raise ModelError(f"{yaml_path}: a {test.kind} test of {name} lacks {', '.join(missing)}; add it")
        if test.kind == "accepted_range" and test.min is None and test.max is None:
            raise ModelError(f"{yaml_path}: an accepted_range test of {name} has neither min nor max; give one")
    return spec


def _reads(con: duckdb.DuckDBPyConnection, path: str, sql: str) -> tuple[str, ...]:
    try:
        return relations_read(con, sql, table_macros())
    except ValueError as error:
        raise ModelError(f"{path} is not one SELECT that DuckDB can parse: {error}") from None


def _in_order(drafts: Mapping[str, Draft]) -> list[Draft]:
    known = drafts.keys() | raw_tables().keys()
    for draft in drafts.values():
        for read in draft.depends_on:
            if read not in known:
                raise ModelError(
                    f"{draft.path} reads {read}, which is neither a model nor a table of sources.yml; "
                    "correct the name, or add it"
                )
    graph = {name: [read for read in draft.depends_on if read in drafts] for name, draft in drafts.items()}
    try:
        return [drafts[name] for name in TopologicalSorter(graph).static_order()]
    except CycleError as error:
        raise ModelError(f"models read one another in a circle: {' -> '.join(error.args[1])}; break it") from None


def _bind(con: duckdb.DuckDBPyConnection, ordered: list[Draft]) -> Models:
    described: dict[str, dict[str, ColumnSpec]] = {}
    for table in raw_tables().values():
        con.execute(table.create_sql())
        described[table.name] = {
            name: ColumnSpec(description=column.description, unit=column.unit) for name, column in table.columns.items()
        }
    install_macros(con)
    con.execute("set variable window_start = now(); set variable window_end = now()")
    times = {table.name: table.time for table in raw_tables().values() if table.time}
    models = []
    for draft in ordered:
        try:
            types = {row[0]: str(row[1]) for row in con.execute(f"describe {draft.sql}").fetchall()}
        except duckdb.Error as error:
            raise ModelError(f"{draft.path} does not run: {error}") from None
        columns = _columns(draft, types, described)
        con.execute(create_table_sql(draft.name, columns))
        _check_tests(con, draft, types, described)
        described[draft.name] = {c.name: ColumnSpec(description=c.description, unit=c.unit) for c in columns}
        times |= {draft.name: draft.spec.time} if draft.spec.time else {}
        models.append(_model(draft, columns, times))
    return Models(models)


def _columns(
    draft: Draft, types: Mapping[str, str], described: Mapping[str, Mapping[str, ColumnSpec]]
) -> tuple[ModelColumn, ...]:
    """What SQL returns joined with what YAML says; each must know exactly what the other does."""
    spec = draft.spec
    gone = [name for name in spec.columns if name not in types]
    if gone:
        raise ModelError(
            f"{draft.yaml_path} describes {', '.join(gone)} of {draft.name}, which {draft.path} does not return; "
            "select it, or drop it from the YAML"
        )
    for relation in spec.like:
        if relation not in described:
            raise ModelError(f"{draft.yaml_path}: {draft.name} is like {relation}, which comes after it or is unknown")
    known: dict[str, ColumnSpec] = {}
    for relation in reversed(spec.like):
        known |= described[relation]
    known |= spec.columns
    extra = [name for name in types if name not in known]
    if extra:
        raise ModelError(
            f"{draft.path} returns {', '.join(extra)}, which {draft.yaml_path} does not describe; "
            "add the column with its unit, or drop it from the select"
        )
    for name in types:
        if name.endswith(UNIT_SUFFIXES) and not known[name].unit:
            raise ModelError(f"{draft.yaml_path}: {draft.name}.{name} has no unit, and its name promises one; add it")
    for name in (*spec.grain, *([spec.time] if spec.time else [])):
        if name not in types:
            raise ModelError(f"{draft.yaml_path}: {draft.name} has {name} in its grain or as its time, but no column")
    return tuple(
        ModelColumn(name=name, sql_type=sql_type, unit=known[name].unit, description=known[name].description)
        for name, sql_type in types.items()
    )


def _check_tests(
    con: duckdb.DuckDBPyConnection,
    draft: Draft,
    types: Mapping[str, str],
    described: Mapping[str, Mapping[str, ColumnSpec]],
) -> None:
    """Refuse tests of columns, relations or expressions that are not there; a typo would otherwise never fail."""
    for test in draft.spec.tests:
        place = f"{draft.yaml_path}: a {test.kind} test of {draft.name}"
        for name in (*test.columns, *([test.column] if test.column else [])):
            if name not in types:
                raise ModelError(f"{place} looks at {name}, which it does not return; correct the name")
        if test.to and (test.to not in described or test.field not in described[test.to]):
            raise ModelError(
                f"{place} refers to {test.to}.{test.field}, which does not exist or comes after it; "
                "correct the name, or test it from the other side"
            )
        if test.expression:
            try:
                con.execute(f'describe select not ({test.expression}) from "{draft.name}"')
            except duckdb.Error as error:
                raise ModelError(f"{place} does not run: {error}") from None


def _model(draft: Draft, columns: tuple[ModelColumn, ...], times: Mapping[str, str]) -> Model:
    spec = draft.spec
    return Model(
        name=draft.name,
        layer=draft.layer,
        path=draft.path,
        sql=draft.sql,
        materialization=spec.materialized,
        description=spec.description,
        grain=spec.grain,
        time=spec.time,
        step_seconds=spec.step_seconds,
        retention=spec.retention,
        columns=columns,
        tests=tuple(_named(test) for test in (*_implied_tests(spec, columns), *spec.tests)),
        depends_on=draft.depends_on,
        times={name: times[name] for name in draft.depends_on if name in times},
        fingerprint=_fingerprint(draft.sql, columns),
    )


def _fingerprint(sql: str, columns: tuple[ModelColumn, ...]) -> str:
    """Changes with the SQL, and with the columns: a `select *` returns others when what it reads has changed."""
    shape = [f"{column.name} {column.sql_type}" for column in columns]
    return hashlib.sha256("\n".join([sql, *shape]).encode()).hexdigest()[:16]


def _implied_tests(spec: ModelSpec, columns: tuple[ModelColumn, ...]) -> Iterator[DataTest]:
    yield DataTest(kind="unique", columns=spec.grain)
    for name in spec.grain:
        if name not in spec.nullable_grain:
            yield DataTest(kind="not_null", column=name)
    for column in columns:
        if column.name.endswith("_ratio") and column.sql_type == "DOUBLE":
            yield DataTest(kind="accepted_range", column=column.name, min=0, max=1, severity=Severity.WARN)


def _named(test: DataTest) -> DataTest:
    """A test with a name unique in its model, made of its kind and what it looks at, where YAML gives none."""
    if test.name:
        return test
    subject = test.column or "_".join(test.columns) or hashlib.sha256(str(test.expression).encode()).hexdigest()[:8]
    return test.model_copy(update={"name": f"{test.kind}_{subject}"})


def create_table_sql(name: str, columns: tuple[ModelColumn, ...]) -> str:
    """CREATE TABLE IF NOT EXISTS with a model's columns."""
    body = ", ".join(f'"{column.name}" {column.sql_type}' for column in columns)
    return f'CREATE TABLE IF NOT EXISTS "{name}" ({body})'
