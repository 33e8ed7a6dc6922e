"""A page of Prometheus text as a polars frame.

Here: `parse`. Not here: how a page is read (`pages`, `reader`).
"""

from weakref import WeakKeyDictionary

import polars as pl

from optiinfra_pipelines.exposition.pages import Layout
from optiinfra_pipelines.exposition.reader import Reader

LABEL = pl.Struct({"name": pl.String, "value": pl.String})
SAMPLE_SCHEMA = {"name": pl.String(), "labels": pl.List(LABEL), "value": pl.Float64(), "timestamp_ms": pl.Int64()}

# A person or an asset looks at a few shapes of page; collectors of many targets have a Reader of their own.
_READER = Reader(max_layouts=64, max_bytes=64 * 2**20)
_SERIES: WeakKeyDictionary[Layout, tuple[pl.Series, pl.Series, pl.Series]] = WeakKeyDictionary()


def parse(text: str) -> pl.DataFrame:
    """The samples of a page, one row each, in page order.

    Columns: name; labels, a list of (name, value) in page order; value; timestamp_ms, null where the page gives none.
    Raises ExpositionError, with line number and cause, on anything that the text format forbids.
    """
    page = _READER.read(text)
    series = _SERIES.get(page.layout)
    if series is None:
        series = _SERIES[page.layout] = _constant_series(page.layout)
    names, labels, no_stamps = series
    stamps = no_stamps
    if page.timestamps_ms:
        stamps = pl.Series(
            "timestamp_ms", [page.timestamps_ms.get(position) for position in range(len(page.values))], pl.Int64
        )
    return pl.DataFrame([names, labels, pl.Series("value", page.values, pl.Float64), stamps])


def forget() -> None:
    """Let go of every remembered shape, as in a new process; only the speed of `parse` depends on them."""
    _SERIES.clear()
    _READER.forget()


def _constant_series(layout: Layout) -> tuple[pl.Series, pl.Series, pl.Series]:
    """The columns that all pages of a layout share: names, labels, and timestamps where there are none."""
    # flat columns, gathered by polars: 10 times as fast as handing it nested lists of dicts
    nothing = ((None, None),)
    rows = [(position, *pair) for position, pairs in enumerate(layout.labels) for pair in pairs or nothing]
    flat = pl.DataFrame(rows, {"position": pl.Int64, "name": pl.String, "value": pl.String}, orient="row")
    label = pl.struct("name", "value").filter(pl.col("name").is_not_null())
    labels = flat.group_by("position", maintain_order=True).agg(labels=label).get_column("labels")
    return (
        pl.Series("name", layout.names, pl.String),
        labels,
        pl.Series("timestamp_ms", [None] * len(layout.names), pl.Int64),
    )
