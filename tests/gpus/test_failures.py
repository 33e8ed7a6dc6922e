"""GPU collection when something fails: a value, a GPU, a permission, the driver. The rest stays whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpus.fake_nvml.harness import GIB, H100, L4, ROOT, Driver, build, gpu

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the fake NVIDIA driver")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A whole driver."""
    folder = tmp_path_factory.mktemp("driver")
    with Driver(build(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def old_driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A driver of 2022: none of what came since."""
    folder = tmp_path_factory.mktemp("old_driver")
    missing = (
        "nvmlDeviceGetTemperatureV",
        "nvmlDeviceGetMarginTemperature",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlDeviceGetGraphicsRunningProcesses_v3",
        "nvmlDeviceGetMPSComputeRunningProcesses_v3",
        "nvmlDeviceGetProcessesUtilizationInfo",
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlGpmQueryDeviceSupport",
        "nvmlGpmSampleAlloc",
    )
    with Driver(build(folder, without=missing)) as running:
        yield running


def test_what_a_chip_lacks_is_asked_once(driver: Driver) -> None:
    """NOT_SUPPORTED is remembered; what a chip tells is asked once per tick."""
    counted = ["nvmlDeviceGetFanSpeed", "nvmlDeviceGetPowerUsage", "nvmlGpmSampleGet", "nvmlDeviceGetMarginTemperature"]
    run = driver.run(gpu(0, L4), *range(0, 50, 5), counted=counted)

    assert run.ticks[-1].calls == {
        "nvmlDeviceGetFanSpeed": 1,
        "nvmlDeviceGetPowerUsage": 10,
        "nvmlGpmSampleGet": 0,
        "nvmlDeviceGetMarginTemperature": 1,
    }


@pytest.mark.parametrize(("code", "health"), [(15, "lost"), (16, "reset_required")])
def test_a_lost_gpu_is_a_row_and_the_others_are_whole(driver: Driver, code: int, health: str) -> None:
    """GPU 1 answers no more from second 12: its row keeps who it is, drops what it measured; GPU 0 does not notice."""
    script = gpu(0, H100) + gpu(1, H100) + gpu(2, L4) + f"at 12 fail 1 * {code}\n"
    run = driver.run(script, 0, 5, 10, 15, 20)

    lost = run.ticks[3].gpu("GPU-1")
    assert {name for name, value in lost.items() if value is not None} - {"xid_total"} == {
        "sampled_at",
        "host",
        "telemetry",
        "source",
        "gpu_uuid",
        "mig_instance",
        "gpu_index",
        "pci_bus_id",
        "name",
        "driver_version",
        "health",
    }
    assert lost["health"] == health
    for tick in run.ticks[2:]:
        assert tick.gpu()["sm_active_ratio"] == pytest.approx(0.38)
        assert tick.gpu()["utilization_sample_count"] == 30
        assert tick.gpu("GPU-2")["health"] == "ok"
        assert (tick.collection["status"], tick.collection["gpu_count"]) == ("ok", 3)
    assert run.leaked_gpm_samples == 0


def test_a_gpu_lost_before_it_gave_its_name_is_a_row_too(driver: Driver) -> None:
    """No handle, no UUID: the row says so under a name that is nobody's UUID."""
    run = driver.run(gpu(0, H100) + gpu(1, L4) + "fail 0 * 15\n", 0, 5)

    assert [(row["gpu_uuid"], row["health"]) for row in run.ticks[1].samples] == [
        ("GPU-1", "ok"),
        ("unknown-0", "lost"),
    ]


def test_a_lost_gpu_that_comes_back_is_read_again(driver: Driver) -> None:
    """After a reset the same UUID answers, and its facts are read at once."""
    run = driver.run(gpu(0, H100) + "at 8 fail 0 * 15\nat 18 fail 0 * 0\n", 0, 5, 10, 15, 20)

    assert [tick.gpu()["health"] for tick in run.ticks] == ["ok", "ok", "lost", "lost", "ok"]
    assert run.ticks[4].gpu()["power_watts"] == 520.0


def test_permission_denied_is_no_zero(driver: Driver) -> None:
    """Who may not list processes does not know how many there are; the rest of the row is whole."""
    run = driver.run(gpu(0, H100) + "fail 0 nvmlDeviceGetComputeRunningProcesses_v3 4\n", 0, 5)

    assert run.ticks[1].gpu()["process_count"] is None
    assert run.ticks[1].gpu()["power_watts"] == 520.0
    assert run.ticks[1].processes == []
    assert any("not permitted: compute_processes" in line for line in run.described)
    assert run.ticks[1].collection["error_count"] == 0


def test_a_gpu_one_may_not_open_says_so(driver: Driver) -> None:
    """A container that was given one GPU of two sees the other refuse."""
    run = driver.run(gpu(0, H100) + gpu(1, L4) + "fail 1 nvmlDeviceGetHandleByIndex_v2 4\n", 0, 5)

    assert [(row["gpu_uuid"], row["health"]) for row in run.ticks[1].samples] == [
        ("GPU-0", "ok"),
        ("unknown-1", "no_permission"),
    ]


def test_a_gpu_that_leaves_mig_mode_tells_its_utilization_again(driver: Driver) -> None:
    """What a chip cannot tell is remembered for the mode it was in."""
    cut = gpu(0, H100, mig=1) + gpu("0/2", {}, name="x MIG 1g.10gb", memory_total=GIB)
    refused = "".join(f"fail 0 {call} 3\n" for call in ("nvmlDeviceGetSamples", "nvmlDeviceGetUtilizationRates"))
    restored = refused.replace("fail", "at 30 fail").replace(" 3\n", " 0\n")
    run = driver.run(cut + refused + restored + "at 30 gpu 0 mig 0\n", 0, 5, 60, 65)

    assert [tick.gpu()["gpu_utilization_ratio"] for tick in run.ticks[:2]] == [None, None]
    assert run.ticks[3].gpu()["gpu_utilization_ratio"] == 0.97
    assert len(run.ticks[3].samples) == 1


@pytest.mark.parametrize(
    ("garbage", "columns"),
    [
        ({"memory_used": 90 * GIB}, ("memory_used_bytes", "memory_total_bytes")),
        ({"power_mw": 0}, ("power_watts",)),
        ({"temperature": 0}, ("temperature_celsius", "slowdown_temperature_celsius")),
        ({"util": 4294967295}, ("gpu_utilization_ratio",)),
        ({"gpm_sm": 12345}, ("sm_active_ratio",)),
        ({"fan": 100000}, ("fan_speed_ratio",)),
        ({"pstate": 32}, ("performance_state",)),  # NVML_PSTATE_UNKNOWN
    ],
)
def test_an_impossible_value_is_unknown_and_counted(
    driver: Driver, garbage: dict[str, int], columns: tuple[str, ...]
) -> None:
    """More memory used than there is, 0 W, 0 degrees: no number is better than a wrong one; the tick counts them."""
    run = driver.run(gpu(0, H100, **garbage), 0, 5)

    row = run.ticks[1].gpu()
    assert [row[column] for column in columns] == [None] * len(columns)
    assert row["sm_clock_mhz"] == 1965.0
    assert run.ticks[1].collection["error_count"] >= 1


def test_an_unexpected_code_fails_one_value_only(driver: Driver) -> None:
    """UNKNOWN (999) is counted in the tick it came in and asked again in the next."""
    run = driver.run(gpu(0, H100) + "at 4 fail 0 nvmlDeviceGetPowerUsage 999\n", 0, 5)

    assert run.ticks[1].gpu()["power_watts"] is None
    assert run.ticks[1].gpu()["energy_joules_total"] == 2600.0
    assert run.ticks[1].collection["error_count"] == 1
    assert any("power_watts: unknown, 1 times" in line for line in run.described)


def test_a_link_that_is_down_leaves_no_false_reset(driver: Driver) -> None:
    """Seventeen of eighteen links are no sum: NULL, until the links are looked for again."""
    run = driver.run(gpu(0, H100) + "at 7 gpu 0 nvlink_down 3\n", 0, 5, 10, 60, 65)

    totals = [tick.gpu()["nvlink_tx_bytes_total"] for tick in run.ticks]
    assert totals[1] == 18 * 5 * 1000 * 1024.0
    assert totals[2] is None
    assert totals[4] == 17 * 65 * 1000 * 1024.0


def test_zero_gpus_is_ok_and_empty(driver: Driver) -> None:
    """A driver without a card: status ok, count 0, frames with all their columns and no row."""
    run = driver.run("driver 590.48.01\n", 0, 5)

    assert run.ticks[1].samples == []
    assert (run.ticks[1].collection["status"], run.ticks[1].collection["gpu_count"]) == ("ok", 0)


@pytest.mark.parametrize(
    ("code", "status"),
    [(9, "driver_not_loaded"), (18, "version_mismatch"), (4, "no_permission"), (999, "error")],
)
def test_a_driver_that_does_not_start_is_a_state(driver: Driver, code: int, status: str) -> None:
    """One row per tick that says why, no GPU row, one line in the log, and ever rarer probes."""
    run = driver.run(f"fail * nvmlInit {code}\n", *range(0, 600, 5), counted=["nvmlInitWithFlags"])

    assert {tick.collection["status"] for tick in run.ticks} == {status}
    assert {tick.collection["gpu_count"] for tick in run.ticks} == {None}
    assert all(tick.collection["detail"] for tick in run.ticks)
    assert [line["event"] for line in run.logged] == ["gpu collection"]
    assert run.described[0].startswith(f"GPUs: {status}")


def test_a_driver_that_appears_is_found_within_a_minute(driver: Driver) -> None:
    """Probes come after 5, 10, 20, 40 and then every 60 s; one that succeeds ends the wait and is logged."""
    seconds = tuple(range(0, 400, 5))
    appears_at = 250
    run = driver.run("fail * nvmlInit 9\n", *seconds, rewritten={appears_at // 5: gpu(0, H100)})

    states = [tick.collection["status"] for tick in run.ticks]
    found_at = seconds[states.index("ok")]
    assert appears_at <= found_at <= appears_at + 60
    assert states[states.index("ok") :].count("ok") == len(states) - states.index("ok")
    assert [line["status"] for line in run.logged] == ["driver_not_loaded", "ok"]


def test_a_driver_upgraded_under_us_is_a_state_with_its_remedy(driver: Driver) -> None:
    """RM_VERSION_MISMATCH in the middle of a run: the tick says so and what to do."""
    run = driver.run(gpu(0, H100) + "at 8 fail * * 18\n", 0, 5, 10, 15)

    assert [tick.collection["status"] for tick in run.ticks[:3]] == ["ok", "ok", "version_mismatch"]
    assert "restart" in run.ticks[2].collection["detail"]
    assert run.ticks[2].samples == []


def test_an_uninitialized_library_is_initialized_once_more(driver: Driver) -> None:
    """UNINITIALIZED in the middle of a run costs no tick: NVML is opened again and asked again, and then no more."""
    broken = gpu(0, H100) + "at 8 fail 0 nvmlDeviceGetPowerUsage 1\n"
    run = driver.run(broken, 0, 5, 10, rewritten={2: gpu(0, H100)})
    assert [tick.collection["status"] for tick in run.ticks] == ["ok"] * 3
    assert run.ticks[2].gpu()["power_watts"] == 520.0

    run = driver.run(gpu(0, H100) + "fail 0 nvmlDeviceGetPowerUsage 1\n", 0, 5)
    assert run.ticks[1].collection["status"] == "error"
    assert run.ticks[1].samples == []


def test_no_driver_is_calm(tmp_path: Path) -> None:
    """No library on the host: a row, a remedy, one line in the log, and nothing that costs."""
    with Driver(tmp_path, has_library=False) as bare:
        run = bare.run("", *range(0, 300, 5))

    assert {tick.collection["status"] for tick in run.ticks} == {"no_driver"}
    assert len(run.logged) == 1
    assert "libnvidia-ml.so.1" in run.described[0]
    assert all(tick.samples == [] and tick.processes == [] for tick in run.ticks)


def test_a_forked_child_opens_the_driver_for_itself(tmp_path: Path) -> None:
    """NVML is not to be used across a fork: the child begins anew, and its parent's handles stay as they were."""
    (tmp_path / "scenario").write_text(gpu(0, H100), encoding="ascii")
    program = """
import os, sys
from datetime import UTC, datetime
import pynvml
from resources.nvml.gpus import GpuCollector

def opened():
    return pynvml.nvmlLib.fake_nvml_calls(b"nvmlInitWithFlags")

collector = GpuCollector("here")
collector.collect(datetime.now(UTC))
before = opened()
child = os.fork()
frames = collector.collect(datetime.now(UTC))
ok = frames["raw_gpu_samples"]["health"].to_list() == ["ok"] and opened() == before + (child == 0)
if child == 0:
    os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
sys.exit(0 if ok and status == 0 else 1)
"""
    environment = {
        **os.environ,
        "FAKE_NVML_SCENARIO": str(tmp_path / "scenario"),
        "LD_LIBRARY_PATH": str(build(tmp_path)),
        "PYTHONPATH": str(ROOT),
        # polars' threads do not survive a fork; one thread has none to lose
        "POLARS_MAX_THREADS": "1",
    }
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


def test_an_old_driver_answers_through_its_older_calls(old_driver: Driver) -> None:
    """No TemperatureV, no v3 process lists, no GPM: the older calls give the same columns, and nothing raises."""
    script = "driver 515.65.01\n" + gpu(0, H100) + "process 0 4194303 C 1000 25\n"
    run = old_driver.run(script, 0, 5, counted=["nvmlDeviceGetTemperature"])

    row = run.ticks[1].gpu()
    assert row["temperature_celsius"] == 41.0
    assert row["clock_event_reasons"] == 4
    assert row["process_count"] == 1
    assert row["sm_active_ratio"] is None
    assert row["temperature_margin_celsius"] is None
    assert run.ticks[1].processes[0]["sm_utilization_ratio"] == 0.25
    assert run.ticks[1].collection["error_count"] == 0
    assert run.ticks[1].calls == {"nvmlDeviceGetTemperature": 2}
