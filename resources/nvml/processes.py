"""The processes on one GPU: who holds memory, who computes.

Here: NVML's process lists and per-process utilization, and the name of a pid from /proc. Not here: the processes' own
CPU and waits, which are the host collector's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import psutil
import pynvml as nvml

from resources.nvml.ask import Ledger, ask_first, code_of
from resources.nvml.buffers import ActivityReader, ProcessLister

# (kind, metric, NVML calls from the newest on). The last kind that lists a pid is the most telling: clients of MPS are
# in the compute list, too.
_LISTS = tuple(
    (kind, f"{kind}_processes", (f"nvmlDeviceGet{call}RunningProcesses_v3", f"nvmlDeviceGet{call}RunningProcesses_v2"))
    for kind, call in (("graphics", "Graphics"), ("compute", "Compute"), ("mps", "MPSCompute"))
)
# Inference runs here; graphics and MPS are seldom in use, and looked for once a minute.
_ALWAYS = "compute"
_NO_INSTANCE = 0xFFFFFFFF


@dataclass
class GpuProcess:
    """One process on one GPU. mig_instance '' when it uses the whole GPU; None where the driver does not tell."""

    pid: int
    kind: str
    mig_instance: str
    used_memory_bytes: float | None
    sm_utilization_ratio: float | None = None
    name: str | None = None


def _older_activity(handle: object, since: int) -> list[tuple[int, int, int]]:
    """Activity as drivers before 550 tell it; asked twice, for the bindings make room for a moment ago's processes."""
    for attempt in (1, 2):
        try:
            samples = nvml.nvmlDeviceGetProcessUtilization(handle, since)  # type: ignore[no-untyped-call]
            return [(sample.timeStamp, sample.pid, sample.smUtil) for sample in samples]
        except nvml.NVMLError as error:
            if code_of(error) != nvml.NVML_ERROR_INSUFFICIENT_SIZE or attempt == 2:
                raise
    return []


class ProcessReader:
    """Reads the processes of one GPU, tick after tick."""

    def __init__(self, ledger: Ledger, lister: ProcessLister, activity: ActivityReader) -> None:
        self._ledger = ledger
        self._lists = [
            (kind, metric, tuple(partial(lister.read, call) for call in calls)) for kind, metric, calls in _LISTS
        ]
        self._activity = (activity.read, _older_activity)
        self._newest_activity_us = 0
        self._in_use: set[str] = set()
        self._names: dict[int, str | None] = {}

    def read(
        self, handle: object, memory_total_bytes: float | None, *, look_everywhere: bool
    ) -> list[GpuProcess] | None:
        """The processes, by pid; empty when there are none, None when they cannot be listed.

        look_everywhere: ask every kind's list and look names up anew, for a server names itself some time after it has
        started; else only the list of compute processes and those that were not empty at the last such look.
        """
        if look_everywhere:
            self._names.clear()
            self._in_use.clear()
        found = self._listed(handle, memory_total_bytes, look_everywhere=look_everywhere)
        if not found:
            self._names.clear()
            return found
        busy = self._busy(handle)
        self._names = {process.pid: self._name(process.pid) for process in found}
        for process in found:
            process.name = self._names[process.pid]
            if busy is not None:
                process.sm_utilization_ratio = busy.get(process.pid, 0.0)
        return found

    def _listed(
        self, handle: object, memory_total_bytes: float | None, *, look_everywhere: bool
    ) -> list[GpuProcess] | None:
        found: dict[tuple[int, str], GpuProcess] = {}
        for kind, metric, calls in self._lists:
            if not (look_everywhere or kind == _ALWAYS or kind in self._in_use):
                continue
            entries = ask_first(self._ledger, metric, calls, handle)
            if entries is None:
                if metric in self._ledger.unsupported:
                    continue
                return None
            if entries and look_everywhere:
                self._in_use.add(kind)
            for pid, memory, number in entries:
                instance = "" if number == _NO_INSTANCE else str(number)
                # Early 535 drivers laid these entries out differently for a while; such garbage is told by its values.
                if pid == 0 or (memory and memory_total_bytes and memory > memory_total_bytes):
                    self._ledger.reject(metric)
                    continue
                used = None if memory is None else float(memory)
                found[pid, instance] = GpuProcess(pid, kind, instance, used)
        return list(found.values())

    def _busy(self, handle: object) -> dict[int, float] | None:
        """SM share (0-1) by pid since the last tick; a process that is not in it did nothing. None: not told."""
        since, nobody = self._newest_activity_us, list[tuple[int, int, int]]()
        samples = ask_first(self._ledger, "sm_utilization_ratio", self._activity, handle, since, when_empty=nobody)
        if samples is None:
            return None
        busy: dict[int, float] = {}
        for timestamp, pid, percent in samples:
            # Old samples come again when nothing new happened, and some drivers answer with numbers over 100 %.
            if timestamp > since and percent <= 100:
                busy[pid] = percent / 100
                self._newest_activity_us = max(self._newest_activity_us, timestamp)
        return busy

    def _name(self, pid: int) -> str | None:
        """Name of a running process; None when the pid is not of our pid namespace or is gone."""
        if pid not in self._names:
            try:
                self._names[pid] = psutil.Process(pid).name()
            except psutil.Error:
                self._names[pid] = None
        return self._names[pid]
