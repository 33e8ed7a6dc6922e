"""What one tick of GPU collection costs: 8 GPUs behind the fake driver, the frames included.

Run from the project's folder: python -m benchmarks.gpu_tick [--gpus 8] [--ticks 200]. Prints wall and CPU
milliseconds per tick. The fake answers from memory: a real driver adds its own time in the kernel, which this does
not measure. Beside it: what the frame alone costs, from rows that are ready.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from optiinfra_pipelines.sql.sources import raw_tables
from resources.nvml.gpus import GpuCollector
from tests.gpus.fake_nvml.harness import H100, ROOT, build, gpu

# Far enough apart for GPM (100 ms) and for new samples in the ring (6 a second).
GAP_SECONDS = 0.25


def scenario(count: int) -> str:
    """Busy H100s with 18 NVLinks and two processes each."""
    cards = "".join(gpu(index, H100) for index in range(count))
    return cards + "".join(
        f"process {index} {pid} C 1000000 50\n" for index in range(count) for pid in (os.getpid(), 4_194_303)
    )


def show(title: str, seconds: list[float], goal_ms: float | None) -> None:
    """One line: smallest, median, largest in milliseconds."""
    low, middle, high = min(seconds) * 1e3, statistics.median(seconds) * 1e3, max(seconds) * 1e3
    goal = "" if goal_ms is None else f"   goal {goal_ms:g}: {'met' if middle <= goal_ms else 'MISSED'}"
    print(f"{title:<34} min {low:7.3f}   median {middle:7.3f}   max {high:7.3f} ms{goal}")


def measure(gpus: int, ticks: int) -> None:
    """Run the ticks in this process, which was started with the fake driver."""
    collector = GpuCollector("benchmark", source="simulated")
    wall: list[float] = []
    cpu: list[float] = []
    slow: list[float] = []
    last: dict[str, pl.DataFrame] = {}
    for tick in range(ticks + 2):
        is_slow = tick == 0
        began, began_cpu = time.perf_counter(), time.thread_time()
        last = collector.collect(datetime.now(UTC))
        took, took_cpu = time.perf_counter() - began, time.thread_time() - began_cpu
        if is_slow:
            slow.append(took_cpu)
        elif tick > 1:  # the second tick still asks older calls for what this driver lacks
            wall.append(took)
            cpu.append(took_cpu)
        time.sleep(GAP_SECONDS)
    samples = last["raw_gpu_samples"]
    (row,) = last["raw_gpu_collections"].to_dicts()
    known = sum(samples[column].null_count() < samples.height for column in samples.columns)
    print(
        f"{samples.height} GPUs, {known} of {samples.width} columns known, {last['raw_gpu_processes'].height} processes"
    )
    load, cores = os.getloadavg()[0], os.cpu_count()
    print(f"load average {load:.1f} on {cores} cores: on a busy machine the caches are cold and CPU times longer")
    print(f"status {row['status']}, {row['error_count']} values failed, {len(wall)} ticks {GAP_SECONDS} s apart")
    show("wall per tick", wall, 10.0)
    show("CPU per tick", cpu, 2.0)
    show("CPU of the first tick, facts included", slow, None)

    rows, schema = samples.to_dicts(), dict(raw_tables()["raw_gpu_samples"].polars_schema)
    floor = []
    for _ in range(ticks):
        began_cpu = time.thread_time()
        pl.DataFrame(rows, schema=schema)
        floor.append(time.thread_time() - began_cpu)
    show("of it, rows to frame (CPU)", floor, None)
    collector.close()


def main() -> None:
    """Compile the fake, start this again with it under the bindings, and measure there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--ticks", type=int, default=100)
    arguments = parser.parse_args()
    if os.environ.get("FAKE_NVML_SCENARIO"):
        measure(arguments.gpus, arguments.ticks)
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        script = Path(folder) / "scenario"
        script.write_text(scenario(arguments.gpus), encoding="utf-8")
        # The library path is read when a process starts, so this one starts anew.
        environment = {**os.environ, "FAKE_NVML_SCENARIO": str(script), "LD_LIBRARY_PATH": folder}
        subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_tick", *sys.argv[1:]], env=environment, cwd=ROOT, check=True
        )


if __name__ == "__main__":
    main()
