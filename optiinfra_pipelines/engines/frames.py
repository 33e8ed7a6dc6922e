"""Rows of many pages -> one polars frame per raw table, column by column.

Here: assembling columns fast (a thousand targets a tick). Not here: what the rows are (`normalize`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate, chain
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow

from optiinfra_pipelines.engines.normalize import TABLES, Normalized, Row
from optiinfra_pipelines.sql.sources import PolarsType, RawTable, raw_tables

# pyarrow carries no types.
_arrow: Any = pyarrow
_NUMBERS = pl.List(pl.Float64)
_MAP = pl.List(pl.Struct({"key": pl.String, "value": pl.String}))
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_frames(normalized: Sequence[Normalized]) -> dict[str, pl.DataFrame]:
    """One frame per raw table with exactly that table's columns and types, empty tables included.

    Bucket bounds that many pages share appear once. Nested columns go by flat arrays: polars takes nested lists value
    by value, eight times slower.
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
        return _number_lists(name, values)
    if dtype == _MAP:
        return _maps(name, values)
    if isinstance(dtype, pl.Datetime):
        return pl.Series(name, _microseconds(values), dtype=pl.Int64).cast(dtype)
    return pl.Series(name, values, dtype=dtype, strict=True)


def _number_lists(name: str, values: Sequence[Sequence[float] | None]) -> pl.Series:
    known = [value for value in values if value is not None]
    offsets = _offsets(0 if value is None else len(value) for value in values)
    flat = np.fromiter(chain.from_iterable(known), np.float64, count=int(offsets[-1]))
    present = None
    if len(known) < len(values):
        present = _arrow.py_buffer(np.packbits([value is not None for value in values], bitorder="little"))
    numbers = _arrow.Array.from_buffers(_arrow.float64(), len(flat), [None, _arrow.py_buffer(flat)])
    return _lists(name, numbers, present, offsets)


def _maps(name: str, values: Sequence[Mapping[str, str]]) -> pl.Series:
    """Maps as lists of entries, the shape in which an Arrow map reaches polars."""
    entries = pl.DataFrame(
        {
            "key": pl.Series(list(chain.from_iterable(values)), dtype=pl.String),
            "value": pl.Series(list(chain.from_iterable(value.values() for value in values)), dtype=pl.String),
        }
    ).to_struct()
    offsets = _offsets(map(len, values))
    return _lists(name, entries.to_arrow(compat_level=pl.CompatLevel.oldest()), None, offsets)


def _offsets(sizes: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.fromiter(accumulate(sizes, initial=0), dtype=np.int64)


def _lists(name: str, flat: Any, present: Any, offsets: npt.NDArray[np.int64]) -> pl.Series:
    """Cut a flat array into lists. From buffers: pyarrow's own constructors import pandas, a second of CPU."""
    buffers = [present, _arrow.py_buffer(offsets)]
    kind = _arrow.large_list(flat.type)
    return pl.Series(name, _arrow.Array.from_buffers(kind, len(offsets) - 1, buffers, children=[flat]))


def _microseconds(values: Sequence[datetime | None]) -> list[int | None]:
    """Instants as microseconds since 1970. Rows of one page share the object, so it is converted once."""
    known: dict[int, int | None] = {}
    for value in values:
        if id(value) not in known:
            known[id(value)] = None if value is None else (value - _EPOCH) // timedelta(microseconds=1)
    return [known[id(value)] for value in values]
