"""Reading recorded and written pages for the engine tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from optiinfra_pipelines.engines import Normalized, normalize
from optiinfra_pipelines.exposition import Reader
from optiinfra_pipelines.sql.sources import raw_tables

RECORDINGS = Path(__file__).parent.parent / "fixtures" / "recordings"
SCRAPED_AT = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)

Normalizer = Callable[..., Normalized]
Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def recordings() -> Path:
    return RECORDINGS


@pytest.fixture(scope="session")
def all_recordings() -> Path:
    """The whole set of recordings, of which tests/fixtures/recordings is a selection."""
    data = os.environ.get("OPTIINFRA_DATA")
    if not data:
        pytest.skip("OPTIINFRA_DATA is unset: it names the folder with the whole set of recordings")
    return Path(data) / "fixtures"


@pytest.fixture(scope="session")
def normalized() -> Normalizer:
    """A page (its text, or a path under tests/fixtures/recordings) -> what the engine tables make of it."""
    reader = Reader()

    def run(page: str | Path, **options: Any) -> Normalized:
        text = (RECORDINGS / page).read_text() if isinstance(page, Path) else page
        return normalize(reader.read(text), target="t", scraped_at=SCRAPED_AT, **options)

    return run


@pytest.fixture(scope="session")
def rows() -> Rows:
    """The rows of one table as dicts, without what is unknown."""

    def read(page: Normalized, table: str = "raw_engine_samples") -> list[dict[str, Any]]:
        columns = tuple(raw_tables()[table].columns)
        named = (zip(columns, row, strict=True) for row in page.rows[table])
        return [{column: value for column, value in row if value is not None} for row in named]

    return read
