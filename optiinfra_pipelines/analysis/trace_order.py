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
# LMCache's threads stamp a lookup before they queue it for the log: lines of one moment may change places.
SLACK_MS = {"lmcache": 1000}


class Succession:
    """Checks a trace piece by piece, in the order of the file.

    keeps_repeats: lines that are wholly the same are counted in `repeated` and stay; else the first one is an error.
    slack_ms: how far time may fall before it is an error; such a line counts as of the latest time before it.
    unfinished: last lines of a log that its writer had not ended, left out.
    """

    def __init__(self, *, keeps_repeats: bool, slack_ms: int = 0) -> None:
        self.keeps_repeats = keeps_repeats
        self.slack_ms = slack_ms
        self.repeated = self.unfinished = 0
        self._recent = pl.DataFrame(schema={"at": pl.Int64, "line": pl.Binary})  # lines as late as a line may be

    def check(self, timestamp_ms: pl.Series, lines: Sequence[bytes], numbers: Sequence[int]) -> pl.Series:
        """timestamp_ms: of each line of the piece; numbers: of its lines in the file. TraceError names the line.

        Returns timestamp_ms, none under one before it.
        """
        if timestamp_ms.is_empty():
            return timestamp_ms
        before = self._recent.height
        piece = pl.DataFrame({"at": timestamp_ms.cast(pl.Int64), "line": [line.strip() for line in lines]})
        rows = pl.concat([self._recent, piece])
        latest = rows["at"].cum_max()
        falls = latest - rows["at"] > self.slack_ms
        repeats = ~rows.select(pl.struct("at", "line").is_first_distinct()).to_series()
        repeats = repeats & (pl.int_range(0, rows.height, eager=True) >= before)
        bad = falls if self.keeps_repeats else falls | repeats
        if bad.any():
            row = int(bad.arg_true()[0])
            number = numbers[row - before]
            if falls[row]:
                raise TraceError(
                    f"line {number}: its time lies {(latest[row] - rows['at'][row]) / 1000:g} s before that of a line "
                    "before it. Sort the file by time: load and reuse depend on the order"
                )
            raise TraceError(
                f"line {number} is wholly the same as an earlier one of the same time. Drop it if it was exported "
                "twice; if these are requests that only look alike, import with --keep-duplicates"
            )
        self.repeated += int(repeats.sum())
        self._recent = rows.filter(rows["at"] >= int(latest[-1]) - self.slack_ms)
        return latest[before:].alias(timestamp_ms.name)
