"""The engine processes of this host: which they are, and their own CPU, waiting and memory.

Here: finding them (GPU holders, listeners on targets' ports, their parents and children) now and then, and reading
those few every tick. Not here: which pids hold a GPU (the GPU collector) and which ports are targets' (fleet.yaml).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from resources.host import proc_files
from resources.host.proc_files import ProcessStat

Row = dict[str, object]

# Finding reads every process' stat, 0.02 ms each. Engines start a few times a day.
FIND_EVERY = timedelta(seconds=60)
# Reading the kernel's table of sockets costs some 7 ms (it walks a hash table sized for the machine's memory), and
# whose a socket is, only every process' descriptors tell: 0.05 ms a process. So neither is done while each port has a
# living listener, until this time has passed: a supervisor may have handed the socket on.
SEARCH_EVERY = timedelta(minutes=10)
# A process that ended or a new GPU holder asks for it sooner, but a crash loop must not make it every tick.
FIND_AT_MOST_EVERY = timedelta(seconds=10)
# vLLM's worker -> EngineCore -> API server is two levels; SGLang's is the same.
LEVELS = 2
# An 8-GPU host with 8 engines has some 40. More means that something forks without end; reading is 0.05 ms each.
MAX_PROCESSES = 64
_NAME_LIMIT = 15  # the kernel cuts a process' name here


@dataclass
class _Known:
    role: str
    started_ticks: int
    started_at: datetime | None
    short_name: str = ""
    name: str = ""


class EngineProcesses:
    """Finds and reads engine processes under `proc_root`. Only those of our own pid and network namespace are seen."""

    def __init__(self, proc_root: Path, ticks_per_second: int) -> None:
        self._root = str(proc_root)
        self._ticks_per_second = ticks_per_second
        self._known: dict[int, _Known] = {}
        self._asked: tuple[frozenset[int], frozenset[int]] | None = None
        self._found_at: datetime | None = None
        self._has_vanished = False
        self._ports: dict[int, int] = {}  # socket inode -> port
        self._holders: dict[int, set[int]] = {}  # socket inode -> pids; none where it is another user's
        self._searched_at: datetime | None = None
        self.errors = 0

    def rows(
        self, now: datetime, watch_pids: Collection[int], listen_ports: Collection[int], booted_at: datetime | None
    ) -> list[Row]:
        """One row per engine process that is alive, without host and sampled_at."""
        self.errors = 0
        self._find_if_due(now, frozenset(watch_pids), frozenset(listen_ports), booted_at)
        rows = []
        for pid, known in list(self._known.items()):
            row = self._row(pid, known)
            if row is None:
                del self._known[pid]
                self._has_vanished = True
            else:
                rows.append(row)
        return rows

    def _find_if_due(
        self, now: datetime, pids: frozenset[int], ports: frozenset[int], booted_at: datetime | None
    ) -> None:
        asked = (pids, ports)
        age = now - self._found_at if self._found_at else None
        is_due = age is None or age >= FIND_EVERY or age < timedelta(0)
        is_wanted = asked != self._asked or self._has_vanished
        if not is_due and not (is_wanted and age is not None and age >= FIND_AT_MOST_EVERY):
            return
        self._asked, self._found_at, self._has_vanished = asked, now, False
        self._known = self._find(now, pids, ports, booted_at) if pids or ports else {}

    def _find(
        self, now: datetime, pids: Iterable[int], ports: frozenset[int], booted_at: datetime | None
    ) -> dict[int, _Known]:
        # The collector is no engine, though it may serve recordings or have started one.
        others = (pid for pid in self._pids() if pid != os.getpid())
        everyone = {pid: stat for pid in others if (stat := self._stat(pid))}
        roles = {pid: "gpu" for pid in sorted(pids) if pid in everyone}
        for pid in sorted(self._listeners(now, ports, everyone)):
            roles.setdefault(pid, "engine")
        for pid in self._relatives(list(roles), everyone):
            roles.setdefault(pid, "relative")
        found = {}
        for pid, role in list(roles.items())[:MAX_PROCESSES]:
            ticks = everyone[pid].started_ticks
            known = self._known.get(pid)
            if known and known.started_ticks == ticks:
                known.role = role
                found[pid] = known
            else:
                found[pid] = _Known(role, ticks, self._started_at(ticks, booted_at))
        return found

    def _started_at(self, ticks: int, booted_at: datetime | None) -> datetime | None:
        return booted_at + timedelta(seconds=ticks / self._ticks_per_second) if booted_at else None

    def _relatives(self, pids: list[int], everyone: dict[int, ProcessStat]) -> Iterable[int]:
        """Parents, then children. Above the parent only within the same job (process group): not the user's shell."""
        children: dict[int, list[int]] = {}
        for pid, stat in everyone.items():
            children.setdefault(stat.parent, []).append(pid)
        for pid in pids:
            current = pid
            for level in range(LEVELS):
                parent = everyone[current].parent
                is_same_job = parent in everyone and everyone[parent].group == everyone[pid].group
                # pid 1 is the host's init, unless it is of the same job: a container's only service.
                if parent not in everyone or not (is_same_job or (level == 0 and parent > 1)):
                    break
                yield parent
                current = parent
        for pid in pids:
            generation = [pid]
            for _ in range(LEVELS):
                generation = [child for parent in generation for child in children.get(parent, ())]
                yield from generation

    def _listeners(self, now: datetime, ports: frozenset[int], everyone: Collection[int]) -> set[int]:
        """Pids that hold a socket listening on one of the ports."""
        if not ports:
            return set()
        alive = set(everyone)
        are_alive = all(pids <= alive for pids in self._holders.values())
        is_recent = self._searched_at is not None and now - self._searched_at < SEARCH_EVERY
        are_held = {self._ports[inode] for inode, pids in self._holders.items() if pids} == ports
        if not (are_alive and is_recent and are_held):
            listening: dict[int, int] = {}
            for name in ("net/tcp", "net/tcp6"):
                listening |= proc_files.parse_listeners(proc_files.read(f"{self._root}/{name}") or b"", ports)
            if not (are_alive and is_recent) or listening != self._ports:
                self._ports, self._holders = listening, self._search(set(listening), everyone)
                self._searched_at = now
        return {pid for pids in self._holders.values() for pid in pids}

    def _search(self, inodes: set[int], everyone: Collection[int]) -> dict[int, set[int]]:
        holders: dict[int, set[int]] = {inode: set() for inode in inodes}
        links = {f"socket:[{inode}]": inode for inode in inodes}
        for pid in everyone if inodes else ():
            for link in self._descriptors(pid):
                if link in links:
                    holders[links[link]].add(pid)
        return holders

    def _descriptors(self, pid: int) -> Iterable[str]:
        folder = f"{self._root}/{pid}/fd"
        try:
            names = os.listdir(folder)  # noqa: PTH208 - a Path per descriptor would double the cost
        except OSError:  # another user's process, or one that ended
            return
        for name in names:
            try:
                yield os.readlink(f"{folder}/{name}")  # noqa: PTH115 - as above
            except OSError:
                continue

    def _pids(self) -> Iterable[int]:
        return (int(name) for name in os.listdir(self._root) if name.isdecimal())  # noqa: PTH208 - as above

    def _stat(self, pid: int) -> ProcessStat | None:
        """None when the process is gone, or its stat cannot be read or understood."""
        try:
            data = proc_files.read(f"{self._root}/{pid}/stat")
            return proc_files.parse_process_stat(data) if data else None
        except (OSError, ValueError, IndexError):
            self.errors += 1
            return None

    def _row(self, pid: int, known: _Known) -> Row | None:
        stat = self._stat(pid)
        if stat is None or stat.started_ticks != known.started_ticks or known.started_at is None:
            return None
        if stat.name != known.short_name:
            known.short_name, known.name = stat.name, self._full_name(pid, stat.name)
        row: Row = {
            "pid": pid,
            "process_started_at": known.started_at,
            "name": known.name,
            "role": known.role,
            "cpu_seconds_total": stat.cpu_ticks / self._ticks_per_second,
            "thread_count": stat.thread_count,
        }
        for part in (self._status, self._waiting, self._open_files):
            try:
                row |= part(pid)
            except (OSError, ValueError, IndexError):
                self.errors += 1
        return row

    def _status(self, pid: int) -> Row:
        data = proc_files.read(f"{self._root}/{pid}/status") or b""
        told = proc_files.parse_keyed(data, ("VmRSS", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"))
        row: Row = {column: float(told[key]) for key, column in _STATUS_COLUMNS.items() if key in told}
        return row | ({"resident_bytes": told["VmRSS"] * 1024.0} if "VmRSS" in told else {})

    def _waiting(self, pid: int) -> Row:
        """/proc/<pid>/schedstat: nanoseconds on a CPU, nanoseconds waiting for one, slices; of the main thread."""
        data = proc_files.read(f"{self._root}/{pid}/schedstat")
        return {"run_queue_wait_seconds_total": int(data.split()[1]) / 1e9} if data else {}

    def _open_files(self, pid: int) -> Row:
        """Linux 6.2 and later tell the count as the folder's size, to anyone; before, the owner may count."""
        folder = f"{self._root}/{pid}/fd"
        try:
            count = os.stat(folder).st_size or len(os.listdir(folder))  # noqa: PTH116, PTH208 - as above
        except (PermissionError, FileNotFoundError):
            return {}
        return {"open_files": count}

    def _full_name(self, pid: int, name: str) -> str:
        """The name, from the command line where the kernel cut it (VLLM::EngineCor -> VLLM::EngineCore_DP0)."""
        if len(name.encode()) < _NAME_LIMIT:
            return name
        try:
            line = proc_files.read(f"{self._root}/{pid}/cmdline") or b""
        except OSError:
            return name
        program = line.partition(b"\0")[0].decode(errors="replace").rpartition("/")[2].strip()
        return program if program.startswith(name) else name


_STATUS_COLUMNS = {
    "voluntary_ctxt_switches": "voluntary_switches_total",
    "nonvoluntary_ctxt_switches": "involuntary_switches_total",
}


def boot_time(seconds: int | None) -> datetime | None:
    """The kernel's boot time as a moment."""
    return datetime.fromtimestamp(seconds, UTC) if seconds else None
