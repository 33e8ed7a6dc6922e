"""What holds on every real NVIDIA GPU. Run where there is one: pytest -n 0 -m engine tests/gpus/test_real.py"""

from __future__ import annotations

import time
from datetime import UTC, datetime

import polars as pl
import pytest

from resources.nvml.gpus import GpuCollector

pytestmark = pytest.mark.engine

MIB = 1 << 20


@pytest.fixture(scope="module")
def ticks() -> list[dict[str, pl.DataFrame]]:
    """Four ticks, five seconds apart."""
    collector = GpuCollector("here")
    collected = [collector.collect(datetime.now(UTC))]
    status = collected[0]["raw_gpu_collections"]["status"][0]
    if status != "ok" or collected[0]["raw_gpu_samples"].is_empty():
        pytest.skip(f"no readable GPU here: {status}")
    for _ in range(3):
        time.sleep(5)
        collected.append(collector.collect(datetime.now(UTC)))
    collector.close()
    return collected


def test_memory_adds_up(ticks: list[dict[str, pl.DataFrame]]) -> None:
    """total = used + free + reserved, to the rounding of a MiB, on every whole GPU."""
    samples = pl.concat(tick["raw_gpu_samples"] for tick in ticks).filter(pl.col("mig_instance") == "")

    gap = pl.col("memory_total_bytes") - pl.sum_horizontal(
        "memory_used_bytes", "memory_free_bytes", "memory_reserved_bytes"
    )
    assert samples.select(gap.abs().max()).item() <= 2 * MIB


def test_the_ring_covers_the_gap_between_ticks(ticks: list[dict[str, pl.DataFrame]]) -> None:
    """Where the ring is not dry, five seconds hold at least four samples a second."""
    counts = pl.concat(tick["raw_gpu_samples"] for tick in ticks[1:])["utilization_sample_count"].drop_nulls()

    assert counts.is_empty() or counts.min() >= 20


def test_energy_agrees_with_power(ticks: list[dict[str, pl.DataFrame]]) -> None:
    """The mean power of the energy counter lies within what the card can draw."""
    samples = pl.concat(tick["raw_gpu_samples"] for tick in ticks).sort("gpu_uuid", "sampled_at")
    rates = samples.with_columns(
        watts=pl.col("energy_joules_total").diff().over("gpu_uuid", "mig_instance")
        / pl.col("sampled_at").diff().over("gpu_uuid", "mig_instance").dt.total_microseconds()
        * 1e6
    ).filter(pl.col("watts").is_not_null())

    assert rates.filter((pl.col("watts") <= 0) | (pl.col("watts") > 1.2 * pl.col("power_limit_watts"))).is_empty()


def test_counters_never_fall_and_ratios_are_ratios(ticks: list[dict[str, pl.DataFrame]]) -> None:
    """Cumulative columns grow, ratios lie in [0, 1], and thresholds lie above the temperature of a healthy card."""
    samples = pl.concat(tick["raw_gpu_samples"] for tick in ticks).sort("sampled_at")
    for column in samples.columns:
        values = samples.select("gpu_uuid", "mig_instance", column).drop_nulls(column)
        if column.endswith("_total"):
            steps = values.select(pl.col(column).diff().over("gpu_uuid", "mig_instance")).to_series().drop_nulls()
            assert (steps >= 0).all(), column
        if column.endswith("_ratio") and column != "fan_speed_ratio":
            assert values[column].is_between(0, 1).all(), column
    healthy = samples.filter(pl.col("health") == "ok").drop_nulls("slowdown_temperature_celsius")
    assert (healthy["slowdown_temperature_celsius"] > healthy["temperature_celsius"]).all()


def test_a_tick_is_within_its_budget(ticks: list[dict[str, pl.DataFrame]]) -> None:
    """50 ms of wall time and 25 ms of CPU, half a percent of a core at five seconds, once the facts are known."""
    last = ticks[-1]["raw_gpu_collections"]

    assert last["duration_seconds"][0] <= 0.050
    assert last["cpu_seconds"][0] <= 0.025
    assert last["error_count"][0] == 0
