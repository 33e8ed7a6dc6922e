"""The stable replicas' stored past gives exact minutes and an A/A replay, through a real warehouse file."""

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from optiinfra_pipelines.rollout.margins import JudgedEdge
from optiinfra_pipelines.sql.sources import raw_tables
from resources.rollouts.history import StableHistory
from resources.warehouse import Warehouse

NOW = datetime(2026, 11, 18, 12, 0, tzinfo=UTC)
BOUNDS = [0.5, 1.0, math.inf]
SIGNAL = "time_to_first_token_seconds"


def store(warehouse: Warehouse, counts: dict[str, np.ndarray], look_seconds: float = 5.0) -> None:
    """Cumulative counts, [look, bucket] by target; the last look is NOW."""
    rows: list[dict[str, object]] = []
    for target, table in counts.items():
        for index, row in enumerate(table.tolist()):
            at = NOW - timedelta(seconds=look_seconds * (len(table) - 1 - index))
            rows.append(
                {
                    "scraped_at": at,
                    "target": target,
                    "engine_rank": "0",
                    "metric": SIGNAL,
                    "bounds_id": 7,
                    "bucket_counts": row,
                    "count_value": row[-1],
                }
            )
    tables = raw_tables()
    warehouse.append(
        "batch-1",
        {
            "raw_engine_histograms": tables["raw_engine_histograms"].frame(rows),
            "raw_histogram_bounds": tables["raw_histogram_bounds"].frame([{"bounds_id": 7, "upper_bounds": BOUNDS}]),
        },
    )


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(tmp_path, clock=lambda: NOW)


def test_minutes_are_exact_over_targets_restarts_and_gaps(warehouse: Warehouse) -> None:
    """One request a look in each bucket; a restart counts from zero, a missed look counts nothing."""
    steady = np.cumsum(np.ones((61, 3)), axis=0).cumsum(axis=1)
    restarted = steady.copy()
    restarted[40:] = steady[: 61 - 40]
    store(warehouse, {"a": steady, "b": restarted})
    history = StableHistory(lambda sql, given: warehouse.read(sql, given), ["a", "b"], 5.0)

    minutes = history.minutes(SIGNAL, NOW)

    assert [tuple(one.upper_bounds) for one in minutes] == [tuple(BOUNDS)] * len(minutes)
    assert sum(one.total for one in minutes) == 2 * 60 * 3
    assert {one.total for one in minutes[1:-1]} == {2 * 12 * 3.0}
    assert history.minutes("inter_token_latency_seconds", NOW) == []
    assert StableHistory(lambda sql, given: warehouse.read(sql, given), ["x"], 5.0).minutes(SIGNAL, NOW) == []


def test_hours_without_data_are_no_harmless_windows(warehouse: Warehouse) -> None:
    """Six replicas, four hours of the day stored at the 5 s cadence."""
    random = np.random.default_rng(1)
    counts = {}
    for name in "abcdef":
        state, rows = 0.0, []
        for _ in range(2881):
            state = 0.95 * state + math.sqrt(1 - 0.95**2) * random.normal(0, 0.7)
            share = 0.4 * math.exp(state) / (1 + 0.4 * math.exp(state))
            total = random.poisson(40)
            over = random.binomial(total, share)
            rows.append([total - over, total, total])
        counts[name] = np.cumsum(np.array(rows, dtype=float), axis=0)
    store(warehouse, counts)
    history = StableHistory(lambda sql, given: warehouse.read(sql, given), list("abcdef"), 5.0)

    found = history.calibration(SIGNAL, [JudgedEdge(0.5, 0.3, 1.3)], NOW, alpha=0.01)

    assert found.windows == 6 * 8  # the twenty hours before are not harmless, they are not there
    assert found.stake < 0.5  # few windows, but minutes enough to see how far these replicas drift
    assert "48 of 50 windows: stake 0.1 for their drift" in found.reason


def test_the_load_of_a_staging_test_shares_what_production_shares(warehouse: Warehouse) -> None:
    """Seven tenths of the looked-up tokens were found; a restart counts from its first look, another target nothing."""
    history = StableHistory(lambda sql, given: warehouse.read(sql, given), ["a"], 5.0)
    assert history.load_mix(NOW).shared_prefix_ratio == 0.0
    rows: list[dict[str, object]] = []
    for look in range(60):
        at = NOW - timedelta(seconds=5 * (59 - look))
        counted = 1000.0 * (look % 30)
        common = {"scraped_at": at, "engine_rank": "0", "engine": "vllm", "vantage": "engine"}
        rows += [
            common | {"target": "a", "prefix_cache_queries_total": counted, "prefix_cache_hits_total": 0.7 * counted},
            common | {"target": "b", "prefix_cache_queries_total": counted, "prefix_cache_hits_total": counted},
            common | {"target": "a", "engine_rank": "1", "requests_running": look % 5, "requests_waiting": look % 20},
        ]
    warehouse.append("samples", {"raw_engine_samples": raw_tables()["raw_engine_samples"].frame(rows)})

    assert history.load_mix(NOW).shared_prefix_ratio == pytest.approx(0.7)
    assert history.load_mix(NOW).most_in_flight == 4 + 19
    assert history.load_mix(NOW + timedelta(hours=2)).most_in_flight is None
    assert history.load_mix(NOW + timedelta(hours=2)).shared_prefix_ratio == 0.0
