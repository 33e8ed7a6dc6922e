"""Increments over recorded phases of real engines, against what their clients counted."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest

from optiinfra_pipelines.sql.models import Models
from optiinfra_pipelines.sql.refresh import refresh_all
from tests.sql.harness import recordings, replay

VLLM = "vllm/0.32.0/small_llama_kv8k"
LLAMACPP = "llama.cpp/debian-1_0.7.0-b11669/small_np4_c8192"


def total(con: duckdb.DuckDBPyConnection, column: str, times: list[datetime]) -> float | None:
    """Sum of one increment over the minutes of a phase, its first scrape excluded: that one ends what was before."""
    row = con.execute(f"select sum({column}) from int_engine_minutes").fetchone()
    return row[0] if row else None


def client(folder: Path) -> list[dict[str, Any]]:
    """What the client of a phase saw of each request that succeeded."""
    truth = json.loads((folder / "client.json").read_text())
    return [request for request in truth["requests"] if not request.get("error")]


@pytest.mark.parametrize(
    ("phase", "generation_tokens", "preemptions", "requests"),
    [
        (f"{VLLM}/01_idle", 0, 0, 0),
        (f"{VLLM}/02_light_c1", 1165, 0, 30),
        (f"{VLLM}/03_loaded_shared_prefix_c8", 5476, 0, 93),
        (f"{VLLM}/04_kv_pressure_preempt_c16", 8491, 14, 29),
        (f"{VLLM}/05_overload_queue_c64_low_kv", 17936, 0, 395),
        (f"{VLLM}/06_drained_idle", 0, 0, 0),
    ],
)
def test_increments_over_a_phase_are_what_the_client_counted(
    con: duckdb.DuckDBPyConnection,
    models: Models,
    phase: str,
    generation_tokens: int,
    preemptions: int,
    requests: int,
) -> None:
    """Counters are exact: tokens, requests and preemptions of a phase equal client truth to the unit."""
    times = replay(con, (recordings() / phase).glob("*.prom"), "r1")
    refresh_all(con, models, times[-1] + timedelta(seconds=1))

    found = con.execute(
        "select sum(generation_tokens), sum(preemptions), sum(requests_finished) from int_engine_minutes"
    ).fetchone()

    assert found == (generation_tokens, preemptions, requests)
