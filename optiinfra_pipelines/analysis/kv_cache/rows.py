"""From what is known of a workload's blocks to rows of the reuse curve and the cache advice.

Pure. The curve is `kv_cache`, what memory pays is `sizing`; reading accesses and keeping rows is the work of
`resources` and `defs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.kv_cache.accesses import AccessError
from optiinfra_pipelines.analysis.kv_cache.curve import Reuse, hit_ratio_curve, measure_reuse, summarize_reuse
from optiinfra_pipelines.analysis.kv_cache.events import ghost_distances, working_set
from optiinfra_pipelines.analysis.kv_cache.sizing import curve_from_reuse_histogram, recommend_cache
from optiinfra_pipelines.domain.kv_cache import CacheAdvice, Memory, ReuseSummary

CEILING_COLUMNS = {0.5: "blocks_for_half", 0.8: "blocks_for_80", 0.95: "blocks_for_95", 0.99: "blocks_for_99"}
NO_ACCESSES = (
    "no engine exports which blocks a request used: import a log of them (LMCache's lookup hashes, or a trace) "
    "with `optiinfra import-trace`, or run a cache server that exports its reuse distances"
)
EVENTS_ALONE = (
    "KV events tell of stores and removals, never of hits: kv_working_set has what they show; for a curve import a log "
    "of the blocks that requests used (LMCache's lookup hashes, or a trace) with `optiinfra import-trace`"
)
NO_EVENTS = (
    "no KV events are stored: record them (vLLM's --kv-events-config) and import the file with "
    "`optiinfra import-trace --format kv_events`"
)
EXTRA_COLUMNS = {0.5: "extra_blocks_for_half", 0.8: "extra_blocks_for_80", 0.95: "extra_blocks_for_95",
                 1.0: "extra_blocks_for_all"}  # fmt: skip
# A gigabyte of ids; past it blocks are sampled, which moved the curve by under 0.3 points on the public traces.
EXACT_REFERENCES = 20_000_000
SAMPLE_RATIO = 0.1


@dataclass(frozen=True)
class CacheQuestion:
    """What is known of a replica, as far as it is; None is unknown. Speeds and loads are of one replica."""

    bytes_per_token: float | None = None
    present_gpu_bytes: float = 0.0
    tiers: Sequence[Memory] = ()
    prefill_tokens_per_second: float | None = None
    input_tokens_per_hour: float | None = None
    usd_per_replica_hour: float | None = None
    goal_hit_ratio: float | None = None


def reuse_of(accesses: pl.DataFrame) -> Reuse | str:
    """The reuse of one deployment's accesses, exact while they fit; or why there is none."""
    try:
        references = int(accesses["hash_ids"].list.len().sum())
        return measure_reuse(accesses, sample_ratio=None if references <= EXACT_REFERENCES else SAMPLE_RATIO)
    except AccessError as error:
        return str(error)


def curve_rows(
    deployment: str, reuse: Reuse | str, measured_at: datetime, bytes_per_token: float | None = None
) -> pl.DataFrame:
    """Rows of kv_reuse_curve from accesses; one abstaining row with the reason where there is no curve."""
    base: dict[str, Any] = {"measured_at": measured_at, "deployment": deployment}
    if isinstance(reuse, str):
        return pl.DataFrame([base | {"reason": reuse}])
    summary = summarize_reuse(reuse)
    curve = hit_ratio_curve(reuse, bytes_per_token=bytes_per_token)
    ceiling = summary.block_ceiling_ratio
    is_exact = reuse.tracked_blocks == summary.unique_blocks
    return curve.with_columns(
        **{name: pl.lit(value) for name, value in base.items()},
        origin=pl.lit("accesses"),
        reuse_share_ratio=pl.col("block_hit_ratio") / ceiling if ceiling else pl.lit(None, dtype=pl.Float64),
        requests=pl.lit(summary.requests),
        references=pl.lit(summary.references),
        reason=pl.lit(
            f"{'exact' if is_exact else 'sampled'} LRU over {summary.requests:,} requests and "
            f"{summary.unique_blocks:,} distinct blocks"
        ),
    )


def histogram_rows(
    deployment: str, bounds: Sequence[float], counts: Sequence[float], measured_at: datetime
) -> pl.DataFrame:
    """Rows of kv_reuse_curve from reuse distances that a cache server exports: exact at their bounds."""
    curve = curve_from_reuse_histogram(bounds, counts, None)
    return curve.select(
        measured_at=pl.lit(measured_at),
        deployment=pl.lit(deployment),
        origin=pl.lit("histogram"),
        capacity_blocks=pl.col("capacity_objects").cast(pl.Int64),
        reuse_share_ratio="reuse_share_ratio",
        reason=pl.lit("reuse distances of the cache server, in its chunks; first uses are not in them"),
    )


def working_set_rows(deployment: str, events: pl.DataFrame | None, measured_at: datetime) -> pl.DataFrame:
    """Rows of kv_working_set, one per medium that its KV events name; one that abstains where there are none.

    events: EVENTS_SCHEMA, of one engine, in order. A lower bound of what more cache would save: hits leave no event.
    """
    base: dict[str, Any] = {"measured_at": measured_at, "deployment": deployment}
    if events is None or events.is_empty():
        return pl.DataFrame([base | {"reason": NO_EVENTS}])
    of_blocks = pl.col("event").is_in(["stored", "removed"])
    media = events.filter(of_blocks)["medium"].unique(maintain_order=True).to_list() or [None]
    return pl.DataFrame(
        [
            base
            | _medium_row(
                events.with_columns(
                    pl.when(of_blocks & pl.col("medium").ne_missing(pl.lit(medium, dtype=pl.String)))
                    .then(pl.lit("empty"))  # the batch was received; what it says is of another cache
                    .otherwise("event")
                    .alias("event")
                ),
                medium,
            )
            for medium in media
        ],
        infer_schema_length=None,
    )


def _medium_row(events: pl.DataFrame, medium: str | None) -> dict[str, Any]:
    found = working_set(events)
    distances = ghost_distances(events)
    begin, end = events["emitted_at"].min(), events["emitted_at"].max()
    sizes = events.filter(pl.col("event") == "stored")["block_size_tokens"].drop_nulls()
    needed = {
        name: int(np.quantile(distances, share, method="inverted_cdf")) + 1 if len(distances) else None
        for share, name in EXTRA_COLUMNS.items()
    }
    doubts = [
        f"{found.missing_batches} batches were never received: more may have been stored again"
        if found.missing_batches
        else "",
        "the recording began late: what was held before is unknown" if found.joined_late else "",
        f"{found.unknown_events} events of an unknown kind are not counted" if found.unknown_events else "",
    ]
    told = (
        f"{found.restored_blocks} of {found.stored_blocks} stores were of blocks removed before: at the least these "
        "would have been hits in a larger cache; hits leave no event, so no hit ratio is known"
    )
    return {
        "medium": medium,
        "window_start_at": begin,
        "window_end_at": end,
        "block_size_tokens": int(sizes[0]) if len(sizes) else None,
        **needed,
        **found.model_dump(exclude={"joined_late"}),
        "reason": "; ".join([told, *filter(None, doubts)]),
    }


def cache_rows(deployment: str, reuse: Reuse | str, question: CacheQuestion, decided_at: datetime) -> pl.DataFrame:
    """Rows of kv_cache_recommendations: one per tier, or one that abstains and says what is missing.

    What the workload alone tells (ceilings, sizes in blocks, an impossible goal) is in every row.
    """
    base: dict[str, Any] = {"decided_at": decided_at, "deployment": deployment}
    if isinstance(reuse, str):
        return pl.DataFrame([base | {"reason": reuse}])
    weight = "block" if reuse.trace.block_size is None else "token"
    summary = summarize_reuse(reuse, weight=weight, shares=tuple(CEILING_COLUMNS))  # type: ignore[arg-type]
    advice = recommend_cache(
        deployment,
        reuse,
        # 1 B a token counts in tokens: what is said of ceilings and goals does not depend on it.
        bytes_per_token=question.bytes_per_token or 1.0,
        present_gpu_bytes=question.present_gpu_bytes,
        tiers=question.tiers if question.bytes_per_token is not None else (),
        prefill_tokens_per_second=question.prefill_tokens_per_second,
        input_tokens_per_hour=question.input_tokens_per_hour,
        usd_per_replica_hour=question.usd_per_replica_hour,
        goal_hit_ratio=question.goal_hit_ratio,
    )
    base |= _workload(summary) | {"refusal": "; ".join(advice.refusals) or None}
    missing = advice.abstention or _missing(question)
    if missing:
        return pl.DataFrame([base | {"reason": missing}], infer_schema_length=None)
    return pl.DataFrame([base | tier for tier in _tiers(advice)], infer_schema_length=None)


def _workload(summary: ReuseSummary) -> dict[str, Any]:
    sizes = {CEILING_COLUMNS[size.share_ratio]: size.capacity_blocks for size in summary.sizes}
    return sizes | {
        "token_ceiling_ratio": summary.token_ceiling_ratio,
        "block_ceiling_ratio": summary.block_ceiling_ratio,
    }


def _missing(question: CacheQuestion) -> str | None:
    if question.bytes_per_token is None:
        return "the KV bytes of a token are not known (model, data type): sizes are in blocks; give bytes_per_token"
    if not question.tiers:
        return "no memory to size was named: give the GiB a replica can have of each tier"
    return None


def _tiers(advice: CacheAdvice) -> list[dict[str, Any]]:
    return [tier.model_dump() for tier in advice.tiers]
