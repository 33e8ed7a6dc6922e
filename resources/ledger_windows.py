"""Read what the rules look at: the samples, histograms and configurations of one window.

Here: the queries and the frames they give. Not here: what is made of them (`analysis.rules_measures`) or where
recommendations are kept (`resources.ledger_store`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import duckdb
import polars as pl

from optiinfra_pipelines.analysis.rules_measures import HISTOGRAMS, SAMPLE_COLUMNS


@dataclass(frozen=True)
class WindowRows:
    """Everything of one window. settings: (target, config hash) -> what the page prints."""

    samples: pl.DataFrame
    histograms: pl.DataFrame
    settings: Mapping[tuple[str, str], Mapping[str, str]]


def read_window(connection: duckdb.DuckDBPyConnection, start: datetime, end: datetime) -> WindowRows:
    """Rows scraped from `start` to `end`, both included."""
    samples: pl.DataFrame = connection.sql(samples_sql(), params=[start, end]).pl()
    histograms: pl.DataFrame = connection.sql(histograms_sql(), params=[start, end]).pl()
    return WindowRows(samples, histograms, read_settings(connection))


def read_settings(connection: duckdb.DuckDBPyConnection) -> dict[tuple[str, str], dict[str, str]]:
    """(target, config hash) -> settings as the page prints them, of every configuration ever seen."""
    rows = connection.execute("select target, config_hash, settings from stg_engine_configs").fetchall()
    return {(target, config_hash): dict(settings) for target, config_hash, settings in rows}


def samples_sql() -> str:
    """Samples of a window, two parameters: its first and last moment."""
    columns = ", ".join(f'"{name}"' for name in SAMPLE_COLUMNS)
    return f"select {columns} from stg_engine_samples where scraped_at between ? and ?"


def histograms_sql() -> str:
    """First and last state of each histogram in a window, two parameters: its first and last moment."""
    metrics = ", ".join(f"'{name}'" for name in HISTOGRAMS)
    return f"""
        select
            h.target, h.engine_rank, h.metric, any_value(b.upper_bounds) as upper_bounds,
            arg_min(h.bucket_counts, h.scraped_at) as first_counts,
            arg_max(h.bucket_counts, h.scraped_at) as last_counts,
            arg_min(h.sum_value, h.scraped_at) as first_sum, arg_max(h.sum_value, h.scraped_at) as last_sum,
            arg_min(h.count_value, h.scraped_at) as first_count, arg_max(h.count_value, h.scraped_at) as last_count
        from stg_engine_histograms h
        left join stg_histogram_bounds b using (bounds_id)
        where h.scraped_at between ? and ? and h.metric in ({metrics}) and h.vantage = 'engine'
        group by h.target, h.engine_rank, h.metric, h.bounds_id
    """
