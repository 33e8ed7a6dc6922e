"""Reading the kernel's text files: /proc and /sys, one file at a time.

Here: reading, and the formats (stat, meminfo, vmstat, pressure, snmp, diskstats, net/dev, mountinfo, net/tcp, a
process' stat and status). Not here: what is collected and which columns it becomes (`host`,
`processes`, `cgroups`). psutil reads the same files; here each is read once a tick, and from
any root, so that a test can write its own kernel.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from optiinfra_pipelines.telemetry.devices import Mount

# Kernel counters of disks are in sectors of 512 bytes, whatever the disk's own sectors are.
SECTOR_BYTES = 512
# "Not here", told in different ways: no such file, a process that ended while it was read, a kernel without PSI.
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESRCH, errno.EOPNOTSUPP, errno.ENODEV})
_CHUNK_BYTES = 65536
_LINE_BYTES = 128  # longer than any line of a key and a number


def read(path: str | Path) -> bytes | None:
    """The whole file; None where the kernel does not have it. Raises OSError where it has it and refuses."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    try:
        chunks = []
        while chunk := os.read(descriptor, _CHUNK_BYTES):
            chunks.append(chunk)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    finally:
        os.close(descriptor)
    return b"".join(chunks)


class Stat(NamedTuple):
    """/proc/stat: ticks of all CPUs by mode (None where this kernel has no such mode), and counters."""

    modes: Mapping[str, int | None]
    cpu_count: int
    context_switches: int | None
    blocked: int | None
    boot_time: int | None


CPU_MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
_STAT_NUMBERS = {
    key: re.compile(rb"^%s (\d+)" % key.encode(), re.MULTILINE) for key in ("ctxt", "procs_blocked", "btime")
}


def parse_stat(data: bytes) -> Stat:
    ticks = [int(text) for text in data[: data.index(b"\n")].split()[1:]]
    padded: list[int | None] = [*ticks, *[None] * len(CPU_MODES)]
    numbers = {key: _number(pattern, data) for key, pattern in _STAT_NUMBERS.items()}
    return Stat(
        dict(zip(CPU_MODES, padded, strict=False)),
        data.count(b"\ncpu"),
        numbers["ctxt"],
        numbers["procs_blocked"],
        numbers["btime"],
    )


def parse_keyed(data: bytes, keys: Collection[str]) -> dict[str, int]:
    """`key number` or `key: number kB` lines (meminfo, vmstat, memory.events ...) -> the numbers of these keys."""
    found = {}
    text = b"\n" + data  # a key begins a line: MemTotal is not found in HugeMemTotal
    for key in keys:
        name = b"\n" + key.encode()
        start = max(text.find(name + b" "), text.find(name + b":"))
        if start >= 0:
            found[key] = int(text[start : start + _LINE_BYTES].split(None, 2)[1])
    return found


def parse_pressure(data: bytes) -> dict[str, float]:
    """Total stall time by kind ("some", "full"), in seconds; the kernel counts microseconds."""
    return {kind.decode(): int(total) / 1e6 for kind, total in re.findall(rb"^(\w+) .*total=(\d+)", data, re.MULTILINE)}


def parse_snmp(data: bytes, protocol: str, key: str) -> int | None:
    """One number of /proc/net/snmp, where each protocol has a line of names and a line of values."""
    lines = [line.split() for line in data.splitlines() if line.startswith(protocol.encode() + b":")]
    if len(lines) < 2 or key.encode() not in lines[0]:
        return None
    return int(lines[1][lines[0].index(key.encode())])


class DiskCounters(NamedTuple):
    """One line of /proc/diskstats; times in seconds (the kernel counts milliseconds in 32 bits: they wrap)."""

    reads: int
    read_bytes: int
    read_seconds: float
    writes: int
    write_bytes: int
    write_seconds: float
    busy_seconds: float


def parse_diskstats(data: bytes) -> dict[str, DiskCounters]:
    disks = {}
    for line in data.splitlines():
        fields = line.split()
        if len(fields) < 14:  # partitions before Linux 2.6.25 had fewer
            continue
        n = [int(text) for text in fields[3:13]]
        disks[fields[2].decode()] = DiskCounters(
            n[0], n[2] * SECTOR_BYTES, n[3] / 1000, n[4], n[6] * SECTOR_BYTES, n[7] / 1000, n[9] / 1000
        )
    return disks


class InterfaceCounters(NamedTuple):
    """One line of /proc/net/dev."""

    received_bytes: int
    sent_bytes: int
    errors: int
    drops: int


def parse_net_dev(data: bytes) -> dict[str, InterfaceCounters]:
    interfaces = {}
    for line in data.splitlines()[2:]:
        name, _, counters = line.rpartition(b":")  # an alias (eth0:1) has a colon in its name
        n = [int(text) for text in counters.split()]
        interfaces[name.strip().decode()] = InterfaceCounters(n[0], n[8], n[2] + n[10], n[3] + n[11])
    return interfaces


_OCTAL = re.compile(r"\\([0-7]{3})")


def parse_mountinfo(data: bytes) -> Iterator[Mount]:
    """Mounts in mount order; spaces and other odd characters in paths come as octal escapes."""
    for line in data.decode(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if len(fields) >= 5 and len(rest) >= 2:
            # Kinds without a device name (btrfs subvolumes have one) are told apart by major:minor.
            source = _unescaped(rest[1])
            device = source if source.startswith("/") else f"{source}:{fields[2]}"
            yield Mount(device, _unescaped(fields[4]), rest[0], _unescaped(fields[3]))


def _unescaped(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text) if "\\" in text else text


_LISTENING = b"0A"


def parse_listeners(data: bytes, ports: Collection[int]) -> dict[int, int]:
    """Sockets of /proc/net/tcp or tcp6 that listen on one of these ports: inode -> port."""
    listening = {}
    for line in data.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[3] == _LISTENING:
            port = int(fields[1].rpartition(b":")[2], 16)
            if port in ports:
                listening[int(fields[9])] = port
    return listening


class ProcessStat(NamedTuple):
    """/proc/<pid>/stat. Ticks are of the whole process, children not included."""

    name: str
    parent: int
    group: int
    cpu_ticks: int
    thread_count: int
    started_ticks: int


def parse_process_stat(data: bytes) -> ProcessStat:
    # The name stands in parentheses and may itself hold spaces and parentheses: it ends at the last one.
    opening, closing = data.index(b"("), data.rindex(b")")
    fields = data[closing + 2 :].split()
    return ProcessStat(
        data[opening + 1 : closing].decode(errors="replace"),
        int(fields[1]),
        int(fields[2]),
        int(fields[11]) + int(fields[12]),
        int(fields[17]),
        int(fields[19]),
    )


def _number(pattern: re.Pattern[bytes], data: bytes) -> int | None:
    match = pattern.search(data)
    return int(match[1]) if match else None
