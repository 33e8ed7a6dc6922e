"""Exact counts of one tick from two scrapes of one process: whole numbers, cut where two processes would be mixed.

A rollout restarts engines, so counters start over and new series appear exactly when it matters. `rate()` bridges and
extrapolates there; here a delta is the integer difference of two neighboring ticks of one process with one
configuration, the whole of its counters when it began between them, or nothing. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise

from optiinfra_pipelines.rollout.judge import ArmTick
from optiinfra_pipelines.rollout.warm_up import CacheTick


@dataclass(frozen=True)
class Buckets:
    """A cumulative histogram as scraped: ascending upper bounds, the last +Inf, and the count at or under each."""

    upper_bounds: tuple[float, ...]
    cumulative: tuple[float, ...]


@dataclass(frozen=True)
class ProcessPage:
    """What one process told in one tick. None: it does not tell.

    requests, failed: counters for the error gate. generation_tokens: counter for throughput. cache_queries, cache_hits:
    counters of tokens looked up and found in the prefix cache. scraped_at: tells one scrape from the next.
    """

    process: str
    started_at: datetime | None = None
    config_hash: str | None = None
    histograms: Mapping[str, Buckets] = field(default_factory=dict)
    requests: float | None = None
    failed: float | None = None
    generation_tokens: float | None = None
    cache_queries: float | None = None
    cache_hits: float | None = None
    scraped_at: datetime | None = None


@dataclass(frozen=True)
class ProcessDelta:
    """What one process did in one tick: requests per signal and bound at or under it, errors, and cache lookups."""

    histograms: Mapping[str, Buckets]
    requests: int | None
    failed: int | None
    generation_tokens: float | None
    process: str = ""
    cache: CacheTick | None = None


@dataclass(frozen=True)
class Cut:
    """A process whose tick does not count, and why."""

    process: str
    reason: str


class CountTracker:
    """Turns pages of successive ticks into deltas. One tracker for all processes of both arms."""

    def __init__(self) -> None:
        self._last: dict[str, ProcessPage] = {}
        self._has_looked = False

    def observe(self, pages: Iterable[ProcessPage]) -> tuple[dict[str, ProcessDelta], tuple[Cut, ...]]:
        """Deltas of the processes seen in this tick and in the one before it; and the cuts, each with its reason.

        A process that misses a tick is cut in the next one too: its delta would span two, and a tick must be the same
        stretch of time in both arms. So is one whose scrape is delivered again beside new ones of others; a whole tick
        that is delivered again was counted already and changes nothing.
        """
        given = {page.process: page for page in pages}
        repeated = {process for process, page in given.items() if self._is_repeated(page)}
        if given and len(repeated) == len(given):
            return {}, tuple(Cut(process, "the same scrape again") for process in given)
        before, self._last = self._last, {name: page for name, page in given.items() if name not in repeated}
        had_looked, self._has_looked = self._has_looked, True
        deltas: dict[str, ProcessDelta] = {}
        cuts: list[Cut] = []
        for process, page in self._last.items():
            found = self._delta(before.get(process), page) if had_looked else "first look: nothing to subtract"
            if isinstance(found, str):
                cuts.append(Cut(process, found))
            else:
                deltas[process] = found
        cuts += [Cut(process, "no page in this tick") for process in before if process not in self._last]
        return deltas, tuple(cuts)

    def _is_repeated(self, page: ProcessPage) -> bool:
        before = self._last.get(page.process)
        return before is not None and page.scraped_at is not None and before.scraped_at == page.scraped_at

    @staticmethod
    def _delta(before: ProcessPage | None, now: ProcessPage) -> ProcessDelta | str:
        if before is None:
            return "no page in the tick before"
        if before.config_hash != now.config_hash:
            return f"its configuration changed from {before.config_hash} to {now.config_hash}"
        is_restarted = before.started_at != now.started_at or _fell(before, now)
        histograms = {}
        for signal, buckets in now.histograms.items():
            old = None if is_restarted else before.histograms.get(signal)
            if old is not None and old.upper_bounds != buckets.upper_bounds:
                return f"the bounds of {signal} changed"
            counts = _whole(buckets.cumulative, old.cumulative if old else None)
            if counts is None:
                return f"{signal} is not a histogram of whole, rising counts"
            histograms[signal] = Buckets(buckets.upper_bounds, counts)
        requests = _counter(before.requests, now.requests, is_restarted)
        failed = _counter(before.failed, now.failed, is_restarted)
        if requests is not None and failed is not None and failed > requests:
            return f"{failed} failures of {requests} requests"
        tokens = _counter(before.generation_tokens, now.generation_tokens, is_restarted)
        cache = _cache(before, now, is_restarted)
        return ProcessDelta(histograms, requests, failed, tokens, now.process, cache)


def arm_tick(deltas: Iterable[ProcessDelta], bounds: Mapping[str, Iterable[float]]) -> ArmTick | None:
    """The sum over an arm's processes: requests of each signal, those over each judged bound, and errors.

    A bound that one of the processes does not count at (another engine version, say) is left out: a sum over some of
    them is not the arm's. None when no process of the arm counts in this tick, or when one of them lacks a signal or
    all of its judged bounds: that is no data.
    """
    found = list(deltas)
    if not found:
        return None
    # A gateway's own counters have requests and failures, no latency.
    engines = [delta for delta in found if delta.histograms]
    observed: dict[str, int] = {}
    over: dict[str, dict[float, int]] = {}
    replicas: dict[str, dict[float, dict[str, tuple[int, int]]]] = {}
    for signal, wanted in bounds.items():
        if not engines:
            break
        if any(signal not in delta.histograms for delta in engines):
            return None
        common = set[float].intersection(*(set(delta.histograms[signal].upper_bounds) for delta in engines))
        judged = [bound for bound in wanted if bound in common]
        if not judged:
            return None
        observed[signal] = sum(int(delta.histograms[signal].cumulative[-1]) for delta in engines)
        by_bound = {
            bound: {_named(delta, i): _over(delta, signal, bound) for i, delta in enumerate(engines)}
            for bound in judged
        }
        over[signal] = {bound: sum(slow for _, slow in each.values()) for bound, each in by_bound.items()}
        if all(delta.process for delta in engines):
            replicas[signal] = by_bound
    told = [delta.generation_tokens for delta in found if delta.generation_tokens is not None]
    return ArmTick(
        observed,
        over,
        sum(delta.requests or 0 for delta in found),
        sum(delta.failed or 0 for delta in found),
        sum(told) / len(told) if told else None,
        replicas,
        _cache_of(engines),
    )


def _cache_of(engines: Sequence[ProcessDelta]) -> CacheTick | None:
    """Lookups of an arm; None when one of its engines does not count them."""
    told = [delta.cache for delta in engines if delta.cache is not None]
    if not told or len(told) < len(engines):
        return None
    return CacheTick(sum(one.queries for one in told), sum(one.hits for one in told))


def _named(delta: ProcessDelta, index: int) -> str:
    return delta.process or str(index)


def _over(delta: ProcessDelta, signal: str, bound: float) -> tuple[int, int]:
    """Requests of a process in a tick, and those over a bound it counts at."""
    buckets = delta.histograms[signal]
    total = int(buckets.cumulative[-1])
    return total, total - int(buckets.cumulative[buckets.upper_bounds.index(bound)])


def _fell(before: ProcessPage, now: ProcessPage) -> bool:
    """Whether any counter went down: a restart that the page's start time does not show."""
    pairs = [
        (before.requests, now.requests),
        (before.failed, now.failed),
        (before.generation_tokens, now.generation_tokens),
    ]
    pairs += [
        (before.histograms[signal].cumulative[-1], buckets.cumulative[-1])
        for signal, buckets in now.histograms.items()
        if signal in before.histograms
    ]
    return any(old is not None and new is not None and new < old for old, new in pairs)


def _counter(before: float | None, now: float | None, is_restarted: bool) -> int | None:
    if now is None or (before is None and not is_restarted) or not math.isfinite(now):
        return None
    delta = now if is_restarted or before is None else now - before
    return int(delta) if float(delta).is_integer() and delta >= 0 else None


def _cache(before: ProcessPage, now: ProcessPage, is_restarted: bool) -> CacheTick | None:
    queries = _counter(before.cache_queries, now.cache_queries, is_restarted)
    hits = _counter(before.cache_hits, now.cache_hits, is_restarted)
    return None if queries is None or hits is None or hits > queries else CacheTick(queries, hits)


def _whole(now: tuple[float, ...], before: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Bucket deltas when they are whole and rise with the bound; None when they cannot be counts of one process."""
    counts = now if before is None else tuple(new - old for new, old in zip(now, before, strict=True))
    rising = all(low <= high for low, high in pairwise(counts))
    is_whole = all(math.isfinite(count) and count >= 0 and float(count).is_integer() for count in counts)
    return counts if counts and rising and is_whole else None
