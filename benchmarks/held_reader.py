"""Collect and publish while another process holds a read-only session on the read copy.

    python benchmarks/held_reader.py [--seconds 300] [--interval 1.0] [--root DIR]

Appends a small batch and publishes every `interval` seconds, moves closed hours every tenth time, and lets the held
session ask for all rows all along. Prints writes, failed ones and the slowest. Exit status 1 when anything failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl

from optiinfra_pipelines.sql.sources import raw_tables
from resources.warehouse import Warehouse, WarehouseError

HELD_SESSION = """
import sys, time, duckdb
session = duckdb.connect(sys.argv[1], read_only=True)
answers = failed = 0
print("held", flush=True)
while True:
    try:
        session.execute("select count(*), max(scraped_at)::varchar from raw_scrapes").fetchall()
        answers += 1
    except duckdb.Error as error:
        failed += 1
        print(error, file=sys.stderr)
    if session.execute("select count(*) from glob(?)", [sys.argv[2]]).fetchall() != [(0,)]:
        break
    time.sleep(0.1)
print(answers, failed, flush=True)
"""
TARGETS = 50
# Ten minutes of rows a batch, so that hours close while the benchmark runs.
STEP = timedelta(minutes=10)


def batch(at: datetime) -> dict[str, pl.DataFrame]:
    rows: list[dict[str, object]] = [{"scraped_at": at, "target": f"target {n}", "is_up": True} for n in range(TARGETS)]
    return {"raw_scrapes": raw_tables()["raw_scrapes"].frame(rows)}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=300.0)
    arguments.add_argument("--interval", type=float, default=1.0)
    arguments.add_argument("--root", type=Path)
    given = arguments.parse_args()
    root = given.root or Path(tempfile.mkdtemp(prefix="held_reader_"))
    now = datetime(2026, 1, 1, tzinfo=UTC)
    warehouse = Warehouse(root, clock=lambda: now)
    warehouse.append("first", batch(now))
    copy = warehouse.publish().path

    appends = publications = moves = failed = 0
    slowest = 0.0
    stop = root / "stop"
    command = [sys.executable, "-c", HELD_SESSION, str(copy), str(stop)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as session:
        assert session.stdout is not None
        assert session.stdout.readline() == "held\n"
        until = time.monotonic() + given.seconds
        while (begun := time.monotonic()) < until:
            now += STEP
            try:
                appends += warehouse.append(now.isoformat(), batch(now)).status == "stored"
                publications += warehouse.publish().is_new
                if appends % 10 == 0:
                    moves += len(warehouse.move_closed_hours(now))
            except WarehouseError as error:
                failed += 1
                print(error, file=sys.stderr)
            took = time.monotonic() - begun
            slowest = max(slowest, took)
            time.sleep(max(0.0, given.interval - took))
        stop.touch()
        answers, unanswered = session.stdout.readline().split()

    print(f"session held {given.seconds:g} s")
    print(f"appends {appends}")
    print(f"publications {publications}")
    print(f"moved hours {moves}")
    print(f"failed writes {failed}")
    print(f"slowest append and publication {slowest * 1000:.0f} ms")
    print(f"answers of the held session {answers}")
    print(f"failed answers {unanswered}")
    return int(bool(failed or int(unanswered)))


if __name__ == "__main__":
    sys.exit(main())
