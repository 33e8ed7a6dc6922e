"""One page -> rows of the raw tables, by the plan of its layout.

Here: reading values, dropping what cannot be read, naming it. Not here: what names mean (the dialects), frames of
many pages (`frames`), writing them (`resources.warehouse`). Timestamps on the page are not used: rows carry the time
of the scrape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from optiinfra_pipelines.domain.base import Engine
from optiinfra_pipelines.engines.catalog import Identity
from optiinfra_pipelines.engines.compiler import HistogramPlan, Values
from optiinfra_pipelines.engines.plan import (
    ENGINE_COLUMNS,
    TIER_COLUMNS,
    Missing,
    Plan,
    kept_series,
    plan_for,
)
from optiinfra_pipelines.exposition import Page

Row = tuple[object, ...]
# The tables that a page becomes, in the order of sources.yml.
TABLES = (
    "raw_engine_samples",
    "raw_engine_histograms",
    "raw_histogram_bounds",
    "raw_engine_configs",
    "raw_kv_tier_samples",
    "raw_kept_samples",
)
_ENGINE_HEAD = ENGINE_COLUMNS.index("config_hash") + 1
_TIER_HEAD = TIER_COLUMNS.index("model_name") + 1
_HEALTHY = TIER_COLUMNS.index("is_healthy")
# Wall clocks before 2000 or after 2200 are not start times; they are a broken gauge.
_EARLIEST, _LATEST = 946_684_800.0, 7_258_118_400.0


@dataclass(frozen=True, slots=True)
class Defect:
    """A histogram on the page that was dropped, and why; everything else of the page stands."""

    metric: str
    source_metric: str
    engine_rank: str
    reason: str


@dataclass(frozen=True, slots=True)
class Normalized:
    """Rows of one page, by table, as tuples in the order of that table's columns; and what to know about them.

    unknown_families: under the engine's own prefix and not in its table. missing: what ought to be there, and the
    flag that turns it on. mapped_families, ignored_families: read, and left out on purpose.
    """

    identity: Identity
    target: str
    scraped_at: datetime
    process_started_at: datetime | None
    rows: Mapping[str, Sequence[Row]]
    mapped_families: tuple[str, ...]
    ignored_families: tuple[str, ...]
    unknown_families: tuple[str, ...]
    missing: tuple[Missing, ...]
    defects: tuple[Defect, ...]
    notes: tuple[str, ...]


def normalize(
    page: Page, *, target: str, scraped_at: datetime, keep: tuple[str, ...] = (), engine: Engine | None = None
) -> Normalized:
    """Everything that a page says, in our words.

    scraped_at: start of the scrape, aware. keep: families or samples to keep verbatim, * and ? being wildcards.
    engine: what the operator says it is. A value that is NaN, infinite or negative is NULL: no quantity here can be.
    raw_engine_configs and raw_histogram_bounds repeat with every page; the writer keeps first sights.
    Raises UnknownEngineError when no known engine printed the page.
    """
    plan = plan_for(page.layout, engine)
    values = page.values
    started = _instant(plan.started(values)) if plan.started else None
    samples, configs = _engine_rows(plan, values, target, scraped_at, started)
    histograms, bounds, defects = _histogram_rows(plan, values, target, scraped_at)
    kept = kept_series(page.layout, keep) if keep else ()
    return Normalized(
        identity=plan.identity,
        target=target,
        scraped_at=scraped_at,
        process_started_at=started,
        rows={
            "raw_engine_samples": samples,
            "raw_engine_histograms": histograms,
            "raw_histogram_bounds": bounds,
            "raw_engine_configs": configs,
            "raw_kv_tier_samples": _tier_rows(plan, values, target, scraped_at),
            "raw_kept_samples": [(scraped_at, target, name, labels, values[i]) for i, name, labels in kept],
        },
        mapped_families=plan.mapped,
        ignored_families=plan.ignored,
        unknown_families=plan.unknown,
        missing=(*plan.missing, *(missing for number, missing in plan.off_while_zero if number(values) == 0)),
        defects=(*(Defect(f.metric, f.source, f.rank, f.reason) for f in plan.flaws), *defects),
        notes=plan.notes,
    )


def _instant(seconds: float | None) -> datetime | None:
    """Unix seconds as UTC; None for what is no time of day."""
    return datetime.fromtimestamp(seconds, UTC) if seconds and _EARLIEST <= seconds <= _LATEST else None


def _engine_rows(
    plan: Plan, values: Values, target: str, scraped_at: datetime, started: datetime | None
) -> tuple[list[Row], list[Row]]:
    samples: list[Row] = []
    configs: list[Row] = []
    identity = plan.identity
    empty = [None] * (len(ENGINE_COLUMNS) - _ENGINE_HEAD)
    for rank in plan.ranks:
        config = rank.config.read(values)
        digest = None
        if config is not None:
            digest, settings = config
            configs.append((scraped_at, target, rank.rank, digest, identity.engine, identity.version, settings))
        row: list[object] = [
            scraped_at,
            target,
            rank.rank,
            identity.engine,
            identity.vantage,
            rank.model_name,
            started,
            digest,
            *empty,
        ]
        for picks in rank.picks:
            picks.fill(row, values)
        samples.append(tuple(row))
    return samples, configs


def _tier_rows(plan: Plan, values: Values, target: str, scraped_at: datetime) -> list[Row]:
    rows: list[Row] = []
    for tier in plan.tiers:
        row: list[object] = [scraped_at, target, tier.tier, tier.model_name]
        row += [None] * (len(TIER_COLUMNS) - _TIER_HEAD)
        tier.picks.fill(row, values)
        healthy = tier.is_healthy(values) if tier.is_healthy else None
        row[_HEALTHY] = None if healthy is None else healthy > 0
        rows.append(tuple(row))
    return rows


def _histogram_rows(
    plan: Plan, values: Values, target: str, scraped_at: datetime
) -> tuple[list[Row], list[Row], list[Defect]]:
    rows: list[Row] = []
    bounds: dict[int, Row] = {}
    defects: list[Defect] = []
    for spec in plan.histograms:
        total = spec.total(values) if spec.total else None
        count = spec.count(values) if spec.count else None
        counts: list[float] | None = None
        if spec.buckets:
            counts = _cumulative(spec, values)
            if counts is None:
                defects.append(Defect(spec.metric, spec.source, spec.rank, "bucket counts that fall or are no numbers"))
                continue
            count = counts[-1] if count is None else count
        elif total is None or count is None:
            continue
        if spec.bounds is not None and spec.bounds_id is not None:
            bounds[spec.bounds_id] = (spec.bounds_id, spec.bounds)
        rows.append(
            (
                scraped_at,
                target,
                spec.rank,
                spec.metric,
                spec.vantage,
                spec.source,
                spec.is_proxy,
                spec.bounds_id,
                counts,
                total,
                count,
            )
        )
    return rows, list(bounds.values()), defects


def _cumulative(spec: HistogramPlan, values: Values) -> list[float] | None:
    """Bucket counts of all series of the histogram together; None where they fall, or one is no count."""
    children = [child(values) for child in spec.buckets]
    counts = children[0] if len(children) == 1 else [math.fsum(c) for c in zip(*children, strict=True)]
    # A NaN hides from comparisons but not from a sum.
    sound = math.isfinite(sum(counts)) and counts[0] >= 0
    for child in children:
        sound = sound and sorted(child) == child
    return counts if sound else None
