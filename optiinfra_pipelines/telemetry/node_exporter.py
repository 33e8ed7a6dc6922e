"""node_exporter's names -> `raw_host_samples` and `raw_host_devices`.

Here: which family gives which column, over which labels it is added up, and the identity of a boot read over HTTP.
Not here: fetching the page. Rates are made in SQL.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from optiinfra_pipelines.telemetry.devices import Mount, counted_disks, counted_filesystems, is_counted_interface
from optiinfra_pipelines.telemetry.samples import Row, Sample

# The page does not tell the page size. 4 KiB is x86-64's and most arm64 kernels'; one of 64 KiB swaps 16 times as much.
ASSUMED_PAGE_BYTES = 4096.0
# The kernel derives boot time from the wall clock, so it moves by a second or so when the clock is disciplined.
BOOT_TIME_TOLERANCE_SECONDS = 30.0

_CPU = "node_cpu_seconds_total"
# `user` and `nice` hold guest time already, as in /proc/stat; node_cpu_guest_seconds_total tells it a second time.
CPU_MODES: Mapping[str, tuple[str, ...]] = {
    "cpu_user_seconds_total": ("user", "nice"),
    "cpu_system_seconds_total": ("system", "irq", "softirq"),
    "cpu_idle_seconds_total": ("idle",),
    "cpu_iowait_seconds_total": ("iowait",),
    "cpu_steal_seconds_total": ("steal",),
}
HOST_COLUMNS: Mapping[str, str] = {
    "load_1m": "node_load1",
    "context_switches_total": "node_context_switches_total",
    "processes_blocked": "node_procs_blocked",
    "memory_total_bytes": "node_memory_MemTotal_bytes",
    "memory_available_bytes": "node_memory_MemAvailable_bytes",
    "swap_total_bytes": "node_memory_SwapTotal_bytes",
    "major_faults_total": "node_vmstat_pgmajfault",
    "oom_kills_total": "node_vmstat_oom_kill",
    "psi_cpu_some_seconds_total": "node_pressure_cpu_waiting_seconds_total",
    "psi_memory_some_seconds_total": "node_pressure_memory_waiting_seconds_total",
    "psi_memory_full_seconds_total": "node_pressure_memory_stalled_seconds_total",
    "psi_io_some_seconds_total": "node_pressure_io_waiting_seconds_total",
    "psi_io_full_seconds_total": "node_pressure_io_stalled_seconds_total",
    "tcp_retransmits_total": "node_netstat_Tcp_RetransSegs",
}
PAGE_COLUMNS: Mapping[str, str] = {
    "swap_in_bytes_total": "node_vmstat_pswpin",
    "swap_out_bytes_total": "node_vmstat_pswpout",
}
DISK_COLUMNS: Mapping[str, str] = {
    "read_bytes_total": "node_disk_read_bytes_total",
    "write_bytes_total": "node_disk_written_bytes_total",
    "reads_total": "node_disk_reads_completed_total",
    "writes_total": "node_disk_writes_completed_total",
    "read_seconds_total": "node_disk_read_time_seconds_total",
    "write_seconds_total": "node_disk_write_time_seconds_total",
    "busy_seconds_total": "node_disk_io_time_seconds_total",
}
NETWORK_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "read_bytes_total": ("node_network_receive_bytes_total",),
    "write_bytes_total": ("node_network_transmit_bytes_total",),
    "errors_total": ("node_network_receive_errs_total", "node_network_transmit_errs_total"),
    "drops_total": ("node_network_receive_drop_total", "node_network_transmit_drop_total"),
}
FILESYSTEM_COLUMNS: Mapping[str, str] = {
    "size_bytes": "node_filesystem_size_bytes",
    "available_bytes": "node_filesystem_avail_bytes",
}
_BOOT = "node_boot_time_seconds"
_SWAP_FREE = "node_memory_SwapFree_bytes"
_DEVICE_ERROR = "node_filesystem_device_error"

_SCALARS = frozenset({*HOST_COLUMNS.values(), *PAGE_COLUMNS.values(), _BOOT, _SWAP_FREE})
_DEVICE_FAMILIES = frozenset({*DISK_COLUMNS.values(), *(name for names in NETWORK_COLUMNS.values() for name in names)})
_FILESYSTEM_FAMILIES = frozenset({*FILESYSTEM_COLUMNS.values(), _DEVICE_ERROR})
FAMILIES = frozenset({_CPU} | _SCALARS | _DEVICE_FAMILIES | _FILESYSTEM_FAMILIES)


class Boot(NamedTuple):
    """Identity and time of one boot of a host."""

    boot_id: str
    booted_at: datetime


@dataclass(frozen=True)
class HostPage:
    """What a page says: at most one row of raw_host_samples, rows of raw_host_devices, the families it has."""

    host_rows: list[Row]
    device_rows: list[Row]
    families: frozenset[str]
    boot: Boot | None


@dataclass
class _Page:
    """The families of a page, sorted by what their labels tell apart."""

    scalars: dict[str, float]
    cpu_modes: dict[str, float]
    cpus: set[str]
    devices: dict[str, dict[str, float]]  # family -> device -> value
    mounts: dict[Mount, dict[str, float]]  # mount -> family -> value

    @property
    def families(self) -> frozenset[str]:
        of_mounts = {name for values in self.mounts.values() for name in values}
        return frozenset({*self.scalars, *self.devices, *of_mounts, *((_CPU,) if self.cpu_modes else ())})


def read_host(
    samples: Iterable[Sample],
    *,
    host: str,
    sampled_at: datetime,
    telemetry: str = "node_exporter",
    source: str = "live",
    previous_boot: Boot | None = None,
) -> HostPage:
    """Samples of one node_exporter at one moment -> its rows. No family of node_exporter: no rows at all.

    `previous_boot`: the boot last seen on this host; a boot time within 30 s of it is the same boot.
    Columns that the exporter has no family for (cgroup, the monotonic clock) are NULL.
    """
    page = _sort(samples)
    if not page.families:
        return HostPage([], [], frozenset(), previous_boot)
    boot = boot_identity(page.scalars.get(_BOOT), previous_boot)
    row: Row = {
        "sampled_at": sampled_at,
        "host": host,
        "telemetry": telemetry,
        "source": source,
        "boot_id": boot.boot_id if boot else None,
        "booted_at": boot.booted_at if boot else None,
        "cpu_count": len(page.cpus) or None,
    }
    for column, modes in CPU_MODES.items():
        told = [page.cpu_modes[mode] for mode in modes if mode in page.cpu_modes]
        row[column] = sum(told) if told else None
    for column, name in HOST_COLUMNS.items():
        row[column] = page.scalars.get(name)
    for column, name in PAGE_COLUMNS.items():
        pages = page.scalars.get(name)
        row[column] = None if pages is None else pages * ASSUMED_PAGE_BYTES
    total, free = row["swap_total_bytes"], page.scalars.get(_SWAP_FREE)
    row["swap_used_bytes"] = total - free if isinstance(total, float) and free is not None else None
    identity = {"sampled_at": sampled_at, "host": host, "boot_id": row["boot_id"]}
    return HostPage([row], [identity | device for device in _device_rows(page)], page.families, boot)


def boot_identity(boot_time_seconds: float | None, previous: Boot | None) -> Boot | None:
    """The boot that a boot time names; None when the page does not tell it."""
    if boot_time_seconds is None or boot_time_seconds <= 0:
        return None
    booted_at = datetime.fromtimestamp(boot_time_seconds, UTC)
    if previous and abs((booted_at - previous.booted_at).total_seconds()) <= BOOT_TIME_TOLERANCE_SECONDS:
        return previous
    return Boot(f"booted-{int(boot_time_seconds)}", booted_at)


def _sort(samples: Iterable[Sample]) -> _Page:
    page = _Page({}, defaultdict(float), set(), defaultdict(dict), defaultdict(dict))
    for name, labels, value in samples:
        if name not in FAMILIES or not math.isfinite(value):
            continue
        if name == _CPU:
            page.cpu_modes[labels.get("mode", "")] += value
            page.cpus.add(labels.get("cpu", ""))
        elif name in _SCALARS:
            page.scalars[name] = value
        elif name in _DEVICE_FAMILIES:
            page.devices[name][labels.get("device", "")] = value
        else:
            mount = Mount(labels.get("device", ""), labels.get("mountpoint", ""), labels.get("fstype", ""))
            page.mounts[mount][name] = value
    return page


def _device_rows(page: _Page) -> Iterable[Row]:
    disks = {device for name in DISK_COLUMNS.values() for device in page.devices.get(name, ())}
    for disk in sorted(counted_disks(disks)):
        values = {column: page.devices.get(name, {}).get(disk) for column, name in DISK_COLUMNS.items()}
        yield {"kind": "disk", "device": disk, **values}
    cards = {device for names in NETWORK_COLUMNS.values() for name in names for device in page.devices.get(name, ())}
    for card in sorted(filter(is_counted_interface, cards)):
        row: Row = {"kind": "network", "device": card}
        for column, names in NETWORK_COLUMNS.items():
            told = [page.devices[name][card] for name in names if card in page.devices.get(name, {})]
            row[column] = sum(told) if len(told) == len(names) else None
        yield row
    # node_exporter prints a mount it could not read with its error set and its sizes 0.
    readable = [mount for mount, values in page.mounts.items() if values.get(_DEVICE_ERROR, 0) == 0]
    for mount in counted_filesystems(readable, is_local=False):
        sizes = {column: page.mounts[mount].get(name) for column, name in FILESYSTEM_COLUMNS.items()}
        yield {"kind": "filesystem", "device": mount.mount_point, **sizes}
