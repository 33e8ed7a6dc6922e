"""One guarded question to NVML: each value fails alone, and what a chip cannot tell is not asked again.

Here: the meaning of NVML's return codes for collection (`ask`, `Ledger`). Not here: which calls there are
(`device`, `processes`, `buffers`) and when they are made (`gpus`).

Codes are compared as numbers: NVMLError has `__eq__` without `__hash__`, so it goes into no set and no dict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import pynvml as nvml

from optiinfra_pipelines.domain.gpus import Health

T = TypeVar("T")

CODE_NAMES = {
    getattr(nvml, name): name.removeprefix("NVML_ERROR_").lower()
    for name in dir(nvml)
    if name.startswith("NVML_ERROR_")
}

# The chip, the driver or the driver's library does not have it. DEPRECATED: an interface that was taken away.
UNSUPPORTED_CODES = frozenset(
    {
        nvml.NVML_ERROR_NOT_SUPPORTED,
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        nvml.NVML_ERROR_DEPRECATED,
    }
)
GONE_CODES: dict[int, Health] = {nvml.NVML_ERROR_GPU_IS_LOST: "lost", nvml.NVML_ERROR_RESET_REQUIRED: "reset_required"}
DOWN_CODES = frozenset(
    {
        nvml.NVML_ERROR_UNINITIALIZED,
        nvml.NVML_ERROR_DRIVER_NOT_LOADED,
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    }
)
# Nothing to report at this moment: an idle ring, no process. nvidia-ml-py raises NVMLError(0) for an empty success.
NO_DATA_CODES = frozenset({nvml.NVML_SUCCESS, nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_NO_DATA})


class GpuGoneError(Exception):
    """This GPU answers nothing any more; the others may. `health` is what its row says."""

    def __init__(self, health: Health) -> None:
        super().__init__(health)
        self.health = health


class DriverDownError(Exception):
    """The driver itself is away; `code` is NVML's reason."""

    def __init__(self, code: int) -> None:
        super().__init__(code_name(code))
        self.code = code


def code_of(error: nvml.NVMLError) -> int:
    """The return code in an error of the bindings."""
    return int(error.value)  # type: ignore[attr-defined]


def nvml_error(code: int) -> nvml.NVMLError:
    """The bindings' error for a return code."""
    error: nvml.NVMLError = nvml.NVMLError(code)  # type: ignore[no-untyped-call]
    return error


def code_name(code: int) -> str:
    """NVML's name of a return code in lower case, such as `not_supported`; `code_<n>` for one it does not name."""
    return CODE_NAMES.get(code, f"code_{code}")


@dataclass
class Ledger:
    """What one GPU under one driver does not tell, and why: kept as long as both stay the same.

    unsupported: metric -> reason, never asked again. denied: metric -> reason, asked again, for rights may change.
    failures: unexpected codes and impossible values so far, by kind; `error_count` is their sum.
    chosen: metric -> which of its calls, from the newest to the oldest, this driver knows.
    """

    unsupported: dict[str, str] = field(default_factory=dict)
    denied: dict[str, str] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    chosen: dict[str, int] = field(default_factory=dict)

    def forget(self) -> None:
        """Ask everything again, as of a GPU whose mode has changed."""
        self.unsupported.clear()
        self.chosen.clear()

    @property
    def error_count(self) -> int:
        return self.failures.total()

    def note(self, metric: str, code: int) -> None:
        """Enter a return code other than success; raises where it is about more than one value (GpuGoneError, …)."""
        if code in UNSUPPORTED_CODES:
            self.unsupported[metric] = code_name(code)
        elif code in GONE_CODES:
            raise GpuGoneError(GONE_CODES[code])
        elif code in DOWN_CODES:
            raise DriverDownError(code)
        elif code == nvml.NVML_ERROR_NO_PERMISSION:
            self.denied[metric] = code_name(code)
        elif code not in NO_DATA_CODES:
            self.failures[f"{metric}: {code_name(code)}"] += 1

    def reject(self, metric: str) -> None:
        """Enter a value that cannot be, such as more memory used than there is."""
        self.failures[f"{metric}: impossible value"] += 1


def ask(
    ledger: Ledger, metric: str, call: Callable[..., T], *arguments: object, when_empty: T | None = None
) -> T | None:
    """The answer of one NVML call, or None when there is none; `when_empty` where the driver has nothing to report.

    Never raises for a single value; raises GpuGoneError and DriverDownError (see `Ledger.note`).
    """
    if metric in ledger.unsupported:
        return None
    try:
        answer = call(*arguments)
    except nvml.NVMLError as error:
        code = code_of(error)
        ledger.note(metric, code)
        return when_empty if code in NO_DATA_CODES else None
    except nvml.NVMLLibraryMismatchError:  # no NVMLError: the driver's library is older than the bindings
        ledger.unsupported[metric] = "function_not_found"
        return None
    except UnicodeDecodeError:
        ledger.reject(metric)
        return None
    if ledger.denied:
        ledger.denied.pop(metric, None)
    return answer


def ask_first(
    ledger: Ledger, metric: str, calls: tuple[Callable[..., T], ...], *arguments: object, when_empty: T | None = None
) -> T | None:
    """The same question put to newer and older calls: the first that this driver knows answers, alone, ever after."""
    if metric in ledger.unsupported:
        return None
    for position in range(ledger.chosen.get(metric, 0), len(calls)):
        answer = ask(ledger, metric, calls[position], *arguments, when_empty=when_empty)
        if metric not in ledger.unsupported:
            ledger.chosen[metric] = position
            return answer
        if position + 1 < len(calls):
            del ledger.unsupported[metric]
    return None
