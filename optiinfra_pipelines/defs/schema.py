"""How a table shows itself in the Dagster UI: its columns with units, its name, and a few of its rows.

Here: turning our column and frame types into Dagster metadata. Not here: which assets exist.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Protocol

import dagster as dg
import polars as pl
from dagster._core.definitions.metadata import RawMetadataValue

# What Dagster takes as the value of one metadata entry; it has no public name for it.
Metadata = RawMetadataValue

# The preview is stored three times in the event log with every materialization: a glance, not the table.
PREVIEW_ROWS = 3
PREVIEW_COLUMNS = 8


class ColumnLike(Protocol):
    """A column of a raw table or of a model."""

    @property
    def sql_type(self) -> str: ...
    @property
    def unit(self) -> str | None: ...
    @property
    def description(self) -> str: ...


def table_metadata(name: str, columns: Mapping[str, ColumnLike]) -> dict[str, Metadata]:
    """Definition metadata of one table: its qualified name and its column schema, units in the descriptions."""
    schema = dg.TableSchema(
        columns=[
            dg.TableColumn(
                column_name,
                column.sql_type,
                description=column.description + (f" Unit: {column.unit}." if column.unit else ""),
            )
            for column_name, column in columns.items()
        ]
    )
    return {"dagster/table_name": f"main.{name}", "dagster/column_schema": schema}


def preview(frame: pl.DataFrame, label: str = "newest_rows") -> dict[str, Metadata]:
    """Metadata of this label: the first columns of the first rows as a table in the UI; none for a frame without rows.

    Lists and times become text, NULL stays empty.
    """
    if frame.is_empty():
        return {}
    shown = frame.select(frame.columns[:PREVIEW_COLUMNS]).head(PREVIEW_ROWS)
    records = [dg.TableRecord({key: _cell(value) for key, value in row.items()}) for row in shown.to_dicts()]
    schema = dg.TableSchema([dg.TableColumn(name, str(dtype)) for name, dtype in shown.schema.items()])
    return {label: dg.MetadataValue.table(records, schema)}


def _cell(value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else str(value)
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    return str(value)
