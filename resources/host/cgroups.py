"""What our own cgroup allows and how often it held us back: version 2, version 1 and hosts that mix them.

Here: finding the cgroup, its limits and counters. Not here: other cgroups, or what they mean for an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from resources.host import proc_files

# Version 1 says "no limit" by the largest page-aligned number (9223372036854771712 with 4 KiB pages); no machine has
# half of that.
_NO_LIMIT_BYTES = 2**62
Reading = dict[str, float | None]


class OwnCgroup:
    """Reads the cgroup of this process (`/proc/self/cgroup`) under `sys_root`/fs/cgroup.

    A limit is that of the nearest level that sets one, from our own cgroup up to the highest that can be seen; the
    counters beside it are of the same level. In a container only the levels within it can be seen.
    """

    def __init__(self, proc_root: Path, sys_root: Path) -> None:
        self._proc_root = proc_root
        self._base = sys_root / "fs" / "cgroup"
        self._found: tuple[list[Path], list[Path], bool, bool] | None = None

    def cpu(self) -> Reading:
        """Columns cgroup_cpu_*: limit in cores, throttled seconds and periods; NULL where nothing is told."""
        cpu_levels, _, is_v1, _ = self._levels()
        chosen = None
        limit: float | None = None
        for level in cpu_levels:
            limit = _quota_v1(level) if is_v1 else _quota_v2(level)
            if limit is not None:
                chosen = level
                break
        chosen = chosen or (cpu_levels[0] if cpu_levels else None)
        counters = proc_files.read(chosen / "cpu.stat") if chosen else None
        told = proc_files.parse_keyed(counters or b"", ("nr_throttled", "throttled_usec", "throttled_time"))
        micros, nanos = told.get("throttled_usec"), told.get("throttled_time")
        throttled = micros / 1e6 if micros is not None else nanos / 1e9 if nanos is not None else None
        periods = told.get("nr_throttled")
        return {
            "cgroup_cpu_limit_cores": limit,
            "cgroup_cpu_throttled_seconds_total": throttled,
            "cgroup_cpu_throttled_periods_total": None if periods is None else float(periods),
        }

    def memory(self) -> Reading:
        """Columns cgroup_memory_* and cgroup_oom_kills_total."""
        _, levels, _, is_v1 = self._levels()
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control") if is_v1 else _MEMORY_V2
        limit_name, used_name, kills_name = names
        limits = ((level, _limit_bytes(level / limit_name)) for level in levels)
        chosen, limit = next(((level, limit) for level, limit in limits if limit is not None), (None, None))
        chosen = chosen or (levels[0] if levels else None)
        used = proc_files.read(chosen / used_name) if chosen else None
        kills = proc_files.read(chosen / kills_name) if chosen else None
        kill_count = proc_files.parse_keyed(kills or b"", ("oom_kill",)).get("oom_kill")
        return {
            "cgroup_memory_limit_bytes": limit,
            "cgroup_memory_used_bytes": float(used) if used else None,
            "cgroup_oom_kills_total": None if kill_count is None else float(kill_count),
        }

    def _levels(self) -> tuple[list[Path], list[Path], bool, bool]:
        """Levels for cpu and for memory, nearest first, and whether each is version 1. A process moves rarely: once."""
        if self._found is None:
            self._found = self._find()
        return self._found

    def _find(self) -> tuple[list[Path], list[Path], bool, bool]:
        paths: dict[str, str] = {}
        for line in (proc_files.read(self._proc_root / "self" / "cgroup") or b"").decode().splitlines():
            _, controllers, path = line.split(":", 2)
            paths |= dict.fromkeys(controllers.split(","), path)  # version 2 names no controllers: ""
        v2_base = self._base if (self._base / "cgroup.controllers").exists() else self._base / "unified"

        def levels_of(controller: str) -> tuple[list[Path], bool]:
            if controller in paths:
                return list(_upwards(self._base / controller, paths[controller])), True
            return list(_upwards(v2_base, paths[""])) if "" in paths else [], False

        cpu, cpu_is_v1 = levels_of("cpu")
        memory, memory_is_v1 = levels_of("memory")
        return cpu, memory, cpu_is_v1, memory_is_v1


_MEMORY_V2 = ("memory.max", "memory.current", "memory.events")


def _upwards(base: Path, path: str) -> Iterator[Path]:
    """`base/path` and the levels above it down to `base`, those that exist.

    Where the path is the host's but the mount is the container's own (no cgroup namespace), only `base` exists.
    """
    parts = [part for part in path.split("/") if part and part != ".."]
    for length in range(len(parts), -1, -1):
        level = base.joinpath(*parts[:length])
        if level.is_dir():
            yield level


def _quota_v2(level: Path) -> float | None:
    """Cores of `cpu.max` ("max 100000" or "150000 100000"); None when unlimited or not told."""
    words = (proc_files.read(level / "cpu.max") or b"max").split()
    return None if words[0] == b"max" else int(words[0]) / int(words[1])


def _quota_v1(level: Path) -> float | None:
    quota, period = proc_files.read(level / "cpu.cfs_quota_us"), proc_files.read(level / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def _limit_bytes(path: Path) -> float | None:
    text = (proc_files.read(path) or b"max").strip()
    return None if text == b"max" or int(text) >= _NO_LIMIT_BYTES else float(text)
