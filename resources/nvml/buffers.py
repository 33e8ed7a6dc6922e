"""The NVML calls that return many values, read through buffers that are allocated once.

Here: the sample ring, field values, GPM averages and process lists. The structures and the loaded library are
nvidia-ml-py's; its own wrappers of these build one Python object per value and ask twice (for the size first), which
costs more than the rest of a tick. Not here: what the values mean (`device`).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import pynvml as nvml

from resources.nvml.ask import code_of
from resources.nvml.calls import call

# A ring holds about 100 (utilization) to 120 samples; room for twice as many.
RING_CAPACITY = 256
# A GPU rarely has more than a few dozen processes; the buffer grows when one has.
PROCESS_CAPACITY = 64
# What "since the last tick" means before there was one: the cadence of collection.
FIRST_LOOK_US = 5_000_000

_FIELD_ANSWER = struct.Struct("=24xIIQ")  # of nvmlFieldValue_t: value type, return code, value
_GPM_ANSWER = struct.Struct("=4xId24x")  # of nvmlGpmMetric_t: return code, value
_GPM_HEADER_BYTES = 24
_PROCESS = struct.Struct("=I4xQI4x")  # of nvmlProcessInfo_t (v2 and v3): pid, memory, GPU instance
_ACTIVITY = struct.Struct("=QII24x")  # of nvmlProcessUtilizationInfo_v1_t: timestamp, pid, SM percent
_ACTIVITY_VERSION = ctypes.sizeof(nvml.c_nvmlProcessesUtilizationInfo_v1_t) | 1 << 24
_MEMORY_UNKNOWN = 0xFFFFFFFFFFFFFFFF
_WIDE = nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
_GPM_VERSION = 1


def decode(value_type: int, word: int) -> float | None:
    """The number in the eight bytes of an nvmlValue_t, by its type; None for a type nvml.h 13 does not name.

    A short type leaves the other bytes undefined, so they are masked away.
    """
    if value_type == nvml.NVML_VALUE_TYPE_UNSIGNED_INT:
        return word & 0xFFFFFFFF
    if value_type in (nvml.NVML_VALUE_TYPE_UNSIGNED_LONG, nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG):
        return word
    if value_type == nvml.NVML_VALUE_TYPE_SIGNED_INT:
        return ctypes.c_int32(word & 0xFFFFFFFF).value
    if value_type == nvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG:
        return ctypes.c_int64(word).value
    if value_type == nvml.NVML_VALUE_TYPE_UNSIGNED_SHORT:
        return word & 0xFFFF
    if value_type == nvml.NVML_VALUE_TYPE_DOUBLE:
        return float(struct.unpack("=d", struct.pack("=Q", word))[0])
    return None


class Ring(NamedTuple):
    """Samples of the driver's ring: microseconds of its own clock, and percent (None for an unknown type)."""

    timestamps: list[int]
    values: list[float | None]


EMPTY_RING = Ring([], [])


class RingReader:
    """Reads the driver's ring of samples; one buffer for all GPUs of a collector."""

    def __init__(self) -> None:
        store = bytearray(RING_CAPACITY * ctypes.sizeof(nvml.c_nvmlSample_t))
        self._samples = (nvml.c_nvmlSample_t * RING_CAPACITY).from_buffer(store)
        self._words = memoryview(store).cast("Q")
        self._value_type = ctypes.c_uint()
        self._count = ctypes.c_uint()

    def read(self, handle: object, kind: int, since: int) -> Ring:
        """The samples after `since`, in the ring's own microseconds; 0 is the whole ring.

        One call, no call for the size: the count is the room on the way in and the samples given on the way out.
        """
        self._count.value = RING_CAPACITY
        call(
            "nvmlDeviceGetSamples",
            handle,
            ctypes.c_uint(kind),
            ctypes.c_ulonglong(since),
            ctypes.byref(self._value_type),
            ctypes.byref(self._count),
            self._samples,
        )
        words = self._words[: 2 * min(self._count.value, RING_CAPACITY)].tolist()
        value_type = self._value_type.value
        if value_type == nvml.NVML_VALUE_TYPE_UNSIGNED_INT:  # what utilization is
            return Ring(words[0::2], [word & 0xFFFFFFFF for word in words[1::2]])
        return Ring(words[0::2], [decode(value_type, word) for word in words[1::2]])


class RingCursor:
    """Which samples of one ring are new. The ring's clock is the driver's own and is compared with itself only."""

    def __init__(self) -> None:
        self._newest = 0
        self.ask_from = 0

    def take(self, ring: Ring) -> list[float]:
        """Values, in percent, that no earlier `take` returned; empty when the ring ran dry.

        After a dry tick the whole ring is asked for once more: a ring whose clock was set back would else be silent
        until it caught up. Values over 100 % are what an unfilled slot holds.
        """
        newest = max(ring.timestamps, default=0)
        is_continued = 0 < self._newest <= newest
        since = max(self._newest if is_continued else newest - FIRST_LOOK_US, 0)
        fresh = [
            value
            for timestamp, value in zip(ring.timestamps, ring.values, strict=True)
            if timestamp > since and value is not None and 0 <= value <= 100
        ]
        self.ask_from = newest if fresh else 0
        if newest:
            self._newest = newest
        return fresh


class FieldAnswers(NamedTuple):
    """Return codes of the fields asked for, in order, and their values (None where the code is none of success)."""

    codes: tuple[int, ...]
    values: tuple[float | None, ...]


NO_ANSWERS = FieldAnswers((), ())


class FieldBatch:
    """A fixed list of field ids, asked for in one call. `fields`: (id, scope); a scope is a link's number, else 0."""

    def __init__(self, fields: Sequence[tuple[int, int]]) -> None:
        self._length = ctypes.c_int(len(fields))
        self._answers = struct.Struct("=" + _FIELD_ANSWER.format[1:] * len(fields))
        self._all_wide = (_WIDE,) * len(fields)
        self._store = bytearray(len(fields) * ctypes.sizeof(nvml.c_nvmlFieldValue_t))
        self._values = (nvml.c_nvmlFieldValue_t * len(fields)).from_buffer(self._store)
        for slot, (field_id, scope) in zip(self._values, fields, strict=True):
            slot.fieldId, slot.scopeId = field_id, scope

    def read(self, handle: object) -> FieldAnswers:
        """Raises NVMLError when the whole call fails."""
        call("nvmlDeviceGetFieldValues", handle, self._length, self._values)
        found = self._answers.unpack(self._store)
        kinds, codes, words = found[0::3], found[1::3], found[2::3]
        if kinds == self._all_wide and not any(codes):  # counters are of this type
            return FieldAnswers(codes, words)
        values = (None if code else decode(kind, word) for kind, code, word in zip(kinds, codes, words, strict=True))
        return FieldAnswers(codes, tuple(values))


class MemoryReader:
    """Reads a GPU's memory; one structure for all GPUs of a collector."""

    def __init__(self) -> None:
        self._memory = nvml.c_nvmlMemory_v2_t()
        self._memory.version = nvml.nvmlMemory_v2
        self._reference = ctypes.byref(self._memory)

    def read(self, handle: object) -> tuple[int, int, int, int]:
        """Bytes: total, used, free, reserved. Raises NVMLError."""
        call("nvmlDeviceGetMemoryInfo_v2", handle, self._reference)
        memory = self._memory
        return memory.total, memory.used, memory.free, memory.reserved


class GpmRequest:
    """Which GPM averages to compute; one request structure (19 kB) for all GPUs of a collector."""

    def __init__(self, metrics: Sequence[int]) -> None:
        self._store = bytearray(ctypes.sizeof(nvml.c_nvmlGpmMetricsGet_t))
        self._request = nvml.c_nvmlGpmMetricsGet_t.from_buffer(self._store)
        self._request.version, self._request.numMetrics = _GPM_VERSION, len(metrics)
        self._answers = memoryview(self._store)[_GPM_HEADER_BYTES:][: len(metrics) * _GPM_ANSWER.size]
        for position, metric in enumerate(metrics):
            self._request.metrics[position].metricId = metric

    def averages(self, first: Any, second: Any) -> list[tuple[int, float]]:
        """(return code, mean between the two samples) per metric, in order."""
        self._request.sample1, self._request.sample2 = first, second
        call("nvmlGpmMetricsGet", ctypes.byref(self._request))
        return list(_GPM_ANSWER.iter_unpack(self._answers))


class ProcessLister:
    """Reads process lists; one buffer for all GPUs of a collector."""

    def __init__(self) -> None:
        self._count = ctypes.c_uint()
        self._make_room(PROCESS_CAPACITY)

    def read(self, name: str, handle: object) -> list[tuple[int, int | None, int]]:
        """(pid, bytes of GPU memory or None where not told, GPU instance) per process, by the NVML call `name`."""
        self._count.value = self._room
        try:
            call(name, handle, ctypes.byref(self._count), self._processes)
        except nvml.NVMLError as error:
            if code_of(error) != nvml.NVML_ERROR_INSUFFICIENT_SIZE:
                raise
            self._make_room(2 * max(self._count.value, self._room))
            self._count.value = self._room
            call(name, handle, ctypes.byref(self._count), self._processes)
        found = memoryview(self._store)[: min(self._count.value, self._room) * _PROCESS.size]
        return [
            (pid, None if memory == _MEMORY_UNKNOWN else memory, instance)
            for pid, memory, instance in _PROCESS.iter_unpack(found)
        ]

    def _make_room(self, room: int) -> None:
        self._room = room
        self._store = bytearray(room * ctypes.sizeof(nvml.c_nvmlProcessInfo_v3_t))
        self._processes = (nvml.c_nvmlProcessInfo_v3_t * room).from_buffer(self._store)


class ActivityReader:
    """Reads how busy each process was; one buffer for all GPUs of a collector."""

    def __init__(self) -> None:
        self._request = nvml.c_nvmlProcessesUtilizationInfo_v1_t()
        self._request.version = _ACTIVITY_VERSION
        self._make_room(PROCESS_CAPACITY)

    def read(self, handle: object, since: int) -> list[tuple[int, int, int]]:
        """(timestamp in the driver's microseconds, pid, SM percent) after `since`. Raises NVMLError; driver 550+."""
        self._ask(handle, since)
        found = memoryview(self._store)[: min(self._request.processSamplesCount, self._room) * _ACTIVITY.size]
        return list(_ACTIVITY.iter_unpack(found))

    def _ask(self, handle: object, since: int) -> None:
        self._request.processSamplesCount, self._request.lastSeenTimeStamp = self._room, since
        try:
            call("nvmlDeviceGetProcessesUtilizationInfo", handle, ctypes.byref(self._request))
        except nvml.NVMLError as error:
            if code_of(error) != nvml.NVML_ERROR_INSUFFICIENT_SIZE:
                raise
            self._make_room(2 * max(self._request.processSamplesCount, self._room))
            self._request.processSamplesCount = self._room
            call("nvmlDeviceGetProcessesUtilizationInfo", handle, ctypes.byref(self._request))

    def _make_room(self, room: int) -> None:
        self._room = room
        self._store = bytearray(room * ctypes.sizeof(nvml.c_nvmlProcessUtilizationInfo_v1_t))
        self._request.procUtilArray = (nvml.c_nvmlProcessUtilizationInfo_v1_t * room).from_buffer(self._store)
