"""What the loader refuses, and in which words."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import duckdb
import pytest
import yaml

from optiinfra_pipelines.sql.dependencies import relations_read
from optiinfra_pipelines.sql.loader import load_models
from optiinfra_pipelines.sql.macros import macros, table_macros
from optiinfra_pipelines.sql.models import Layer, ModelError, Models
from optiinfra_pipelines.sql.sources import raw_tables

ENTRY = """
fct_toy:
  description: A toy; one row per target.
  materialized: view
  grain: [target]
  columns:
    target: {description: Target.}
    wait_seconds: {unit: s, description: Wait.}
"""
SQL = "select target, max(duration_seconds) as wait_seconds from stg_scrapes group by target"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Staging as shipped and one mart, in a folder laid out like dbt_like_sql."""
    shutil.copytree(Path(str(resources.files("dbt_like_sql"))) / "staging", tmp_path / "staging")
    for layer in ("intermediate", "marts"):
        (tmp_path / layer).mkdir()
    (tmp_path / "marts" / "marts.yml").write_text(ENTRY)
    (tmp_path / "marts" / "fct_toy.sql").write_text(SQL)
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_models(folder)
    return str(caught.value)


def test_a_model_that_agrees_with_its_yaml_is_loaded(folder: Path) -> None:
    """Types come from the SQL, units and words from the YAML, dependencies from the parser."""
    model = load_models(folder)["fct_toy"]

    assert [(c.name, c.sql_type, c.unit) for c in model.columns] == [
        ("target", "VARCHAR", None),
        ("wait_seconds", "DOUBLE", "s"),
    ]
    assert model.depends_on == ("stg_scrapes",)
    assert {test.name for test in model.tests} == {"unique_target", "not_null_target"}


def test_sql_without_yaml_is_refused(folder: Path) -> None:
    """The error names the file and where to describe it."""
    (folder / "marts" / "fct_other.sql").write_text(SQL)

    assert "marts/fct_other.sql has no entry in dbt_like_sql/marts/marts.yml; describe it there" in refused(folder)


def test_yaml_without_sql_is_refused(folder: Path) -> None:
    """The error names the entry and the file that should be there."""
    (folder / "marts" / "fct_toy.sql").unlink()

    assert "marts.yml describes fct_toy, but there is no dbt_like_sql/marts/fct_toy.sql" in refused(folder)


def test_a_column_only_the_sql_knows_is_refused(folder: Path) -> None:
    """The error names the column and both ways out."""
    (folder / "marts" / "fct_toy.sql").write_text(SQL.replace("max(", "1 as stray, max("))

    message = refused(folder)
    assert "fct_toy.sql returns stray, which dbt_like_sql/marts/marts.yml does not describe" in message
    assert "add the column with its unit, or drop it from the select" in message


def test_a_column_only_the_yaml_knows_is_refused(folder: Path) -> None:
    """The error names the column and both ways out."""
    (folder / "marts" / "marts.yml").write_text(ENTRY + "    ghost: {description: Not there.}\n")

    assert "describes ghost of fct_toy, which dbt_like_sql/marts/fct_toy.sql does not return" in refused(folder)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("unit: s, ", "", "fct_toy.wait_seconds has no unit, and its name promises one"),
        ("  grain: [target]\n", "", "fct_toy has no grain; list the columns"),
        ("grain: [target]", "grain: [nobody]", "has nobody in its grain"),
        ("materialized: view", "materialized: incremental", "needs time, step_seconds and retention"),
        ("materialized: view", "materialized: sometimes", "materialized: Input should be"),
        ("description: A toy", "descriptoin: A toy", "descriptoin: Extra inputs"),
        ("columns:\n", "tests: [{kind: relationships, column: target}]\n  columns:\n", "lacks to, field"),
        ("columns:\n", "tests: [{kind: accepted_range, column: target}]\n  columns:\n", "neither min nor max"),
        ("columns:\n", "tests: [{kind: not_null, column: targte}]\n  columns:\n", "looks at targte"),
        ("columns:\n", "tests: [{kind: expression_is_true, expression: a > 1}]\n  columns:\n", "does not run"),
        ("columns:\n", "tests: [{kind: relationships, column: target, to: x, field: y}]\n  columns:\n", "x.y"),
        ("fct_toy:\n", "fct_toy: [\n", "marts.yml is not YAML"),
    ],
)  # fmt: skip
def test_an_entry_that_is_not_right_is_refused(folder: Path, before: str, after: str, words: str) -> None:
    """Each fault is named with the model it is in."""
    (folder / "marts" / "marts.yml").write_text(ENTRY.replace(before, after, 1))

    assert words in refused(folder)


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("select * from nowhere", "fct_toy.sql reads nowhere, which is neither a model nor a table of sources.yml"),
        ("select * from fct_toy", "in a circle: fct_toy -> fct_toy"),
        ("select target from stg_scrapes; select 1", "2 statements where one SELECT is expected"),
        ("delete from stg_scrapes", "is not one SELECT that DuckDB can parse"),
        ("selec 1", "is not one SELECT that DuckDB can parse"),
        ("select targett, 1.0 as wait_seconds from stg_scrapes", "fct_toy.sql does not run: Binder Error"),
    ],
)
def test_sql_that_cannot_be_a_model_is_refused(folder: Path, sql: str, words: str) -> None:
    """A name nobody knows, a circle, two statements, no SELECT, a column that is not there."""
    (folder / "marts" / "fct_toy.sql").write_text(sql)

    assert words in refused(folder)


@pytest.mark.parametrize(
    ("sql", "reads"),
    [
        ("with a as (select * from x), b as (select * from a) select * from b", ("x",)),
        ("with x as (select * from x) select * from x", ("x",)),
        ("with a as (select 1) select * from (with b as (select * from y) select * from b), a", ("y",)),
        ("with recursive a as (select 1 as k union all select k + 1 from a, z) select * from a", ("z",)),
        ("select (select max(k) from x) from y where exists (from z) and k in (from main.w)", ("w", "x", "y", "z")),
        ("select * from range(3), unnest([1]), read_csv('x.csv')", ()),
        ("select 'from x' as words -- from y", ()),
        ("select * from scrape_steps(1, 2)", ("raw_scrapes",)),
        ("with scrapes as (select * from x) select * from scrape_steps(1, 2), scrapes", ("raw_scrapes", "x")),
        ('select * from "X y" union select * from z', ("X y", "z")),
    ],
)
def test_what_a_query_reads_comes_from_the_parser(sql: str, reads: tuple[str, ...]) -> None:
    """Names bound by WITH, functions, strings and comments are not relations; a table macro is what it reads."""
    with duckdb.connect() as con:
        assert relations_read(con, sql, table_macros()) == reads


def test_a_star_over_a_changed_model_is_a_changed_model(folder: Path) -> None:
    """`select *` reads the same and returns other columns: the stored view has to be made anew."""
    above = "fct_above: {description: One row per target., materialized: view, grain: [target], like: [fct_toy]}\n"
    (folder / "marts" / "marts.yml").write_text(ENTRY + above)
    (folder / "marts" / "fct_above.sql").write_text("select * from fct_toy")
    before = load_models(folder)["fct_above"].fingerprint
    more = ENTRY + "    novelty: {description: New.}\n" + above
    (folder / "marts" / "marts.yml").write_text(more)
    (folder / "marts" / "fct_toy.sql").write_text(SQL.replace("select", "select 1 as novelty,"))

    assert load_models(folder)["fct_above"].fingerprint != before


def test_models_come_after_all_that_they_read(models: Models) -> None:
    """The order is one in which each model can be built."""
    seen = set(raw_tables())
    for name, model in models.items():
        assert set(model.depends_on) <= seen
        seen.add(name)


def test_the_house_rules_of_models_hold(models: Models) -> None:
    """Descriptions and first lines tell the grain, the last line selects one name, times end in _at."""
    for model in models.values():
        lines = model.sql.splitlines()
        assert "one row per" in model.description.lower().rsplit(";", 1)[-1].rsplit(". ", 1)[-1], model.name
        assert lines[0].startswith("-- "), model.name
        assert "one row per" in lines[0], model.name
        assert lines[-1].startswith("select * "), model.name
        moments = {column.name for column in model.columns if column.sql_type.startswith("TIMESTAMP")}
        assert {name for name in moments if not name.endswith("_at")} <= {"valid_from", "valid_to"}, model.name


def test_every_file_of_the_folders_is_a_model_or_a_macro(models: Models) -> None:
    """Nothing lies about unread: each SQL file is a model, each macro file gives macros."""
    root = Path(str(resources.files("dbt_like_sql")))
    for layer in Layer:
        assert {path.stem for path in (root / layer).glob("*.sql")} == {
            model.name for model in models.values() if model.layer is layer
        }
        assert {path.name for path in (root / layer).glob("*.yml")} == {f"{layer}.yml"}
    created = sum(path.read_text().count("create or replace macro") for path in (root / "macros").glob("*.sql"))
    assert len(macros()) == created


def test_yaml_of_models_has_no_column_twice() -> None:
    """YAML would keep the last of two entries and say nothing."""
    root = Path(str(resources.files("dbt_like_sql")))
    for path in [*root.glob("*/*.yml"), root / "sources.yml"]:
        node = yaml.compose(path.read_text())
        _refuse_doubles(node, path)


def _refuse_doubles(node: yaml.Node | None, path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value]
        assert len(names) == len(set(names)), (path, [name for name in names if names.count(name) > 1])
        for _, value in node.value:
            _refuse_doubles(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_doubles(value, path)
