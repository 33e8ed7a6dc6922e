"""The NVLinks of one GPU: bytes both ways and errors, summed over its links.

Here: which links answer, and sums that never jump. Not here: PCIe, which is two plain fields (`metrics`).
Links are asked for one by one (scopeId = link): no documented id gives their sum on every driver.
"""

from __future__ import annotations

from typing import Any

import pynvml as nvml

from resources.nvml.ask import Ledger, ask
from resources.nvml.buffers import NO_ANSWERS, FieldBatch
from resources.nvml.metrics import NVLINK_DATA, NVLINK_ERRORS


class NvLinks:
    """Counters of one GPU's links."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._batch: FieldBatch | None = None
        self._links: tuple[int, ...] = ()
        self._scale = 1.0

    def discover(self, handle: object, link_count: int) -> float | None:
        """Find the links that count bytes; return the errors of all links, None when there is no link or no count."""
        if not link_count:
            self._batch, self._links = None, ()
            return None
        for transmit, receive, scale in NVLINK_DATA:
            ids = [(field_id, link) for link in range(link_count) for field_id in (transmit, receive)]
            answers = self._ask(handle, FieldBatch(ids))
            links = tuple(
                link for link in range(link_count) if None not in answers[2 * link : 2 * link + 2] and answers
            )
            if links:
                self._use(links, transmit, receive, scale)
                break
        else:
            self._batch, self._links = None, ()
        errors = self._ask(
            handle, FieldBatch([(field_id, link) for link in range(link_count) for field_id in NVLINK_ERRORS])
        )
        return None if all(value is None for value in errors) else _sum(errors)

    def read(self, handle: object, row: dict[str, Any]) -> None:
        """Add nvlink_{tx,rx}_bytes_total to the row.

        When one of the links does not answer there is no sum: without it the counter would seem to have been reset.
        """
        if self._batch is None:
            return
        answers = self._ask(handle, self._batch)
        if not answers or None in answers:
            return
        row["nvlink_tx_bytes_total"] = _sum(answers[0::2]) * self._scale
        row["nvlink_rx_bytes_total"] = _sum(answers[1::2]) * self._scale

    def _use(self, links: tuple[int, ...], transmit: int, receive: int, scale: float) -> None:
        if links != self._links or scale != self._scale:
            self._batch = FieldBatch([(field_id, link) for link in links for field_id in (transmit, receive)])
            self._links, self._scale = links, scale

    def _ask(self, handle: object, batch: FieldBatch) -> tuple[float | None, ...]:
        answers = ask(self._ledger, "nvlink", batch.read, handle) or NO_ANSWERS
        if any(answers.codes):
            for code in answers.codes:
                if code in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED):
                    self._ledger.note("nvlink", code)
        return answers.values


def _sum(values: tuple[float | None, ...]) -> float:
    return float(sum(value for value in values if value is not None))
