"""`optiinfra sql`: answer a question from the published read copy, never from the live file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import duckdb
import polars as pl

from optiinfra_pipelines.commands.console import print_table


def run(read_copy: Path, query: str, form: str) -> None:
    """Run one query and print its rows as `table`, `csv` or `json`. Raises click.ClickException with a remedy."""
    if not read_copy.exists():
        raise click.ClickException(
            f"{read_copy} does not exist yet; start `optiinfra up` (or `optiinfra demo --once`) and ask again "
            "after the first refresh, about a minute later"
        )
    try:
        opened = duckdb.connect(str(read_copy), read_only=True)
    except duckdb.Error as error:
        raise click.ClickException(
            f"{read_copy} cannot be opened: {error}; move it away, and the next refresh makes it anew"
        ) from error
    with opened as connection:
        connection.execute("SET TimeZone = 'UTC'")
        try:
            frame = connection.sql(query).pl()
        except duckdb.Error as error:
            raise click.ClickException(f"{error}\n\nTables and views: {_relations(connection)}") from error
    if form == "csv":
        sys.stdout.write(frame.write_csv())
    elif form == "json":
        sys.stdout.write(json.dumps(frame.to_dicts(), default=str, allow_nan=False) + "\n")
    else:
        print_table(frame)


def fetch(read_copy: Path, query: str) -> pl.DataFrame | None:
    """The rows of one query; None while there is no read copy, or no such table in it yet."""
    if not read_copy.exists():
        return None
    with duckdb.connect(str(read_copy), read_only=True) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        try:
            frame: pl.DataFrame = connection.sql(query).pl()
        except duckdb.CatalogException:
            return None
    return frame


def _relations(connection: duckdb.DuckDBPyConnection) -> str:
    rows = connection.execute(
        "select table_name from information_schema.tables where table_schema = 'main' order by table_name"
    ).fetchall()
    return ", ".join(name for (name,) in rows)
