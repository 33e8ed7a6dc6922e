"""A database with the raw tables, and rows put into it: by hand, or from recorded pages the way collection does."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import polars as pl
import pytest

from optiinfra_pipelines.engines.frames import to_frames
from optiinfra_pipelines.engines.normalize import Normalized, normalize
from optiinfra_pipelines.exposition import Reader
from optiinfra_pipelines.sql.macros import install_macros
from optiinfra_pipelines.sql.sources import raw_tables


def empty_warehouse() -> duckdb.DuckDBPyConnection:
    """A database in memory with raw tables and macros."""
    connection = duckdb.connect()
    connection.execute("set threads = 2; set timezone = 'UTC'")
    for table in raw_tables().values():
        connection.execute(table.create_sql())
    install_macros(connection)
    return connection


def insert(con: duckdb.DuckDBPyConnection, table: str, rows: Iterable[dict[str, object]]) -> None:
    """Rows as dicts into a raw table; what a row does not name is NULL. Maps are given as dicts."""
    for row in rows:
        names = ", ".join(f'"{name}"' for name in row)
        con.execute(f'insert into "{table}" ({names}) values ({", ".join("?" * len(row))})', list(row.values()))


def recordings() -> Path:
    """The folder of recorded pages, or a skip that says what to set."""
    folder = os.environ.get("OPTIINFRA_DATA")
    if not folder:
        pytest.skip("recorded pages are found through OPTIINFRA_DATA, which is not set")
    return Path(folder) / "fixtures"


def replay(
    con: duckdb.DuckDBPyConnection, pages: Iterable[Path], target: str, deployment: str | None = None
) -> list[datetime]:
    """Put recorded pages into the raw tables at their own times (a page's name is its Unix milliseconds).

    Returns the times of the scrapes.
    """
    reader = Reader()
    normalized: list[Normalized] = []
    for page in sorted(pages, key=lambda path: int(path.stem)):
        at = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=int(page.stem))
        normalized.append(normalize(reader.read(page.read_text()), target=target, scraped_at=at))
    append_pages(con, normalized)
    insert(
        con,
        "raw_scrapes",
        (
            {
                "scraped_at": page.scraped_at,
                "target": target,
                "deployment": deployment,
                "source": "recorded",
                "is_up": True,
                "engine": page.identity.engine,
                "vantage": page.identity.vantage,
                "duration_seconds": 0.01,
                "process_started_at": page.process_started_at,
            }
            for page in normalized
        ),
    )
    return [page.scraped_at for page in normalized]


def append_pages(con: duckdb.DuckDBPyConnection, pages: Iterable[Normalized]) -> None:
    """Read pages into the raw tables of what they hold."""
    for name, frame in to_frames(list(pages)).items():
        _append(con, name, frame)


def _append(con: duckdb.DuckDBPyConnection, table: str, frame: pl.DataFrame) -> None:
    """A frame into its raw table; what is not of one scrape (bounds, configurations) only once."""
    if frame.is_empty():
        return
    maps = [
        name for name, kind in frame.schema.items() if kind == raw_tables()["raw_kept_samples"].polars_schema["labels"]
    ]
    replaced = ", ".join(f'map_from_entries("{name}") as "{name}"' for name in maps)
    con.register("new_rows", frame)
    select = f"select * {f'replace ({replaced})' if replaced else ''} from new_rows"
    grain = [name for name in raw_tables()[table].grain if not raw_tables()[table].time]
    if grain:
        keys = " and ".join(f'old."{name}" = n."{name}"' for name in grain)
        key_list = ", ".join(f'"{name}"' for name in grain)
        select = (
            f"select distinct on ({key_list}) * from ({select}) n "
            f'where not exists (select 1 from "{table}" old where {keys})'
        )
    con.execute(f'insert into "{table}" by name {select}')
    con.unregister("new_rows")
