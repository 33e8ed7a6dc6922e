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
