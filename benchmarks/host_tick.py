"""CPU and wall time of one local host tick: reading /proc and /sys, and making the four frames.

Prints a line per case, measured on the machine it runs on: the host alone, with a watched process tree, and psutil
reading comparable numbers beside it. The tick that also searches for processes (one a minute) is shown apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import psutil

from resources.host.host import HostCollector

TICK = timedelta(seconds=5)
# Four processes that wait: an engine's API server, its core and two workers.
TREE = (
    "import socket, subprocess, sys; server = socket.create_server(('127.0.0.1', 0)); "
    "[subprocess.Popen([sys.executable, '-c', 'input()']) for _ in range(3)]; "
    "print(server.getsockname()[1], flush=True); input()"
)


def measure(action: Callable[[int], object], ticks: int) -> tuple[float, float]:
    """Median CPU and wall milliseconds of a tick."""
    cpu, wall = [], []
    for number in range(ticks):
        cpu_start, wall_start = time.thread_time(), time.perf_counter()
        action(number)
        cpu.append(time.thread_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
    return statistics.median(cpu) * 1e3, statistics.median(wall) * 1e3


def with_psutil(_: int) -> None:
    """The system-wide numbers that psutil has too."""
    psutil.cpu_times(), psutil.cpu_stats(), psutil.getloadavg(), psutil.virtual_memory(), psutil.swap_memory()
    psutil.disk_io_counters(perdisk=True), psutil.net_io_counters(pernic=True), psutil.disk_usage("/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ticks", type=int, default=300)
    ticks = parser.parse_args().ticks
    start = datetime.now(UTC)

    def report(case: str, timing: tuple[float, float]) -> None:
        print(f"{case:<52} {timing[0]:7.3f} ms CPU {timing[1]:7.3f} ms wall")

    print(f"{os.cpu_count()} CPUs, {len(psutil.pids())} processes, median of {ticks} ticks")
    alone = HostCollector("here")
    report("host alone", measure(lambda n: alone.collect(start + TICK * n), ticks))
    with subprocess.Popen(
        [sys.executable, "-c", TREE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as engine:
        assert engine.stdout is not None
        port = int(engine.stdout.readline())
        watching = HostCollector("here")
        watching.collect(start, [], [port])
        report("host and 4 engine processes", measure(lambda _: watching.collect(start, [], [port]), ticks))
        found = watching.collect(start, [], [port])["raw_host_processes"].height
        later = [start + TICK * number for number in range(120)]
        cpu_start = time.thread_time()
        for at in later:
            watching.collect(at, [], [port])
        mean = (time.thread_time() - cpu_start) * 1e3 / len(later)
        print(f"{'the same, mean of 10 minutes, searches included':<52} {mean:7.3f} ms CPU")
        fresh = [HostCollector("here") for _ in range(20)]
        first = measure(lambda n: fresh[n].collect(start, [], [port]), len(fresh))
        report("the first tick: every process and descriptor searched", first)
        print(f"processes read a tick: {found}")
        for child in psutil.Process(engine.pid).children():
            child.kill()
        engine.kill()
    report("psutil, the system-wide numbers alone", measure(with_psutil, ticks))


if __name__ == "__main__":
    main()
