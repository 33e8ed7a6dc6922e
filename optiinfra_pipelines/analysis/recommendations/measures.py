"""What the tuning rules look at: one set of measures per target over one window, and why a window may not be used.

Pure: rows of a window in, measures out. NULL stays None. Rules and their thresholds are `rules`; reading the rows is
`resources.ledger.store`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.recommendations.limits import (
    AT_CEILING_RATIO,
    KV_FULL_RATIO,
    MAX_GAP_SECONDS,
    MIN_SAMPLES,
    MIN_WINDOW_SECONDS,
    WARM_UP_SECONDS,
)
from optiinfra_pipelines.domain.base import Engine

# Gauges that add up over engine ranks, and those of which the fullest rank counts.
_SUMMED = ("requests_running", "requests_waiting", "requests_waiting_deferred", "kv_cache_capacity_tokens")
_LARGEST = ("kv_cache_usage_ratio", "kv_cache_block_size_tokens")
_LIMITS = ("max_running_requests", "max_batched_tokens")
_COUNTERS = (
    "requests_finished_total",
    "preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "external_cache_queries_total",
    "external_cache_hits_total",
    "cpu_seconds_total",
)
SAMPLE_COLUMNS = (
    "target",
    "engine_rank",
    "scraped_at",
    "engine",
    "vantage",
    "process_started_at",
    "config_hash",
    "is_sleeping",
    *_SUMMED,
    *_LARGEST,
    *_LIMITS,
    *_COUNTERS,
)
# Histograms the rules read, by their normalized names.
HISTOGRAMS = (
    "prompt_tokens",
    "generation_tokens",
    "queue_seconds",
    "prefill_seconds",
    "decode_seconds",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "time_per_output_token_seconds",
    "step_tokens",
    "cache_load_seconds",
)


@dataclass(frozen=True)
class Histogram:
    """New observations of a window, all ranks together: `counts` at or under each bound, the last bound +Inf."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    total: float
    count: float

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count > 0 else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation, observations spread evenly within their bucket; None without a finite bound above."""
        cells = np.diff(np.array([0.0, *self.counts]))
        if self.count <= 0 or not self.bounds or cells[-1] > 0:
            return None
        upper = np.array(self.bounds[:-1])
        lower = np.concatenate([[0.0], upper[:-1]])
        share = cells[:-1] / cells[:-1].sum()
        middle = float(share @ ((upper + lower) / 2))
        square = float(share @ ((upper**2 + upper * lower + lower**2) / 3))
        return math.sqrt(max(0.0, square - middle**2))

    def quantile_bounds(self, q: float) -> tuple[float, float] | None:
        """Edges of the bucket that holds quantile q; the upper one is infinite past the last finite bound."""
        if self.count <= 0 or not self.bounds:
            return None
        index = next(i for i, count in enumerate(self.counts) if count >= q * self.counts[-1])
        return (self.bounds[index - 1] if index else 0.0), self.bounds[index]

    def share_at_or_under(self, bound: float) -> float | None:
        """Share of observations at or under the smallest edge that is not below `bound`."""
        if self.count <= 0 or not self.bounds:
            return None
        edge = next((i for i, edge in enumerate(self.bounds) if edge >= bound * (1 - 1e-9)), len(self.bounds) - 1)
        return self.counts[edge] / self.counts[-1] if self.counts[-1] > 0 else None


@dataclass(frozen=True)
class Measures:
    """One target over one window. values: by name, None when unknown. unusable: why no rule may use it, or None."""

    target: str
    engine: Engine | None
    vantage: str | None
    window_start: datetime
    window_end: datetime
    config_hash: str | None
    ranks: int
    unusable: str | None
    values: Mapping[str, float | None]
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float | None:
        return self.values.get(name)


def measure_targets(
    samples: pl.DataFrame,
    histograms: pl.DataFrame,
    settings: Mapping[tuple[str, str], Mapping[str, str]] | None = None,
) -> dict[str, Measures]:
    """Measures of every target that has samples.

    samples: SAMPLE_COLUMNS of the window's rows. histograms: target, engine_rank, metric, upper_bounds, and
    first_/last_ counts, sum and count of the window. settings: (target, config hash) -> what the page prints.
    """
    if samples.is_empty():
        return {}
    ordered = samples.sort("target", "engine_rank", "scraped_at")
    moments = _moments(ordered)
    gauges = {row["target"]: row for row in _gauges(moments).to_dicts()}
    growth = _growth(ordered)
    guards = {row["target"]: row for row in _guards(ordered).to_dicts()}
    found = _histograms(histograms)
    return {
        target: _measures(target, gauge, growth.get(target, {}), guards[target], found.get(target, {}), settings or {})
        for target, gauge in gauges.items()
    }


def _moments(ordered: pl.DataFrame) -> pl.DataFrame:
    """One row per target and scrape: ranks added up, unknown when one of them is."""
    return (
        ordered.group_by("target", "scraped_at")
        .agg(
            *(
                pl.when(pl.col(name).null_count() == 0).then(pl.col(name).sum()).otherwise(None).alias(name)
                for name in (*_SUMMED, *_LIMITS)
            ),
            *(pl.col(name).max() for name in _LARGEST),
        )
        .sort("target", "scraped_at")
    )


def _gauges(moments: pl.DataFrame) -> pl.DataFrame:
    running, waiting, kv = pl.col("requests_running"), pl.col("requests_waiting"), pl.col("kv_cache_usage_ratio")
    queued = waiting > 0
    half = pl.len() // 2
    return moments.group_by("target", maintain_order=True).agg(
        pl.len().alias("samples"),
        (pl.col("scraped_at").max() - pl.col("scraped_at").min()).dt.total_milliseconds().alias("span_ms"),
        pl.col("scraped_at").diff().max().dt.total_milliseconds().alias("gap_ms"),
        pl.col("scraped_at").min().alias("start"),
        pl.col("scraped_at").max().alias("end"),
        running.mean().alias("running_mean"),
        running.max().alias("running_max"),
        running.last().alias("running_last"),
        waiting.mean().alias("waiting_mean"),
        waiting.max().alias("waiting_max"),
        queued.mean().alias("waiting_share_ratio"),
        waiting.filter(queued).mean().alias("waiting_when_queued"),
        running.filter(queued).mean().alias("running_when_queued"),
        queued.sum().alias("queued_samples"),
        (running.filter(queued) >= _ceiling(running.max())).mean().alias("at_ceiling_ratio"),
        waiting.head(half).mean().alias("waiting_first_half"),
        waiting.tail(half).mean().alias("waiting_second_half"),
        pl.col("requests_waiting_deferred").mean().alias("waiting_deferred_mean"),
        kv.mean().alias("kv_usage_mean_ratio"),
        kv.max().alias("kv_usage_max_ratio"),
        kv.filter(queued).max().alias("kv_usage_queued_max_ratio"),
        (kv >= KV_FULL_RATIO).mean().alias("kv_full_share_ratio"),
        pl.col("kv_cache_capacity_tokens").last().alias("kv_capacity_tokens"),
        pl.col("kv_cache_block_size_tokens").last().alias("kv_block_size_tokens"),
        pl.col("max_running_requests").last().alias("slots"),
        pl.col("max_batched_tokens").last().alias("token_budget"),
    )


def _ceiling(most: pl.Expr) -> pl.Expr:
    """From how many running requests on all slots are taken: one stands empty for a step, of many slots one in ten."""
    return pl.when(most <= 3).then(most).otherwise(pl.min_horizontal(most - 1, AT_CEILING_RATIO * most))


def _growth(ordered: pl.DataFrame) -> dict[str, dict[str, float | None]]:
    """Growth of each counter between first and last sample, ranks added up; None when a rank does not tell."""
    per_rank = ordered.group_by("target", "engine_rank").agg(
        *((pl.col(name).last() - pl.col(name).first()).alias(name) for name in _COUNTERS)
    )
    per_target = per_rank.group_by("target").agg(
        *(
            pl.when(pl.col(name).null_count() == 0).then(pl.col(name).sum()).otherwise(None).alias(name)
            for name in _COUNTERS
        )
    )
    return {row.pop("target"): row for row in per_target.to_dicts()}


def _guards(ordered: pl.DataFrame) -> pl.DataFrame:
    per_rank = ordered.group_by("target", "engine_rank").agg(
        pl.col("engine").last(),
        pl.col("vantage").last(),
        pl.col("process_started_at").n_unique().alias("starts"),
        pl.col("process_started_at").max().alias("started_at"),
        pl.col("config_hash").n_unique().alias("hashes"),
        pl.col("config_hash").last(),
        pl.any_horizontal(
            *((pl.col(name).diff() < 0).any() for name in _COUNTERS if name != "cpu_seconds_total")
        ).alias("is_reset"),
        pl.col("is_sleeping").any().alias("is_sleeping"),
    )
    return per_rank.group_by("target").agg(
        pl.col("engine").last(),
        pl.col("vantage").last(),
        pl.len().alias("ranks"),
        pl.col("starts").max(),
        pl.col("started_at").max(),
        pl.col("hashes").max(),
        pl.col("config_hash").n_unique().alias("rank_hashes"),
        pl.col("config_hash").last(),
        pl.col("is_reset").any(),
        pl.col("is_sleeping").any(),
    )


def _histograms(frame: pl.DataFrame) -> dict[str, dict[str, Histogram]]:
    found: dict[str, dict[str, Histogram]] = {}
    spoiled: set[tuple[str, str]] = set()
    for row in frame.to_dicts():
        key = (row["target"], row["metric"])
        bounds = tuple(row["upper_bounds"] or ())
        counts = tuple(b - a for a, b in zip(row["first_counts"] or (), row["last_counts"] or (), strict=False))
        total, count = row["last_sum"] - row["first_sum"], row["last_count"] - row["first_count"]
        before = found.setdefault(key[0], {}).get(key[1])
        if count < 0 or any(cell < 0 for cell in counts) or (before is not None and before.bounds != bounds):
            spoiled.add(key)
            continue
        if before is not None:
            counts = tuple(a + b for a, b in zip(before.counts, counts, strict=True))
            total, count = total + before.total, count + before.count
        found[key[0]][key[1]] = Histogram(bounds, counts, total, count)
    for target, metric in spoiled:
        found[target].pop(metric, None)
    return found


def _measures(
    target: str,
    gauge: Mapping[str, Any],
    growth: Mapping[str, float | None],
    guard: Mapping[str, Any],
    histograms: Mapping[str, Histogram],
    settings: Mapping[tuple[str, str], Mapping[str, str]],
) -> Measures:
    values: dict[str, float | None] = {
        name: None if value is None else float(value)
        for name, value in gauge.items()
        if name not in ("target", "start", "end", "span_ms", "gap_ms")
    }
    seconds = float(gauge["span_ms"]) / 1000
    values |= {"window_seconds": seconds}
    values |= {name.removesuffix("_total"): value for name, value in growth.items()}
    values |= _derived(values, histograms, seconds)
    start, end = gauge["start"], gauge["end"]
    config_hash = guard["config_hash"]
    return Measures(
        target=target,
        engine=guard["engine"],
        vantage=guard["vantage"],
        window_start=start,
        window_end=end,
        config_hash=config_hash,
        ranks=int(guard["ranks"]),
        unusable=_unusable(values, gauge, guard, start),
        values=values,
        histograms=histograms,
        settings=settings.get((target, config_hash), {}) if config_hash else {},
    )


def _derived(
    values: Mapping[str, float | None], histograms: Mapping[str, Histogram], seconds: float
) -> dict[str, float | None]:
    def mean(metric: str) -> float | None:
        histogram = histograms.get(metric)
        return None if histogram is None else histogram.mean

    prompt, output = histograms.get("prompt_tokens"), histograms.get("generation_tokens")
    finished, preempted = values.get("requests_finished"), values.get("preemptions")
    touched = None if finished is None else finished + (values.get("running_last") or 0)
    rate = low = None
    if preempted is not None and touched:
        from scipy.stats import chi2  # half a second to import: only where it is used

        rate = preempted / touched
        # Exact lower bound of a Poisson count at 95 %: 14 preemptions are sure, one is not.
        low = float(chi2.ppf(0.05, 2 * preempted)) / 2 / touched if preempted else 0.0
    total_mean = total_sd = None
    if prompt is not None and output is not None and prompt.mean is not None and output.mean is not None:
        total_mean = prompt.mean + output.mean
        if prompt.deviation is not None and output.deviation is not None:
            # Prompt and answer taken as independent.
            total_sd = math.hypot(prompt.deviation, output.deviation)
    hits, queries = values.get("prefix_cache_hits"), values.get("prefix_cache_queries")
    cpu = values.get("cpu_seconds")
    longest = [histogram.quantile_bounds(0.999) for histogram in (prompt, output) if histogram is not None]
    return {
        "preemptions_per_request": rate,
        "preemptions_per_request_low": low,
        "request_tokens_mean": total_mean,
        "request_tokens_deviation": total_sd,
        "request_tokens_p999_upper": sum(bound[1] for bound in longest if bound) if len(longest) == 2 else None,
        "prefix_hit_ratio": hits / queries if hits is not None and queries else None,
        "cpu_cores_busy": cpu / seconds if cpu is not None and seconds > 0 else None,
        "waiting_growth": _difference(values.get("waiting_second_half"), values.get("waiting_first_half")),
        **{f"{metric}_mean": mean(metric) for metric in HISTOGRAMS},
        **{f"{metric}_count": histograms[metric].count if metric in histograms else None for metric in HISTOGRAMS},
    }


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _unusable(
    values: Mapping[str, float | None],
    gauge: Mapping[str, Any],
    guard: Mapping[str, Any],
    start: datetime,
) -> str | None:
    """The first reason for which no rule may act on this window."""
    started_at = guard["started_at"]
    reasons: Sequence[tuple[object, str]] = (
        (guard["starts"] != 1, "the engine restarted in the window"),
        (guard["is_reset"], "a counter fell in the window: a reset that the process start does not tell"),
        (guard["hashes"] != 1, "the configuration changed in the window"),
        (guard["rank_hashes"] != 1, "its engine ranks have different configurations"),
        (
            isinstance(started_at, datetime) and (start - started_at).total_seconds() < WARM_UP_SECONDS,
            f"the window begins within {WARM_UP_SECONDS:g} s of the engine's start: warm-up",
        ),
        (guard["is_sleeping"], "the engine was asleep in the window"),
        (float(values["samples"] or 0) < MIN_SAMPLES, f"{values['samples']:g} of {MIN_SAMPLES} samples"),
        (
            float(values["window_seconds"] or 0) < MIN_WINDOW_SECONDS,
            f"the samples span {values['window_seconds']:g} of {MIN_WINDOW_SECONDS:g} s",
        ),
        (
            float(gauge["gap_ms"] or 0) / 1000 > MAX_GAP_SECONDS,
            f"a gap of {float(gauge['gap_ms'] or 0) / 1000:.0f} s between samples",
        ),
    )
    return next((reason for is_so, reason in reasons if is_so), None)
