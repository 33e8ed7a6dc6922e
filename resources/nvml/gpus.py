"""The GPUs of this host, read through NVIDIA's driver (NVML): one collector per process, one `collect` per tick.

Here: the driver's coming and going, which GPU is asked when, XID events, and the three raw frames. Not here: what is
asked of a GPU (`device` and its tables) and the guard around each call (`ask`).

A host without a driver is a calm state, not an error: one row per tick that says so, a probe now and then, one line
in the log when the state changes.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pynvml as nvml
import structlog

from optiinfra_pipelines.domain.base import Source
from optiinfra_pipelines.domain.gpus import Health
from optiinfra_pipelines.sql.sources import raw_tables
from resources.nvml.ask import DriverDownError, GpuGoneError, Ledger, ask, code_name, code_of
from resources.nvml.device import Buffers, GpuReader, Reading, Row, Shared
from resources.nvml.events import XidEvents

_log = structlog.get_logger(__name__)

# Facts that change seldom (limits, ECC, remapped rows, partition): once a minute is what a person would notice.
SLOW_SECONDS = 60.0
# A driver that is away is looked for after 5, 10, 20, 40 and then every 60 s: a probe loads a library.
FIRST_PROBE_SECONDS, LAST_PROBE_SECONDS = 5.0, 60.0

_STATUS: dict[int, tuple[str, str]] = {
    nvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
        "no_driver",
        "libnvidia-ml.so.1 is not on this host: there is no NVIDIA driver, or a container was started without it",
    ),
    nvml.NVML_ERROR_DRIVER_NOT_LOADED: (
        "driver_not_loaded",
        "the NVIDIA kernel module is not loaded; modprobe nvidia, or restart nvidia-persistenced",
    ),
    nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "version_mismatch",
        "the driver's library and its kernel module differ, as after an upgrade: restart this process, or the host",
    ),
    nvml.NVML_ERROR_FUNCTION_NOT_FOUND: (
        "version_mismatch",
        "the driver's library is older than anything supported (before 450); update the driver",
    ),
    nvml.NVML_ERROR_NO_PERMISSION: (
        "no_permission",
        "this user may not talk to the driver; give it /dev/nvidia* and /dev/nvidiactl",
    ),
}


@dataclass
class Absent:
    """A GPU that is known of and cannot be read. `facts`: what its row still says."""

    facts: Row
    health: Health


class GpuCollector:
    """Reads all GPUs of this host. Safe to use from several threads; after a fork it begins anew.

    source: 'simulated' when a fake driver stands behind. sysfs: where PCI devices tell their NUMA node.
    """

    def __init__(
        self,
        host: str,
        *,
        source: Source = "live",
        slow_seconds: float = SLOW_SECONDS,
        sysfs: Path = Path("/sys"),
    ) -> None:
        self._host, self._source, self._sysfs = host, source, sysfs
        self._slow = timedelta(seconds=slow_seconds)
        self._schemas = {  # a plain dict: polars takes a Schema apart again, every time
            name: dict(raw_tables()[name].polars_schema)
            for name in ("raw_gpu_samples", "raw_gpu_processes", "raw_gpu_collections")
        }
        self._buffers = Buffers()
        self._lock = threading.Lock()
        self._ledgers: dict[tuple[str, str], Ledger] = {}
        self._known: dict[str, Row] = {}
        self._status = ""
        self._detail: str | None = None
        self._forget()

    def _forget(self) -> None:
        """As new. What a parent process held in the driver is the parent's, so it is not given back."""
        self._pid = os.getpid()
        self._is_open = False
        self._driver = ""
        self._system = Ledger()
        self._gpus: list[GpuReader] = []
        self._absent: list[Absent] = []
        self._fresh: set[str] = set()
        self._events = XidEvents()
        self._slow_at: datetime | None = None
        self._probed_at: datetime | None = None
        self._patience = timedelta(seconds=FIRST_PROBE_SECONDS)

    # ---- what others call ----

    def collect(self, now: datetime) -> dict[str, pl.DataFrame]:
        """One tick: raw_gpu_samples, raw_gpu_processes, raw_gpu_collections (always one row), as in sources.yml.

        now: start of the tick, UTC. Raises nothing about a driver or a GPU: that is in `status` and `health`.
        """
        with self._lock:
            wall, cpu = time.perf_counter(), time.thread_time()
            errors = self._error_count()
            readings = self._read_all(now)
            samples, processes = self._rows(now, readings)
            collection: Row = {
                "sampled_at": now,
                "host": self._host,
                "telemetry": "nvml",
                "status": self._status,
                "detail": self._detail,
                "gpu_count": len(readings) if self._status == "ok" else None,
                "error_count": self._error_count() - errors,
            }
            frames = {
                "raw_gpu_samples": pl.DataFrame(samples, schema=self._schemas["raw_gpu_samples"]),
                "raw_gpu_processes": pl.DataFrame(processes, schema=self._schemas["raw_gpu_processes"]),
            }
            collection["duration_seconds"] = time.perf_counter() - wall
            collection["cpu_seconds"] = time.thread_time() - cpu
            frames["raw_gpu_collections"] = pl.DataFrame([collection], schema=self._schemas["raw_gpu_collections"])
            return frames

    def describe(self, now: datetime) -> list[str]:
        """Facts for the doctor, one per line: the driver, each GPU, and what it does not tell with the reason."""
        with self._lock:
            if self._slow_at is None:
                self._read_all(now)
            if not self._is_open:
                return [f"GPUs: {self._status}: {self._detail}"]
            lines = [f"NVIDIA driver {self._driver}: {len(self._gpus) + len(self._absent)} GPUs"]
            for gpu in self._gpus:
                lines.append(f"GPU {gpu.facts['gpu_index']} {gpu.facts.get('name') or ''} {gpu.uuid}".rstrip())
                lines += _unknowns(gpu.ledger)
            lines += [f"GPU {absent.facts['gpu_uuid']}: {absent.health}" for absent in self._absent]
            return lines

    def close(self) -> None:
        """Give everything back to the driver; a later `collect` opens it again."""
        with self._lock:
            self._close()

    # ---- one tick ----

    def _read_all(self, now: datetime) -> list[Reading | Absent]:
        """All GPUs; none while the driver is away. One that was initialized anew is asked again, once."""
        if self._pid != os.getpid():
            self._forget()
        for attempt in (1, 2):
            if not self._is_open and not self._probe(now):
                return []
            try:
                return self._read_gpus(now)
            except DriverDownError as down:
                self._close()
                if down.code != nvml.NVML_ERROR_UNINITIALIZED or attempt == 2:
                    self._be_away(down.code, now)
                    return []
        return []

    def _read_gpus(self, now: datetime) -> list[Reading | Absent]:
        is_slow = self._slow_at is None or not self._slow_at <= now < self._slow_at + self._slow
        if is_slow:
            self._find_gpus()
            self._slow_at = now
        alarmed = self._events.read(self._system)
        readings: list[Reading | Absent] = []
        healthy: dict[str, object] = {}
        for gpu in self._gpus:
            is_due = is_slow or gpu.uuid in self._fresh or gpu.uuid in alarmed
            try:
                readings.append(gpu.read(now, is_slow=is_due))
                self._fresh.discard(gpu.uuid)
                healthy[gpu.uuid] = gpu.handle
            except GpuGoneError as gone:
                gpu.free()
                self._fresh.add(gpu.uuid)
                readings.append(Absent(gpu.facts, gone.health))
            self._known[gpu.uuid] = gpu.facts
        self._events.watch(healthy, self._system)
        return [*readings, *self._absent]

    def _rows(self, now: datetime, readings: list[Reading | Absent]) -> tuple[list[Row], list[Row]]:
        common = {"sampled_at": now, "host": self._host}
        samples: list[Row] = []
        processes: list[Row] = []
        for reading in readings:
            if isinstance(reading, Absent):
                rows: list[Row] = [{**reading.facts, "mig_instance": "", "health": reading.health}]
            else:
                rows = reading.rows
            uuid = rows[0]["gpu_uuid"]
            rows[0].update(self._events.columns(uuid))
            for row in rows:
                row.update(common, telemetry="nvml", source=self._source)
                samples.append(row)
            if isinstance(reading, Reading):
                processes += [
                    {
                        **common,
                        "gpu_uuid": uuid,
                        "pid": process.pid,
                        "kind": process.kind,
                        "name": process.name,
                        "used_memory_bytes": process.used_memory_bytes,
                        "sm_utilization_ratio": process.sm_utilization_ratio,
                    }
                    for process in reading.processes
                ]
        return samples, processes

    def _error_count(self) -> int:
        return self._system.error_count + sum(ledger.error_count for ledger in self._ledgers.values())

    # ---- which GPUs there are ----

    def _find_gpus(self) -> None:
        """Handles of all GPUs; those known from before keep their reader. Called at the slow pace."""
        count = ask(self._system, "count", nvml.nvmlDeviceGetCount)
        if count is None:
            return
        kept = {gpu.uuid: gpu for gpu in self._gpus}
        found: dict[str, GpuReader] = {}
        absent: dict[str, Absent] = {}
        for index in range(count):
            try:
                handle = ask(self._system, f"handle {index}", nvml.nvmlDeviceGetHandleByIndex, index)
                uuid = None if handle is None else ask(self._system, f"uuid {index}", nvml.nvmlDeviceGetUUID, handle)
            except GpuGoneError as gone:
                facts = self._facts_at(index)
                absent[facts["gpu_uuid"]] = Absent(facts, gone.health)
                continue
            if handle is not None and uuid is not None:
                found[uuid] = kept.get(uuid) or self._reader(handle, index, uuid)
                found[uuid].handle, found[uuid].facts["gpu_index"] = handle, index
            elif {f"handle {index}", f"uuid {index}"} & self._system.denied.keys():
                facts = self._facts_at(index)
                absent[facts["gpu_uuid"]] = Absent(facts, "no_permission")
            else:
                # A passing error: a GPU that was readable a minute ago keeps its handle.
                found.update({gpu.uuid: gpu for gpu in self._gpus if gpu.facts["gpu_index"] == index})
        for uuid, gpu in kept.items():
            if uuid not in found:
                gpu.free()
        for uuid, facts in self._known.items():
            # The driver no longer lists it: it was lost, or taken out.
            if uuid not in found and uuid not in absent:
                absent[uuid] = Absent(facts, "lost")
        self._gpus, self._absent = list(found.values()), list(absent.values())

    def _facts_at(self, index: int) -> Row:
        """What is known of the GPU at an index that gives no handle; it had the index when it was last seen."""
        for facts in self._known.values():
            if facts["gpu_index"] == index:
                return facts
        return {"gpu_uuid": f"unknown-{index}", "gpu_index": index, "driver_version": self._driver}

    def _reader(self, handle: object, index: int, uuid: str) -> GpuReader:
        ledger = self._ledgers.setdefault((uuid, self._driver), Ledger())
        self._fresh.add(uuid)
        return GpuReader(handle, index, uuid, ledger, Shared(self._driver, self._buffers, self._sysfs))

    # ---- the driver's life ----

    def _probe(self, now: datetime) -> bool:
        """Open the driver if it is time to look for it again."""
        if self._probed_at is not None and self._probed_at <= now < self._probed_at + self._patience:
            return False
        code = self._try_open()
        if code is not None:
            self._be_away(code, now)
        return code is None

    def _try_open(self) -> int | None:
        """Initialize NVML; None when it is open, else its return code."""
        try:
            nvml.nvmlInit()  # type: ignore[no-untyped-call]
            self._is_open = True
            self._driver = str(nvml.nvmlSystemGetDriverVersion())
            self._system.forget()
        except nvml.NVMLError as error:
            code = code_of(error)
            self._close()
            return code
        self._say("ok", None)
        self._probed_at, self._patience = None, timedelta(seconds=FIRST_PROBE_SECONDS)
        return None

    def _be_away(self, code: int, now: datetime) -> None:
        self._say(*_STATUS.get(code, ("error", f"NVML answers {code_name(code)}")))
        if self._probed_at is not None:
            self._patience = min(self._patience * 2, timedelta(seconds=LAST_PROBE_SECONDS))
        self._probed_at = now

    def _say(self, status: str, detail: str | None) -> None:
        """Enter the state of the driver, and log it when it is news."""
        if (status, detail) != (self._status, self._detail):
            _log.info("gpu collection", host=self._host, status=status, detail=detail, driver=self._driver or None)
        self._status, self._detail = status, detail

    def _close(self) -> None:
        is_ours = self._is_open and self._pid == os.getpid()
        self._is_open = False
        for gpu in self._gpus:
            if is_ours:
                gpu.free()
        self._gpus, self._absent, self._slow_at = [], [], None
        if is_ours:
            self._events.free()
            try:
                nvml.nvmlShutdown()  # type: ignore[no-untyped-call]
            except nvml.NVMLError as error:
                _log.debug("nvmlShutdown", code=code_name(code_of(error)))


def _unknowns(ledger: Ledger) -> list[str]:
    """What a GPU does not tell, by reason."""
    lines = [
        f"  {title}: {', '.join(sorted(reasons))}"
        for title, reasons in (("not told", ledger.unsupported), ("not permitted", ledger.denied))
        if reasons
    ]
    return lines + [f"  {failure}, {count} times" for failure, count in sorted(ledger.failures.items())]
