"""Recorded phases and written windows as the rules get them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import duckdb
import polars as pl

from optiinfra_pipelines.analysis.recommendations.context import Context
from optiinfra_pipelines.analysis.recommendations.derive import Advice, Group, recommend
from optiinfra_pipelines.analysis.recommendations.measures import SAMPLE_COLUMNS, Measures, measure_targets
from optiinfra_pipelines.domain.findings import Subject
from optiinfra_pipelines.engines import normalize
from optiinfra_pipelines.exposition import Reader
from optiinfra_pipelines.sql.sources import raw_tables
from resources.demo.replay import load_recording
from resources.ledger.windows import read_window
from tests.analysis.findings_recordings import RECORDINGS
from tests.sql.harness import append_pages, empty_warehouse, recordings, replay

VLLM = "vllm/0.32.0/small_llama_kv8k"
START = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def with_staging(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """The staging views that the queries of windows read, as plain views."""
    for name in ("engine_samples", "engine_histograms", "histogram_bounds", "engine_configs"):
        connection.execute(f"create or replace view stg_{name} as select * from raw_{name}")
    return connection


def load(folders: Sequence[str | Path], target: str = "r1") -> tuple[duckdb.DuckDBPyConnection, list[datetime]]:
    """Recorded pages of some phases in one database, and the times of their scrapes."""
    connection = with_staging(empty_warehouse())
    pages = [page for folder in folders for page in (recordings() / folder).glob("*.prom")]
    return connection, replay(connection, pages, target)


@cache
def collect(phases: tuple[str, ...], target: str = "r1") -> tuple[duckdb.DuckDBPyConnection, dict[str, datetime]]:
    """Phases of vLLM as a collector reads them every 5 s, the last page for a minute more; and each phase's end.

    A day after they were recorded: the process on the pages has long been running.
    """
    begin = START + timedelta(days=1)
    connection = with_staging(empty_warehouse())
    recording = load_recording(target, [RECORDINGS / VLLM / phase for phase in phases])
    reader = Reader()
    ends = {page.phase: begin + timedelta(seconds=page.offset_seconds) for page in recording.pages}
    pages = [
        normalize(
            reader.read(recording.page_at(seconds).path.read_text()),
            target=target,
            scraped_at=begin + timedelta(seconds=seconds),
        )
        for seconds in range(0, int(recording.duration_seconds) + 60, 5)
    ]
    append_pages(connection, pages)
    return connection, ends


def measured(connection: duckdb.DuckDBPyConnection, start: datetime, end: datetime) -> dict[str, Measures]:
    """The measures of a window, read as the product reads them."""
    rows = read_window(connection, start, end)
    return measure_targets(rows.samples, rows.histograms, rows.settings)


def advise(phase: str, context: Context | None = None) -> tuple[Advice, dict[str, Measures]]:
    """What the rules say of one recorded phase, taken as one window."""
    connection, times = load([phase])
    measures = measured(connection, times[0], times[-1])
    group = Group(
        Subject(kind="deployment", name="chat"), ("r1",), context or Context(engine="vllm"), source="recorded"
    )
    return recommend([group], measures, at=times[-1]), measures


def samples(rows: Sequence[dict[str, object]], step_seconds: float = 5.0) -> pl.DataFrame:
    """Written rows of raw_engine_samples: target r1, rank 0, vLLM, one every `step_seconds` unless a row says so."""
    base = {
        "target": "r1",
        "engine_rank": "0",
        "engine": "vllm",
        "vantage": "engine",
        "process_started_at": START - timedelta(hours=1),
        "config_hash": "c0",
    }
    full = [base | {"scraped_at": START + timedelta(seconds=step_seconds * i)} | row for i, row in enumerate(rows)]
    return raw_tables()["raw_engine_samples"].frame(full).select(SAMPLE_COLUMNS)


def no_histograms() -> pl.DataFrame:
    return pl.DataFrame(
        schema={
            "target": pl.String,
            "engine_rank": pl.String,
            "metric": pl.String,
            "upper_bounds": pl.List(pl.Float64),
            "first_counts": pl.List(pl.Float64),
            "last_counts": pl.List(pl.Float64),
            "first_sum": pl.Float64,
            "last_sum": pl.Float64,
            "first_count": pl.Float64,
            "last_count": pl.Float64,
        }
    )
