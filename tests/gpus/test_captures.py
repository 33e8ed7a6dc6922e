"""What nvidia-smi printed on real GPUs, put behind the fake driver, comes out as the same facts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest

from tests.gpus.fake_nvml.captures import MIB, capture, detail, number, queried, section
from tests.gpus.fake_nvml.harness import Driver, build, gpu

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the fake NVIDIA driver")

H100 = "linux-x86_64__nvidia-h100-80gb-hbm3__590.48.01.txt"
H200 = "linux-x86_64__nvidia-h200__590.48.01.txt"
L40S = "linux-x86_64__nvidia-l40s__595.80.txt"
H100_MIG = "linux-x86_64__nvidia-h100-mig__590.48.01.txt"

# Field of nvidia-smi -> (key of a script, factor to NVML's unit).
FIELDS = {
    "utilization.gpu": ("util", 1),
    "utilization.memory": ("memory_util", 1),
    "utilization.encoder": ("encoder", 1),
    "utilization.decoder": ("decoder", 1),
    "memory.total": ("memory_total", MIB),
    "memory.used": ("memory_used", MIB),
    "memory.reserved": ("memory_reserved", MIB),
    "memory.free": ("memory_free", MIB),
    "temperature.gpu": ("temperature", 1),
    "temperature.gpu.tlimit": ("margin", 1),
    "temperature.memory": ("memory_temperature", 1),
    "power.draw.average": ("power_mw", 1000),
    "enforced.power.limit": ("power_limit_mw", 1000),
    "power.default_limit": ("power_default_mw", 1000),
    "clocks.current.sm": ("clock_sm", 1),
    "clocks.current.graphics": ("clock_graphics", 1),
    "clocks.current.memory": ("clock_memory", 1),
    "clocks.max.sm": ("clock_sm_max", 1),
    "fan.speed": ("fan", 1),
    "pcie.link.gen.current": ("pcie_generation", 1),
    "pcie.link.gen.max": ("pcie_generation_max", 1),
    "pcie.link.width.current": ("pcie_width", 1),
    "pcie.link.width.max": ("pcie_width_max", 1),
    "ecc.errors.corrected.volatile.total": ("ecc_corrected", 1),
    "ecc.errors.uncorrected.volatile.total": ("ecc_uncorrected", 1),
    "remapped_rows.correctable": ("remapped_corrected", 1),
    "remapped_rows.uncorrectable": ("remapped_uncorrected", 1),
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A whole driver."""
    folder = tmp_path_factory.mktemp("driver")
    with Driver(build(folder)) as running:
        yield running


def script(text: str, state: str) -> str:
    """A script of the GPU as it was in a state (idle or load); what it lacked, the script lacks."""
    seen = queried(text, state)
    values: dict[str, str | int | float] = {
        key: round(number(seen[name]) * factor) for name, (key, factor) in FIELDS.items() if name in seen
    }
    values |= {"name": seen["name"], "pci": seen["pci.bus_id"], "uuid": seen["uuid"], "pstate": seen["pstate"][1:]}
    values["reasons"] = int(seen["clocks_event_reasons.active"], 16)
    for key, label in (
        ("slowdown_margin", "GPU Slowdown T.Limit Temp"),
        ("shutdown_margin", "GPU Shutdown T.Limit Temp"),
    ):
        limit = detail(text, state, label)
        if limit is not None:
            values[key] = int(number(limit))
    processes = re.findall(
        r"^.*, GPU-[\w-]+, (\d+), [^,]+, (\d+) MiB", section(text, f"{state} :: query-compute-apps"), re.M
    )
    return (
        f"driver {seen['driver_version']}\n"
        + gpu(0, {}, **values)
        + "".join(f"process 0 {pid} C {int(size) * MIB} 0\n" for pid, size in processes)
    )


# (capture, state) -> what the printed numbers say in our columns.
EXPECTED = {
    (H100, "idle"): {
        "gpu_utilization_ratio": 0.0,
        "memory_total_bytes": 81559.0 * MIB,
        "memory_used_bytes": 0.0,
        "memory_reserved_bytes": 479.0 * MIB,
        "memory_free_bytes": 81081.0 * MIB,
        "temperature_celsius": 41.0,
        "memory_temperature_celsius": 48.0,
        "temperature_margin_celsius": 46.0,
        "slowdown_temperature_celsius": 89.0,
        "shutdown_temperature_celsius": 95.0,
        "power_watts": 69.85,
        "power_limit_watts": 700.0,
        "sm_clock_mhz": 345.0,
        "sm_clock_max_mhz": 1980.0,
        "performance_state": 0,
        "clock_event_reasons": 1,
        "fan_speed_ratio": None,
        "process_count": 0,
        "driver_version": "590.48.01",
        "pci_bus_id": "00000000:00:09.0",
    },
    (H100, "load"): {
        "gpu_utilization_ratio": 1.0,
        "memory_bandwidth_utilization_ratio": 0.11,
        "memory_used_bytes": 19818.0 * MIB,
        "temperature_celsius": 59.0,
        "slowdown_temperature_celsius": 87.0,
        "power_watts": 631.95,
        "clock_event_reasons": 0,
        "process_count": 3,
    },
    (H200, "load"): {
        "name": "NVIDIA H200",
        "gpu_utilization_ratio": 1.0,
        "memory_bandwidth_utilization_ratio": 0.07,
        "memory_total_bytes": 143771.0 * MIB,
        "memory_used_bytes": 32362.0 * MIB,
        "slowdown_temperature_celsius": 89.0,
        "shutdown_temperature_celsius": 95.0,
        "process_count": 3,
    },
    (L40S, "load"): {
        "gpu_utilization_ratio": 0.09,
        "encoder_utilization_ratio": 0.6,
        "memory_reserved_bytes": 609.0 * MIB,
        "memory_temperature_celsius": None,
        "temperature_margin_celsius": 34.0,
        "slowdown_temperature_celsius": 90.0,
        "shutdown_temperature_celsius": 93.0,
        "pcie_link_generation": 4,
        "power_limit_watts": 350.0,
        "fan_speed_ratio": None,
        "driver_version": "595.80",
    },
}


@pytest.mark.parametrize(("recording", "state"), EXPECTED)
def test_a_recorded_card_reads_as_it_was_printed(driver: Driver, recording: str, state: str) -> None:
    """Degrees from margins, watts from milliwatts, bytes from MiB; what nvidia-smi prints as N/A is NULL."""
    run = driver.run(script(capture(recording), state), 0, 5)

    row = run.ticks[1].gpu("GPU-00000000-0000-0000-0000-000000000000")
    expected = EXPECTED[recording, state]
    assert {column: row[column] for column in expected} == {
        column: pytest.approx(value, abs=0.01) if isinstance(value, float) else value
        for column, value in expected.items()
    }
    assert run.ticks[1].collection["error_count"] == 0


@pytest.mark.parametrize("recording", [H100, H200, L40S])
@pytest.mark.parametrize("state", ["idle", "load"])
def test_used_free_and_reserved_make_the_total(driver: Driver, recording: str, state: str) -> None:
    """On every real card to rounding: 'used' does not hold the driver's reservation."""
    row = driver.run(script(capture(recording), state), 0).ticks[0].gpu("GPU-00000000-0000-0000-0000-000000000000")

    parts = row["memory_used_bytes"] + row["memory_free_bytes"] + row["memory_reserved_bytes"]
    assert parts == pytest.approx(row["memory_total_bytes"], abs=2 * MIB)


def test_a_recorded_mig_card_has_its_four_instances(driver: Driver) -> None:
    """3g, 2g and two 1g slices; the duty cycle that nvidia-smi prints as N/A is NULL; three processes in slice 2."""
    text = capture(H100_MIG)
    details = section(text, "load :: query (-q)")
    profiles = re.findall(r"^  MIG (\S+)", section(text, "capabilities :: list (-L)"), re.M)
    found = re.findall(
        r"GPU Instance ID +: (\d+).*?Shared FB Memory Usage\s+Total +: (\d+) MiB\s+Reserved +: (\d+) MiB\s+"
        r"Used +: (\d+) MiB\s+Free +: (\d+) MiB",
        details,
        re.DOTALL,
    )
    lines = script(text, "load") + "gpu 0 mig 1\n"
    lines = re.sub(r"^(process .*)$", r"\1 mig=2", lines, flags=re.M)
    for profile, (instance, total, reserved, used, free) in zip(profiles, found, strict=True):
        lines += gpu(
            f"0/{instance}",
            {},
            name=f"NVIDIA H100 80GB HBM3 MIG {profile}",
            memory_total=int(total) * MIB,
            memory_reserved=int(reserved) * MIB,
            memory_used=int(used) * MIB,
            memory_free=int(free) * MIB,
        )
    tick = driver.run(lines, 0, 5).ticks[1]

    assert [(row["mig_instance"], row["mig_profile"], row["process_count"]) for row in tick.samples] == [
        ("", None, 3),
        ("2", "3g.40gb", 3),
        ("3", "2g.20gb", 0),
        ("9", "1g.10gb", 0),
        ("10", "1g.10gb", 0),
    ]
    whole = tick.gpu("GPU-00000000-0000-0000-0000-000000000000")
    assert whole["gpu_utilization_ratio"] is None
    assert whole["power_watts"] == pytest.approx(433.78)
    slices = [row["memory_used_bytes"] for row in tick.samples if row["mig_instance"]]
    assert slices == [size * MIB for size in (11091.0, 17.0, 9.0, 9.0)]
    assert sum(slices) == pytest.approx(whole["memory_used_bytes"], rel=0.01), "a slice is part of its card"
