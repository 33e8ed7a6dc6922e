"""Counts of both arms from the replicas' own metrics pages and, for errors, from the gateway.

Read by the executor itself, every look: the judge must not wait for the warehouse, and both arms must be of the same
tick. Meaning is `optiinfra_pipelines.engines`, deltas are `rollout.counts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import polars as pl

from optiinfra_pipelines.domain.rollouts import RolloutPlan
from optiinfra_pipelines.rollout.calibration import Calibration
from optiinfra_pipelines.rollout.counts import Buckets, CountTracker, ProcessPage
from optiinfra_pipelines.rollout.guards import ReplicaHealth
from optiinfra_pipelines.rollout.margins import StableHistogram, judged_edges
from optiinfra_pipelines.rollout.planner import Traffic
from optiinfra_pipelines.rollout.tempering import DEFAULT_STAKE
from resources.rollouts.clock import Moment
from resources.rollouts.gpu_watch import GpuWatch
from resources.rollouts.history import StableHistory, lowest
from resources.rollouts.ports import Readings
from resources.rollouts.targets.base import Counted, Replica, ServedTarget

# The margin's odds need a tail to count in; fewer requests make every edge a guess.
MIN_REFERENCE_REQUESTS = 300
# Load moves within a minute; two are the least in which it can be seen to.
MIN_REFERENCE_SECONDS = 120.0
_MINUTE = 60.0

# Frames of the raw tables of these replicas, targets named by server.
Scrape = Callable[[Sequence[Replica], datetime], Mapping[str, pl.DataFrame]]


@dataclass
class _Reference:
    """Increments of the stable replicas since the first look, by signal and minute."""

    began: float
    minutes: dict[str, dict[int, Buckets]]
    requests: int = 0


class ScrapeFeed:
    """Both arms of one target: the stable replicas and the candidates that were started.

    signals: judged latencies. history: the stable replicas' stored past, gpus: the candidates' GPUs; None where none
    is.
    """

    def __init__(
        self,
        target: ServedTarget,
        scrape: Scrape,
        signals: tuple[str, ...],
        look_seconds: float,
        history: StableHistory | None = None,
        gpus: GpuWatch | None = None,
    ) -> None:
        self._target = target
        self._gpus = gpus
        self._scrape = scrape
        self._signals = signals
        self._look_seconds = look_seconds
        self._history = history
        self._bounds: dict[int, tuple[float, ...]] = {}
        self._failed_probes: dict[str, int] = {}
        self._tracker = CountTracker()
        self._reference: _Reference | None = None
        self._last: tuple[float, Readings] | None = None

    @property
    def counts_errors(self) -> bool:
        return self._target.counts_errors

    def read(self, now: Moment) -> Readings:
        """Both arms' counters now. Asked twice within half a look, it answers the same."""
        if self._last is not None and 0 <= now.seconds - self._last[0] < self._look_seconds / 2:
            return self._last[1]
        ours, theirs = self._target.started_arm(), self._target.stable_arm()
        frames = self._scrape((*ours, *theirs), now.at)
        samples = {row["target"]: row for row in frames["raw_engine_samples"].iter_rows(named=True)}
        up = set(frames["raw_scrapes"].filter(pl.col("is_up"))["target"])
        candidates, stable = ([server.server for server in arm] for arm in (ours, theirs))
        gateway = self._target.arm_counts()
        faults = self._gpus.faults(ours, theirs, now) if self._gpus is not None else {}
        pages = self._pages(frames, are_counted_here=gateway is None)
        arms = []
        for names, counted in (
            (candidates, gateway.candidate if gateway is not None else {}),
            (stable, gateway.stable if gateway is not None else {}),
        ):
            engines = [page for page in pages if page.process.rsplit("/", 1)[0] in names]
            arms.append((*engines, *_gateway_pages(counted, now.at)))
        readings = Readings(
            arms[0],
            arms[1],
            tuple(self._health(name, name in up, samples.get(name), faults.get(name)) for name in candidates),
            _sum(samples, candidates, "preemptions_total"),
            _sum(samples, stable, "preemptions_total"),
            _mean(samples, stable, "requests_waiting"),
        )
        self._remember(readings, now.seconds)
        self._last = (now.seconds, readings)
        return readings

    def traffic(self, now: Moment) -> Traffic | str:
        """Load as seen since the first call, latencies from the stored last hour or else since then too.

        A text says what is missing until they suffice.
        """
        self.read(now)
        reference = self._reference
        if reference is None:
            return "the stable replicas' reference begins"
        seconds = now.seconds - reference.began
        if seconds < MIN_REFERENCE_SECONDS or reference.requests < MIN_REFERENCE_REQUESTS:
            return (
                f"the stable replicas' reference has {reference.requests} of {MIN_REFERENCE_REQUESTS} requests in "
                f"{seconds:.0f} of {MIN_REFERENCE_SECONDS:.0f} s"
            )
        minutes = {
            signal: [StableHistogram(one.upper_bounds, one.cumulative) for _, one in sorted(found.items())]
            for signal, found in reference.minutes.items()
        }
        for signal in self._signals:
            stored = self._history.minutes(signal, now.at) if self._history is not None else []
            if len(stored) > len(minutes.get(signal, [])):
                minutes[signal] = stored
        return Traffic(reference.requests / seconds, self._target.stable_replicas(), minutes)

    def calibration(self, plan: RolloutPlan, traffic: Traffic, now: Moment) -> Calibration:
        """From the stored last day; the default, with its reason, where none is stored."""
        if self._history is None:
            return Calibration(DEFAULT_STAKE, None, 0, "no history is stored: the default stake")
        edges = {signal: judged_edges(minutes, plan.margin_ratio) for signal, minutes in traffic.minutes.items()}
        found = {
            signal: self._history.calibration(signal, judged, now.at, alpha=plan.alpha / (len(edges) + 1))
            for signal, judged in edges.items()
            if judged
        }
        return lowest(found) or Calibration(DEFAULT_STAKE, None, 0, "no latency is judged: the default stake")

    def _health(self, name: str, is_up: bool, sample: Mapping[str, Any] | None, gpu_fault: str | None) -> ReplicaHealth:
        self._failed_probes[name] = 0 if is_up else self._failed_probes.get(name, 0) + 1
        found = sample or {}
        return ReplicaHealth(
            name,
            failed_probes=self._failed_probes[name],
            is_process_alive=self._target.is_alive(name),
            started_at=found.get("process_started_at"),
            kv_capacity_tokens=found.get("kv_cache_capacity_tokens"),
            waiting=found.get("requests_waiting"),
            gpu_fault=gpu_fault,
        )

    def _pages(self, frames: Mapping[str, pl.DataFrame], *, are_counted_here: bool) -> list[ProcessPage]:
        """One page per process. are_counted_here: no gateway counts requests, so that the engines' own counters do."""
        for row in frames["raw_histogram_bounds"].iter_rows(named=True):
            self._bounds[row["bounds_id"]] = tuple(row["upper_bounds"])
        histograms: dict[str, dict[str, Buckets]] = {}
        for row in frames["raw_engine_histograms"].iter_rows(named=True):
            bounds = self._bounds.get(row["bounds_id"])
            if row["metric"] in self._signals and bounds is not None and row["bucket_counts"] is not None:
                process = histograms.setdefault(f"{row['target']}/{row['engine_rank']}", {})
                process[row["metric"]] = Buckets(bounds, tuple(row["bucket_counts"]))
        return [
            ProcessPage(
                f"{row['target']}/{row['engine_rank']}",
                row["process_started_at"],
                row["config_hash"],
                histograms.get(f"{row['target']}/{row['engine_rank']}", {}),
                requests=_requests(row) if are_counted_here else None,
                failed=row["requests_failed_total"] if are_counted_here else None,
                generation_tokens=row["generation_tokens_total"],
                cache_queries=row["prefix_cache_queries_total"],
                cache_hits=row["prefix_cache_hits_total"],
                scraped_at=row["scraped_at"],
            )
            for row in frames["raw_engine_samples"].iter_rows(named=True)
        ]

    def _remember(self, readings: Readings, seconds: float) -> None:
        deltas, _ = self._tracker.observe(readings.baseline)
        if self._reference is None:
            self._reference = _Reference(seconds, {})
            return
        minute = int((seconds - self._reference.began) // _MINUTE)
        for delta in deltas.values():
            self._reference.requests += delta.requests or 0
            for signal, buckets in delta.histograms.items():
                _merge(self._reference.minutes.setdefault(signal, {}), minute, buckets)


def requests_in_flight(frames: Mapping[str, pl.DataFrame], replicas: Sequence[Replica]) -> int | None:
    """Requests in execution or queued at these replicas; None when one of them does not tell."""
    samples = frames["raw_engine_samples"]
    total = 0.0
    for one in replicas:
        rows = samples.filter(pl.col("target") == one.server)
        running, waiting = rows["requests_running"].to_list(), rows["requests_waiting"].to_list()
        if not running or None in running:
            return None
        total += sum(running) + sum(found or 0.0 for found in waiting)
    return int(total)


def _gateway_pages(counted: Mapping[str, Counted], at: datetime) -> list[ProcessPage]:
    return [
        ProcessPage(f"{name}@gateway", requests=found.requests, failed=found.failed, scraped_at=at)
        for name, found in counted.items()
    ]


def _requests(row: Mapping[str, Any]) -> float | None:
    """Requests that the engine ended, with an answer or an error; None when it does not count answers."""
    finished: float | None = row["requests_finished_total"]
    return None if finished is None else finished + (row["requests_failed_total"] or 0)


def _merge(minutes: dict[int, Buckets], minute: int, buckets: Buckets) -> None:
    present = minutes.get(minute)
    if present is None or present.upper_bounds != buckets.upper_bounds:
        minutes[minute] = buckets
        return
    summed = tuple(one + other for one, other in zip(present.cumulative, buckets.cumulative, strict=True))
    minutes[minute] = Buckets(present.upper_bounds, summed)


def _sum(samples: Mapping[str, Mapping[str, Any]], names: list[str], column: str) -> float | None:
    known = [samples[name][column] for name in names if name in samples and samples[name][column] is not None]
    return float(sum(known)) if known else None


def _mean(samples: Mapping[str, Mapping[str, Any]], names: list[str], column: str) -> float | None:
    total = _sum(samples, names, column)
    count = sum(1 for name in names if name in samples and samples[name][column] is not None)
    return total / count if total is not None else None
