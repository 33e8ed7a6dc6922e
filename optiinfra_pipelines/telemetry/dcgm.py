"""dcgm-exporter's names, old and new -> `raw_gpu_samples`.

Here: which field gives which column, in which unit, and the traps of the page: blank values, MIG, owners.
Not here: fetching the page. The names of both generations are those of NVIDIA's dcgm_fields.h in DCGM 4.5.3 and 4.6.0
(the exporter prints whichever name its csv asks for); ids and units did not change between them unless noted below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from optiinfra_pipelines.telemetry.samples import Row, Sample

MEBIBYTE = 1048576.0
PERCENT = 0.01
MILLI = 1e-3
NANO = 1e-9
# DCGM divides NVML's KiB counters by the time and then by 1000, so one unit of its link throughput is 1000 KiB/s.
NVLINK_UNIT_BYTES_PER_SECOND = 1024000.0


class Alias(NamedTuple):
    """One way to get a column: these fields added up, times `factor`. All must be there, unless `any_of` is set."""

    fields: tuple[str, ...]
    factor: float = 1.0
    any_of: bool = False


def _ways(*names: str, factor: float = 1.0) -> tuple[Alias, ...]:
    return tuple(Alias((name,), factor) for name in names)


# What a MIG slice has of its own. All else on a slice's series is the board's, repeated for each slice.
SLICE_COLUMNS: Mapping[str, tuple[Alias, ...]] = {
    "gpu_utilization_ratio": _ways("DEV_GPU_UTIL", factor=PERCENT),
    "memory_bandwidth_utilization_ratio": _ways("DEV_MEM_COPY_UTIL", factor=PERCENT),
    "encoder_utilization_ratio": _ways("DEV_ENC_UTIL", factor=PERCENT),
    "decoder_utilization_ratio": _ways("DEV_DEC_UTIL", factor=PERCENT),
    "graphics_active_ratio": _ways("PROF_GR_ENGINE_ACTIVE", "PROF_GR_ENGINE_UTIL_RATIO"),
    "sm_active_ratio": _ways("PROF_SM_ACTIVE", "PROF_SM_UTIL_RATIO"),
    "sm_occupancy_ratio": _ways("PROF_SM_OCCUPANCY", "PROF_SM_OCCUPANCY_RATIO"),
    "tensor_active_ratio": _ways("PROF_PIPE_TENSOR_ACTIVE", "PROF_TENSOR_UTIL_RATIO"),
    "dram_active_ratio": _ways("PROF_DRAM_ACTIVE", "PROF_DRAM_UTIL_RATIO"),
    # Without FB_TOTAL the three parts make the whole (recorded: 22563 + 0 + 470 MiB on an L4). Two of three do not:
    # whether "used" holds the driver's reservation depends on the DCGM release.
    "memory_total_bytes": (
        Alias(("DEV_FB_TOTAL",), MEBIBYTE),
        Alias(("DEV_FB_USED", "DEV_FB_FREE", "DEV_FB_RESERVED"), MEBIBYTE),
    ),
    "memory_used_bytes": _ways("DEV_FB_USED", factor=MEBIBYTE),
    "memory_free_bytes": _ways("DEV_FB_FREE", factor=MEBIBYTE),
    "memory_reserved_bytes": _ways("DEV_FB_RESERVED", factor=MEBIBYTE),
}

BOARD_COLUMNS: Mapping[str, tuple[Alias, ...]] = {
    "temperature_celsius": _ways("DEV_GPU_TEMP", "DEV_GPU_TEMP_CELSIUS"),
    "memory_temperature_celsius": _ways("DEV_MEMORY_TEMP", "DEV_MEMORY_TEMP_CELSIUS"),
    "temperature_margin_celsius": _ways("DEV_GPU_TEMP_LIMIT", "DEV_GPU_TEMP_MARGIN_CELSIUS"),
    "slowdown_temperature_celsius": _ways("DEV_SLOWDOWN_TEMP", "DEV_GPU_TEMP_SLOWDOWN_CELSIUS"),
    "shutdown_temperature_celsius": _ways("DEV_SHUTDOWN_TEMP", "DEV_GPU_TEMP_SHUTDOWN_CELSIUS"),
    "power_watts": _ways("DEV_POWER_USAGE", "DEV_BOARD_POWER_WATTS"),
    "power_limit_watts": _ways(
        "DEV_ENFORCED_POWER_LIMIT",
        "DEV_BOARD_POWER_LIMIT_ENFORCED_WATTS",
        "DEV_POWER_MGMT_LIMIT",
        "DEV_BOARD_POWER_LIMIT_REQUESTED_WATTS",
    ),
    "power_default_limit_watts": _ways("DEV_POWER_MGMT_LIMIT_DEF", "DEV_BOARD_POWER_LIMIT_DEFAULT_WATTS"),
    "energy_joules_total": (
        *_ways("DEV_TOTAL_ENERGY_CONSUMPTION", factor=MILLI),
        *_ways("DEV_GPU_ENERGY_JOULES_TOTAL"),
    ),
    "sm_clock_mhz": _ways("DEV_SM_CLOCK"),
    "sm_clock_max_mhz": _ways("DEV_MAX_SM_CLOCK"),
    "memory_clock_mhz": _ways("DEV_MEM_CLOCK"),
    "performance_state": _ways("DEV_PSTATE", "DEV_GPU_PSTATE"),
    "fan_speed_ratio": _ways("DEV_FAN_SPEED", factor=PERCENT),
    "clock_event_reasons": _ways("DEV_CLOCKS_EVENT_REASONS", "DEV_CLOCK_THROTTLE_REASONS"),
    # The *_NS fields are nanoseconds by name. *_VIOLATION is nanoseconds by today's header and was microseconds in
    # older releases: taken as nanoseconds here, so an old exporter's seconds come out 1000 times too small, never too
    # large. Whoever reads the rate must hold it against the time that passed.
    "power_throttle_seconds_total": _ways(
        "DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP_NS", "DEV_POWER_VIOLATION", factor=NANO
    ),
    "thermal_throttle_seconds_total": (
        Alias(("DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN_NS", "DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN_NS"), NANO),
        Alias(("DEV_THERMAL_VIOLATION",), NANO),
    ),
    "hardware_slowdown_seconds_total": (
        Alias(
            ("DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN_NS", "DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN_NS"),
            NANO,
        ),
    ),
    "ecc_corrected_total": _ways("DEV_ECC_SBE_VOL_TOTAL"),
    "ecc_uncorrected_total": _ways("DEV_ECC_DBE_VOL_TOTAL"),
    "remapped_rows_corrected": _ways("DEV_CORRECTABLE_REMAPPED_ROWS", "DEV_ROW_REMAP_CORRECTABLE_TOTAL"),
    "remapped_rows_uncorrected": _ways("DEV_UNCORRECTABLE_REMAPPED_ROWS", "DEV_ROW_REMAP_UNCORRECTABLE_TOTAL"),
    "is_row_remap_pending": _ways("DEV_ROW_REMAP_PENDING"),
    "is_row_remap_failed": _ways("DEV_ROW_REMAP_FAILURE", "DEV_ROW_REMAP_FAILED"),
    # The last XID, not a count. DCGM_EXP_XID_ERRORS_COUNT counts over a window that moves: no counter, so not taken.
    "xid_last": _ways("DEV_XID_ERRORS", "DEV_XID_ERROR"),
    "recovery_action": _ways("DEV_GET_GPU_RECOVERY_ACTION", "DEV_GPU_RECOVERY_ACTION"),
    "pcie_replay_total": _ways("DEV_PCIE_REPLAY_COUNTER", "DEV_PCIE_REPLAY_TOTAL"),
    "pcie_tx_bytes_total": _ways("PROF_PCIE_TX_BYTES_TOTAL"),
    "pcie_rx_bytes_total": _ways("PROF_PCIE_RX_BYTES_TOTAL"),
    # Rates, although older csv files type them counter.
    "pcie_tx_bytes_per_second": _ways("PROF_PCIE_TX_BYTES"),
    "pcie_rx_bytes_per_second": _ways("PROF_PCIE_RX_BYTES"),
    "pcie_link_generation": _ways("DEV_PCIE_LINK_GEN"),
    "pcie_link_width": _ways("DEV_PCIE_LINK_WIDTH"),
    "pcie_link_generation_max": _ways("DEV_PCIE_MAX_LINK_GEN"),
    "pcie_link_width_max": _ways("DEV_PCIE_MAX_LINK_WIDTH"),
    "nvlink_tx_bytes_total": _ways("DEV_NVLINK_COUNT_TX_BYTES", "DEV_NVLINK_TX_BYTES_TOTAL"),
    "nvlink_rx_bytes_total": _ways("DEV_NVLINK_COUNT_RX_BYTES", "DEV_NVLINK_RX_BYTES_TOTAL"),
    # Rates as well; the default csv types DEV_NVLINK_BANDWIDTH_TOTAL counter.
    "nvlink_bytes_per_second": (
        Alias(("PROF_NVLINK_TX_BYTES", "PROF_NVLINK_RX_BYTES")),
        *_ways("DEV_NVLINK_BANDWIDTH_TOTAL", "DEV_NVLINK_THROUGHPUT_TOTAL", factor=NVLINK_UNIT_BYTES_PER_SECOND),
    ),
    # A lower bound where the csv names only some kinds: an error that is told must not be lost for one that is not.
    "nvlink_errors_total": (
        Alias(
            tuple(f"DEV_NVLINK_{kind}_ERROR_COUNT_TOTAL" for kind in ("CRC_FLIT", "CRC_DATA", "REPLAY", "RECOVERY")),
            any_of=True,
        ),
        Alias(
            tuple(f"DEV_NVLINK_{kind}_ERROR_TOTAL" for kind in ("CRC_FLIT", "CRC_DATA", "REPLAY", "RECOVERY")),
            any_of=True,
        ),
    ),
}

_COLUMNS = {**SLICE_COLUMNS, **BOARD_COLUMNS}
# In DCGM 4.6.0 this is the new name of the percentage; in later ones it is another field, a ratio. See _resolve_ratio.
_AMBIGUOUS_UTILIZATION = "DEV_GPU_UTIL_RATIO"
_SLICE_FIELDS = frozenset(name for ways in SLICE_COLUMNS.values() for way in ways for name in way.fields) | {
    _AMBIGUOUS_UTILIZATION
}
_KNOWN_FIELDS = _SLICE_FIELDS | {name for ways in BOARD_COLUMNS.values() for way in ways for name in way.fields}
_PREFIX = "DCGM_FI_"
FAMILY_REGEX = "DCGM_FI_(DEV|PROF)_.+"

_INTEGERS = frozenset(
    {
        "performance_state", "clock_event_reasons", "xid_last", "pcie_link_generation", "pcie_link_width",
        "pcie_link_generation_max", "pcie_link_width_max",
    }
)  # fmt: skip
_FLAGS = frozenset({"is_row_remap_pending", "is_row_remap_failed"})
# Where 0 says "there is none": T4, L40S and A10 print a memory temperature of 0; XID 0 is no XID.
_ZERO_IS_NONE = frozenset({"memory_temperature_celsius", "xid_last"})
# The narrowest of those columns; the bits of clock event reasons end at 0x100. Past it a page talks nonsense.
_LARGEST_INTEGER = 2**31 - 1
_RECOVERY_ACTIONS: Mapping[float, str] = {0: "none", 1: "reset", 2: "reboot", 3: "drain_p2p", 4: "drain_and_reset"}

# DCGM's blanks (dcgm_structs.h): blank, not found, not supported, not permitted. As floats the four of int64 are one
# number, 2^63. Those of int32 and double are matched exactly: a counter may rightly pass either (2^47 ns are 39 hours).
_INT64_BLANK = 9.223372036854775e18
_OTHER_BLANKS = frozenset(
    [float(0x7FFFFFF0 + kind) for kind in range(4)] + [140737488355328.0 + kind for kind in range(4)]
)


def is_blank(value: float) -> bool:
    """True for what DCGM prints when it has no value, and for NaN and infinities."""
    return not math.isfinite(value) or value >= _INT64_BLANK or value in _OTHER_BLANKS


@dataclass
class _Gpu:
    """Values of one GPU or slice by field name without DCGM_FI_, and what its labels say of it."""

    values: dict[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    owners: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class GpuPage:
    """What a page says: rows of raw_gpu_samples, the known fields it has, and samples that named no GPU."""

    rows: list[Row]
    fields: frozenset[str]
    nameless_sample_count: int

    @property
    def gpu_count(self) -> int:
        return len({row["gpu_uuid"] for row in self.rows})


def read_gpus(
    samples: Iterable[Sample],
    *,
    host: str,
    sampled_at: datetime,
    telemetry: str = "dcgm",
    source: str = "live",
) -> GpuPage:
    """Samples of one host's dcgm-exporter at one moment -> one row per GPU and per MIG slice.

    A slice's row has what slices have (activity, memory); what the page repeats from the board on each slice's series
    (power, temperature, clocks, errors) goes to the board's own row, so that nothing is counted twice.
    """
    gpus: dict[tuple[str, str], _Gpu] = {}
    seen: set[str] = set()
    nameless = 0
    for sample in samples:
        if not sample.name.startswith(_PREFIX):
            continue
        name = sample.name[len(_PREFIX) :]
        if name not in _KNOWN_FIELDS:
            continue
        labels = {key.lower(): text for key, text in sample.labels.items()}
        if "nvlink" in labels or "nvswitch" in labels:  # one link's share of what the GPU's own series tells whole
            continue
        uuid = labels.get("uuid") or labels.get("gpu_uuid")
        if not uuid:
            nameless += 1
            continue
        seen.add(name)
        instance = labels.get("gpu_i_id", "")
        gpu = gpus.setdefault((uuid, instance), _Gpu(labels=labels))
        if owner := _owner(labels):
            gpu.owners.add(owner)
        holder = gpu if name in _SLICE_FIELDS or not instance else gpus.setdefault((uuid, ""), _Gpu(labels=labels))
        if not is_blank(sample.value):
            # A GPU shared by several pods has one series per pod, all with the same value.
            holder.values.setdefault(name, sample.value)
    _resolve_ratio(gpus.values())
    rows = [
        _row(gpu, uuid, instance, host=host, sampled_at=sampled_at, telemetry=telemetry, source=source)
        for (uuid, instance), gpu in sorted(gpus.items())
    ]
    return GpuPage(rows, frozenset(seen), nameless)


def _resolve_ratio(gpus: Iterable[_Gpu]) -> None:
    """Read DEV_GPU_UTIL_RATIO by what its values can be: over 1 a percentage, between 0 and 1 a ratio.

    A page on which every value is 0 or 1 does not tell which: then 0 is 0 and 1 (1 % or all of it) is not known.
    """
    holders = [gpu for gpu in gpus if _AMBIGUOUS_UTILIZATION in gpu.values]
    found = [gpu.values.pop(_AMBIGUOUS_UTILIZATION) for gpu in holders]
    if any(value > 1 for value in found):
        to_percent: float | None = 1.0
    elif any(0 < value < 1 for value in found):
        to_percent = 100.0
    else:
        to_percent = None
    for gpu, value in zip(holders, found, strict=True):
        if value == 0 or to_percent is not None:
            gpu.values.setdefault("DEV_GPU_UTIL", value * (to_percent or 1.0))


def _row(gpu: _Gpu, uuid: str, instance: str, *, host: str, sampled_at: datetime, telemetry: str, source: str) -> Row:
    labels = gpu.labels
    index = labels.get("gpu", "")
    row: Row = {
        "sampled_at": sampled_at,
        "host": host,
        "telemetry": telemetry,
        "source": source,
        "gpu_uuid": uuid,
        "mig_instance": instance,
        "mig_profile": (labels.get("gpu_i_profile") or None) if instance else None,
        "gpu_index": int(index) if index.isdecimal() and len(index) < 6 else None,
        "pci_bus_id": labels.get("pci_bus_id") or None,
        "name": labels.get("modelname") or labels.get("model_name") or None,
        "driver_version": labels.get("dcgm_fi_driver_version") or None,
        "owner": ", ".join(sorted(gpu.owners)) or None,
    }
    for column, ways in _COLUMNS.items():
        value = _first(gpu.values, ways)
        if value is not None:
            row[column] = _as_column(column, value)
    return row


def _first(values: Mapping[str, float], ways: tuple[Alias, ...]) -> float | None:
    """The first way that the page allows; ways are never added to one another."""
    for way in ways:
        terms = [values[name] for name in way.fields if name in values]
        if terms and (way.any_of or len(terms) == len(way.fields)):
            return sum(terms) * way.factor
    return None


def _as_column(column: str, value: float) -> object:
    if column in _ZERO_IS_NONE and value == 0:
        return None
    if column in _FLAGS:
        return value > 0
    if column == "recovery_action":
        return _RECOVERY_ACTIONS.get(value)
    if column in _INTEGERS:
        return int(value) if value.is_integer() and 0 <= value <= _LARGEST_INTEGER else None
    return value


_EXPORTER_CONTAINER = re.compile(r"(^|-)dcgm-exporter$|^exporter$")


def _owner(labels: Mapping[str, str]) -> str | None:
    """namespace/pod that holds the GPU, or None.

    A server that does not honor the exporter's labels renames them exported_*. One that does leaves its own target
    labels on the GPUs nobody holds: there `pod` is the exporter itself (recorded on a 16-GPU cluster).
    """
    if "exported_pod" in labels:
        pod, namespace = labels["exported_pod"], labels.get("exported_namespace", "")
    elif _EXPORTER_CONTAINER.search(labels.get("container", "")):
        return None
    else:
        pod, namespace = labels.get("pod", ""), labels.get("namespace", "")
    if not pod:
        return None
    return f"{namespace}/{pod}" if namespace else pod
