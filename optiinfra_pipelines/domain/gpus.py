"""What NVIDIA's driver means by its numbers: clock-event reasons, XID errors, recovery actions.

Nouns and tables only, of NVML's public header (nvml.h 13) and of NVIDIA's XID catalog
(docs.nvidia.com/deploy/xid-errors). Reading a driver is `resources.nvml.gpus`; judging a GPU's health is `analysis`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntFlag
from types import MappingProxyType
from typing import Literal

from optiinfra_pipelines.domain.base import Frozen

Health = Literal["ok", "lost", "reset_required", "no_permission"]
Severity = Literal["info", "warning", "critical"]
Origin = Literal["application", "driver", "memory", "interconnect", "board"]

XID_SOURCE = "docs.nvidia.com/deploy/xid-errors"


class ClockEventReason(IntFlag):
    """Why the clocks are where they are (nvml.h nvmlClocksEventReason*). Several may hold at once."""

    GPU_IDLE = 0x1
    APPLICATION_CLOCKS = 0x2
    SW_POWER_CAP = 0x4
    HW_SLOWDOWN = 0x8
    SYNC_BOOST = 0x10
    SW_THERMAL_SLOWDOWN = 0x20
    HW_THERMAL_SLOWDOWN = 0x40
    HW_POWER_BRAKE = 0x80
    DISPLAY_CLOCK = 0x100


# Reasons that take work away from a GPU that has work; idling, a clock the operator set and a display do not.
THROTTLING = (
    ClockEventReason.SW_POWER_CAP
    | ClockEventReason.HW_SLOWDOWN
    | ClockEventReason.SYNC_BOOST
    | ClockEventReason.SW_THERMAL_SLOWDOWN
    | ClockEventReason.HW_THERMAL_SLOWDOWN
    | ClockEventReason.HW_POWER_BRAKE
)


def reason_names(mask: int) -> tuple[str, ...]:
    """Names of the bits of a clock-event mask, lowest first; a bit that nvml.h 13 does not name is 'bit_<n>'."""
    bits = (1 << position for position in range(mask.bit_length()) if mask >> position & 1)
    known = {reason.value: reason for reason in ClockEventReason}
    return tuple((known[bit].name or "").lower() if bit in known else f"bit_{bit.bit_length() - 1}" for bit in bits)


# nvml.h nvmlDeviceGpuRecoveryAction_t. The first five are as dcgm-exporter and nvidia-smi name them, too.
RECOVERY_ACTIONS: Mapping[int, str] = MappingProxyType(
    {
        0: "none",
        1: "reset",
        2: "reboot",
        3: "drain_p2p",
        4: "drain_and_reset",
        5: "recover_imex_domain",
        6: "bus_reset",
        7: "system_reboot",
    }
)


class Xid(Frozen):
    """One error number of the driver: what it says, how bad it is for the GPU, who is to look, what to do at once."""

    code: int
    meaning: str
    severity: Severity
    origin: Origin
    action: str
    source: str = XID_SOURCE


def _xid(code: int, severity: Severity, origin: Origin, meaning: str, action: str) -> Xid:
    return Xid(code=code, severity=severity, origin=origin, meaning=meaning, action=action)


_RESTART = "Restart the process that used the GPU."
_RESET = "Drain the GPU, then reset it."
_SUPPORT = "Drain the node; run the vendor's field diagnostics."

# The numbers an inference fleet meets. Severity is about the GPU: a crash that only the process caused is a warning.
XIDS: Mapping[int, Xid] = MappingProxyType(
    {
        xid.code: xid
        for xid in (
            _xid(8, "warning", "driver", "The GPU stopped processing", _RESTART),
            _xid(11, "warning", "application", "Invalid or corrupted push buffer stream", _RESTART),
            _xid(13, "warning", "application", "Graphics engine exception, such as an address out of range", _RESTART),
            _xid(31, "warning", "application", "GPU memory page fault", _RESTART),
            _xid(32, "warning", "driver", "Invalid or corrupted push buffer stream (DMA controller)", _RESTART),
            _xid(43, "warning", "application", "A channel was reset after the application's fault", _RESTART),
            _xid(
                45, "info", "application", "Channels removed as their process ended, often after another XID", "None."
            ),
            _xid(48, "critical", "memory", "Double-bit ECC error that could not be corrected", _RESET),
            _xid(61, "critical", "driver", "Internal micro-controller breakpoint or warning", _RESET),
            _xid(62, "critical", "driver", "Internal micro-controller halt", _RESET),
            _xid(63, "warning", "memory", "A memory row was remapped or is to be at the next reset", _RESET),
            _xid(64, "critical", "memory", "A memory row could not be remapped", _SUPPORT),
            _xid(68, "warning", "driver", "Video decoder exception", _RESTART),
            _xid(69, "warning", "application", "Graphics engine class error", _RESTART),
            _xid(
                74, "critical", "interconnect", "NVLink error", "Drain the GPU and its NVLink peers, then reset them."
            ),
            _xid(79, "critical", "board", "The GPU has fallen off the bus", "Drain the node and restart it."),
            _xid(92, "warning", "memory", "High rate of single-bit ECC errors", "Watch it; drain it when it goes on."),
            _xid(94, "warning", "memory", "Contained uncorrectable ECC error: one process was ended", _RESTART),
            _xid(95, "critical", "memory", "Uncontained uncorrectable ECC error", _RESET),
            _xid(109, "warning", "driver", "Context switch timeout", _RESTART),
            _xid(110, "critical", "driver", "Security fault", _RESET),
            _xid(119, "critical", "driver", "The GPU's system processor (GSP) did not answer in time", _RESET),
            _xid(120, "critical", "driver", "Error of the GPU's system processor (GSP)", _RESET),
            _xid(121, "warning", "interconnect", "Corrected error of the chip-to-chip link", "Watch it."),
            _xid(140, "critical", "memory", "Unrecovered ECC error", _RESET),
            _xid(143, "critical", "board", "The GPU could not be initialized", _RESET),
            _xid(154, "warning", "driver", "The recovery action that the GPU asks for has changed", "Do that action."),
        )
    }
)


def xid(code: int) -> Xid:
    """What an XID number means. One that the table does not know is a warning that names the catalog to look it up."""
    unknown = _xid(code, "warning", "driver", f"XID {code}, not in our table", f"Look it up: {XID_SOURCE}.")
    return XIDS.get(code, unknown)
