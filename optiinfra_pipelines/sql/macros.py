"""The SQL macros of `dbt_like_sql/macros`: reading them, and putting them into a database.

Not here: what they mean, which is in the SQL files themselves.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import duckdb

from optiinfra_pipelines.sql.dependencies import relations_read

_MACRO = re.compile(
    r"create\s+or\s+replace\s+macro\s+(?P<name>\w+)\s*\([^)]*\)\s+as\s+(?P<table>table\s)?(?P<body>.*?);", re.S | re.I
)


@dataclass(frozen=True)
class Macro:
    """One macro. `sql`: the statement that creates it. `query`: the query it stands for, None for a scalar macro."""

    name: str
    sql: str
    query: str | None


@cache
def macros() -> tuple[Macro, ...]:
    """Every macro of `dbt_like_sql/macros`, in file order."""
    folder = resources.files("dbt_like_sql") / "macros"
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".sql")), key=lambda entry: entry.name)
    text = "\n".join(entry.read_text(encoding="utf-8") for entry in files)
    return tuple(
        Macro(found["name"], found[0], found["body"] if found["table"] else None)
        for found in _MACRO.finditer(_without_comments(text))
    )


@cache
def table_macros() -> Mapping[str, str]:
    """The macros that stand for a table, by name: the query behind each."""
    return {macro.name: macro.query for macro in macros() if macro.query}


@cache
def macros_fingerprint() -> str:
    """Changes whenever a macro does."""
    return hashlib.sha256("".join(macro.sql for macro in macros()).encode()).hexdigest()[:16]


def install_macros(con: duckdb.DuckDBPyConnection) -> None:
    """Create or replace every macro in the connection's database, so that whoever opens the file has them.

    A macro that stands for a table is bound when it is created: it is left out until the raw tables are there.
    """
    con.execute("".join(macro.sql for macro in macros() if macro.query is None))
    there = {row[0] for row in con.execute("select distinct table_name from duckdb_columns()").fetchall()}
    for macro in macros():
        if macro.query and there.issuperset(relations_read(con, macro.query, table_macros())):
            con.execute(macro.sql)


def _without_comments(sql: str) -> str:
    """SQL without its `--` comments, so that a semicolon or a name in one is not taken for code."""
    return "\n".join(line.split("--", 1)[0] for line in sql.splitlines())
