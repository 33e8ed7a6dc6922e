"""GPU collection against a fake NVIDIA driver: what was scripted is what is stored."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from optiinfra_pipelines.sql.sources import raw_tables
from tests.gpus.fake_nvml.harness import GIB, H100, L4, Driver, build, gpu

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the fake NVIDIA driver")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A whole driver."""
    folder = tmp_path_factory.mktemp("driver")
    with Driver(build(folder)) as running:
        yield running


def test_a_whole_gpu_is_read_as_scripted(driver: Driver, tmp_path: Path) -> None:
    """Every column of an H100, five seconds after the first look, in the units of sources.yml."""
    numa = tmp_path / "bus/pci/devices/0000:10:00.0"
    numa.mkdir(parents=True)
    (numa / "numa_node").write_text("1\n", encoding="ascii")
    run = driver.run(gpu(0, H100), 0, 5, source="simulated", sysfs=str(tmp_path))

    row = run.ticks[1].gpu()
    assert set(row) == set(raw_tables()["raw_gpu_samples"].columns)
    told = {name: value for name, value in row.items() if value is not None and name != "sampled_at"}
    assert told == pytest.approx(
        {
            "host": "host-1",
            "telemetry": "nvml",
            "source": "simulated",
            "gpu_uuid": "GPU-0",
            "mig_instance": "",
            "gpu_index": 0,
            "pci_bus_id": "00000000:10:00.0",
            "numa_node": 1,
            "name": "NVIDIA H100 80GB HBM3",
            "driver_version": "590.48.01",
            "health": "ok",
            "recovery_action": "none",
            "gpu_utilization_ratio": 0.97,
            "gpu_utilization_max_ratio": 0.97,
            "memory_bandwidth_utilization_ratio": 0.41,
            "encoder_utilization_ratio": 0.0,
            "decoder_utilization_ratio": 0.0,
            "utilization_sample_count": 30,
            "graphics_active_ratio": 0.97,
            "sm_active_ratio": 0.38,
            "sm_occupancy_ratio": 0.11,
            "tensor_active_ratio": 0.09,
            "dram_active_ratio": 0.52,
            "memory_total_bytes": 85_520_809_984.0,
            "memory_used_bytes": 70_000_000_000.0,
            "memory_free_bytes": 85_520_809_984.0 - 70_000_000_000 - 502_267_904,
            "memory_reserved_bytes": 502_267_904.0,
            "temperature_celsius": 41.0,
            "memory_temperature_celsius": 48.0,
            "temperature_margin_celsius": 46.0,
            "slowdown_temperature_celsius": 89.0,
            "shutdown_temperature_celsius": 95.0,
            "power_watts": 520.0,
            "power_limit_watts": 700.0,
            "power_default_limit_watts": 700.0,
            "energy_joules_total": 5 * 520.0,
            "sm_clock_mhz": 1965.0,
            "sm_clock_max_mhz": 1980.0,
            "memory_clock_mhz": 2619.0,
            "graphics_clock_mhz": 1980.0,
            "performance_state": 0,
            "clock_event_reasons": 4,
            "power_throttle_seconds_total": 5 * 0.1,
            "thermal_throttle_seconds_total": 5 * (0.02 + 0.03),
            "hardware_slowdown_seconds_total": 5 * (0.03 + 0.05),
            "ecc_corrected_total": 3.0,
            "ecc_uncorrected_total": 0.0,
            "remapped_rows_corrected": 1.0,
            "remapped_rows_uncorrected": 0.0,
            "is_row_remap_pending": True,
            "is_row_remap_failed": False,
            "xid_total": 0.0,
            "pcie_replay_total": 9.0,
            "pcie_tx_bytes_total": 5 * 120_000_000.0,
            "pcie_rx_bytes_total": 5 * 340_000_000.0,
            "pcie_link_generation": 5,
            "pcie_link_width": 16,
            "pcie_link_generation_max": 5,
            "pcie_link_width_max": 16,
            "nvlink_tx_bytes_total": 18 * 5 * 1000 * 1024.0,
            "nvlink_rx_bytes_total": 18 * 5 * 900 * 1024.0,
            "nvlink_errors_total": 18 * 3.0,
            "process_count": 0,
        }
    )
    collection = run.ticks[1].collection
    assert (collection["status"], collection["detail"], collection["gpu_count"]) == ("ok", None, 1)
    assert collection["error_count"] == 0
    assert run.leaked_gpm_samples == 0


def test_a_poll_misses_what_the_ring_holds(driver: Driver) -> None:
    """Load fell one second before the tick: the poll says 5 %, the mean of the last ten seconds 87.8 %."""
    run = driver.run(gpu(0, H100) + "at 30 gpu 0 util 5\nat 30 gpu 0 power_mw 120000\n", 0, 21, 31)

    before, after = run.ticks[1].gpu(), run.ticks[2].gpu()
    ring = [0.97] * 54 + [0.05] * 6
    assert after["gpu_utilization_ratio"] == pytest.approx(sum(ring) / 60, abs=0.02)
    assert after["gpu_utilization_max_ratio"] == 0.97
    assert after["utilization_sample_count"] in (59, 60)
    mean_watts = (after["energy_joules_total"] - before["energy_joules_total"]) / 10
    assert mean_watts == pytest.approx(480.0, abs=0.1)
    assert after["power_watts"] == 120.0


def test_every_ring_sample_is_counted_once(driver: Driver) -> None:
    """Uneven ticks share the ring among them: no sample twice, none left out."""
    seconds = (5, 10.3, 12, 19.9, 25, 25.05, 30)
    run = driver.run(gpu(0, H100), 0, *seconds)

    counts = [tick.gpu()["utilization_sample_count"] or 0 for tick in run.ticks[1:]]
    # The ring ticks at multiples of 166,667 us of the fake's clock.
    first, last = 1_800_000_000_000_000 // 166_667, 1_800_000_030_000_000 // 166_667
    assert sum(counts) == last - first


@pytest.mark.parametrize("quirk", ["", "gpu 0 ring_behind_us 1700000000000000\n"])
def test_the_clock_of_the_ring_is_its_own(driver: Driver, quirk: str) -> None:
    """Samples that are stamped with microseconds since boot are as new as those stamped since 1970."""
    run = driver.run(gpu(0, H100) + quirk, 0, 5, 10)

    assert [tick.gpu()["utilization_sample_count"] for tick in run.ticks] == [None, 30, 30]


def test_a_ring_whose_clock_was_set_back_goes_on(driver: Driver) -> None:
    """An hour back: the next tick polls, the one after it reads the ring again."""
    run = driver.run(gpu(0, H100) + "at 12 gpu 0 ring_behind_us 3600000000\n", 0, 5, 10, 15, 20, 25)

    counts = [tick.gpu()["utilization_sample_count"] for tick in run.ticks]
    assert counts[:3] == [None, 30, 30]
    assert counts[-1] == 30
    assert all(tick.gpu()["gpu_utilization_ratio"] == 0.97 for tick in run.ticks)


def test_a_dry_ring_falls_back_to_a_poll(driver: Driver) -> None:
    """An idle GPU's ring answers NOT_FOUND: the poll's 0 % is a fact, and no sample count claims a mean."""
    script = gpu(0, H100, util=0, memory_util=0, ring_dry_when_idle=1) + "at 12 gpu 0 util 80\n"
    run = driver.run(script, 0, 5, 10, 15)

    idle, busy = run.ticks[2].gpu(), run.ticks[3].gpu()
    assert (idle["gpu_utilization_ratio"], idle["utilization_sample_count"]) == (0.0, None)
    assert idle["gpu_utilization_max_ratio"] is None
    assert busy["gpu_utilization_max_ratio"] == 0.8
    assert run.ticks[2].collection["error_count"] == 0


def test_gpm_averages_cover_the_whole_interval(driver: Driver) -> None:
    """The last tick's sample is kept: a burst of two seconds is two fifths of the mean over five."""
    script = gpu(0, H100, gpm_tensor=0) + "at 6 gpu 0 gpm_tensor 50\nat 8 gpu 0 gpm_tensor 0\n"
    run = driver.run(script, 0, 5, 5.05, 10)

    assert run.ticks[0].gpu()["tensor_active_ratio"] is None
    assert run.ticks[1].gpu()["tensor_active_ratio"] == 0.0
    assert run.ticks[2].gpu()["tensor_active_ratio"] is None, "two samples must be 100 ms apart"
    assert run.ticks[3].gpu()["tensor_active_ratio"] == pytest.approx(0.5 * 2 / 5)


def test_a_plain_card_is_whole_without_what_it_lacks(driver: Driver) -> None:
    """An L4 has no GPM, NVLink, MIG, fan or HBM sensor: NULL, and its absolute thresholds are taken as they are."""
    run = driver.run(gpu(0, L4), 0, 5)

    row = run.ticks[1].gpu()
    for column in ("sm_active_ratio", "fan_speed_ratio", "nvlink_tx_bytes_total", "memory_temperature_celsius"):
        assert row[column] is None
    assert (row["slowdown_temperature_celsius"], row["shutdown_temperature_celsius"]) == (95.0, 98.0)
    assert row["temperature_margin_celsius"] is None
    assert row["power_throttle_seconds_total"] is None, "unknown is not zero"
    assert run.ticks[1].collection["error_count"] == 0
    assert any("gpm" in line and "not told" in line for line in run.described)


def test_no_metric_costs_two_calls_and_none_that_blocks(driver: Driver) -> None:
    """A tick asks each call once per GPU; the ring and clocks once per kind; nvmlDeviceGetPcieThroughput never."""
    counted = {
        "nvmlDeviceGetSamples": 2,
        "nvmlDeviceGetClockInfo": 3,
        "nvmlDeviceGetFieldValues": 2,  # fields of the GPU, counters of its links
        "nvmlDeviceGetMemoryInfo_v2": 1,
        "nvmlDeviceGetTemperatureV": 1,
        "nvmlDeviceGetUtilizationRates": 0,
        "nvmlDeviceGetTotalEnergyConsumption": 1,
        "nvmlGpmSampleGet": 1,
        "nvmlGpmMetricsGet": 1,
        "nvmlGpmSampleAlloc": 0,
        "nvmlDeviceGetName": 0,
        "nvmlDeviceGetMaxClockInfo": 0,
        "nvmlDeviceGetPcieThroughput": 0,
        "nvmlInitWithFlags": 0,
    }
    run = driver.run(gpu(0, H100), 0, 5, 10, counted=list(counted))

    (_, before, after) = run.ticks
    assert {name: after.calls[name] - before.calls[name] for name in counted} == counted


def test_facts_that_change_seldom_are_read_once_a_minute(driver: Driver) -> None:
    """An ECC error of second 20 is in the row of second 60, not before; the row in between repeats what was known."""
    run = driver.run(gpu(0, H100) + "at 20 gpu 0 ecc_uncorrected 1\n", 0, 25, 55, 60)

    assert [tick.gpu()["ecc_uncorrected_total"] for tick in run.ticks] == [0.0, 0.0, 0.0, 1.0]


def test_an_xid_is_counted_and_brings_the_facts_at_once(driver: Driver) -> None:
    """XID 94 and 63 within one tick: both counted, the last one kept, and ECC is read without waiting a minute."""
    script = gpu(0, H100) + gpu(1, H100) + "at 6 gpu 0 ecc_uncorrected 1\nat 6 xid 0 94\nat 7 xid 0 63\n"
    run = driver.run(script, 0, 5, 10, 15)

    assert [(tick.gpu()["xid_last"], tick.gpu()["xid_total"]) for tick in run.ticks] == [
        (None, 0.0),
        (None, 0.0),
        (63, 2.0),
        (63, 2.0),
    ]
    assert run.ticks[2].gpu()["ecc_uncorrected_total"] == 1.0
    assert run.ticks[3].gpu("GPU-1")["xid_last"] is None


def test_a_compute_process_is_seen_at_once_and_a_graphics_process_within_a_minute(driver: Driver) -> None:
    """Lists that were empty are asked for with the slow facts: inference hardly ever stands in them."""
    script = gpu(0, H100) + "at 3 process 0 4194303 G 1000 0\nat 3 process 0 4194302 C 1000 0\n"
    run = driver.run(script, 0, 5, 65, 70)

    assert [[row["pid"] for row in tick.processes] for tick in run.ticks] == [
        [], [4194302], [4194303, 4194302], [4194303, 4194302]
    ]  # fmt: skip


def test_processes_are_listed_with_what_the_driver_tells(driver: Driver) -> None:
    """A live pid has its name, a pid of another namespace none; memory 'not available' is NULL; an idle one did 0 %."""
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        script = gpu(0, H100) + (
            f"process 0 {sleeper.pid} C 69800000000 96\n"
            "process 0 4194303 C na 0\n"
            f"process 0 {sleeper.pid} G 69800000000 96\n"
            "process 0 4194302 M 1000 0\n"
            "process 0 0 C 5 0\n"
            "process 0 77 C 99999999999999 0\n"
        )
        run = driver.run(script, 0, 5)
        sleeper.kill()

    by_pid = {row["pid"]: row for row in run.ticks[1].processes}
    told = {
        pid: (row["kind"], row["name"], row["used_memory_bytes"], row["sm_utilization_ratio"])
        for pid, row in by_pid.items()
    }
    assert told == {
        sleeper.pid: ("compute", "sleep", 69_800_000_000.0, 0.96),
        4194303: ("compute", None, None, 0.0),
        4194302: ("mps", None, 1000.0, 0.0),
    }
    assert len(run.ticks[1].processes) == 3, "one row per pid and GPU"
    assert run.ticks[1].gpu()["process_count"] == 3
    assert run.ticks[1].collection["error_count"] == 2, "pid 0 and more memory than the card has are garbage"


def test_nobody_active_is_zero_however_the_driver_says_it(driver: Driver) -> None:
    """NOT_FOUND and a success without entries both mean that no process computed."""
    idle = gpu(0, H100) + "process 0 4194303 C 1000 0\n"
    for script in (idle, idle + "gpu 0 process_util_empty_success 1\n"):
        run = driver.run(script, 0, 5)

        assert run.ticks[1].processes[0]["sm_utilization_ratio"] == 0.0
        assert run.ticks[1].collection["error_count"] == 0


def test_mig_instances_have_rows_of_their_own(driver: Driver) -> None:
    """Memory, activity and processes by instance; heat and power in the row of the GPU; its duty cycle is NULL."""
    whole = gpu(0, H100, mig=1, util=None, memory_util=None, encoder=None, decoder=None, nvlink_count=None)
    slices = (
        gpu("0/2", {}, name="NVIDIA H100 80GB HBM3 MIG 3g.40gb", memory_total=40 * GIB, memory_used=11 * GIB, gpm_sm=80)
        + gpu("0/9", {}, name="NVIDIA H100 80GB HBM3 MIG 1c.1g.10gb", memory_total=10 * GIB, memory_used=GIB, gpm_sm=0)
        + "process 0 4194303 C 2147483648 0 mig=2\nprocess 0 4194302 C na 0 mig=2\n"
        + "fail 0 nvmlDeviceGetProcessesUtilizationInfo 3\nfail 0 nvmlDeviceGetProcessUtilization 3\n"
    )
    run = driver.run(whole + slices, 0, 5)

    tick = run.ticks[1]
    assert [(row["mig_instance"], row["mig_profile"]) for row in tick.samples] == [
        ("", None),
        ("2", "3g.40gb"),
        ("9", "1g.10gb"),
    ]
    assert {row["gpu_uuid"] for row in tick.samples} == {"GPU-0"}
    busy, idle = tick.gpu(instance="2"), tick.gpu(instance="9")
    assert (busy["memory_used_bytes"], busy["sm_active_ratio"], busy["process_count"]) == (11 * GIB, 0.8, 2)
    assert (idle["memory_total_bytes"], idle["sm_active_ratio"], idle["process_count"]) == (10 * GIB, 0.0, 0)
    assert busy["power_watts"] is None
    assert tick.gpu()["power_watts"] == 520.0
    assert tick.gpu()["gpu_utilization_ratio"] is None
    assert tick.gpu()["process_count"] == 2
    assert [row["sm_utilization_ratio"] for row in tick.processes] == [None, None]
    assert run.leaked_gpm_samples == 0


def test_rates_fill_in_where_there_is_no_counter(driver: Driver) -> None:
    """Without byte counters GPM's MiB/s are kept, NVLink both ways together; with counters they are not."""
    run = driver.run(gpu(0, H100, pcie_tx_bytes=None, nvlink_count=None), 0, 5)

    row = run.ticks[1].gpu()
    assert row["pcie_tx_bytes_per_second"] == 114 * 1024**2
    assert row["pcie_rx_bytes_per_second"] is None
    assert row["nvlink_bytes_per_second"] == (17 + 15) * 1024**2


def test_nvlink_5_counts_in_bytes(driver: Driver) -> None:
    """Blackwell's links have other ids: bytes, not KiB."""
    card = {**H100, "nvlink_xmit_bytes": 7, "nvlink_rcv_bytes": 5}
    run = driver.run(gpu(0, card, nvlink_tx_kib=None, nvlink_rx_kib=None), 0, 5)

    row = run.ticks[1].gpu()
    assert (row["nvlink_tx_bytes_total"], row["nvlink_rx_bytes_total"]) == (18 * 35.0, 18 * 25.0)


def test_throttle_ids_follow_the_driver(driver: Driver) -> None:
    """The ids of heat and power brake moved from 251-253 to 269-271 with 580.82, and before 575 there were none."""
    card = gpu(
        0, H100, throttle_sw_thermal_old=0.4, throttle_hw_thermal_old=0.2, throttle_brake_old=0.1, throttle_thermal=0.7
    )
    told = {}
    for version in ("580.82.07", "580.65.06", "535.183.01"):
        row = driver.run(f"driver {version}\n" + card, 0, 10).ticks[1].gpu()
        told[version] = (row["thermal_throttle_seconds_total"], row["hardware_slowdown_seconds_total"])
    assert told["580.82.07"] == pytest.approx((0.5, 0.8))
    assert told["580.65.06"] == pytest.approx((6.0, 3.0))
    assert told["535.183.01"] == (pytest.approx(7.0), None)


def test_heat_is_the_older_counter_where_the_newer_ones_are_missing(driver: Driver) -> None:
    """A chip that counts all heat as one still tells how long it was held down by it."""
    card = gpu(0, H100, throttle_sw_thermal=None, throttle_hw_thermal=None, throttle_thermal=0.25)
    row = driver.run(card, 0, 10).ticks[1].gpu()

    assert row["thermal_throttle_seconds_total"] == pytest.approx(2.5)
    assert row["hardware_slowdown_seconds_total"] is None
