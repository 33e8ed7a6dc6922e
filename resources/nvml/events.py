"""XID errors, as the driver reports them to who has registered: the last one and how many, by GPU.

Here: registering, and taking what has happened without waiting. Not here: what an XID means (`domain.gpus`). Only what
happens while the collector runs is seen; the kernel's log has the rest.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import pynvml as nvml
import structlog

from resources.nvml.ask import GpuGoneError, Ledger, ask, code_name, code_of, nvml_error
from resources.nvml.calls import function

_log = structlog.get_logger(__name__)
_XID = nvml.nvmlEventTypeXidCriticalError
# A GPU that reports without end must not hold up the tick; what is left comes with the next one.
MOST_PER_TICK = 64


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


class XidEvents:
    """Counts XID events since collection began; the counts outlive the driver's."""

    def __init__(self) -> None:
        self._set: Any = None
        self._handles: dict[str, object] = {}
        self._event = nvml.c_nvmlEventData_t()
        self._next_arguments = (ctypes.byref(self._event), ctypes.c_uint(0))  # 0 ms: nothing is waited for
        self._uuids: dict[int | None, str] = {}
        self._watched: set[str] = set()
        self._last: dict[str, int] = {}
        self._total: Counter[str] = Counter()

    def watch(self, handles: dict[str, object], ledger: Ledger) -> None:
        """Register every GPU that can be, all anew when there are others than before."""
        if self._set is not None and handles == self._handles:
            return  # the very same handles: ctypes compares them by identity
        addresses = {_address(handle): uuid for uuid, handle in handles.items()}
        if self._set is not None and addresses == self._uuids:
            self._handles = dict(handles)
            return
        self.free()
        self._set = ask(ledger, "events", nvml.nvmlEventSetCreate)
        if self._set is None:
            return
        self._uuids, self._handles = addresses, dict(handles)
        for uuid, handle in handles.items():
            metric = f"events of {uuid}"
            errors = ledger.error_count
            try:
                ask(ledger, metric, nvml.nvmlDeviceRegisterEvents, handle, _XID, self._set)
            except GpuGoneError:
                continue
            if metric not in ledger.unsupported and metric not in ledger.denied and ledger.error_count == errors:
                self._watched.add(uuid)

    def read(self, ledger: Ledger) -> set[str]:
        """Take what has happened since the last call; the uuids it happened to."""
        alarmed: set[str] = set()
        for _ in range(MOST_PER_TICK if self._set is not None else 0):
            event = self._next(ledger)
            if event is None:
                break
            uuid = self._uuids.get(_address(event.device))
            if uuid is not None and event.eventType == _XID:
                self._last[uuid] = int(event.eventData)
                self._total[uuid] += 1
                alarmed.add(uuid)
        return alarmed

    def columns(self, uuid: str) -> dict[str, Any]:
        """xid_last and xid_total of a GPU; the total is None where nothing is reported."""
        total = float(self._total[uuid]) if uuid in self._watched or uuid in self._total else None
        return {"xid_last": self._last.get(uuid), "xid_total": total}

    def free(self) -> None:
        """Give the registration back."""
        if self._set is not None:
            try:
                nvml.nvmlEventSetFree(self._set)  # type: ignore[no-untyped-call]
            except nvml.NVMLError as error:
                _log.debug("nvmlEventSetFree", code=code_name(code_of(error)))
        self._set, self._uuids, self._watched, self._handles = None, {}, set(), {}

    def _next(self, ledger: Ledger) -> Any | None:
        """One event, or None when there is none."""
        try:
            return ask(ledger, "event", self._take)
        except GpuGoneError:
            # One lost GPU makes the whole set answer so: the others register again (see `watch`).
            self.free()
            return None

    def _take(self) -> Any | None:
        code = function("nvmlEventSetWait_v2")(self._set, *self._next_arguments)
        if code == nvml.NVML_ERROR_TIMEOUT:  # nothing has happened
            return None
        if code:
            raise nvml_error(code)
        return self._event
