"""What was seen of one target in one window: its scrapes, the steps between them, and what is known around it.

Pure. Here: the shape of the input of a diagnosis and the steps that counters grow over. Not here: judging them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property
from itertools import pairwise

import polars as pl

from optiinfra_pipelines.analysis.findings.measure import Tables
from optiinfra_pipelines.domain.base import Source
from optiinfra_pipelines.domain.findings import Subject
from optiinfra_pipelines.domain.fleet import Objective
from optiinfra_pipelines.sql.sources import raw_tables

# Added up over engine ranks; usage is that of the fullest rank, because each rank preempts by itself.
_SUMMED = ("requests_running", "requests_waiting", "requests_waiting_capacity", "requests_waiting_deferred")
_LIMITS = ("max_running_requests",)
_GROWING = (
    "requests_finished_total",
    "preemptions_total",
    "generation_tokens_total",
    "prompt_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "cpu_seconds_total",
)
# Counters that a new process starts again from zero and that every serving engine has some of.
_LIFE = ("generation_tokens_total", "prompt_tokens_total", "requests_finished_total", "steps_total")
_RATIOS = ("kv_cache_usage_ratio", "kv_cache_host_usage_ratio", "kv_cache_reserved_ratio", "prefix_cache_hit_ratio")


# A start time is a float of seconds that some engines compute anew: a second apart is the same process.
_SAME_START = timedelta(seconds=1)
# How far a target's clock may lag ours, as the SQL macro scrape_steps has it.
CLOCK_LAG = timedelta(minutes=1)


@dataclass(frozen=True)
class Capacity:
    """What one replica of a deployment was seen to do while work waited: tokens a second, and from how many periods."""

    tokens_per_second: float
    period_count: int


@dataclass(frozen=True)
class HitHistory:
    """Prefix-cache hit ratios of earlier periods of one target, and what its workload could reach, where known."""

    period_ratios: Sequence[float] = ()
    attainable_ratio: float | None = None


@dataclass(frozen=True)
class Step:
    """From one scrape to the next: gauges at its end, growth over it by column. A missing key is not known."""

    start_at: datetime
    end_at: datetime
    gauges: Mapping[str, float]
    usage_before: float | None
    growth: Mapping[str, float]
    # Of each histogram: sum and count of the observations made in the step.
    observed: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    # What went backwards: a counter, or the start time when another process answered. Nothing can be compared then.
    fallen: str | None = None
    # Start of a process that took over in this step, and whether it had run beside the one before it.
    started_at: datetime | None = None
    was_running: bool = False

    @property
    def seconds(self) -> float:
        return (self.end_at - self.start_at).total_seconds()

    def gauge(self, name: str) -> float | None:
        return self.gauges.get(name)

    def grew(self, name: str) -> float | None:
        return self.growth.get(name)

    @property
    def usage(self) -> float | None:
        """KV usage while the step lasted: the larger of its two ends."""
        ends = [u for u in (self.usage_before, self.gauge("kv_cache_usage_ratio")) if u is not None]
        return max(ends, default=None)


@dataclass(frozen=True)
class EngineWindow:
    """One target in [start, end]; `end` is now.

    scrapes, samples, histograms: rows of stg_scrapes, stg_engine_samples, stg_engine_histograms of this target; rows
    before `start` tell what was before (a restart needs it) and are not judged. is_clean: samples have passed `cleaned`
    already. bounds: bucket bounds by id. is_new: the target was never read before the window.
    ready_replicas: engines behind a frontend, None when not known. objectives, capacity, hits: what to hold it against.
    """

    target: str
    start: datetime
    end: datetime
    source: Source
    scrapes: pl.DataFrame
    samples: pl.DataFrame
    histograms: pl.DataFrame
    bounds: Mapping[int, Sequence[float]] = field(default_factory=dict)
    is_clean: bool = False
    is_new: bool = False
    ready_replicas: int | None = None
    objectives: Sequence[Objective] = ()
    capacity: Capacity | None = None
    hits: HitHistory = field(default_factory=HitHistory)

    @property
    def subject(self) -> Subject:
        return Subject(kind="target", name=self.target)

    @cached_property
    def tables(self) -> Tables:
        return Tables(
            {
                "stg_scrapes": _shaped("raw_scrapes", self.scrapes),
                "stg_engine_samples": self.samples if self.is_clean else cleaned(self.samples),
                "stg_engine_histograms": _shaped("raw_engine_histograms", self.histograms),
            },
            self.bounds,
        )

    @cached_property
    def last_up_at(self) -> datetime | None:
        scrapes = self.tables.frames["stg_scrapes"]
        newest = scrapes.filter(pl.col("is_up"), pl.col("scraped_at") <= self.end)["scraped_at"].max()
        return newest if isinstance(newest, datetime) else None

    @cached_property
    def is_idle_slot(self) -> bool:
        """The newest scrape found a place for candidates of rollouts in which nothing should run."""
        scrapes = self.tables.frames["stg_scrapes"].filter(pl.col("scraped_at") <= self.end).sort("scraped_at")
        return scrapes.height > 0 and scrapes["error_kind"][-1] == "idle_slot"

    @cached_property
    def vantage(self) -> str | None:
        """engine, frontend or cache, as the newest page says; None when no page was read."""
        named = self.tables.frames["stg_scrapes"].filter(pl.col("vantage").is_not_null()).sort("scraped_at")
        samples = self.tables.frames["stg_engine_samples"].filter(pl.col("vantage").is_not_null())
        for frame in (named, samples):
            if frame.height:
                return str(frame["vantage"][-1])
        return None

    @cached_property
    def engine(self) -> str | None:
        samples = self.tables.frames["stg_engine_samples"].sort("scraped_at")["engine"].drop_nulls()
        return str(samples[-1]) if samples.len() else None

    @cached_property
    def all_steps(self) -> tuple[Step, ...]:
        """Every step whose end lies in the window, oldest first."""
        return tuple(step for step in _steps(self.tables) if self.start <= step.end_at <= self.end)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The steps of the newest life of the process: what was before a restart is not mixed with what came after."""
        kept: list[Step] = []
        for step in self.all_steps:
            if is_restart(step):
                kept = []
            elif step.fallen is None:
                kept.append(step)
        return tuple(kept)

    def has(self, column: str) -> bool:
        """Whether the newest life ever told this gauge."""
        return any(column in step.gauges for step in self.steps)


def is_restart(step: Step) -> bool:
    """The process behind the page started within the step. Without a start time, falling counters tell."""
    if step.started_at is not None:
        return True
    return step.fallen is not None and "process_started_at" not in step.gauges


def _shaped(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Exactly the columns of the raw table, in their types; a column that is not there is unknown."""
    schema = raw_tables()[table].polars_schema
    if frame.schema == schema:
        return frame
    missing = [pl.lit(None).cast(kind).alias(name) for name, kind in schema.items() if name not in frame.columns]
    return frame.with_columns(missing).select(pl.col(name).cast(kind, strict=False) for name, kind in schema.items())


def cleaned(samples: pl.DataFrame) -> pl.DataFrame:
    """As stg_engine_samples: -1 and NaN are not shares of anything. Infinite values are nobody's count either."""
    shaped = _shaped("raw_engine_samples", samples)
    floats = [name for name, kind in shaped.schema.items() if kind == pl.Float64]
    finite = shaped.with_columns(pl.when(pl.col(name).is_finite()).then(pl.col(name)).alias(name) for name in floats)
    return finite.with_columns(
        pl.when(pl.col(name).is_between(0, 1)).then(pl.col(name)).alias(name) for name in _RATIOS
    )


def _steps(tables: Tables) -> list[Step]:
    """Between every two scrapes that follow each other."""
    scrapes = _by_time(tables.frames["stg_engine_samples"])
    observed = _observations(tables.frames["stg_engine_histograms"])
    steps: list[Step] = []
    times = sorted(scrapes)
    is_one_after_another = _is_one_after_another([scrapes[at] for at in times])
    for before_at, at in pairwise(times):
        before, now = scrapes[before_at], scrapes[at]
        started_at, is_known, was_running = _started(before, now, before_at)
        is_other = was_running and not is_one_after_another
        step = Step(
            start_at=before_at,
            end_at=at,
            gauges=_gauges(now) | ({"process_started_at": 1.0} if is_known else {}),
            usage_before=_gauges(before).get("kv_cache_usage_ratio"),
            growth=_growth(before, now),
            observed=_observed(observed.get(before_at, {}), observed.get(at, {})),
            fallen="process_started_at" if is_other else _fallen(before, now),
            started_at=None if is_other else started_at,
            was_running=was_running,
        )
        is_comparable = started_at is None
        steps.append(step if is_comparable else replace(step, growth={}, observed={}, usage_before=None))
    return steps


Ranks = Mapping[str, Mapping[str, object]]


def _by_time(samples: pl.DataFrame) -> dict[datetime, dict[str, Mapping[str, object]]]:
    wanted = ["scraped_at", "engine_rank", "process_started_at", "kv_cache_usage_ratio", "steps_total"]
    found: dict[datetime, dict[str, Mapping[str, object]]] = {}
    for row in samples.select(*wanted, *_SUMMED, *_LIMITS, *_GROWING).iter_rows(named=True):
        if row["scraped_at"] is not None:
            found.setdefault(row["scraped_at"], {})[str(row["engine_rank"])] = row
    return found


def _number(row: Mapping[str, object], column: str) -> float | None:
    value = row.get(column)
    return value if isinstance(value, float) else None


def _gauges(ranks: Ranks) -> dict[str, float]:
    gauges: dict[str, float] = {}
    for column in (*_SUMMED, *_LIMITS):
        values = [value for row in ranks.values() if (value := _number(row, column)) is not None]
        if values and min(values) >= 0:
            gauges[column] = sum(values)
    usages = [value for row in ranks.values() if (value := _number(row, "kv_cache_usage_ratio")) is not None]
    if usages:
        gauges["kv_cache_usage_ratio"] = max(usages)
    return gauges


def _growth(before: Ranks, now: Ranks) -> dict[str, float]:
    grown: dict[str, float] = {}
    for column in _GROWING:
        for rank, row in now.items():
            old, new = _number(before.get(rank, {}), column), _number(row, column)
            if old is not None and new is not None and new >= old:
                grown[column] = grown.get(column, 0.0) + new - old
    return grown


def _fallen(before: Ranks, now: Ranks) -> str | None:
    for rank, row in now.items():
        for column in _LIFE:
            old, new = _number(before.get(rank, {}), column), _number(row, column)
            if old is not None and new is not None and new < old:
                return column
    return None


def _started(before: Ranks, now: Ranks, before_at: datetime) -> tuple[datetime | None, bool, bool]:
    """When the process that answers now started, None if it is the one before; whether start times are told; whether
    it ran already at the scrape before, when the other one answered.
    """
    old, started_at = _start_of(before), _start_of(now)
    if old is None or started_at is None:
        return None, started_at is not None, False
    if abs(started_at - old) <= _SAME_START:
        return None, True, False
    return started_at, True, started_at <= before_at - CLOCK_LAG


def _start_of(ranks: Ranks) -> datetime | None:
    return max((at for row in ranks.values() if isinstance(at := row["process_started_at"], datetime)), default=None)


def _is_one_after_another(scrapes: Sequence[Ranks]) -> bool:
    """Whether processes took over from each other, each the younger one, and the last one answered twice.

    Replicas that share one address answer in turns: one comes back after the other.
    """
    starts = [at for ranks in scrapes if (at := _start_of(ranks)) is not None]
    is_rising = all(late >= early - _SAME_START for early, late in pairwise(starts))
    return is_rising and len(starts) > 1 and starts[-1] - starts[-2] <= _SAME_START


Observations = dict[tuple[str, str, object], tuple[float, float]]


def _observations(histograms: pl.DataFrame) -> dict[datetime, Observations]:
    found: dict[datetime, Observations] = {}
    wanted = histograms.select("scraped_at", "engine_rank", "metric", "bounds_id", "sum_value", "count_value")
    for at, rank, metric, bounds_id, total, count in wanted.iter_rows():
        if None not in (at, metric, total, count):
            found.setdefault(at, {})[str(rank), metric, bounds_id] = (total, count)
    return found


def _observed(before: Observations, now: Observations) -> dict[str, tuple[float, float]]:
    """Sum and count made between two scrapes, ranks added up; a histogram that fell tells nothing of this step."""
    made: dict[str, tuple[float, float]] = {}
    for key, (total, count) in now.items():
        if key in before:
            old_total, old_count = before[key]
            if count >= old_count and total >= old_total:
                seen = made.get(key[1], (0.0, 0.0))
                made[key[1]] = (seen[0] + total - old_total, seen[1] + count - old_count)
    return made
