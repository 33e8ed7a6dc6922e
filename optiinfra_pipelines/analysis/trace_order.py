"""What must hold from one line of a trace to the next: time does not fall, and no line comes twice.

Pure; what a line means is `traces`. Reuse depends on the order of arrival, and an export that was joined with itself
doubles the load, so neither is put right in silence.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from optiinfra_pipelines.analysis.traces import TraceError

# BurstGPT's clock counts whole seconds: requests of one second that look alike are requests all the same.
COARSE_CLOCKS = ("burstgpt",)


class Succession:
    """Checks a trace piece by piece, in the order of the file.

    keeps_repeats: lines that are wholly the same are counted in `repeated` and stay; else the first one is an error.
    unfinished: last lines of a log that its writer had not ended, left out.
    """

    def __init__(self, *, keeps_repeats: bool) -> None:
        self.keeps_repeats = keeps_repeats
        self.repeated = self.unfinished = 0
        self._last_ms: int | None = None
        self._last_lines: list[bytes] = []  # lines of the latest time so far

    def check(self, timestamp_ms: pl.Series, lines: Sequence[bytes], numbers: Sequence[int]) -> None:
        """timestamp_ms: of each line of the piece; numbers: of its lines in the file. TraceError names the line."""
        if timestamp_ms.is_empty():
            return
        before = len(self._last_lines)
        at = pl.concat([pl.Series([self._last_ms] * before, dtype=pl.Int64), timestamp_ms.cast(pl.Int64)])
        rows = pl.DataFrame({"at": at, "line": [*self._last_lines, *(line.strip() for line in lines)]})
        falls = (at.diff() < 0).fill_null(False)
        repeats = ~rows.select(pl.struct("at", "line").is_first_distinct()).to_series()
        repeats = repeats & (pl.int_range(0, len(repeats), eager=True) >= before)
        bad = falls if self.keeps_repeats else falls | repeats
        if bad.any():
            row = int(bad.arg_true()[0])
            number = numbers[row - before]
            if falls[row]:
                raise TraceError(
                    f"line {number}: its time lies {(at[row - 1] - at[row]) / 1000:g} s before that of the line before "
                    "it. Sort the file by time: load and reuse depend on the order"
                )
            raise TraceError(
                f"line {number} is wholly the same as an earlier one of the same time. Drop it if it was exported "
                "twice; if these are requests that only look alike, import with --keep-duplicates"
            )
        self.repeated += int(repeats.sum())
        self._last_ms = int(at[-1])
        self._last_lines = rows.filter(rows["at"] == self._last_ms)["line"].to_list()
