"""Recorded pages as windows of a diagnosis, the way collection would have stored them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from optiinfra_pipelines.analysis.findings.window import EngineWindow
from optiinfra_pipelines.engines import normalize, to_frames
from optiinfra_pipelines.exposition import Reader
from optiinfra_pipelines.sql.sources import raw_tables

RECORDINGS = Path(__file__).parent.parent / "fixtures" / "recordings"
# Snapshots without a time are as far apart as Prometheus' usual scrapes.
UNTIMED = timedelta(seconds=15)
EPOCH = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
_READER = Reader()


def pages_of(*folders: Path) -> list[Path]:
    """The pages of some folders, oldest first; pages without a time in the order of their names."""
    return [page for folder in folders for page in sorted(folder.glob("*.prom"))]


def scraped_at(page: Path, place: int) -> datetime:
    stamps = [part for part in page.stem.split("_") if part.isdigit() and len(part) == 13]
    return datetime.fromtimestamp(int(stamps[0]) / 1000, UTC) if stamps else EPOCH + place * UNTIMED


@cache
def _page(path: Path, at: datetime, target: str) -> Any:
    return normalize(_READER.read(path.read_text()), target=target, scraped_at=at)


def frames(timed: Iterable[tuple[Path, datetime]], target: str = "t") -> dict[str, pl.DataFrame]:
    """Raw tables of pages, raw_scrapes included."""
    pages = [_page(path, at, target) for path, at in timed]
    scrapes = raw_tables()["raw_scrapes"].frame(
        [
            {
                "scraped_at": page.scraped_at,
                "target": target,
                "source": "recorded",
                "is_up": True,
                "engine": page.identity.engine,
                "vantage": page.identity.vantage,
                "process_started_at": page.process_started_at,
            }
            for page in pages
        ]
    )
    made = to_frames(pages)
    empty = {name: table.empty() for name, table in raw_tables().items()}
    return empty | {name: frame for name, frame in made.items() if frame.height} | {"raw_scrapes": scrapes}


def window_of(tables: dict[str, pl.DataFrame], **options: Any) -> EngineWindow:
    """All rows of one target as one window that ends at its last scrape."""
    times = tables["raw_scrapes"]["scraped_at"]
    bounds = {row["bounds_id"]: tuple(row["upper_bounds"]) for row in tables["raw_histogram_bounds"].to_dicts()}
    named: dict[str, Any] = {
        "target": tables["raw_scrapes"]["target"][0],
        "start": times.min(),
        "end": times.max(),
        "source": "recorded",
        "scrapes": tables["raw_scrapes"],
        "samples": tables["raw_engine_samples"],
        "histograms": tables["raw_engine_histograms"],
        "bounds": bounds,
    }
    return EngineWindow(**(named | options))


def phase(*folders: Path, **options: Any) -> EngineWindow:
    """One recorded phase (or some, in order) as one window."""
    pages = pages_of(*folders)
    return window_of(frames([(page, scraped_at(page, place)) for place, page in enumerate(pages)]), **options)


def five_minutes(tables: dict[str, pl.DataFrame], end: datetime) -> EngineWindow:
    """The window that a refresh at `end` would look at; it knows nothing later."""
    seen = {
        name: frame.filter(pl.col("scraped_at") <= end) if "scraped_at" in frame.columns else frame
        for name, frame in tables.items()
    }
    return window_of(seen, start=end - timedelta(minutes=5), end=end)


# What goes on from one round of `going_on` to the next: counters, by the keys that tell their series apart.
_COUNTED = {
    "raw_scrapes": ((), ()),
    "raw_engine_samples": (("engine_rank",), ()),
    "raw_engine_histograms": (("engine_rank", "metric"), ("bucket_counts", "sum_value", "count_value")),
}


def going_on(folder: Path, length: timedelta) -> dict[str, pl.DataFrame]:
    """Raw tables of a phase whose pages come again and again from EPOCH on, at their own pace, for `length`.

    A round begins with the last page of the one before, and its counters go on from there: rates stay what was
    recorded, and nothing looks like a restart.
    """
    timed = [(page, scraped_at(page, place)) for place, page in enumerate(pages_of(folder))]
    tables, first, span = frames(timed), timed[0][1], timed[-1][1] - timed[0][1]
    for name, (series, counters) in _COUNTED.items():
        frame = tables[name].sort("scraped_at")
        counted = counters or [column for column in frame.columns if column.endswith("_total")]
        rise = {column: pl.col(column).last() - pl.col(column).first() for column in counted}
        rises = frame.with_columns((by.over(series) if series else by).alias(f"+{name}") for name, by in rise.items())
        rounds = [
            rises.filter((pl.col("scraped_at") > first) | (n == 0)).with_columns(
                pl.col("scraped_at") + (EPOCH - first + n * span),
                *(pl.col(column) + pl.col(f"+{column}") * float(n) for column in counted),
            )
            for n in range(-(-length // span))
        ]
        tables[name] = pl.concat(rounds).select(frame.columns).filter(pl.col("scraped_at") <= EPOCH + length)
    return tables
