"""A fault of a candidate's GPU reaches the guards from the rows that collection stores, within two asks."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from optiinfra_pipelines.domain.rollout_policy import HaproxyServer
from optiinfra_pipelines.sql.sources import raw_tables
from resources.rollouts.clock import Moment
from resources.rollouts.gpu_watch import ASK_SECONDS, GpuWatch, from_live
from resources.warehouse import Warehouse

NOW = Moment(datetime(2026, 11, 18, 12, 0, tzinfo=UTC), 1_000.0)
CANDIDATE = HaproxyServer(server="c0", url="http://10.0.0.6:8000")
STABLE = HaproxyServer(server="s0", url="http://10.0.0.5:8000")
HOSTS = {"c0": "gpu-2", "s0": "gpu-1"}


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(tmp_path, clock=lambda: NOW.at)


def store(warehouse: Warehouse, host: str, rows: list[dict[str, object]]) -> None:
    """GPU rows 5 s apart from 5 s after NOW on."""
    common = {"host": host, "telemetry": "nvml", "source": "live", "gpu_uuid": "GPU-1", "mig_instance": ""}
    given = [common | {"sampled_at": NOW.at + timedelta(seconds=5 + 5 * i)} | row for i, row in enumerate(rows)]
    frame = raw_tables()["raw_gpu_samples"].frame(given)
    warehouse.append(f"{host}-{len(rows)}", {"raw_gpu_samples": frame})


def ask(watch: GpuWatch, times: int) -> dict[str, str]:
    """So many looks, each after the answer to the one before came."""
    faults: dict[str, str] = {}
    for index in range(times):
        moment = replace(NOW, seconds=NOW.seconds + ASK_SECONDS * index)
        faults = watch.faults([CANDIDATE], [STABLE], moment)
        watch.settle()
    return faults


def test_an_xid_on_the_candidates_host_is_told_and_one_elsewhere_is_not(warehouse: Warehouse) -> None:
    calm: list[dict[str, object]] = [{"xid_last": None, "health": "ok"}] * 2
    store(warehouse, "gpu-2", calm)
    store(warehouse, "gpu-1", [*calm, {"xid_last": 79, "health": "lost"}])
    watch = GpuWatch(from_live(warehouse), lambda one: HOSTS.get(one.server))
    assert ask(watch, 2) == {}

    store(warehouse, "gpu-2", [*calm, {"xid_last": 31, "health": "ok"}])

    again = GpuWatch(from_live(warehouse), lambda one: HOSTS.get(one.server))
    assert ask(again, 2) == {"c0": "GPU GPU-1: XID 31: GPU memory page fault"}


def test_a_candidate_on_a_host_that_nobody_names_is_not_judged_by_gpus(warehouse: Warehouse) -> None:
    watch = GpuWatch(from_live(warehouse), lambda _: None)

    assert ask(watch, 2) == {}


def test_a_warehouse_that_cannot_be_asked_is_no_fault_and_forgets_none(warehouse: Warehouse) -> None:
    """A refresh that holds the file for a minute neither trips a guard nor clears one."""
    store(warehouse, "gpu-2", [{"health": "lost"}])
    live, is_held = from_live(warehouse), [False]
    watch = GpuWatch(lambda sql, given: None if is_held[0] else live(sql, given), lambda one: HOSTS.get(one.server))
    assert ask(watch, 2) == {"c0": "GPU GPU-1 is lost"}

    is_held[0] = True

    assert ask(watch, 3) == {"c0": "GPU GPU-1 is lost"}
