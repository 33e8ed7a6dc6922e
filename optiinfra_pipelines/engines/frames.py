"""Rows of many pages -> one polars frame per raw table, column by column.

Here: assembling columns fast (a thousand targets a tick). Not here: what the rows are (`normalize`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any

import polars as pl
import pyarrow

from optiinfra_pipelines.engines.normalize import TABLES, Normalized, Row
from optiinfra_pipelines.sql.sources import PolarsType, RawTable, raw_tables

# pyarrow carries no types. Polars takes nested lists value by value, ten times slower than pyarrow does.
_arrow: Any = pyarrow
_NUMBERS = pl.List(pl.Float64)
_MAP = pl.List(pl.Struct({"key": pl.String, "value": pl.String}))
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_frames(normalized: Sequence[Normalized]) -> dict[str, pl.DataFrame]:
    """One frame per raw table with exactly that table's columns and types, empty tables included.

    Bucket bounds that many pages share appear once.
    """
    frames = {}
    for name in TABLES:
        rows: Iterable[Row] = chain.from_iterable(page.rows[name] for page in normalized)
        if name == "raw_histogram_bounds":
            rows = {row[0]: row for row in rows}.values()
        frames[name] = _frame(raw_tables()[name], list(rows))
    return frames


def _frame(table: RawTable, rows: list[Row]) -> pl.DataFrame:
    if not rows:
        return table.empty()
    columns = zip(table.columns.items(), zip(*rows, strict=True), strict=True)
    return pl.DataFrame([_series(name, values, column.polars_type) for (name, column), values in columns])


def _series(name: str, values: Sequence[Any], dtype: PolarsType) -> pl.Series:
    if dtype == _NUMBERS:
        return pl.Series(name, _arrow.array(values, _arrow.large_list(_arrow.float64())))
    if dtype == _MAP:
        entries = [list(settings.items()) for settings in values]
        entry = _arrow.struct([("key", _arrow.large_string()), ("value", _arrow.large_string())])
        return pl.Series(name, _arrow.array(entries, _arrow.large_list(entry)))
    if isinstance(dtype, pl.Datetime):
        return pl.Series(name, _microseconds(values), dtype=pl.Int64).cast(dtype)
    return pl.Series(name, values, dtype=dtype, strict=True)


def _microseconds(values: Sequence[datetime | None]) -> list[int | None]:
    """Instants as microseconds since 1970. Rows of one page share the object, so it is converted once."""
    known: dict[int, int | None] = {}
    for value in values:
        if id(value) not in known:
            known[id(value)] = None if value is None else (value - _EPOCH) // timedelta(microseconds=1)
    return [known[id(value)] for value in values]
