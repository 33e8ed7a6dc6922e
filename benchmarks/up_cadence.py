"""`optiinfra up` watching one host: cadence of the three sensors, CPU of all its processes, growth of its storage.

    python benchmarks/up_cadence.py [--minutes 5] [--fleet fleet.yaml] [--port 3999]

Live: starts the real product on a fresh state folder and stops it again. CPU is what the kernel accounts to the
supervisor, Dagster's processes and every run they started, beginning when all are up; the first minute, in which
every table is built, is shown apart.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import dagster as dg
import psutil

from optiinfra_pipelines.settings import load_fleet
from resources.dagster_home.prune import REFRESH_TAG

# How long the hourly job keeps each part, in hours: PruneConfig's default, and KEEP_EVALUATIONS.
KEEP_HOURS = {"ticks": 4, "evaluations": 2, "runs": 4, "events": 4}
SENSORS = ("scrape_engines", "sample_gpus", "sample_hosts")


def cpu_seconds(root: psutil.Process) -> float:
    """CPU of a process and all its descendants, ended ones included once their parent has reaped them."""
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def stored_by_part(dagster_home: Path) -> dict[str, int]:
    """Bytes of Dagster's records by what they are; pruning keeps each part for a time of its own."""
    with sqlite3.connect(dagster_home / "schedules" / "schedules.db") as connection:
        [(ticks,)] = connection.execute("select coalesce(sum(length(tick_body) + 700), 0) from job_ticks")
        [(evaluations,)] = connection.execute(
            "select coalesce(sum(length(asset_evaluation_body) + 100), 0) from asset_daemon_asset_evaluations"
        )
    runs = dagster_home / "history" / "runs"
    shards = {path.name: path.stat().st_size for path in runs.glob("*.db")}
    events = shards.pop("index.db", 0) + shards.pop(".db", 0)
    return {"ticks": ticks, "evaluations": evaluations, "runs": sum(shards.values()), "events": events}


def refreshes_since(dagster_home: Path, since: float) -> int:
    """Refresh runs that began since a moment."""
    with dg.DagsterInstance.from_config(str(dagster_home)) as instance:
        records = instance.get_run_records(dg.RunsFilter(tags=REFRESH_TAG))
    return sum(1 for record in records if record.create_timestamp.timestamp() >= since)


def tick_times(dagster_home: Path, since: float) -> dict[str, list[float]]:
    """Start of every tick since a moment, per sensor, oldest first: from Dagster's own record."""
    with dg.DagsterInstance.from_config(str(dagster_home)) as instance:
        times = {}
        for state in instance.all_instigator_state():
            if state.instigator_name in SENSORS:
                ticks = instance.get_ticks(state.instigator_origin_id, state.selector_id, after=since)
                times[state.instigator_name] = sorted(tick.timestamp for tick in ticks)
        return times


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--minutes", type=float, default=5)
    arguments.add_argument("--fleet", type=Path, default=Path(__file__).parent.parent / "fleet.yaml")
    arguments.add_argument("--port", type=int, default=3999)
    given = arguments.parse_args()
    home = Path(tempfile.mkdtemp(prefix="optiinfra-bench-"))
    command = [str(Path(sys.executable).parent / "optiinfra"), "--home", str(home), "--fleet", str(given.fleet)]
    product = subprocess.Popen(
        [*command, "up", "--port", str(given.port)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert product.stdout is not None
    try:
        for line in product.stdout:
            print("  |", line.rstrip(), flush=True)
            if "stop    Ctrl-C" in line:
                break
        root, dagster_home = psutil.Process(product.pid), home / "dagster"
        begun, before = time.time(), cpu_seconds(root)
        time.sleep(60)
        warm_at, warm = time.time(), cpu_seconds(root)
        stored = stored_by_part(dagster_home)
        print(f"first minute: {(warm - before) / (warm_at - begun):.1%} of one core, every table built in it")
        time.sleep(given.minutes * 60)
        seconds, cpu = time.time() - warm_at, cpu_seconds(root) - warm
        grown = {part: size - stored[part] for part, size in stored_by_part(dagster_home).items()}
        print(f"CPU of all processes over {seconds:.0f} s: {cpu / seconds:.1%} of one core ({cpu:.1f} s)")
        resident = sum(process.memory_info().rss for process in [root, *root.children(recursive=True)])
        print(f"resident memory: {resident / 2**20:.0f} MiB")
        for name, times in tick_times(dagster_home, warm_at).items():
            gaps = [after - earlier for earlier, after in itertools.pairwise(times)]
            print(
                f"{name}: {len(times)} ticks, gap mean {statistics.fmean(gaps):.2f} s, "
                f"longest {max(gaps):.2f} s, sd {statistics.pstdev(gaps):.2f} s"
            )
        # A window may hold one refresh more or less than its length says: what a refresh writes is taken per refresh.
        refreshes = refreshes_since(dagster_home, warm_at)
        share = seconds / 60 / load_fleet(given.fleet, os.environ).cadence.refresh_minutes / max(refreshes, 1)
        scale = {"ticks": 1.0, "evaluations": share, "runs": share, "events": share}
        a_day = {part: size * scale[part] / seconds * 86400 / 1e6 for part, size in grown.items()}
        steady = {part: a_day[part] * KEEP_HOURS[part] / 24 for part in a_day}
        print(
            f"Dagster's own storage: {sum(a_day.values()):.0f} MB written a day ("
            + ", ".join(f"{part} {size:.0f}" for part, size in a_day.items())
            + f"); pruned every hour it holds {sum(steady.values()):.0f} MB and grows no more"
        )
        print(f"warehouse: {folder_bytes(home / 'warehouse') / 1e6:.1f} MB after {(time.time() - begun) / 60:.0f} min")
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the end")
    finally:
        product.send_signal(signal.SIGTERM)
        product.wait(timeout=60)
    left = [p for p in psutil.process_iter(["cmdline"]) if str(home) in " ".join(p.info["cmdline"] or [])]
    print(f"processes left running after SIGTERM: {len(left)}; state kept in {home}")


if __name__ == "__main__":
    main()
