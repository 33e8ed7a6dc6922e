"""The fake driver's structures are those of the bindings, and our readers' offsets, too."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pynvml as nvml
import pytest

from resources.nvml import buffers as nvml_buffers
from tests.gpus.fake_nvml.harness import HERE

# C structure of nvml_abi.h -> structure of nvidia-ml-py.
STRUCTURES = {
    "nvml_value": nvml.c_nvmlValue_t,
    "memory_v1": nvml.c_nvmlMemory_t,
    "memory_v2": nvml.c_nvmlMemory_v2_t,
    "utilization": nvml.c_nvmlUtilization_t,
    "temperature_v1": nvml.c_nvmlTemperature_v1_t,
    "margin_temperature_v1": nvml.c_nvmlMarginTemperature_v1_t,
    "pci_info": nvml.nvmlPciInfo_t,
    "process_info": nvml.c_nvmlProcessInfo_v3_t,
    "process_utilization": nvml.c_nvmlProcessUtilizationInfo_v1_t,
    "processes_utilization": nvml.c_nvmlProcessesUtilizationInfo_v1_t,
    "old_process_utilization": nvml.c_nvmlProcessUtilizationSample_t,
    "ring_sample": nvml.c_nvmlSample_t,
    "field_value": nvml.c_nvmlFieldValue_t,
    "event_data": nvml.c_nvmlEventData_t,
    "gpm_support": nvml.c_nvmlGpmSupport_t,
    "gpm_metric": nvml.c_nvmlGpmMetric_t,
}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the fake NVIDIA driver")
def test_every_structure_of_the_fake_has_the_size_of_the_bindings(tmp_path: Path) -> None:
    """A fake with other sizes would prove nothing: C's sizeof equals ctypes' for each."""
    prints = "".join(f'    printf("{name} %zu\\n", sizeof({name}));\n' for name in STRUCTURES)
    source = f'#include <stdio.h>\n#include "nvml_abi.h"\nint main(void) {{\n{prints}    return 0;\n}}\n'
    (tmp_path / "sizes.c").write_text(source, encoding="ascii")
    subprocess.run(["gcc", f"-I{HERE}", "-o", tmp_path / "sizes", tmp_path / "sizes.c"], check=True)
    printed = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout

    sizes = {name: int(size) for name, size in (line.split() for line in printed.splitlines())}
    assert sizes == {name: ctypes.sizeof(structure) for name, structure in STRUCTURES.items()}


def test_version_words_are_size_and_version() -> None:
    """NVML refuses a structure whose version word is not its size and version: 40 bytes are 0x02000028."""
    assert nvml.nvmlMemory_v2 == ctypes.sizeof(nvml.c_nvmlMemory_v2_t) | 2 << 24 == 0x02000028
    assert nvml.nvmlTemperature_v1 == ctypes.sizeof(nvml.c_nvmlTemperature_v1_t) | 1 << 24 == 0x0100000C
    assert ctypes.sizeof(nvml.c_nvmlProcessesUtilizationInfo_v1_t) | 1 << 24 == 0x01000018


def test_our_readers_look_where_the_bindings_put_the_values() -> None:
    """The offsets that answers are read at are those of the bindings' structures."""
    field = nvml.c_nvmlFieldValue_t
    assert nvml_buffers._FIELD_ANSWER.size == ctypes.sizeof(field)
    assert (field.valueType.offset, field.nvmlReturn.offset, field.value.offset) == (24, 28, 32)
    metric = nvml.c_nvmlGpmMetric_t
    assert nvml_buffers._GPM_ANSWER.size == ctypes.sizeof(metric)
    assert (metric.nvmlReturn.offset, metric.value.offset) == (4, 8)
    assert nvml.c_nvmlGpmMetricsGet_t.metrics.offset == nvml_buffers._GPM_HEADER_BYTES
    process = nvml.c_nvmlProcessInfo_v3_t
    assert nvml_buffers._PROCESS.size == ctypes.sizeof(process)
    assert (process.pid.offset, process.usedGpuMemory.offset, process.gpuInstanceId.offset) == (0, 8, 16)
    activity = nvml.c_nvmlProcessUtilizationInfo_v1_t
    assert nvml_buffers._ACTIVITY.size == ctypes.sizeof(activity)
    assert (activity.timeStamp.offset, activity.pid.offset, activity.smUtil.offset) == (0, 8, 12)
    sample = nvml.c_nvmlSample_t
    assert (ctypes.sizeof(sample), sample.timeStamp.offset, sample.sampleValue.offset) == (16, 0, 8)


def test_field_numbers_are_those_of_the_bindings() -> None:
    """Ids are written as numbers, for names moved; today's names stand for the same numbers."""
    names = {
        74: nvml.NVML_FI_DEV_PERF_POLICY_POWER,
        75: nvml.NVML_FI_DEV_PERF_POLICY_THERMAL,
        82: nvml.NVML_FI_DEV_MEMORY_TEMP,
        91: nvml.NVML_FI_DEV_NVLINK_LINK_COUNT,
        94: nvml.NVML_FI_DEV_PCIE_REPLAY_COUNTER,
        138: nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
        193: nvml.NVML_FI_DEV_TEMPERATURE_SHUTDOWN_TLIMIT,
        194: nvml.NVML_FI_DEV_TEMPERATURE_SLOWDOWN_TLIMIT,
        197: nvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES,
        202: nvml.NVML_FI_DEV_NVLINK_COUNT_XMIT_BYTES,
        230: nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION,
        269: nvml.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN,
        271: nvml.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN,
    }
    assert {number: number for number in names} == names


def test_the_fake_exports_nothing_that_a_real_driver_lacks(nvml_symbols: frozenset[str]) -> None:
    """Each of its calls is among the 405 that a 590.48.01 driver exports."""
    source = "".join(path.read_text(encoding="ascii") for path in HERE.glob("nvml_*.c"))
    exported = set(re.findall(r"(?:EXPORT [\w ]+\*?\b|_CALL\()(nvml[A-Z]\w+)", source))

    assert len(exported) > 50
    assert exported <= nvml_symbols


def test_every_call_of_the_collector_is_one_a_real_driver_has(nvml_symbols: frozenset[str]) -> None:
    """No call of ours is newer than the 590.48.01 driver, so that none is FUNCTION_NOT_FOUND there."""
    ours = "".join(path.read_text(encoding="utf-8") for path in Path(nvml_buffers.__file__).parent.glob("*.py"))
    bindings = Path(nvml.__file__).read_text(encoding="utf-8")
    missing = set()
    for name in set(re.findall(r"\bnvml\.(nvml(?:Device|Gpm|Event|System)\w+)\b", ours)):
        body = re.search(rf"^def {name}\(.*?(?=^def |^class |\Z)", bindings, re.DOTALL | re.MULTILINE)
        if body is not None:
            missing |= set(re.findall(r'_nvmlGetFunctionPointer\("(\w+)"\)', body[0])) - nvml_symbols
    assert missing == set()


@pytest.fixture
def nvml_symbols() -> frozenset[str]:
    """What libnvidia-ml.so.1 of driver 590.48.01 exports, from the end of the H100 capture."""
    from tests.gpus.fake_nvml.captures import capture

    _, _, symbols = capture("linux-x86_64__nvidia-h100-80gb-hbm3__590.48.01.txt").partition(
        "capabilities :: nvml-symbols"
    )
    return frozenset(re.findall(r"^nvml\w+$", symbols, re.MULTILINE))
