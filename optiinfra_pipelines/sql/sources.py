"""The raw tables as `dbt_like_sql/sources.yml` defines them: names, grain, columns, units.

Here: reading that file, and making DDL and polars schemas from it. Not here: writing rows (`resources.warehouse`)
or what the rows mean (`engines`, `analysis`). Pure but for reading one packaged file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources

import polars as pl
import yaml
from pydantic import BaseModel, ConfigDict, Field

_UTC = pl.Datetime("us", "UTC")
PolarsType = pl.DataType | type[pl.DataType]
_POLARS: dict[str, PolarsType] = {
    "TIMESTAMPTZ": _UTC,
    "VARCHAR": pl.String,
    "BOOLEAN": pl.Boolean,
    "SMALLINT": pl.Int16,
    "INTEGER": pl.Int32,
    "BIGINT": pl.Int64,
    "UBIGINT": pl.UInt64,
    "DOUBLE": pl.Float64,
    "DOUBLE[]": pl.List(pl.Float64),
    # An Arrow map arrives in polars as a list of entries; the warehouse turns it back.
    "MAP(VARCHAR, VARCHAR)": pl.List(pl.Struct({"key": pl.String, "value": pl.String})),
}


class Column(BaseModel):
    """One column: DuckDB type, unit in words (None when it has none) and what it means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sql_type: str = Field(alias="type")
    description: str
    unit: str | None = None

    @property
    def polars_type(self) -> PolarsType:
        return _POLARS[self.sql_type]


class RawTable(BaseModel):
    """One raw table. `grain`: columns that identify a row. `time`: the column hours and retention go by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str
    grain: tuple[str, ...]
    time: str | None = None
    columns: Mapping[str, Column] = Field(min_length=1)

    @property
    def polars_schema(self) -> pl.Schema:
        return pl.Schema({name: column.polars_type for name, column in self.columns.items()})

    def empty(self) -> pl.DataFrame:
        return pl.DataFrame(schema=self.polars_schema)

    def frame(self, rows: list[dict[str, object]]) -> pl.DataFrame:
        """Rows as dicts -> a frame with exactly this table's columns; a missing key is NULL, a stray one an error."""
        stray = {key for row in rows for key in row} - set(self.columns)
        if stray:
            raise ValueError(f"{self.name} has no column {sorted(stray)}; sources.yml lists what it has")
        return pl.DataFrame(rows, schema=self.polars_schema, strict=True)

    def create_sql(self, table: str | None = None) -> str:
        """CREATE TABLE IF NOT EXISTS for this table, under another name where one is given."""
        columns = ", ".join(f'"{name}" {column.sql_type}' for name, column in self.columns.items())
        return f'CREATE TABLE IF NOT EXISTS "{table or self.name}" ({columns})'


@cache
def raw_tables() -> Mapping[str, RawTable]:
    """Every raw table by name, in the order of sources.yml."""
    text = (resources.files("dbt_like_sql") / "sources.yml").read_text(encoding="utf-8")
    return {name: RawTable(name=name, **spec) for name, spec in yaml.safe_load(text).items()}
