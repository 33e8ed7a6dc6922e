"""Faults of the GPUs under a candidate, from the raw rows that collection has just stored.

Asked in a thread: the warehouse may be held by a refresh for seconds, and a look must not wait for it. What counts as
a fault is `optiinfra_pipelines.rollout.gpu_faults`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import datetime

import polars as pl
import structlog

from optiinfra_pipelines.rollout.gpu_faults import GpuSince, gpu_fault
from resources.rollouts.budgets import Read
from resources.rollouts.clock import Moment
from resources.rollouts.targets.base import Replica
from resources.warehouse import Warehouse, WarehouseError

# Collection commits every 12 s; asking more often would find nothing new.
ASK_SECONDS = 15.0
# Somebody else's turn; the next ask is 15 s away, and an executor's end must not wait for this thread.
DEADLINE_SECONDS = 2.0
_log = structlog.get_logger(__name__)

# By host: its GPUs since the first look, and how many processes its kernel ended for lack of memory (None: not told).
Seen = Mapping[str, tuple[list[GpuSince], float | None]]

_GPUS = """
select host, gpu_uuid, arg_max(health, sampled_at) as health,
    arg_min(coalesce(xid_last, -1), sampled_at) as xid_first, arg_max(coalesce(xid_last, -1), sampled_at) as xid_last,
    arg_max(xid_total, sampled_at) - arg_min(xid_total, sampled_at) as xid_events,
    arg_max(ecc_uncorrected_total, sampled_at) - arg_min(ecc_uncorrected_total, sampled_at) as ecc_uncorrected
from raw_gpu_samples
where list_contains(?, host) and sampled_at > ?
group by host, gpu_uuid
order by all
"""
_KILLS = """
select host, arg_max(oom_kills_total, sampled_at) - arg_min(oom_kills_total, sampled_at) as oom_kills
from raw_host_samples
where list_contains(?, host) and sampled_at > ?
group by host, boot_id
order by all
"""


def from_live(warehouse: Warehouse) -> Read:
    """Reads the live file with a short deadline; None when it is held for longer."""

    def read(sql: str, params: Sequence[object]) -> pl.DataFrame | None:
        try:
            with warehouse.connect(DEADLINE_SECONDS) as connection:
                frame: pl.DataFrame = connection.sql(sql, params=list(params)).pl()
                return frame
        except WarehouseError as error:
            _log.info("gpu_guard_not_asked", cause=str(error))
            return None

    return read


class GpuWatch:
    """The GPUs of some candidates' hosts since the first look. host_of: as fleet.yaml names it; None: not known."""

    def __init__(self, read: Read, host_of: Callable[[Replica], str | None]) -> None:
        self._read = read
        self._host_of = host_of
        self._since: datetime | None = None
        self._asked_at = float("-inf")
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._asking: Future[Seen] | None = None
        self._seen: Seen = {}

    def faults(self, candidates: Sequence[Replica], stable: Sequence[Replica], now: Moment) -> dict[str, str]:
        """What is wrong, by server, as of the last answer; empty where nothing is, or nothing is known."""
        hosts = {one.server: host for one in candidates if (host := self._host_of(one)) is not None}
        if not hosts:
            return {}
        self._since = self._since or now.at
        if self._asking is not None and self._asking.done():
            self._seen = self._asking.result()
            self._asking = None
        if self._asking is None and now.seconds - self._asked_at >= ASK_SECONDS:
            self._asked_at = now.seconds
            self._asking = self._pool.submit(self._ask, sorted(set(hosts.values())), self._since)
        shared = {self._host_of(one) for one in stable}
        faults = {}
        for server, host in hosts.items():
            gpus, kills = self._seen.get(host, ([], None))
            fault = gpu_fault(gpus, kills, is_shared=host in shared)
            if fault is not None:
                faults[server] = fault
        return faults

    def settle(self) -> None:
        """Wait for the answer that is on its way, if there is one."""
        if self._asking is not None:
            wait([self._asking])

    def _ask(self, hosts: list[str], since: datetime) -> Seen:
        found: dict[str, tuple[list[GpuSince], float | None]] = {host: ([], None) for host in hosts}
        gpus, kills = self._read(_GPUS, [hosts, since]), self._read(_KILLS, [hosts, since])
        if gpus is None or kills is None:
            # What was known stays known: a fault does not go away because nobody could look.
            return self._seen
        for row in kills.iter_rows(named=True):
            found[row["host"]] = ([], row["oom_kills"])
        for row in gpus.iter_rows(named=True):
            gpu = GpuSince(
                row["gpu_uuid"],
                row["health"],
                None if row["xid_first"] == -1 else row["xid_first"],
                None if row["xid_last"] == -1 else row["xid_last"],
                row["xid_events"],
                row["ecc_uncorrected"],
            )
            found[row["host"]][0].append(gpu)
        return found
