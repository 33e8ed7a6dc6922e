"""A second process for the warehouse's tests and benchmarks: it works until it is killed.

    warehouse_writer.py work ROOT NAME SEED   append, move, publish, expire at random; tell each acknowledged batch
    warehouse_writer.py append ROOT NAME N    append N batches and end

Its clock runs ten minutes a batch from a start that the state directory remembers, so that hours close all the time.
"""

from __future__ import annotations

import random
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl

from optiinfra_pipelines.domain.fleet import Retention
from optiinfra_pipelines.sql.sources import raw_tables
from resources.warehouse import Warehouse

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
STEP = timedelta(minutes=10)
ROWS = 40


def batch_rows(batch_id: str, at: datetime) -> dict[str, pl.DataFrame]:
    """One scrape row and ROWS kept samples that carry the batch's id, so that each can be accounted for."""
    kept = raw_tables()["raw_kept_samples"]
    samples = [
        {"scraped_at": at, "target": "t", "name": batch_id, "labels": [{"key": "row", "value": str(n)}], "value": n}
        for n in range(ROWS)
    ]
    return {
        "raw_kept_samples": pl.DataFrame(samples, schema=kept.polars_schema),
        "raw_scrapes": raw_tables()["raw_scrapes"].frame([{"scraped_at": at, "target": batch_id, "is_up": True}]),
    }


def work(root: Path, name: str, seed: int) -> None:
    rng = random.Random(seed)
    clock = root / "clock"
    tick = int(clock.read_text()) if clock.exists() else 0
    interval = rng.choice([0.0, 0.2])
    warehouse = Warehouse(
        root, clock=lambda: EPOCH + tick * STEP, commit_interval_seconds=interval, rng=rng, min_free_bytes=0
    )
    warehouse.sweep()
    say("ready")
    while True:
        tick += 1
        clock.with_suffix(".new").write_text(str(tick))
        clock.with_suffix(".new").replace(clock)
        now = EPOCH + tick * STEP
        batch_id = f"{name}-{tick}"
        late = timedelta(hours=rng.choice([0, 0, 0, 2]))
        say(f"trying {batch_id}")
        warehouse.append(batch_id, batch_rows(batch_id, now - late))
        say(f"stored {batch_id}")
        if rng.random() < 0.2:
            warehouse.append(batch_id, batch_rows(batch_id, now - late))
        if rng.random() < 0.3:
            say(f"moving at {tick}")
            warehouse.move_closed_hours(now)
        if rng.random() < 0.25:
            say(f"publishing at {tick}")
            warehouse.publish()
        if rng.random() < 0.05:
            warehouse.apply_retention(Retention(raw_hours=24 * 365), now)


def append(root: Path, name: str, count: int) -> None:
    warehouse = Warehouse(root, clock=lambda: EPOCH, lock_deadline_seconds=0.3, min_free_bytes=0)
    for number in range(count):
        batch_id = f"{name}-{number}"
        warehouse.append(batch_id, batch_rows(batch_id, EPOCH + timedelta(seconds=number)))
        say(f"stored {batch_id}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    command, folder, *rest = sys.argv[1:]
    if command == "work":
        work(Path(folder), rest[0], int(rest[1]))
    elif command == "append":
        append(Path(folder), rest[0], int(rest[1]))
    else:
        sys.exit(f"unknown command {command}; see the module's text")
