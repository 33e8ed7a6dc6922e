"""What it costs to judge a fleet: read windows, diagnose, update and store findings, on recorded pages.

Run: python benchmarks/judge_fleet.py [replicas]. Prints seconds of each part; every replica gets five minutes of one
recorded phase at the collection cadence, a quarter of them each idle, light, short of KV memory, and overloaded.
"""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl

from optiinfra_pipelines.domain.fleet import Deployment, Fleet, Target
from optiinfra_pipelines.domain.thresholds import threshold_values
from optiinfra_pipelines.engines import normalize, to_frames
from optiinfra_pipelines.exposition import Reader
from optiinfra_pipelines.sql.loader import load_models
from optiinfra_pipelines.sql.sources import raw_tables
from resources.demo.fleet import RECORDINGS
from resources.findings.reader import read_windows
from resources.findings.store import FindingsStore, diagnose_all
from resources.model_runner import ModelRunner
from resources.warehouse import Warehouse

PHASES = ("01_idle", "02_light_c1", "04_kv_pressure_preempt_c16", "05_overload_queue_c64_low_kv")
SCRAPES, CADENCE = 60, timedelta(seconds=5)
END = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def five_minutes(phase: str) -> dict[str, pl.DataFrame]:
    """Raw tables of one target, its recorded pages spread over the window."""
    reader = Reader()
    pages = sorted((RECORDINGS / "vllm/0.32.0/small_llama_kv8k" / phase).glob("*.prom"))
    parsed = [reader.read(page.read_text()) for page in pages]
    times = [END - (SCRAPES - 1 - n) * CADENCE for n in range(SCRAPES)]
    made = [normalize(parsed[n * len(parsed) // SCRAPES], target="t", scraped_at=at) for n, at in enumerate(times)]
    scrapes = [
        {"scraped_at": at, "target": "t", "is_up": True, "engine": "vllm", "vantage": "engine", "source": "recorded"}
        for at in times
    ]
    return to_frames(made) | {"raw_scrapes": raw_tables()["raw_scrapes"].frame(scrapes)}


def fill(warehouse: Warehouse, replicas: int) -> None:
    tables = [five_minutes(phase) for phase in PHASES]
    for name in ("raw_scrapes", "raw_engine_samples", "raw_engine_histograms", "raw_engine_configs"):
        parts = [tables[n % 4][name].with_columns(pl.lit(f"r{n}").alias("target")) for n in range(replicas)]
        warehouse.append(name, {name: pl.concat([part for part in parts if part.height])})
    warehouse.append("bounds", {"raw_histogram_bounds": tables[0]["raw_histogram_bounds"]})


def main(replicas: int) -> None:
    fleet = Fleet(
        targets=tuple(Target(name=f"r{n}", url=f"http://h/{n}", deployment=f"d{n % 20}") for n in range(replicas)),
        deployments=tuple(Deployment(name=f"d{n}", model="small") for n in range(20)),
    )
    values = threshold_values({})
    with tempfile.TemporaryDirectory() as folder:
        warehouse = Warehouse(Path(folder), clock=lambda: END)
        fill(warehouse, replicas)
        runner = ModelRunner(load_models(), warehouse, lambda: END)
        for model in runner.models.values():
            runner.refresh(model)
        begun = time.perf_counter()
        with warehouse.connect() as connection:
            windows = read_windows(connection, fleet, END, values)
        read = time.perf_counter()
        diagnoses = diagnose_all(windows, values)
        judged, cpu = time.perf_counter(), time.process_time()
        refreshed = FindingsStore(fleet, warehouse, lambda: END).refresh()
        whole, cpu = time.perf_counter(), time.process_time() - cpu
    found = sum(len(one.findings) for one in diagnoses)
    print(f"{replicas} replicas, {len(diagnoses)} subjects, {found} findings")
    cost = f"{whole - judged:.2f} s wall {cpu:.2f} s CPU"
    print(f"read {read - begun:.2f} s   judge {judged - read:.2f} s   whole refresh {cost}")
    print(f"stored: {len(refreshed.findings)} findings, {len(refreshed.abstentions)} abstentions")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
