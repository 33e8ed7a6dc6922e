"""A process with the fake driver under nvidia-ml-py: takes orders as JSON lines, answers with what was collected.

Started by `harness.Driver`, which says what an order is. Run by itself it waits for orders on standard input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pynvml
import structlog

from resources.nvml.gpus import GpuCollector
from tests.gpus.fake_nvml.harness import EPOCH_US, write_clock

SCENARIO, CLOCK = Path(os.environ["FAKE_NVML_SCENARIO"]), Path(os.environ["FAKE_NVML_CLOCK"])


def calls(names: list[str]) -> dict[str, int]:
    """How often the fake was asked, by function."""
    library = pynvml.nvmlLib
    return {name: library.fake_nvml_calls(name.encode()) for name in names} if library is not None else {}


def moment(seconds: float) -> datetime:
    """The collector's clock beside the fake's."""
    return datetime.fromtimestamp(EPOCH_US / 1e6 + seconds, UTC)


def obey(order: dict[str, Any]) -> dict[str, Any]:
    """Run one script from beginning to end."""
    logged: list[Mapping[str, Any]] = []

    def keep(_logger: object, level: str, event: Any) -> Any:
        logged.append({"level": level, **event})
        raise structlog.DropEvent

    structlog.configure(processors=[keep], cache_logger_on_first_use=False)
    SCENARIO.write_text(order["script"], encoding="utf-8")
    write_clock(CLOCK, order["seconds"][0])
    options = order["options"]
    if "sysfs" in options:
        options["sysfs"] = Path(options["sysfs"])
    collector = GpuCollector("host-1", **options)
    ticks = []
    for position, seconds in enumerate(order["seconds"]):
        write_clock(CLOCK, seconds)
        if str(position) in order["rewritten"]:
            SCENARIO.write_text(order["rewritten"][str(position)], encoding="utf-8")
        frames = collector.collect(moment(seconds))
        ticks.append(
            {
                "samples": frames["raw_gpu_samples"].to_dicts(),
                "processes": frames["raw_gpu_processes"].to_dicts(),
                "collection": frames["raw_gpu_collections"].to_dicts()[0],
                "calls": calls(order["counted"]),
            }
        )
    described = collector.describe(moment(order["seconds"][-1]))
    collector.close()
    leaked = pynvml.nvmlLib.fake_nvml_gpm_samples() if pynvml.nvmlLib is not None else 0
    return {"ticks": ticks, "described": described, "leaked_gpm_samples": leaked, "logged": logged}


def main() -> None:
    """Orders on standard input, answers on standard output, one line each."""
    for line in sys.stdin:
        sys.stdout.write(json.dumps(obey(json.loads(line)), default=str) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
