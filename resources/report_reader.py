"""Fetch the tables of a fleet report, from the live warehouse or from the copy for people.

Here: running `report_data.QUERIES`. A table that does not exist yet is None, so that a report can be had from the first
minute on. Not here: what is made of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import duckdb
import polars as pl

from optiinfra_pipelines.analysis.report_data import QUERIES
from resources.warehouse import Warehouse


def report_frames(warehouse: Warehouse, since: datetime, until: datetime) -> dict[str, pl.DataFrame | None]:
    """The frames of [since, until) from the live file."""
    with warehouse.connect() as connection:
        return _frames(connection, since, until)


def published_frames(read_copy: Path, since: datetime, until: datetime) -> dict[str, pl.DataFrame | None]:
    """The same from the read copy, which nobody waits for. duckdb.Error when it cannot be opened."""
    with duckdb.connect(str(read_copy), read_only=True) as connection:
        return _frames(connection, since, until)


def _frames(connection: duckdb.DuckDBPyConnection, since: datetime, until: datetime) -> dict[str, pl.DataFrame | None]:
    connection.execute("SET TimeZone = 'UTC'")
    return {name: _frame(connection, query, {"since": since, "until": until}) for name, query in QUERIES.items()}


def _frame(connection: duckdb.DuckDBPyConnection, query: str, params: Mapping[str, object]) -> pl.DataFrame | None:
    try:
        frame: pl.DataFrame = connection.sql(query, params=dict(params)).pl()
    except duckdb.CatalogException:
        # No such table or macro: the models have not been built yet.
        return None
    return frame
