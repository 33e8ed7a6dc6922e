"""Findings about GPUs, hosts and whole deployments, and the links between them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.findings.deployment import DeploymentWindow, diagnose_deployment
from optiinfra_pipelines.analysis.findings.diagnosis import diagnose
from optiinfra_pipelines.analysis.findings.gpu import GpuWindow, diagnose_gpu
from optiinfra_pipelines.analysis.findings.host import HostWindow, diagnose_host
from optiinfra_pipelines.analysis.findings.links import link_causes
from optiinfra_pipelines.analysis.findings.window import EngineWindow
from optiinfra_pipelines.domain.findings import Diagnosis, FindingKind, Severity
from optiinfra_pipelines.domain.thresholds import threshold_values
from optiinfra_pipelines.sql.sources import raw_tables
from tests.analysis.findings_recordings import RECORDINGS, frames, pages_of, phase, scraped_at, window_of

VALUES = threshold_values({})
END = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
VLLM = RECORDINGS / "vllm/0.32.0/small_llama_kv8k"
GIB = 2.0**30

GPU: dict[str, Any] = {
    "host": "node-1",
    "gpu_uuid": "GPU-1",
    "mig_instance": "",
    "health_last": "ok",
    "unhealthy_count": 0,
    "recovery_action": "none",
    "sample_count": 12,
    "observed_seconds": 60.0,
    "sm_active_max_ratio": 0.5,
    "gpu_utilization_max_ratio": 1.0,
    "memory_total_bytes": 80 * GIB,
    "memory_used_max_bytes": 72 * GIB,
    "process_count_max": 1,
    "ecc_uncorrected": 0.0,
    "xid": 0.0,
    "xid_last": None,
    "is_row_remap_failed": False,
    "is_row_remap_pending": False,
    "power_throttle_seconds": 0.0,
    "thermal_throttle_seconds": 0.0,
    "hardware_slowdown_seconds": 0.0,
}

EMPTY = {"sm_active_max_ratio": 0.0, "process_count_max": 0, "memory_used_max_bytes": 0.3 * GIB}


def gpu(minutes: int = 60, last: dict[str, Any] | None = None, **every: Any) -> Diagnosis:
    """A GPU over an hour. every: columns of all minutes; last: of the newest one."""
    return diagnose_gpu(gpu_window(minutes, last, **every), VALUES)


def gpu_window(minutes: int = 60, last: dict[str, Any] | None = None, **every: Any) -> GpuWindow:
    rows = [GPU | every | {"minute_at": END - timedelta(minutes=minutes - n)} for n in range(minutes)]
    if rows and last:
        rows[-1] |= last
    schema = {"minute_at": pl.Datetime("us", "UTC"), "xid_last": pl.Int32}
    frame = pl.DataFrame(rows or [GPU | {"minute_at": END}], schema_overrides=schema, infer_schema_length=None)
    return GpuWindow("node-1", "GPU-1", "", END - timedelta(hours=1), END, "live", frame.head(minutes), None)


def told(diagnosis: Diagnosis) -> set[tuple[str, str]]:
    return {(finding.kind.value, finding.cause) for finding in diagnosis.findings}


@pytest.mark.parametrize(
    ("columns", "truth"),
    [
        ({}, set()),
        # Memory nearly full and a duty cycle of 100 % are what a healthy engine that preallocates looks like.
        ({"memory_used_max_bytes": 79 * GIB}, set()),
        (EMPTY, {("IDLE_FREE", "unused")}),
        ({"sm_active_max_ratio": 0.0}, {("IDLE_HELD", "no_activity")}),
        ({"power_throttle_seconds": 30.0}, {("THROTTLED", "power")}),
        ({"thermal_throttle_seconds": 2.0}, {("THROTTLED", "thermal")}),
        ({"hardware_slowdown_seconds": 2.0, "thermal_throttle_seconds": 2.0}, {("THROTTLED", "hardware")}),
    ],
)
def test_an_hour_of_a_gpu_gives_its_finding_and_no_other(columns: dict[str, Any], truth: set[tuple[str, str]]) -> None:
    """Activity, processes and throttling counters decide; memory in use and the duty cycle alone never do."""
    assert told(gpu(**columns)) == truth


@pytest.mark.parametrize(
    ("last", "cause", "severity"),
    [
        ({"health_last": "lost", "unhealthy_count": 12}, "lost", Severity.CRITICAL),
        ({"ecc_uncorrected": 1.0}, "ecc_uncorrected", Severity.CRITICAL),
        ({"xid_last": 79, "xid": 1.0}, "xid_79", Severity.CRITICAL),
        ({"xid_last": 31, "xid": 1.0}, "xid_31", Severity.WARNING),
        ({"xid_last": 9999, "xid": 1.0}, "xid_9999", Severity.WARNING),
        ({"recovery_action": "drain_and_reset"}, "recovery_action", Severity.WARNING),
        ({"is_row_remap_failed": True}, "row_remap_failed", Severity.CRITICAL),
    ],
)
def test_a_fault_is_the_drivers_own_word(last: dict[str, Any], cause: str, severity: Severity) -> None:
    """One bad minute is enough, and a GPU with a fault is not called idle."""
    diagnosis = gpu(last=last, sm_active_max_ratio=0.0)

    assert [(one.cause, one.severity) for one in diagnosis.findings] == [(cause, severity)]
    assert FindingKind.IDLE_HELD not in diagnosis.judged


@pytest.mark.parametrize(("code", "is_fault"), [(31, False), (45, False), (79, True)])
def test_an_old_xid_is_old_news_unless_the_gpu_is_unfit_by_it(code: int, is_fault: bool) -> None:
    """A last XID that was there all along tells of an earlier day; one that makes a GPU unfit still counts."""
    assert bool(gpu(xid_last=code).findings) == is_fault


@pytest.mark.parametrize("minutes", [3, 20])
def test_a_few_quiet_minutes_are_not_idleness(minutes: int) -> None:
    """Idle needs half an hour: less is an abstention that counts the minutes."""
    diagnosis = gpu(minutes=minutes, sm_active_max_ratio=0.0)

    reasons = {one.kind: one.reason for one in diagnosis.abstentions}
    assert told(diagnosis) == set()
    assert reasons[FindingKind.IDLE_HELD] == f"{minutes} of 30 minutes were seen"


def test_a_gpu_that_tells_no_activity_is_not_idle() -> None:
    """NULL activity is unknown: neither idle nor busy."""
    columns = dict.fromkeys(("sm_active_max_ratio", "gpu_utilization_max_ratio"))

    assert told(gpu(**columns)) == set()
    assert FindingKind.IDLE_FREE not in gpu(**columns).judged


def test_a_gpu_without_minutes_is_stale() -> None:
    """No rows are no health."""
    diagnosis = gpu(minutes=0)

    assert told(diagnosis) == {("STALE_OR_MISSING_DATA", "not_sampled")}
    assert diagnosis.judged == {FindingKind.STALE_OR_MISSING_DATA}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(sorted(set(GPU) - {"host", "gpu_uuid", "mig_instance"})), max_size=21))
def test_a_gpu_with_any_columns_unknown_raises_no_finding(hidden: list[str]) -> None:
    """A healthy GPU of which some columns are NULL is judged on the rest, or not at all."""
    assert told(gpu(minutes=40, **dict.fromkeys(hidden))) == set()


SIGNS = {"psi_cpu_some_seconds": 1.0, "cpu_steal_seconds": 0.0, "cgroup_cpu_throttled_seconds": 0.0}


def host(is_serving: bool | None = True, waits: float = 0.0, **columns: float | None) -> Diagnosis:
    """A host over six minutes; waits: share of the time its engine's main thread had no CPU."""
    return diagnose_host(host_window(is_serving, waits, **columns), VALUES)


def host_window(is_serving: bool | None = True, waits: float = 0.0, **columns: float | None) -> HostWindow:
    usual = {"cpu_count": 16} | SIGNS
    times = [END - timedelta(minutes=n) for n in range(6, 0, -1)]
    head = {"host": "node-1", "observed_seconds": 60.0}
    rows = [head | {"sample_count": 12} | usual | columns | {"minute_at": at} for at in times]
    process = head | {"pid": 7, "role": "engine", "run_queue_wait_seconds": 60.0 * waits}
    other = head | {"pid": 8, "role": "engine", "run_queue_wait_seconds": 0.0}
    schema = {"minute_at": pl.Datetime("us", "UTC")} | dict.fromkeys(SIGNS, pl.Float64)
    processes = pl.DataFrame([one | {"minute_at": at} for at in times for one in (process, other)])
    return HostWindow(
        host="node-1",
        start=times[0],
        end=END,
        source="live",
        minutes=pl.DataFrame(rows, schema_overrides=schema),
        processes=processes,
        is_serving=is_serving,
    )


@pytest.mark.parametrize(
    ("columns", "truth"),
    [
        ({}, set()),
        ({"psi_cpu_some_seconds": 30.0}, {("HOST_BOUND", "cpu_pressure")}),
        # 16 CPUs: 5 % of them is 0.8 cores, so half a core taken is nothing and two cores are.
        ({"cpu_steal_seconds": 30.0}, set()),
        ({"cpu_steal_seconds": 120.0}, {("HOST_BOUND", "cpu_steal")}),
        ({"cgroup_cpu_throttled_seconds": 12.0}, {("HOST_BOUND", "cpu_quota")}),
        ({"waits": 0.3}, {("HOST_BOUND", "run_queue_wait")}),
    ],
)
def test_a_serving_host_gives_its_finding_and_no_other(columns: dict[str, float], truth: set[tuple[str, str]]) -> None:
    """Pressure, steal, quota and the engine thread's own waiting each have their cause."""
    assert told(host(**columns)) == truth


def test_a_busy_host_that_serves_nothing_is_nobodys_bottleneck() -> None:
    """A build server under pressure is no finding; a host no target names is not judged at all."""
    assert told(host(is_serving=False, psi_cpu_some_seconds=50.0)) == set()
    assert FindingKind.HOST_BOUND not in host(is_serving=None, psi_cpu_some_seconds=50.0).judged


def test_a_host_without_any_of_the_signs_is_not_called_fine() -> None:
    """No PSI, no steal, no quota, no scheduler statistics: an abstention."""
    window = host_window(**dict.fromkeys(SIGNS))

    diagnosis = diagnose_host(replace(window, processes=window.processes.clear()), VALUES)

    assert told(diagnosis) == set()
    assert FindingKind.HOST_BOUND not in diagnosis.judged


@pytest.mark.parametrize(
    ("table", "window"),
    [
        ("int_gpu_minutes", gpu_window(sm_active_max_ratio=0.01, thermal_throttle_seconds=3.0)),
        ("int_gpu_minutes", gpu_window(last={"xid_last": 79, "xid": 1.0})),
        ("int_host_minutes", host_window(psi_cpu_some_seconds=30.0, cpu_steal_seconds=100.0)),
        ("int_host_process_minutes", host_window(waits=0.4)),
    ],
)
def test_the_evidence_of_hardware_can_be_fetched_again(table: str, window: GpuWindow | HostWindow) -> None:
    """The SQL of each signal gives its value on the stored minutes."""
    if isinstance(window, GpuWindow):
        found, frames_ = diagnose_gpu(window, VALUES), {"int_gpu_minutes": window.minutes}
    else:
        found = diagnose_host(window, VALUES)
        frames_ = {"int_host_minutes": window.minutes, "int_host_process_minutes": window.processes}
    signals = [signal for finding in found.findings for signal in finding.evidence]
    assert table in {signal.table for signal in signals}
    with duckdb.connect() as connection:
        for name, frame in frames_.items():
            connection.register("rows_", frame)
            connection.execute(f"create table {name} as select * from rows_")
        for signal in signals:
            assert connection.execute(signal.sql()).fetchall() == [(pytest.approx(signal.value),)], signal.name


def replicas(*folders: str) -> list[EngineWindow]:
    """One replica for each recorded phase, all at the same time."""
    made = []
    for number, folder in enumerate(folders):
        pages = pages_of(VLLM / folder)
        shift = END - scraped_at(pages[-1], 0)
        timed = [(page, scraped_at(page, 0) + shift) for page in pages]
        made.append(window_of(frames(timed, f"r{number}")))
    return made


def configs(windows: list[EngineWindow], **changed: str) -> pl.DataFrame:
    """The stored settings of every replica; changed: settings of the last one."""
    rows = []
    for number, window in enumerate(windows):
        digest = window.samples["config_hash"][-1]
        settings = {"enable_prefix_caching": "True", "num_gpu_blocks": "256"}
        if number == len(windows) - 1:
            settings |= changed
        entries = [{"key": key, "value": value} for key, value in settings.items()]
        head = {"first_seen_at": END, "target": window.target, "engine_rank": "0", "engine": "vllm"}
        rows.append(head | {"config_hash": digest, "settings": entries})
    return raw_tables()["raw_engine_configs"].frame(rows)


def other_config(window: EngineWindow) -> EngineWindow:
    return replace(window, samples=window.samples.with_columns(pl.lit("other").alias("config_hash")))


def test_one_replica_with_a_queue_beside_an_idle_one_is_imbalance() -> None:
    """48 requests wait at one replica while the other has nothing to do: that is the router's doing."""
    windows = replicas("05_overload_queue_c64_low_kv", "02_light_c1")

    found = diagnose_deployment(DeploymentWindow("chat", END, windows, configs(windows)), VALUES)

    assert told(found) == {("IMBALANCE", "uneven_load")}
    assert len(found.findings[0].evidence) == 4


@pytest.mark.parametrize("folder", ["05_overload_queue_c64_low_kv", "02_light_c1"])
def test_replicas_under_the_same_load_are_balanced(folder: str) -> None:
    """Two overloaded replicas are too few, not unevenly used; two light ones are fine."""
    windows = replicas(folder, folder)

    assert told(diagnose_deployment(DeploymentWindow("chat", END, windows, configs(windows)), VALUES)) == set()


def test_settings_that_an_operator_chose_drift_and_sizes_an_engine_derived_do_not() -> None:
    """Another number of blocks comes from another memory; prefix caching off is a different server."""
    first, second = replicas("02_light_c1", "02_light_c1")
    windows = [first, other_config(second)]

    derived = diagnose_deployment(DeploymentWindow("c", END, windows, configs(windows, num_gpu_blocks="300")), VALUES)
    chosen = configs(windows, enable_prefix_caching="False")
    drifted = diagnose_deployment(DeploymentWindow("c", END, windows, chosen), VALUES)

    assert told(derived) == set()
    assert told(drifted) == {("CONFIG_DRIFT", "settings_differ")}
    assert "enable_prefix_caching" in drifted.findings[0].summary


def test_different_hashes_without_their_settings_are_not_judged() -> None:
    """Who cannot see what differs cannot tell drift from another memory size."""
    first, second = replicas("02_light_c1", "02_light_c1")
    windows = [first, other_config(second)]

    found = diagnose_deployment(DeploymentWindow("c", END, windows, configs(windows).head(1)), VALUES)

    assert FindingKind.CONFIG_DRIFT not in found.judged


def test_one_replica_is_compared_with_nobody() -> None:
    """A deployment of one has neither balance nor drift."""
    [window] = replicas("05_overload_queue_c64_low_kv")

    assert diagnose_deployment(DeploymentWindow("c", END, [window], configs([window])), VALUES).judged == frozenset()


def test_a_frontends_queue_follows_from_the_trouble_of_its_engine() -> None:
    """The frontend's finding names the engine's; the engine's names the host's that holds it back."""
    dynamo = RECORDINGS / "dynamo/1.6.1/frontend_kv_router_mocker"
    [queue] = diagnose(replace(phase(dynamo / "04_overload_c64"), target="front"), VALUES).findings
    [memory] = diagnose(replace(phase(dynamo / "worker"), target="worker"), VALUES).findings
    standing = [one.model_copy(update={"until": None}) for one in (queue, memory)]

    linked = link_causes(
        standing,
        host_of={"worker": "node-1"},
        deployment_of={"front": "mock", "worker": "mock"},
        frontends=frozenset({"front"}),
    )

    assert [one.caused_by for one in linked] == [memory.id, None]


def test_a_queue_on_a_host_without_cpu_follows_from_it() -> None:
    """HOST_BOUND on its host is the cause of an engine's queue."""
    [bound] = host(waits=0.3).findings
    [queue] = diagnose(phase(VLLM / "05_overload_queue_c64_low_kv"), VALUES).findings

    linked = link_causes([bound, queue], host_of={"t": "node-1"}, deployment_of={}, frontends=frozenset())

    assert [one.caused_by for one in linked] == [None, bound.id]
