"""Two hours of a deployment whose replicas run out of batch slots, as raw rows and as a refreshed warehouse."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from optiinfra_pipelines.domain.fleet import Deployment, Fleet, Target
from optiinfra_pipelines.sql.loader import load_models
from optiinfra_pipelines.sql.sources import raw_tables
from resources.model_runner import ModelRunner
from resources.warehouse import Warehouse

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
CHANGED_AT = START + timedelta(minutes=62)
END = START + timedelta(minutes=140)
SLOTS = 16
FLEET = Fleet(
    targets=tuple(Target(name=f"r{n}", url=f"http://127.0.0.1:{n + 1}/metrics", deployment="chat") for n in range(4)),
    deployments=(Deployment(name="chat", model="my-model", gpu="H100-80GB-SXM", gpus_per_replica=1),),
)


# The models that the ledger reads, and those they are made from, in the order of the loader.
READ = (
    "int_scrape_minutes",
    "int_engine_minutes",
    "int_latency_minutes",
    "int_config_changes",
    "int_gpu_minutes",
    "fct_replica_load_5m",
    "fct_latency_5m",
    "int_host_minutes",
    "fct_replica_load_1h",
    "fct_gpu_utilization_5m",
    "fct_gpu_utilization_1h",
    "fct_host_utilization_5m",
    "fct_host_utilization_1h",
    "fct_scrape_health",
    "dim_targets",
    "fct_utilization_trends",
)


class Clock:
    """A clock that stands where the test puts it."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


def history() -> dict[str, pl.DataFrame]:
    """Two hours of four vLLM replicas behind 16 slots with 40 waiting at 20 % KV; r0 and r1 get 32 slots after 62
    minutes, with a restart, and 18 fewer wait there from then on."""
    rng = np.random.default_rng(7)
    samples: list[dict[str, object]] = []
    scrapes: list[dict[str, object]] = []
    for i in range(int((END - START) / timedelta(seconds=20)) + 1):
        at = START + timedelta(seconds=20 * i)
        for n in range(4):
            is_changed = n < 2 and at >= CHANGED_AT
            begun = CHANGED_AT - timedelta(seconds=40) if is_changed else START - timedelta(hours=5)
            life = (at - begun).total_seconds()
            noise = float(rng.normal(0, 1))
            common = {"scraped_at": at, "target": f"r{n}", "engine": "vllm", "vantage": "engine"}
            samples.append(
                common
                | {
                    "engine_rank": "0",
                    "process_started_at": begun,
                    "config_hash": "c0",
                    "requests_running": SLOTS * (2.0 if is_changed else 1.0),
                    "requests_waiting": 40.0 + noise - (18.0 if is_changed else 0.0),
                    "kv_cache_usage_ratio": 0.4 if is_changed else 0.2,
                    "requests_finished_total": 2.0 * life,
                    "prompt_tokens_total": 800.0 * life,
                    "generation_tokens_total": 200.0 * life,
                    "preemptions_total": 0.0,
                }
            )
            scrapes.append(
                common | {"deployment": "chat", "source": "live", "is_up": True, "process_started_at": begun}
            )
    config: dict[str, object] = {
        "first_seen_at": START,
        "engine_rank": "0",
        "config_hash": "c0",
        "engine": "vllm",
        "settings": [{"key": "block_size", "value": "16"}],
    }
    return {
        "raw_engine_samples": raw_tables()["raw_engine_samples"].frame(samples),
        "raw_scrapes": raw_tables()["raw_scrapes"].frame(scrapes),
        "raw_engine_configs": raw_tables()["raw_engine_configs"].frame(
            [config | {"target": f"r{n}"} for n in range(4)]
        ),
    }


def record(root: Path) -> None:
    """A state directory with the history and every model refreshed."""
    warehouse = Warehouse(root, clock=Clock(END))
    warehouse.append("history", history())
    models = load_models()
    runner = ModelRunner(models, warehouse, Clock(END))
    for name in models:
        if name.startswith("stg_") or name in READ:
            runner.refresh(models[name])
