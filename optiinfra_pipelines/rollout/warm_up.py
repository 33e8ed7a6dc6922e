"""When a step's warm-up is over: once the arms' prefix-cache hit rates have settled, not before and not never.

Pure. Looks at whole counts of looked-up and found tokens and at nothing else: no latency and no failure can move the
moment at which judging begins. A bet that is fair from any moment on stays fair when that moment is chosen by what was
seen before it, so the judge's false-alarm rate is untouched (optional starting of a supermartingale).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

# Hit rates are ratios of tokens. At 2 requests/s a minute of them scatters by about this much by itself; a gap of a
# twentieth moves time to first token by about as much, half of the 10 % margin.
SETTLED_RATIO = 0.05
# A candidate whose cache stays emptier than the baseline's may be made so by its flags: waiting longer tells nothing.
LOWER_FACTOR = 3
# Ten minutes at the default minimum of one: at 2 requests/s of 1,000 tokens that is 1.2 M tokens, more than the cache
# of a replica holds. Judging begins all the same: a cold cache can only make a candidate look worse than it is, so
# what is risked is a needless way back and never a wrong pass; and where few requests make hit rates scatter for good,
# a pause would stop every rollout.
MAX_FACTOR = 10


class WarmUpRule(StrEnum):
    """Which rule ended a warm-up. TIME: no hit rates are counted. MAXIMUM: they had not settled."""

    TIME = "time"
    HIT_RATE = "hit_rate"
    MAXIMUM = "maximum"


@dataclass(frozen=True)
class CacheTick:
    """One arm in one tick: tokens looked up in the prefix cache, and those found there."""

    queries: int
    hits: int


@dataclass(frozen=True)
class WarmUpEnd:
    """The end of a warm-up: seconds since the step began, the rule that held, and the numbers."""

    seconds: float
    rule: WarmUpRule
    reason: str


def longest_warm_up(warm_up_seconds: float) -> float:
    """Seconds after which a warm-up of this minimum ends in any case."""
    return MAX_FACTOR * warm_up_seconds


class WarmUp:
    """The warm-up of one step. warm_up_seconds: its minimum; 0 asks for none.

    Over when the rate of neither arm differs by more than SETTLED_RATIO between the third quarter of the ticks so far
    and the last one, and the candidate's is not that much under the baseline's or LOWER_FACTOR times the minimum
    has passed. By time alone where the candidate's page does not count, or counted no lookup; at `longest_warm_up` in
    any case.
    """

    def __init__(self, warm_up_seconds: float) -> None:
        self._least = warm_up_seconds
        self._canary: list[CacheTick] = []
        self._baseline: list[CacheTick] = []
        self.end: WarmUpEnd | None = None
        if warm_up_seconds <= 0:
            self.end = WarmUpEnd(0.0, WarmUpRule.TIME, "no warm-up was asked for")

    def observe(self, seconds: float, canary: CacheTick | None, baseline: CacheTick | None) -> None:
        """Take in one tick. seconds: since the step began. None: the arm's pages do not count, or not in this tick."""
        if self.end is not None:
            return
        if canary is not None:
            self._canary.append(canary)
        if baseline is not None:
            self._baseline.append(baseline)
        if seconds >= self._least:
            self.end = self._ended(seconds)

    @property
    def said(self) -> str:
        """What holds a warm-up up, or what ended it."""
        if self.end is not None:
            return f"warm-up of {self.end.seconds:.0f} s: {self.end.reason}"
        return f"warm-up, not judged yet: {self._why_not() or 'its least time is not over'}"

    def _ended(self, seconds: float) -> WarmUpEnd | None:
        if not self._canary:
            return WarmUpEnd(seconds, WarmUpRule.TIME, "by time alone, the candidate's pages do not count cache hits")
        if not sum(tick.queries for tick in self._canary):
            return WarmUpEnd(seconds, WarmUpRule.TIME, "by time alone, no cache lookup was counted at the candidate")
        why_not = self._why_not() or self._why_lower(seconds)
        if why_not is None:
            return WarmUpEnd(seconds, WarmUpRule.HIT_RATE, f"the hit rate has settled, {self._rates()}")
        if seconds >= longest_warm_up(self._least):
            return WarmUpEnd(seconds, WarmUpRule.MAXIMUM, f"judged although the hit rate has not settled: {why_not}")
        return None

    def _why_not(self) -> str | None:
        """What of the arms moves still; None when nothing does."""
        for name, ticks in (("candidate", self._canary), ("baseline", self._baseline)):
            before, last = _lately(ticks)
            if before is None or last is None:
                if name == "baseline":
                    # Without a cache, or all traffic has left it: it holds nothing up.
                    continue
                return f"the {name} has too few lookups"
            if abs(last - before) > SETTLED_RATIO:
                return f"the {name}'s hit rate went from {before:.2f} to {last:.2f}"
        return None

    def _why_lower(self, seconds: float) -> str | None:
        ours, theirs = _lately(self._canary)[1], _lately(self._baseline)[1]
        if ours is None or theirs is None or ours >= theirs - SETTLED_RATIO:
            return None
        if seconds >= LOWER_FACTOR * self._least:
            return None
        return f"the candidate's hit rate is {ours:.2f}, the baseline's {theirs:.2f}"

    def _rates(self) -> str:
        ours, theirs = _lately(self._canary)[1], _lately(self._baseline)[1]
        beside = "" if theirs is None else f" beside {theirs:.2f} in the baseline"
        return f"{ours or 0.0:.2f} at the candidate{beside}"


def _lately(ticks: Sequence[CacheTick]) -> tuple[float | None, float | None]:
    """Hit rates of the third and the last quarter of the ticks; None where nothing was looked up.

    Parts of all ticks so far: a longer wait averages more, and a cache that fills exponentially is left when less than
    a tenth is missing, after at most five of its time constants.
    """
    quarter = len(ticks) // 4
    return _rate(ticks[2 * quarter : 3 * quarter]), _rate(ticks[3 * quarter :])


def _rate(ticks: Sequence[CacheTick]) -> float | None:
    queries = sum(tick.queries for tick in ticks)
    return sum(tick.hits for tick in ticks) / queries if queries else None
