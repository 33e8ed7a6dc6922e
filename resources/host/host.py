"""This host's raw telemetry: CPU, memory, pressure, disks, network, file systems, our cgroup, engine processes.

Here: which file of /proc and /sys gives which column of the raw host tables. Not here: rates (made in SQL), GPUs, and
other hosts (`resources.telemetry`). Every file fails alone: what cannot be read is NULL, and the tick's row in
raw_host_collections says how many there were.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

import polars as pl

from optiinfra_pipelines.sql.sources import raw_tables
from optiinfra_pipelines.telemetry.devices import Mount, counted_disks, counted_filesystems, is_counted_interface
from resources.host import proc_files
from resources.host.cgroups import OwnCgroup
from resources.host.processes import EngineProcesses, Row, boot_time

# Mounts change with pods and volumes, not with ticks; on a Kubernetes node the list is long.
MOUNTS_EVERY = timedelta(seconds=60)
_MEMORY_COLUMNS = {
    "memory_total_bytes": "MemTotal",
    "memory_available_bytes": "MemAvailable",
    "swap_total_bytes": "SwapTotal",
}
_VMSTAT_COLUMNS = {"major_faults_total": "pgmajfault", "oom_kills_total": "oom_kill"}
_VMSTAT_PAGES = {"swap_in_bytes_total": "pswpin", "swap_out_bytes_total": "pswpout"}
# `full` of cpu is not taken: at the level of the host the kernel defines it as 0.
_PRESSURES = {"cpu": ("some",), "memory": ("some", "full"), "io": ("some", "full")}
_FAILURES = (OSError, ValueError, IndexError, KeyError)


class HostCollector:
    """Reads this host. `collect` gives frames of the raw host tables; it raises for nothing that a kernel can do.

    proc_root, sys_root: other roots than the kernel's own, for tests and for a container that mounts the host's.
    monotonic: seconds that never go back, for rates.
    """

    def __init__(
        self,
        host_name: str,
        proc_root: Path = Path("/proc"),
        sys_root: Path = Path("/sys"),
        *,
        source: str = "live",
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host_name
        self._proc = str(proc_root)
        self._sys = sys_root
        self._source = source
        self._monotonic = monotonic
        self._ticks_per_second = os.sysconf("SC_CLK_TCK")
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._cgroup = OwnCgroup(proc_root, sys_root)
        self._processes = EngineProcesses(proc_root, self._ticks_per_second)
        self._mounts: tuple[datetime, list[Mount]] | None = None
        self._cards: tuple[frozenset[str], frozenset[str]] | None = None
        self._booted_at: datetime | None = None
        self._boot_id: str | None = None
        self._failures: list[str] = []

    def collect(
        self, now: datetime, watch_pids: Collection[int] = (), listen_ports: Collection[int] = ()
    ) -> dict[str, pl.DataFrame]:
        """One tick: raw_host_samples, raw_host_devices, raw_host_processes, raw_host_collections.

        watch_pids: processes that hold a GPU, as this pid namespace numbers them. listen_ports: ports of targets that
        are served from this host.
        """
        wall, cpu = time.perf_counter(), time.thread_time()
        self._failures = []
        self._read_boot_id()
        sample: Row = {"telemetry": "local", "source": self._source, "monotonic_seconds": self._monotonic()}
        for name, part in self._parts.items():
            sample |= self._guarded(name, part, self)
        sample |= {"boot_id": self._boot_id, "booted_at": self._booted_at}
        devices = [
            *self._guarded_rows("diskstats", self._disks),
            *self._guarded_rows("net/dev", self._interfaces),
            *self._guarded_rows("mountinfo", lambda: self._filesystems(now)),
        ]
        processes = self._guarded_rows(
            "processes", lambda: self._processes.rows(now, watch_pids, listen_ports, self._booted_at)
        )
        errors = len(self._failures) + self._processes.errors
        collection: Row = {
            "telemetry": "local",
            "status": "partial" if errors else "ok",
            "detail": f"could not read {', '.join(self._failures) or 'a process'}"[:300] if errors else None,
            "duration_seconds": time.perf_counter() - wall,
            "cpu_seconds": time.thread_time() - cpu,
            "error_count": errors,
        }
        identity: Row = {"sampled_at": now, "host": self._host}
        return {
            "raw_host_samples": _frame("raw_host_samples", [identity | sample]),
            "raw_host_devices": _frame(
                "raw_host_devices", [identity | {"boot_id": self._boot_id} | row for row in devices]
            ),
            "raw_host_processes": _frame("raw_host_processes", [identity | row for row in processes]),
            "raw_host_collections": _frame("raw_host_collections", [identity | collection]),
        }

    def _guarded(self, name: str, part: Callable[[HostCollector], Row], collector: HostCollector) -> Row:
        try:
            return part(collector)
        except _FAILURES:
            self._failures.append(name)
            return {}

    def _guarded_rows(self, name: str, part: Callable[[], list[Row]]) -> list[Row]:
        try:
            return part()
        except _FAILURES:
            self._failures.append(name)
            return []

    def _read(self, name: str) -> bytes | None:
        return proc_files.read(f"{self._proc}/{name}")

    def _read_boot_id(self) -> None:
        """Once: a kernel has one for life, and so has every process of it."""
        if self._boot_id is None:
            try:
                text = self._read("sys/kernel/random/boot_id")
            except OSError:
                self._failures.append("boot_id")
                return
            self._boot_id = text.decode().strip() if text else None

    def _cpu(self) -> Row:
        data = self._read("stat")
        if not data:
            return {}
        stat = proc_files.parse_stat(data)
        # The kernel derives it from the wall clock, so it can move; a boot keeps the first one seen.
        self._booted_at = self._booted_at or boot_time(stat.boot_time)

        def seconds(*modes: str) -> float | None:
            ticks = [told for mode in modes if (told := stat.modes[mode]) is not None]
            return sum(ticks) / self._ticks_per_second if ticks else None

        return {
            "cpu_count": stat.cpu_count or None,
            # `user` and `nice` hold guest time already: adding `guest` and `guest_nice` would count it twice.
            "cpu_user_seconds_total": seconds("user", "nice"),
            "cpu_system_seconds_total": seconds("system", "irq", "softirq"),
            "cpu_idle_seconds_total": seconds("idle"),
            "cpu_iowait_seconds_total": seconds("iowait"),
            "cpu_steal_seconds_total": seconds("steal"),
            "context_switches_total": _float(stat.context_switches),
            "processes_blocked": _float(stat.blocked),
        }

    def _load(self) -> Row:
        data = self._read("loadavg")
        return {"load_1m": float(data.split()[0])} if data else {}

    def _memory(self) -> Row:
        told = proc_files.parse_keyed(self._read("meminfo") or b"", (*_MEMORY_COLUMNS.values(), "SwapFree"))
        row: Row = {column: told[key] * 1024.0 for column, key in _MEMORY_COLUMNS.items() if key in told}
        if "SwapTotal" in told and "SwapFree" in told:
            row["swap_used_bytes"] = (told["SwapTotal"] - told["SwapFree"]) * 1024.0
        return row

    def _vmstat(self) -> Row:
        told = proc_files.parse_keyed(self._read("vmstat") or b"", (*_VMSTAT_COLUMNS.values(), *_VMSTAT_PAGES.values()))
        row: Row = {column: float(told[key]) for column, key in _VMSTAT_COLUMNS.items() if key in told}
        pages = {column: float(told[key] * self._page_bytes) for column, key in _VMSTAT_PAGES.items() if key in told}
        return row | pages

    def _pressure(self) -> Row:
        row: Row = {}
        for what, kinds in _PRESSURES.items():
            totals = proc_files.parse_pressure(self._read(f"pressure/{what}") or b"")
            row |= {f"psi_{what}_{kind}_seconds_total": totals.get(kind) for kind in kinds}
        return row

    def _tcp(self) -> Row:
        return {
            "tcp_retransmits_total": _float(proc_files.parse_snmp(self._read("net/snmp") or b"", "Tcp", "RetransSegs"))
        }

    _parts: Mapping[str, Callable[[HostCollector], Row]] = {
        "stat": _cpu,
        "loadavg": _load,
        "meminfo": _memory,
        "vmstat": _vmstat,
        "pressure": _pressure,
        "net/snmp": _tcp,
        "cgroup cpu": lambda self: dict(self._cgroup.cpu()),
        "cgroup memory": lambda self: dict(self._cgroup.memory()),
    }

    def _disks(self) -> list[Row]:
        disks = proc_files.parse_diskstats(self._read("diskstats") or b"")
        return [
            {
                "kind": "disk",
                "device": name,
                "read_bytes_total": float(disks[name].read_bytes),
                "write_bytes_total": float(disks[name].write_bytes),
                "reads_total": float(disks[name].reads),
                "writes_total": float(disks[name].writes),
                "read_seconds_total": disks[name].read_seconds,
                "write_seconds_total": disks[name].write_seconds,
                "busy_seconds_total": disks[name].busy_seconds,
            }
            for name in sorted(counted_disks(disks))
        ]

    def _interfaces(self) -> list[Row]:
        interfaces = proc_files.parse_net_dev(self._read("net/dev") or b"")
        return [
            {
                "kind": "network",
                "device": name,
                "read_bytes_total": float(interfaces[name].received_bytes),
                "write_bytes_total": float(interfaces[name].sent_bytes),
                "errors_total": float(interfaces[name].errors),
                "drops_total": float(interfaces[name].drops),
            }
            for name in sorted(self._counted_cards(frozenset(interfaces)))
        ]

    def _counted_cards(self, names: frozenset[str]) -> frozenset[str]:
        """Interfaces with a device behind them; where none has one (a container's eth0), those named like one."""
        if self._cards is None or self._cards[0] != names:
            physical = {name for name in names if (self._sys / "class" / "net" / name / "device").exists()}
            self._cards = names, frozenset(physical or filter(is_counted_interface, names))
        return self._cards[1]

    def _filesystems(self, now: datetime) -> list[Row]:
        if self._mounts is None or not timedelta(0) <= now - self._mounts[0] < MOUNTS_EVERY:
            mounts = proc_files.parse_mountinfo(self._read("self/mountinfo") or b"")
            self._mounts = now, counted_filesystems(mounts, is_local=True)
        rows: list[Row] = []
        for mount in self._mounts[1]:
            try:
                told = os.statvfs(mount.mount_point)
            except OSError:  # unmounted since, or a place we may not enter
                self._failures.append(mount.mount_point)
                continue
            rows.append(
                {
                    "kind": "filesystem",
                    "device": mount.mount_point,
                    "size_bytes": float(told.f_blocks * told.f_frsize),
                    "available_bytes": float(told.f_bavail * told.f_frsize),
                }
            )
        return rows


def _float(number: int | None) -> float | None:
    return None if number is None else float(number)


def _frame(table: str, rows: list[Row]) -> pl.DataFrame:
    return raw_tables()[table].frame(rows) if rows else _empty(table)


@cache
def _empty(table: str) -> pl.DataFrame:
    """Kept, because making a frame of no rows costs more than one of rows (0.25 ms)."""
    return raw_tables()[table].empty()
