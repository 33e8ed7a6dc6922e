"""NVML calls that answer with one number, through a place that is allocated once.

Here: the shapes of such calls and the readers made of them. Not here: which call stands for which column (`metrics`),
or calls that answer with many values (`buffers`). The bindings' own wrappers make the place anew at each call, which
costs more than the call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pynvml as nvml

from resources.nvml.ask import nvml_error

Reader = Callable[[object], float]


class Place(NamedTuple):
    """Where a call writes: `references` are its last arguments, `field` of `holder` is the answer."""

    holder: Any
    field: str
    references: tuple[Any, ...]


def unsigned() -> Place:
    """An unsigned int, which is also how NVML passes its enumerations."""
    number = ctypes.c_uint()
    return Place(number, "value", (ctypes.byref(number),))


def wide() -> Place:
    """An unsigned long long."""
    number = ctypes.c_ulonglong()
    return Place(number, "value", (ctypes.byref(number),))


def percent() -> Place:
    """Encoder and decoder answer percent and a sampling period; the period is of no interest."""
    number, period = ctypes.c_uint(), ctypes.c_uint()
    return Place(number, "value", (ctypes.byref(number), ctypes.byref(period)))


def gpu_temperature() -> Place:
    asked = nvml.c_nvmlTemperature_v1_t()
    asked.version, asked.sensorType = nvml.nvmlTemperature_v1, nvml.NVML_TEMPERATURE_GPU
    return Place(asked, "temperature", (ctypes.byref(asked),))


def margin_temperature() -> Place:
    asked = nvml.c_nvmlMarginTemperature_v1_t()
    asked.version = nvml.nvmlMarginTemperature_v1
    return Place(asked, "marginTemperature", (ctypes.byref(asked),))


@dataclass(frozen=True, slots=True)
class Call:
    """A function of NVML: its name, the numbers between handle and answer, and the shape of the answer."""

    name: str
    arguments: tuple[int, ...] = ()
    place: Callable[[], Place] = unsigned

    def reader(self) -> Reader:
        """A function of a handle, with a place of its own: not for two threads at once. It raises NVMLError."""
        holder, field, references = self.place()
        name, arguments = self.name, (*map(ctypes.c_uint, self.arguments), *references)

        def read(handle: object) -> float:
            code = function(name)(handle, *arguments)
            if code:
                raise nvml_error(code)
            answer: float = getattr(holder, field)
            return answer

        return read


def function(name: str) -> Callable[..., int]:
    """A function of the loaded library; NVMLError when it has none of that name."""
    try:
        found: Callable[..., int] = getattr(nvml.nvmlLib, name)
    except AttributeError:
        raise nvml_error(nvml.NVML_ERROR_FUNCTION_NOT_FOUND) from None
    return found


def call(name: str, *arguments: object) -> None:
    """Call a function of the loaded library; NVMLError as the bindings raise it."""
    code = function(name)(*arguments)
    if code:
        raise nvml_error(code)
