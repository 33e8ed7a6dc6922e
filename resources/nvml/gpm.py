"""GPM: how busy the parts of a GPU (or of a MIG instance) were, as averages over the interval between two ticks.

Here: keeping the last tick's sample, and the columns that come of it. Not here: the structures (`buffers`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pynvml as nvml

from resources.nvml.ask import UNSUPPORTED_CODES, Ledger, ask
from resources.nvml.buffers import GpmRequest
from resources.nvml.metrics import GPM_METRICS

Row = dict[str, Any]

# nvml.h: two GPM samples must be at least 100 ms apart.
GPM_MIN_SECONDS = 0.1


class GpmAverages:
    """GPM needs two samples: the one of the last tick is kept, so that an average covers the whole interval."""

    def __init__(self, gpu: object, instance: int | None = None) -> None:
        self._gpu, self._instance = gpu, instance
        self._metric = "gpm" if instance is None else "mig_gpm"
        self._samples: list[Any] = []
        self._taken_at: datetime | None = None

    def read(self, request: GpmRequest, ledger: Ledger, now: datetime) -> Row:
        """Columns by name; empty on the first tick, and where the chip has no GPM (Hopper and later have)."""
        while len(self._samples) < 2:
            sample = ask(ledger, self._metric, nvml.nvmlGpmSampleAlloc)
            if sample is None:
                return {}
            self._samples.append(sample)
        previous, current = self._samples
        seconds = None if self._taken_at is None else (now - self._taken_at).total_seconds()
        if seconds is not None and 0 <= seconds < GPM_MIN_SECONDS:
            return {}
        if self._instance is None:
            taken = ask(ledger, self._metric, nvml.nvmlGpmSampleGet, self._gpu, current)
        else:
            taken = ask(ledger, self._metric, nvml.nvmlGpmMigSampleGet, self._gpu, self._instance, current)
        if taken is None:
            self._taken_at = None
            return {}
        self._samples, self._taken_at = [current, previous], now
        if seconds is None or seconds < 0:
            return {}
        answers = ask(ledger, self._metric, request.averages, previous, current) or []
        row: Row = {}
        for (_, column, scale), (code, value) in zip(GPM_METRICS, answers, strict=False):
            if code != nvml.NVML_SUCCESS:
                if code not in UNSUPPORTED_CODES:
                    ledger.note(column, code)
            elif math.isfinite(value) and value >= 0 and (value <= 100 or not column.endswith("_ratio")):
                row[column] = value * scale
            else:
                ledger.reject(column)
        return row

    def free(self) -> None:
        """Give the samples back to the driver; a lost GPU or an ended driver may refuse, which changes nothing."""
        for sample in self._samples:
            try:
                nvml.nvmlGpmSampleFree(sample)  # type: ignore[no-untyped-call]
            except nvml.NVMLError:
                continue
        self._samples, self._taken_at = [], None


@dataclass
class MigInstance:
    """One GPU instance of a GPU that is cut into slices."""

    handle: object
    number: int
    profile: str | None
    gpm: GpmAverages


def add_averages(row: Row, averages: Row) -> None:
    """GPM's rates count only where the counters are missing: two shapes for one thing would not agree."""
    transmitted = averages.pop("nvlink_tx_bytes_per_second", None)
    received = averages.pop("nvlink_rx_bytes_per_second", None)
    if transmitted is not None and received is not None and "nvlink_tx_bytes_total" not in row:
        averages["nvlink_bytes_per_second"] = transmitted + received
    for way in ("tx", "rx"):
        if f"pcie_{way}_bytes_total" in row:
            averages.pop(f"pcie_{way}_bytes_per_second", None)
    row.update(averages)


def mig_profile(name: str | None) -> str | None:
    """'NVIDIA H100 80GB HBM3 MIG 1c.2g.20gb' -> '2g.20gb', the profile of the GPU instance; None when not told."""
    _, found, profile = (name or "").rpartition(" MIG ")
    if not found:
        return None
    compute, dot, rest = profile.partition("c.")
    return rest if dot and compute.isdigit() else profile
