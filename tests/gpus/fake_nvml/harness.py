"""Builds the fake driver and runs a collector over it, one process per build.

Here: compiling, scripts for usual cards, and the client of `worker.py`. Not here: the fake itself (the C files) and
what is asserted about it (`test_gpus*.py`). nvidia-ml-py keeps one library per process, so the collector under test
runs in a process of its own, started with LD_LIBRARY_PATH set: setting it later has no effect.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
# Where the clock of a script begins, microseconds since 1970; a whole number of ring steps is not needed.
EPOCH_US = 1_800_000_000_000_000
GIB = 1 << 30

Value = str | int | float

H100: dict[str, Value] = {
    "name": "NVIDIA H100 80GB HBM3",
    "memory_total": 85_520_809_984,
    "memory_used": 70_000_000_000,
    "memory_reserved": 502_267_904,
    "util": 97,
    "memory_util": 41,
    "encoder": 0,
    "decoder": 0,
    "temperature": 41,
    "margin": 46,
    "slowdown_margin": -2,
    "shutdown_margin": -8,
    "memory_temperature": 48,
    "power_mw": 520_000,
    "power_limit_mw": 700_000,
    "power_default_mw": 700_000,
    "clock_graphics": 1980,
    "clock_sm": 1965,
    "clock_memory": 2619,
    "clock_sm_max": 1980,
    "pstate": 0,
    "reasons": 4,
    "pcie_generation": 5,
    "pcie_width": 16,
    "pcie_generation_max": 5,
    "pcie_width_max": 16,
    "pcie_replay": 9,
    "pcie_tx_bytes": 120_000_000,
    "pcie_rx_bytes": 340_000_000,
    "ecc_corrected": 3,
    "ecc_uncorrected": 0,
    "remapped_corrected": 1,
    "remapped_uncorrected": 0,
    "remap_pending": 1,
    "remap_failed": 0,
    "recovery_action": 0,
    "throttle_power": 0.1,
    "throttle_sw_thermal": 0.02,
    "throttle_hw_thermal": 0.03,
    "throttle_brake": 0.05,
    "nvlink_count": 18,
    "nvlink_tx_kib": 1000,
    "nvlink_rx_kib": 900,
    "nvlink_replay": 2,
    "nvlink_recovery": 0,
    "nvlink_crc": 1,
    "gpm_graphics": 97,
    "gpm_sm": 38,
    "gpm_occupancy": 11,
    "gpm_tensor": 9,
    "gpm_dram": 52,
    "gpm_pcie_tx": 114,
    "gpm_pcie_rx": 324,
    "gpm_nvlink_tx": 17,
    "gpm_nvlink_rx": 15,
    "mig": 0,
}

# No GPM, no MIG, no NVLink, no fan: those calls answer NOT_SUPPORTED.
L4: dict[str, Value] = {
    "name": "NVIDIA L4",
    "memory_total": 24_152_899_584,
    "memory_used": 0,
    "memory_reserved": 500_000_000,
    "util": 0,
    "memory_util": 0,
    "encoder": 0,
    "decoder": 0,
    "temperature": 38,
    "slowdown": 95,
    "shutdown": 98,
    "memory_temperature": 0,
    "power_mw": 16_400,
    "power_limit_mw": 72_000,
    "clock_graphics": 210,
    "clock_sm": 210,
    "clock_memory": 405,
    "pstate": 8,
    "reasons": 1,
    "ecc_corrected": 0,
    "ecc_uncorrected": 0,
}


def gpu(index: int | str, card: dict[str, Value], **changes: Value | None) -> str:
    """Script lines of one GPU ('0') or MIG instance ('0/2'). A change to None takes the key away."""
    values = {"uuid": f"GPU-{index}", **card, **changes}
    return "".join(f"gpu {index} {key} {value}\n" for key, value in values.items() if value is not None)


def build(folder: Path, *, without: Iterable[str] = ()) -> Path:
    """Compile the fake into `folder`; the functions in `without` are missing, as in an older driver's library."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("gcc is not installed: the fake NVIDIA driver cannot be compiled")
    folder.mkdir(parents=True, exist_ok=True)
    hidden = [f"-D{function}=hidden_{position}" for position, function in enumerate(without)]
    library = folder / "libnvidia-ml.so.1"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", *hidden]
    sources = sorted(map(str, HERE.glob("*.c")))
    command = [compiler, *flags, f"-Wl,-soname,{library.name}", "-o", str(library), *sources, "-lm", "-lpthread"]
    subprocess.run(command, check=True)
    return folder


def write_clock(path: Path, seconds: float) -> None:
    """Set the fake's clock, which it has mapped: written in place, never replaced."""
    mode = "r+b" if path.exists() else "wb"
    with path.open(mode) as file:
        file.write(struct.pack("<Q", EPOCH_US + round(seconds * 1_000_000)))


@dataclass(frozen=True)
class Tick:
    """What one `collect` returned: the rows of the three tables, and how often each counted call was made so far."""

    samples: list[dict[str, Any]]
    processes: list[dict[str, Any]]
    collection: dict[str, Any]
    calls: dict[str, int]

    def gpu(self, uuid: str = "GPU-0", instance: str = "") -> dict[str, Any]:
        """The row of one GPU or MIG instance."""
        (row,) = [row for row in self.samples if (row["gpu_uuid"], row["mig_instance"]) == (uuid, instance)]
        return row


@dataclass(frozen=True)
class Run:
    """A whole script run: its ticks, the doctor's lines, GPM samples not freed, lines logged."""

    ticks: list[Tick]
    described: list[str]
    leaked_gpm_samples: int
    logged: list[dict[str, Any]]


class Driver:
    """A process with one build of the fake (or none) under the bindings; it runs script after script."""

    def __init__(self, folder: Path, *, has_library: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.scenario, self.clock = folder / "scenario", folder / "clock"
        write_clock(self.clock, 0)
        environment = {
            **os.environ,
            "FAKE_NVML_SCENARIO": str(self.scenario),
            "FAKE_NVML_CLOCK": str(self.clock),
            "PYTHONPATH": str(ROOT),
        }
        environment.pop("LD_LIBRARY_PATH", None)
        if has_library:
            environment["LD_LIBRARY_PATH"] = str(folder)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self,
        script: str,
        *seconds: float,
        counted: Sequence[str] = (),
        rewritten: dict[int, str] | None = None,
        **options: Any,
    ) -> Run:
        """Collect at these seconds of the script's clock. rewritten: a new script from that tick (a number) on."""
        order = {
            "script": script,
            "seconds": seconds,
            "counted": counted,
            "rewritten": {str(position): text for position, text in (rewritten or {}).items()},
            "options": options,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the worker ended with {self._process.wait()}"
        answer = json.loads(line)
        return Run(
            [Tick(**tick) for tick in answer["ticks"]],
            answer["described"],
            answer["leaked_gpm_samples"],
            answer["logged"],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()
