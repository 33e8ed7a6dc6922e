"""What is asked of each GPU: which NVML call or field stands for which column of raw_gpu_samples.

Tables only: column, call, unit factor and the values that can be. How they are asked is `device`; what NVML's
units are is in NVIDIA's nvml.h (13.x).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pynvml as nvml

from resources.nvml.calls import Call, Place, gpu_temperature, margin_temperature, percent, unsigned, wide


@dataclass(frozen=True, slots=True)
class Metric:
    """One column from one call, or from the newest of several that the driver knows.

    The raw value times `scale` lies within [low, high], else it is garbage: NULL.
    """

    column: str
    calls: tuple[Call, ...]
    scale: float = 1.0
    low: float = 0.0
    high: float = float("inf")
    is_integer: bool = False


_GRAPHICS, _SM, _MEMORY = nvml.NVML_CLOCK_GRAPHICS, nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM
# A powered chip draws power and is warmer than ice: 0 is how a sensor says that it does not work.
_SOME_WATTS = 0.001
_COLD, _BURNT = 1, 150
# 64 lanes or generations are more than PCIe has.
_PCIE_MOST = 64


def _get(what: str, *arguments: int, place: Callable[[], Place] = unsigned) -> Call:
    return Call(f"nvmlDeviceGet{what}", arguments, place)


FAST_METRICS = (
    Metric(
        "temperature_celsius",
        (_get("TemperatureV", place=gpu_temperature), _get("Temperature", nvml.NVML_TEMPERATURE_GPU)),  # V since 565
        low=_COLD,
        high=_BURNT,
    ),
    Metric(
        "temperature_margin_celsius", (_get("MarginTemperature", place=margin_temperature),), low=-_BURNT, high=_BURNT
    ),
    Metric("power_watts", (_get("PowerUsage"),), scale=1e-3, low=_SOME_WATTS),
    Metric("energy_joules_total", (_get("TotalEnergyConsumption", place=wide),), scale=1e-3),
    Metric("sm_clock_mhz", (_get("ClockInfo", _SM),)),
    Metric("memory_clock_mhz", (_get("ClockInfo", _MEMORY),)),
    Metric("graphics_clock_mhz", (_get("ClockInfo", _GRAPHICS),)),
    Metric("performance_state", (_get("PerformanceState"),), high=15, is_integer=True),
    Metric("fan_speed_ratio", (_get("FanSpeed"),), scale=1e-2, high=2.0),  # may exceed 100 % (nvml.h)
    Metric(
        "clock_event_reasons",
        (
            _get("CurrentClocksEventReasons", place=wide),  # since 535
            _get("CurrentClocksThrottleReasons", place=wide),
        ),
        is_integer=True,
    ),
    Metric("encoder_utilization_ratio", (_get("EncoderUtilization", place=percent),), scale=1e-2, high=1.0),
    Metric("decoder_utilization_ratio", (_get("DecoderUtilization", place=percent),), scale=1e-2, high=1.0),
)

SLOW_METRICS = (
    Metric("power_limit_watts", (_get("EnforcedPowerLimit"),), scale=1e-3, low=_SOME_WATTS),
    Metric("pcie_link_generation", (_get("CurrPcieLinkGeneration"),), low=1, high=_PCIE_MOST, is_integer=True),
    Metric("pcie_link_width", (_get("CurrPcieLinkWidth"),), low=1, high=_PCIE_MOST, is_integer=True),
    Metric("power_default_limit_watts", (_get("PowerManagementDefaultLimit"),), scale=1e-3, low=_SOME_WATTS),
    Metric("sm_clock_max_mhz", (_get("MaxClockInfo", _SM),)),
    Metric("pcie_link_generation_max", (_get("MaxPcieLinkGeneration"),), low=1, high=_PCIE_MOST, is_integer=True),
    Metric("pcie_link_width_max", (_get("MaxPcieLinkWidth"),), low=1, high=_PCIE_MOST, is_integer=True),
    Metric(
        "slowdown_temperature_celsius",
        (_get("TemperatureThreshold", nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),),
        low=_COLD,
        high=_BURNT,
    ),
    Metric(
        "shutdown_temperature_celsius",
        (_get("TemperatureThreshold", nvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN),),
        low=_COLD,
        high=_BURNT,
    ),
)

KIB, MIB = 1024.0, 1024.0**2
_NANOSECONDS = 1e-9


@dataclass(frozen=True, slots=True)
class Field:
    """One field id. `key` is a column, or a name that `device` makes a column from."""

    key: str
    field_id: int
    scale: float = 1.0
    low: float = 0.0
    high: float = float("inf")
    is_zero_none: bool = False


def fast_fields(driver: tuple[int, ...]) -> tuple[Field, ...]:
    """The fields of every tick. Ids are written out: the bindings' names moved from 251-253 to 269-271 with 580.82.

    driver: version as numbers, such as (590, 48, 1). Before 575 the last three had no id; heat is field 75 there.
    """
    if driver >= (580, 82):
        software, hardware, brake = 269, 270, 271
    elif driver >= (575,):
        software, hardware, brake = 251, 252, 253
    else:
        software = hardware = brake = 0
    known = (
        Field("power_throttle_seconds_total", 74, _NANOSECONDS),
        Field("thermal_policy_seconds", 75, _NANOSECONDS),
        Field("memory_temperature_celsius", 82, low=_COLD, high=_BURNT, is_zero_none=True),  # 0 on T4, A10, L40S
        Field("pcie_tx_bytes_total", 197),
        Field("pcie_rx_bytes_total", 198),
    )
    if not software:
        return known
    return (
        *known,
        Field("software_thermal_seconds", software, _NANOSECONDS),
        Field("hardware_thermal_seconds", hardware, _NANOSECONDS),
        Field("power_brake_seconds", brake, _NANOSECONDS),
    )


SLOW_FIELDS = (
    Field("ecc_corrected_total", 3),
    Field("ecc_uncorrected_total", 4),
    Field("nvlink_count", 91, high=nvml.NVML_NVLINK_MAX_LINKS),
    Field("pcie_replay_total", 94),
    Field("remapped_rows_corrected", 142),
    Field("remapped_rows_uncorrected", 143),
    Field("is_row_remap_pending", 144),
    Field("is_row_remap_failed", 145),
    Field("shutdown_margin_celsius", 193, low=-_BURNT, high=_BURNT),
    Field("slowdown_margin_celsius", 194, low=-_BURNT, high=_BURNT),
    Field("recovery_action", 230),
)

# (transmitted, received, factor to bytes): through NVLink 4 in KiB, from NVLink 5 on in bytes.
NVLINK_DATA = ((138, 139, KIB), (202, 204, 1.0))
# Through NVLink 4: replays, recoveries, CRC. From NVLink 5 on: malformed packets, overruns, receive errors (own,
# remote, general), link integrity, failed recoveries. Symbol errors are left out: correcting those is normal work.
NVLINK_ERRORS = (161, 162, 163, 206, 207, 208, 209, 210, 211, 214)

# GPM metric -> (column, factor); the numbers of nvml.h, for some of the bindings' constants were tuples until 13.590.
GPM_METRICS: tuple[tuple[int, str, float], ...] = (
    (1, "graphics_active_ratio", 1e-2),
    (2, "sm_active_ratio", 1e-2),
    (3, "sm_occupancy_ratio", 1e-2),
    (5, "tensor_active_ratio", 1e-2),
    (10, "dram_active_ratio", 1e-2),
    (20, "pcie_tx_bytes_per_second", MIB),
    (21, "pcie_rx_bytes_per_second", MIB),
    (60, "nvlink_rx_bytes_per_second", MIB),
    (61, "nvlink_tx_bytes_per_second", MIB),
)
