"""How long recommendations, the ledger and waste take to derive for a fleet of many replicas.

    python benchmarks/derive_recommendations.py --replicas 200

Makes a real warehouse with an hour of 5 s scrapes of vLLM replicas (a third idle, a third behind full batch slots, a
third short of KV memory; with histograms), refreshes the models it needs, and times the refresh of one window (what
happens live every five minutes), a catch-up of ten windows, and waste with costs, trends and packing. Prints wall and
CPU seconds of this machine, nothing else.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from optiinfra_pipelines.domain.fleet import Deployment, Fleet, Host, Target
from optiinfra_pipelines.sql.loader import load_models
from optiinfra_pipelines.sql.sources import raw_tables
from resources.findings.waste import WasteStore
from resources.ledger.store import LedgerStore
from resources.model_runner import ModelRunner
from resources.warehouse import Warehouse

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
STEP = timedelta(seconds=5)
PER_DEPLOYMENT = 10
BOUNDS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, float("inf")]
METRICS = ("prompt_tokens", "generation_tokens", "queue_seconds", "time_to_first_token_seconds", "step_tokens")
KINDS = (
    {"requests_running": 2.0, "requests_waiting": 0.0, "kv_cache_usage_ratio": 0.05, "preemptions": 0.0},
    {"requests_running": 16.0, "requests_waiting": 40.0, "kv_cache_usage_ratio": 0.2, "preemptions": 0.0},
    {"requests_running": 14.0, "requests_waiting": 3.0, "kv_cache_usage_ratio": 0.98, "preemptions": 0.2},
)


class Clock:
    """A clock that stands where the benchmark puts it."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


def fleet(replicas: int) -> Fleet:
    names = [f"d{n}" for n in range(-(-replicas // PER_DEPLOYMENT))]
    return Fleet(
        targets=tuple(
            Target(name=f"r{n}", url="http://127.0.0.1:1/", deployment=f"d{n // PER_DEPLOYMENT}", host=f"h{n}")
            for n in range(replicas)
        ),
        hosts=tuple(Host(name=f"h{n}") for n in range(replicas)),
        deployments=tuple(
            Deployment(
                name=name,
                model="meta-llama/Llama-3.1-8B-Instruct",
                gpu="H100-80GB-SXM",
                gpus_per_replica=1,
                price_usd_per_gpu_hour=None,
            )
            for name in names
        ),
    )


def minutes(replicas: int, begin: datetime) -> dict[str, pl.DataFrame]:
    """Ten minutes of every replica, columns made at once and not row by row."""
    steps = int(timedelta(minutes=10) / STEP)
    times = [begin + STEP * i for i in range(steps)]
    base = pl.DataFrame({"scraped_at": times}).join(
        pl.DataFrame({"target": [f"r{n}" for n in range(replicas)], "n": range(replicas)}), how="cross"
    )
    kind = (pl.col("n") // PER_DEPLOYMENT) % 3
    life = (pl.col("scraped_at") - START).dt.total_seconds() + 3600
    rng = np.random.default_rng(0)
    rows = base.with_columns(
        *(
            pl.when(kind == 0)
            .then(KINDS[0][name])
            .when(kind == 1)
            .then(KINDS[1][name])
            .otherwise(KINDS[2][name])
            .alias(name)
            for name in KINDS[0]
        ),
        noise=pl.Series(rng.normal(0, 1, base.height)),
        engine_rank=pl.lit("0"),
        engine=pl.lit("vllm"),
        vantage=pl.lit("engine"),
        source=pl.lit("live"),
        is_up=pl.lit(True),
        process_started_at=pl.lit(START - HOUR),
        config_hash=pl.lit("c0"),
        kv_cache_capacity_tokens=pl.lit(320_000.0),
        kv_cache_block_size_tokens=pl.lit(16.0),
        requests_finished_total=2 * life.cast(pl.Float64),
        prompt_tokens_total=8000 * life.cast(pl.Float64),
        generation_tokens_total=500 * life.cast(pl.Float64),
        preemptions_total=pl.lit(0.0),
    ).with_columns(
        preemptions_total=pl.col("preemptions") * pl.col("requests_finished_total"),
        requests_waiting=(pl.col("requests_waiting") + pl.when(kind > 0).then(pl.col("noise")).otherwise(0.0)).clip(0),
        deployment=pl.format("d{}", pl.col("n") // PER_DEPLOYMENT),
    )
    shares = [0.0, 0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0, 1.0]
    histograms = rows.join(pl.DataFrame({"metric": list(METRICS)}), how="cross").with_columns(
        bounds_id=pl.lit(1, dtype=pl.UInt64),
        bucket_counts=pl.concat_list([pl.col("requests_finished_total") * share for share in shares]),
        sum_value=pl.col("requests_finished_total") * 900,
        count_value=pl.col("requests_finished_total"),
    )
    frames = {"raw_engine_samples": rows, "raw_scrapes": rows, "raw_engine_histograms": histograms}
    return {
        name: frame.select(c for c in raw_tables()[name].columns if c in frame.columns)
        for name, frame in frames.items()
    }


def timed(label: str, work: Callable[[], object]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    print(f"{label:<52} {time.perf_counter() - wall:8.2f} s wall {time.process_time() - cpu:8.2f} s CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=200)
    replicas = parser.parse_args().replicas
    clock = Clock(START)
    with tempfile.TemporaryDirectory() as folder:
        warehouse = Warehouse(Path(folder) / "warehouse", clock=clock)
        bounds = raw_tables()["raw_histogram_bounds"].frame([{"bounds_id": 1, "upper_bounds": BOUNDS}])
        config = {"first_seen_at": START, "engine_rank": "0", "config_hash": "c0", "engine": "vllm"}
        settings = [{"key": "gpu_memory_utilization", "value": "0.9"}, {"key": "cache_dtype", "value": "auto"}]
        configs = [config | {"target": f"r{n}", "settings": settings} for n in range(replicas)]
        warehouse.append(
            "known",
            {"raw_histogram_bounds": bounds, "raw_engine_configs": raw_tables()["raw_engine_configs"].frame(configs)},
        )
        for part in range(6):
            warehouse.append(f"part-{part}", minutes(replicas, START + timedelta(minutes=10 * part)))
        clock.now = START + HOUR + timedelta(seconds=31)
        models = load_models()
        runner = ModelRunner(models, warehouse, clock)
        for name in models:
            runner.refresh(models[name])
        store = LedgerStore(fleet(replicas), warehouse, clock)
        clock.now = START + timedelta(minutes=50, seconds=31)
        timed(f"ledger, {replicas} replicas, catch-up of 10 windows", store.refresh)
        clock.now = START + timedelta(minutes=55, seconds=31)
        timed(f"ledger, {replicas} replicas, one window (a live refresh)", store.refresh)
        waste = WasteStore(fleet(replicas), warehouse, clock)
        timed(f"waste, costs, trends and packing, {replicas} replicas", waste.refresh)
        print(f"open recommendations: {len(store.open_recommendations())}")


if __name__ == "__main__":
    main()
