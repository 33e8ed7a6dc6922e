"""One GPU, tick after tick: its row of raw_gpu_samples, those of its MIG instances, and its processes.

Here: what is asked when (every tick, or once a minute), and columns made from several answers. Not here: the table of
calls (`metrics`), the guard around each (`ask`), the driver's coming and going (`gpus`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pynvml as nvml

from optiinfra_pipelines.domain.gpus import RECOVERY_ACTIONS
from resources.nvml.ask import UNSUPPORTED_CODES, Ledger, ask, ask_first
from resources.nvml.buffers import (
    EMPTY_RING,
    NO_ANSWERS,
    ActivityReader,
    FieldBatch,
    GpmRequest,
    MemoryReader,
    ProcessLister,
    RingCursor,
    RingReader,
)
from resources.nvml.calls import Reader
from resources.nvml.gpm import GpmAverages, MigInstance, add_averages, mig_profile
from resources.nvml.links import NvLinks
from resources.nvml.metrics import FAST_METRICS, GPM_METRICS, SLOW_FIELDS, SLOW_METRICS, Field, Metric, fast_fields
from resources.nvml.processes import GpuProcess, ProcessReader

Row = dict[str, Any]

# Fields that become a threshold (see `_finish`) and are no columns themselves.
_MARGINS = ("slowdown_margin_celsius", "shutdown_margin_celsius")

# A metric with the readers of its calls.
Bound = tuple[Metric, tuple[Reader, ...]]


class Buffers:
    """What NVML writes its answers to: one of each for all GPUs, which are asked one after the other."""

    def __init__(self) -> None:
        self.ring, self.processes, self.activity = RingReader(), ProcessLister(), ActivityReader()
        self.gpm = GpmRequest([metric for metric, _, _ in GPM_METRICS])
        self.memory = MemoryReader()
        self.fast_metrics, self.slow_metrics = _bound(FAST_METRICS), _bound(SLOW_METRICS)


def _bound(metrics: Sequence[Metric]) -> tuple[Bound, ...]:
    return tuple((metric, tuple(call.reader() for call in metric.calls)) for metric in metrics)


@dataclass(frozen=True)
class Shared:
    """What all GPUs of one collector share."""

    driver_version: str
    buffers: Buffers
    sysfs: Path


@dataclass
class Reading:
    """One GPU in one tick. `rows`: the GPU first, then its MIG instances; keys are columns of raw_gpu_samples."""

    rows: list[Row]
    processes: list[GpuProcess] = field(default_factory=list)


class FieldGroup:
    """Fields that are asked for together."""

    def __init__(self, wanted: tuple[Field, ...]) -> None:
        self._wanted = wanted
        self.fields: tuple[Field, ...] = ()
        self.batch: FieldBatch | None = None

    def fill(self, ledger: Ledger) -> None:
        """Leave out what the chip does not tell."""
        self.fields = tuple(each for each in self._wanted if each.key not in ledger.unsupported)
        self.batch = FieldBatch([(each.field_id, 0) for each in self.fields])


class GpuReader:
    """Reads one GPU. `facts` are the columns that a lost GPU still has."""

    def __init__(self, handle: object, index: int, uuid: str, ledger: Ledger, shared: Shared) -> None:
        self.handle = handle
        self.ledger = ledger
        self.facts: Row = {"gpu_uuid": uuid, "gpu_index": index, "driver_version": shared.driver_version}
        self._shared = shared
        self._slow: Row = {}
        self._margins: Row = {}
        self._gpu_ring = RingCursor()
        self._rings: tuple[tuple[str, str, int, RingCursor], ...] = tuple(
            (column, f"{column} ring", kind, cursor)
            for column, kind, cursor in (
                ("gpu_utilization_ratio", nvml.NVML_GPU_UTILIZATION_SAMPLES, self._gpu_ring),
                ("memory_bandwidth_utilization_ratio", nvml.NVML_MEMORY_UTILIZATION_SAMPLES, RingCursor()),
            )
        )
        self._links = NvLinks(ledger)
        self._processes = ProcessReader(ledger, shared.buffers.processes, shared.buffers.activity)
        self._gpm: GpmAverages | None = None
        self._instances: list[MigInstance] = []
        self._is_mig: bool | None = None
        driver = tuple(int(part) for part in shared.driver_version.split(".") if part.isdigit())
        self._fast_fields, self._slow_fields = FieldGroup(fast_fields(driver)), FieldGroup(SLOW_FIELDS)

    @property
    def uuid(self) -> str:
        return str(self.facts["gpu_uuid"])

    def read(self, now: datetime, *, is_slow: bool) -> Reading:
        """Everything of this tick; with `is_slow` also what changes seldom, which is repeated in between.

        Raises GpuGoneError when the GPU is lost or needs a reset, DriverDownError when the driver is away.
        """
        if is_slow:
            self._read_slow()
        row: Row = {**self.facts, "mig_instance": "", "health": "ok"}
        self._read_metrics(row, self._shared.buffers.fast_metrics)
        self._read_fields(row, self._fast_fields)
        self._read_utilization(row)
        row.update(self._read_memory(self.handle))
        self._links.read(self.handle, row)
        if self._gpm is not None:
            add_averages(row, self._gpm.read(self._shared.buffers.gpm, self.ledger, now))
        row.update(self._slow)
        _finish(row, self._margins)
        processes = self._processes.read(self.handle, row.get("memory_total_bytes"), look_everywhere=is_slow)
        row["process_count"] = None if processes is None else len({process.pid for process in processes})
        rows = [row, *(self._read_instance(instance, processes, now) for instance in self._instances)]
        return Reading(rows, _by_pid(processes or []))

    def free(self) -> None:
        """Give back what is held in the driver."""
        for held in (self._gpm, *(instance.gpm for instance in self._instances)):
            if held is not None:
                held.free()

    # ---- once a minute ----

    def _read_slow(self) -> None:
        self._read_identity()
        slow: Row = {}
        self._read_metrics(slow, self._shared.buffers.slow_metrics)
        self._read_fields(slow, self._slow_fields)
        slow["nvlink_errors_total"] = self._links.discover(self.handle, int(slow.pop("nvlink_count", None) or 0))
        action = slow.pop("recovery_action", None)
        if action is not None:
            slow["recovery_action"] = RECOVERY_ACTIONS.get(int(action), f"action_{int(action)}")
        for flag in ("is_row_remap_pending", "is_row_remap_failed"):
            if slow.get(flag) is not None:
                slow[flag] = bool(slow[flag])
        self._margins = {key: slow.pop(key) for key in _MARGINS if key in slow}
        self._slow = slow
        self._read_partition()

    def _read_identity(self) -> None:
        name = ask(self.ledger, "name", nvml.nvmlDeviceGetName, self.handle)
        pci = ask(self.ledger, "pci_bus_id", nvml.nvmlDeviceGetPciInfo_v3, self.handle)
        self.facts["name"] = name if name is not None else self.facts.get("name")
        if pci is not None:
            self.facts["pci_bus_id"] = pci.busId
            self.facts["numa_node"] = numa_node(self._shared.sysfs, pci.busId)

    def _read_partition(self) -> None:
        """Is the GPU cut into MIG instances, and which? Changing that changes what the GPU can tell."""
        mode = ask(self.ledger, "mig", nvml.nvmlDeviceGetMigMode, self.handle)
        is_mig = bool(mode and mode[0] == nvml.NVML_DEVICE_MIG_ENABLE)
        if self._is_mig is not None and is_mig != self._is_mig:
            self.ledger.forget()
            self._fast_fields.fill(self.ledger)
            self._slow_fields.fill(self.ledger)
        self._is_mig = is_mig
        if self._gpm is None:
            support = ask(self.ledger, "gpm", nvml.nvmlGpmQueryDeviceSupport, self.handle)
            if support is not None and support.isSupportedDevice:
                self._gpm = GpmAverages(self.handle)
            elif support is not None:
                self.ledger.unsupported["gpm"] = "not_supported"
        self._instances = self._find_instances() if is_mig else self._drop_instances({})

    def _find_instances(self) -> list[MigInstance]:
        known = {instance.number: instance for instance in self._instances}
        found: dict[int, MigInstance] = {}
        most = ask(self.ledger, "mig_count", nvml.nvmlDeviceGetMaxMigDeviceCount, self.handle) or 0
        for position in range(most):
            handle = ask(self.ledger, "mig_handle", nvml.nvmlDeviceGetMigDeviceHandleByIndex, self.handle, position)
            number = None if handle is None else ask(self.ledger, "mig_id", nvml.nvmlDeviceGetGpuInstanceId, handle)
            if handle is None or number is None or number in found:
                continue  # an empty place, or a second compute instance of a slice that we have
            name = ask(self.ledger, "mig_name", nvml.nvmlDeviceGetName, handle)
            kept = known.get(number)
            gpm = kept.gpm if kept else GpmAverages(self.handle, number)
            found[number] = MigInstance(handle, number, mig_profile(name), gpm)
        return self._drop_instances(found)

    def _drop_instances(self, keep: dict[int, MigInstance]) -> list[MigInstance]:
        for instance in self._instances:
            if instance.number not in keep:
                instance.gpm.free()
        return list(keep.values())

    # ---- every tick ----

    def _read_metrics(self, row: Row, metrics: Sequence[Bound]) -> None:
        ledger, handle = self.ledger, self.handle
        for metric, readers in metrics:
            if len(readers) == 1:
                raw = ask(ledger, metric.column, readers[0], handle)
            else:
                raw = ask_first(ledger, metric.column, readers, handle)
            if raw is None:
                continue
            value = raw * metric.scale
            if metric.low <= value <= metric.high:
                row[metric.column] = int(value) if metric.is_integer else value
            else:
                ledger.reject(metric.column)

    def _read_fields(self, row: Row, group: FieldGroup) -> None:
        """Field values in one call; those the chip does not have are left out of the next one."""
        if group.batch is None:
            group.fill(self.ledger)
        batch = group.batch
        answers = ask(self.ledger, "field_values", batch.read, self.handle) if batch and group.fields else None
        has_refused = False
        for each, code, value in zip(group.fields, *(answers or NO_ANSWERS), strict=False):
            if code != nvml.NVML_SUCCESS:
                # A driver that does not know an id may also call it an invalid argument.
                is_unknown = code == nvml.NVML_ERROR_INVALID_ARGUMENT or code in UNSUPPORTED_CODES
                self.ledger.note(each.key, nvml.NVML_ERROR_NOT_SUPPORTED if is_unknown else code)
                has_refused |= is_unknown
            elif value == 0 and each.is_zero_none:
                self.ledger.note(each.key, nvml.NVML_ERROR_NOT_SUPPORTED)
                has_refused = True
            elif value is not None and each.low <= value * each.scale <= each.high:
                row[each.key] = value * each.scale
            else:
                self.ledger.reject(each.key)
        if has_refused:
            group.fill(self.ledger)

    def _read_utilization(self, row: Row) -> None:
        """Mean and peak of the ring since the last tick; one poll where the ring is dry or the chip has none."""
        for column, metric, kind, cursor in self._rings:
            samples = ask(self.ledger, metric, self._shared.buffers.ring.read, self.handle, kind, cursor.ask_from)
            fresh = cursor.take(samples or EMPTY_RING)
            if not fresh:
                continue
            row[column] = sum(fresh) / len(fresh) / 100
            if cursor is self._gpu_ring:
                row["gpu_utilization_max_ratio"] = max(fresh) / 100
                row["utilization_sample_count"] = len(fresh)
        if "gpu_utilization_ratio" in row and "memory_bandwidth_utilization_ratio" in row:
            return
        rates = ask(self.ledger, "utilization_rates", nvml.nvmlDeviceGetUtilizationRates, self.handle)
        if rates is None:
            return
        polled = (("gpu_utilization_ratio", rates.gpu), ("memory_bandwidth_utilization_ratio", rates.memory))
        for column, percent in polled:
            if percent > 100:
                self.ledger.reject(column)
            else:
                row.setdefault(column, percent / 100)

    def _read_memory(self, handle: object, metric: str = "memory") -> Row:
        answer = ask(self.ledger, metric, self._shared.buffers.memory.read, handle)
        if answer is None:
            return {}
        total, used, free, reserved = answer
        if total <= 0 or max(used, free, reserved) > total:
            self.ledger.reject(metric)
            return {}
        return {
            "memory_total_bytes": float(total),
            "memory_used_bytes": float(used),
            "memory_free_bytes": float(free),
            "memory_reserved_bytes": float(reserved),
        }

    def _read_instance(self, instance: MigInstance, processes: list[GpuProcess] | None, now: datetime) -> Row:
        """A MIG instance has memory, activity and processes of its own; heat and power are the whole GPU's."""
        row: Row = {
            **self.facts,
            "mig_instance": str(instance.number),
            "mig_profile": instance.profile,
            "health": "ok",
            **self._read_memory(instance.handle, "mig_memory"),
        }
        if self._gpm is not None:
            add_averages(row, instance.gpm.read(self._shared.buffers.gpm, self.ledger, now))
        if processes is not None:
            row["process_count"] = sum(process.mig_instance == row["mig_instance"] for process in processes)
        return row


def _finish(row: Row, margins: Row) -> None:
    """Columns made from several answers: absolute thresholds, throttled time."""
    temperature, margin = row.get("temperature_celsius"), row.get("temperature_margin_celsius")
    for name in ("slowdown", "shutdown"):
        limit = margins.get(f"{name}_margin_celsius")
        column = f"{name}_temperature_celsius"
        if row.get(column) is None and temperature is not None and margin is not None and limit is not None:
            # Ada and later speak in degrees left: the threshold lies where the margin has shrunk to `limit`.
            row[column] = temperature + margin - limit
    software = row.pop("software_thermal_seconds", None)
    hardware = row.pop("hardware_thermal_seconds", None)
    brake = row.pop("power_brake_seconds", None)
    policy = row.pop("thermal_policy_seconds", None)
    # The two reasons of nvml.h 13 where both are counted, else the older policy counter of all heat.
    both = None if software is None or hardware is None else software + hardware
    row["thermal_throttle_seconds_total"] = policy if both is None else both
    if hardware is not None and brake is not None:
        row["hardware_slowdown_seconds_total"] = hardware + brake


def _by_pid(processes: list[GpuProcess]) -> list[GpuProcess]:
    """One entry per pid: a process that uses several MIG instances of a GPU holds the sum."""
    merged: dict[int, GpuProcess] = {}
    for process in processes:
        first = merged.setdefault(process.pid, process)
        if first is process:
            continue
        if first.used_memory_bytes is None or process.used_memory_bytes is None:
            first.used_memory_bytes = None
        else:
            first.used_memory_bytes += process.used_memory_bytes
    return list(merged.values())


def numa_node(sysfs: Path, bus_id: str) -> int | None:
    """NUMA node of a PCI device such as 00000000:00:09.0; None where there is none (-1, no such device)."""
    domain, _, rest = bus_id.lower().partition(":")
    try:
        node = int((sysfs / "bus/pci/devices" / f"{int(domain, 16):04x}:{rest}" / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
