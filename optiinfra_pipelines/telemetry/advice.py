"""What an exporter's page lacks, and the line that turns it on. For the doctor.

Here: which missing families are worth a word and why. Not here: printing it (`optiinfra check`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class Missing(NamedTuple):
    """A column that stays NULL, what it would tell, and the remedy to paste."""

    column: str
    why: str
    remedy: str


class _Wish(NamedTuple):
    column: str
    any_of: tuple[str, ...]
    why: str
    remedy: str


_CSV = "add to the exporter's counters csv (--collectors): "
_DCGM: tuple[_Wish, ...] = (
    _Wish(
        "sm_active_ratio",
        ("PROF_SM_ACTIVE", "PROF_SM_UTIL_RATIO"),
        "gpu_utilization_ratio is a duty cycle; SM activity tells whether the chip was used (off in the default csv)",
        _CSV + "DCGM_FI_PROF_SM_ACTIVE, gauge, The ratio of cycles an SM has at least 1 warp assigned.",
    ),
    _Wish(
        "dram_active_ratio",
        ("PROF_DRAM_ACTIVE", "PROF_DRAM_UTIL_RATIO"),
        "decode is bound by memory bandwidth: this is its load",
        _CSV + "DCGM_FI_PROF_DRAM_ACTIVE, gauge, Ratio of cycles the device memory interface is active. "
        "(profiling needs a data-center GPU and the SYS_ADMIN capability)",
    ),
    _Wish(
        "tensor_active_ratio",
        ("PROF_PIPE_TENSOR_ACTIVE", "PROF_TENSOR_UTIL_RATIO"),
        "prefill is bound by the tensor cores: this is its load",
        _CSV + "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE, gauge, Ratio of cycles the tensor pipe is active. "
        "(profiling needs a data-center GPU and the SYS_ADMIN capability)",
    ),
    _Wish(
        "power_limit_watts",
        ("DEV_ENFORCED_POWER_LIMIT", "DEV_BOARD_POWER_LIMIT_ENFORCED_WATTS", "DEV_POWER_MGMT_LIMIT"),
        "power is held against its limit",
        _CSV + "DCGM_FI_DEV_ENFORCED_POWER_LIMIT, gauge, Enforced power limit (in W).",
    ),
    _Wish(
        "clock_event_reasons",
        ("DEV_CLOCKS_EVENT_REASONS", "DEV_CLOCK_THROTTLE_REASONS"),
        "why the clocks are held down now",
        _CSV + "DCGM_FI_DEV_CLOCK_THROTTLE_REASONS, gauge, Bit mask of the reasons that hold the clocks down.",
    ),
    _Wish(
        "power_throttle_seconds_total",
        ("DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP_NS", "DEV_POWER_VIOLATION"),
        "how long the power cap held the GPU down",
        _CSV + "DCGM_FI_DEV_POWER_VIOLATION, counter, Throttling duration due to power constraints (in ns).",
    ),
    _Wish(
        "thermal_throttle_seconds_total",
        ("DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN_NS", "DEV_THERMAL_VIOLATION"),
        "how long heat held the GPU down",
        _CSV + "DCGM_FI_DEV_THERMAL_VIOLATION, counter, Throttling duration due to thermal constraints (in ns).",
    ),
    _Wish(
        "slowdown_temperature_celsius",
        ("DEV_SLOWDOWN_TEMP", "DEV_GPU_TEMP_SLOWDOWN_CELSIUS", "DEV_GPU_TEMP_LIMIT", "DEV_GPU_TEMP_MARGIN_CELSIUS"),
        "temperature is held against this threshold",
        _CSV + "DCGM_FI_DEV_SLOWDOWN_TEMP, gauge, Slowdown temperature (in C).",
    ),
    _Wish(
        "ecc_uncorrected_total",
        ("DEV_ECC_DBE_VOL_TOTAL",),
        "uncorrected memory errors are a reason to drain the GPU",
        _CSV + "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL, counter, Total number of double-bit volatile ECC errors.",
    ),
    _Wish(
        "xid_last",
        ("DEV_XID_ERRORS", "DEV_XID_ERROR"),
        "XID errors are a reason to drain the GPU (the series is absent until the first one on some releases)",
        _CSV + "DCGM_FI_DEV_XID_ERRORS, gauge, Value of the last XID error encountered.",
    ),
    _Wish(
        "memory_total_bytes",
        ("DEV_FB_TOTAL", "DEV_FB_RESERVED"),
        "without it the size of the frame buffer is not known",
        _CSV + "DCGM_FI_DEV_FB_RESERVED, gauge, Framebuffer memory reserved (in MiB).",
    ),
)
_NODE: tuple[_Wish, ...] = (
    _Wish(
        "psi_cpu_some_seconds_total",
        ("node_pressure_cpu_waiting_seconds_total",),
        "how long tasks waited for a CPU: the first sign that the host holds the GPUs back",
        "a kernel with PSI (boot with psi=1) and node_exporter with --collector.pressure",
    ),
    _Wish(
        "tcp_retransmits_total",
        ("node_netstat_Tcp_RetransSegs",),
        "lost packets between replicas and clients",
        "node_exporter with --collector.netstat",
    ),
    _Wish(
        "oom_kills_total",
        ("node_vmstat_oom_kill",),
        "kills for lack of memory",
        "node_exporter with --collector.vmstat",
    ),
    _Wish(
        "booted_at",
        ("node_boot_time_seconds",),
        "counters of two boots are not told apart without it",
        "node_exporter with --collector.stat",
    ),
    _Wish(
        "cpu_idle_seconds_total",
        ("node_cpu_seconds_total",),
        "CPU time by mode",
        "node_exporter with --collector.cpu",
    ),
)


def missing_from_dcgm(fields: Collection[str]) -> list[Missing]:
    """What a dcgm-exporter page with these fields (`GpuPage.fields`, without DCGM_FI_) does not tell."""
    return _missing(_DCGM, fields)


def missing_from_node_exporter(families: Collection[str]) -> list[Missing]:
    """What a node_exporter page with these families (`HostPage.families`) does not tell."""
    return _missing(_NODE, families)


def _missing(wishes: tuple[_Wish, ...], told: Collection[str]) -> list[Missing]:
    return [Missing(wish.column, wish.why, wish.remedy) for wish in wishes if not set(wish.any_of) & set(told)]
