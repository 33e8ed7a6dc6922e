"""`optiinfra up` watching one host: cadence of the three sensors, CPU of all its processes, growth of its storage.

    python benchmarks/up_cadence.py [--minutes 15] [--fleet fleet.yaml] [--port 3999]

Live: starts the real product on a fresh state folder and stops it again. The first minute, in which every table is
built, is shown apart; the window after it begins at the end of a refresh and holds whole ones. CPU is what the kernel
accounts to the supervisor, Dagster's processes and every run they started. Growth of Dagster's storage is told page by
page from its databases; what comes hourly (data tests, forecasts, pruning) is in a window of an hour or more only.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import psutil

from optiinfra_pipelines.defs.maintenance import PruneConfig
from optiinfra_pipelines.defs.raw import REPORTED_BY
from optiinfra_pipelines.settings import load_fleet
from resources.dagster_home.prune import REFRESH_TAG

# Table -> what it is called in the output.
PARTS = {
    "event_logs": "events",
    "asset_event_tags": "events",
    "job_ticks": "ticks",
    "asset_daemon_asset_evaluations": "evaluations",
    "asset_check_executions": "check results",
    "runs": "runs",
    "run_tags": "runs",
    "snapshots": "runs",
}


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


def pages_by_part(dagster_home: Path) -> dict[str, int]:
    """Bytes in use in Dagster's databases by what they hold, indexes included; free pages count for nothing.

    Measured page by page (SQLite's dbstat); `files` is everything else in the folder: logs of runs and processes.
    """
    parts = dict.fromkeys([*PARTS.values(), "other records", "files"], 0)
    for database in dagster_home.rglob("*.db"):
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            table_of = dict(connection.execute("select name, tbl_name from sqlite_schema"))
            for name, size in connection.execute("select name, sum(pgsize) from dbstat group by name"):
                parts[PARTS.get(table_of.get(name, name), "other records")] += size
    databases = sum(path.stat().st_size for path in dagster_home.rglob("*.db*"))
    parts["files"] = folder_bytes(dagster_home) - databases
    return parts


def bytes_to_disk(processes: list[psutil.Process]) -> int:
    """Bytes these processes handed to the disk so far (the kernel's write_bytes), their ended children's included."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.io_counters().write_bytes
    return total


@dataclass(frozen=True)
class Cadence:
    """Ticks of one sensor between its first and its last report in the window."""

    ticks: int
    seconds: float
    longest_gap_seconds: float

    def __str__(self) -> str:
        mean = f"{self.seconds / self.ticks:.2f} s" if self.ticks else "unknown"
        return f"{self.ticks} ticks, gap mean {mean}, longest {self.longest_gap_seconds:.2f} s"


def cadences(dagster_home: Path, since: float) -> dict[str, Cadence]:
    """Per sensor, from what it reports of itself once a minute: Dagster's record holds one quiet tick a minute."""
    found = {}
    with dg.DagsterInstance.from_config(str(dagster_home)) as instance:
        for sensor, (table, *_) in REPORTED_BY.items():
            wanted = dg.AssetRecordsFilter(dg.AssetKey(table), after_timestamp=since)
            records = instance.fetch_materializations(wanted, limit=1000, ascending=True).records
            said = [record.asset_materialization.metadata for record in records if record.asset_materialization]
            found[sensor] = Cadence(
                ticks=sum(int(str(one["ticks"].value)) for one in said[1:]),
                seconds=records[-1].timestamp - records[0].timestamp if len(records) > 1 else 0.0,
                longest_gap_seconds=max((float(str(one["longest_gap_seconds"].value)) for one in said[1:]), default=0),
            )
    return found


def finished_refreshes(dagster_home: Path) -> int:
    with dg.DagsterInstance.from_config(str(dagster_home)) as instance:
        return instance.get_runs_count(dg.RunsFilter(tags=REFRESH_TAG, statuses=[dg.DagsterRunStatus.SUCCESS]))


def await_refresh(dagster_home: Path, within_seconds: float) -> None:
    """Until the next refresh has ended: windows that begin and end there hold whole refreshes."""
    before, until = finished_refreshes(dagster_home), time.time() + within_seconds
    while finished_refreshes(dagster_home) == before:
        if time.time() > until:
            raise TimeoutError(f"no refresh ended within {within_seconds:.0f} s; see {dagster_home / 'process_logs'}")
        time.sleep(1)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--minutes", type=float, default=15, help="rounded up to whole refreshes")
    arguments.add_argument("--fleet", type=Path, default=Path(__file__).parent.parent / "fleet.yaml")
    arguments.add_argument("--port", type=int, default=3999)
    given = arguments.parse_args()
    step = 60 * load_fleet(given.fleet, os.environ).cadence.refresh_minutes
    window = math.ceil(60 * given.minutes / step) * step
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
        else:
            raise SystemExit("optiinfra up ended by itself; what it said is above")
        measure(psutil.Process(product.pid), home, window, step)
    finally:
        product.send_signal(signal.SIGTERM)
        product.wait(timeout=60)
    left = [p for p in psutil.process_iter(["cmdline"]) if str(home) in " ".join(p.info["cmdline"] or [])]
    print(f"processes left running after SIGTERM: {len(left)}; state kept in {home}")


def measure(root: psutil.Process, home: Path, window: float, step: float) -> None:
    """The first minute, then whole refreshes for `window` seconds."""
    dagster_home = home / "dagster"
    begun, before = time.time(), cpu_seconds(root)
    time.sleep(60)
    print(f"first minute: {(cpu_seconds(root) - before) / (time.time() - begun):.1%} of one core, all tables built")
    await_refresh(dagster_home, 3 * step)
    daemon = [p for p in root.children(recursive=True) if "dagster._daemon" in " ".join(p.cmdline())]
    warm_at, warm = time.time(), cpu_seconds(root)
    refreshes, stored, handed = finished_refreshes(dagster_home), pages_by_part(dagster_home), bytes_to_disk(daemon)
    time.sleep(window)
    seconds, cpu = time.time() - warm_at, cpu_seconds(root) - warm
    print(f"CPU of all processes over {seconds:.0f} s: {cpu / seconds:.1%} of one core ({cpu:.1f} s)")
    resident = sum(process.memory_info().rss for process in [root, *root.children(recursive=True)])
    print(f"resident memory: {resident / 2**20:.0f} MiB")
    for name, cadence in cadences(dagster_home, warm_at).items():
        print(f"{name}: {cadence}")
    now = pages_by_part(dagster_home)
    a_day = {part: (now[part] - stored[part]) / seconds * 86400 / 1e6 for part in now}
    print(
        f"Dagster's own storage grows by {sum(a_day.values()):.0f} MB a day before pruning ("
        + ", ".join(f"{part} {size:.1f}" for part, size in a_day.items() if round(size, 1))
        + f"), {finished_refreshes(dagster_home) - refreshes} refreshes in the window"
    )
    # Between two prunings an hour comes on top of what they leave.
    kept = sum(a_day.values()) * (PruneConfig().keep_hours + 1) / 24
    at_start = folder_bytes(dagster_home) / 1e6 - sum(a_day.values()) * seconds / 86400
    print(
        f"pruned every hour it holds {at_start + kept:.0f} MB and grows no more: {at_start:.0f} MB after the first "
        f"build, logs that SQLite writes ahead included, and {kept:.0f} MB of history"
    )
    to_disk = (bytes_to_disk(daemon) - handed) / seconds * 86400 / 1e6
    print(f"the daemon, which writes nothing else, hands {to_disk:.0f} MB a day to the disk (whole pages, twice each)")
    print(f"warehouse: {folder_bytes(home / 'warehouse') / 1e6:.1f} MB after {(time.time() - begun) / 60:.0f} min")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the end")


if __name__ == "__main__":
    main()
