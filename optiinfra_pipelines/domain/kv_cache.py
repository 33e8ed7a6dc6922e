"""Nouns of cache sizing: how well a workload reuses its prefixes, and how much memory for that reuse pays.

Frozen and closed; units in the names. How they are computed: `analysis.kv_cache.curve` (the reuse curve),
`analysis.kv_cache.sizing` (the recommendation) and `analysis.kv_cache.events` (what KV events can tell).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from optiinfra_pipelines.domain.base import Frozen, Positive, Ratio

Weight = Literal["block", "token", "request"]
Tier = Literal["gpu", "cpu", "disk"]


class SizeForShare(Frozen):
    """The smallest LRU cache that reaches `share_ratio` of the ceiling."""

    share_ratio: Ratio
    hit_ratio: Ratio
    capacity_blocks: NonNegativeInt
    capacity_tokens: NonNegativeInt | None
    capacity_bytes: NonNegativeInt | None


class ReuseSummary(Frozen):
    """What a workload's prefixes allow. Ceilings: hit ratios of an infinite cache, where only first uses miss."""

    requests: NonNegativeInt
    references: NonNegativeInt = Field(description="Block references: the sum of blocks over requests.")
    unique_blocks: NonNegativeInt
    block_size_tokens: NonNegativeInt | None
    block_ceiling_ratio: Ratio | None = Field(description="Share of block references that are not a first use.")
    token_ceiling_ratio: Ratio | None = Field(description="Share of input tokens, a partial block or rest included.")
    request_ceiling_ratio: Ratio | None = Field(description="Mean over requests of their share of blocks.")
    weight: Weight = Field(description="Which of the three the sizes go by.")
    sizes: tuple[SizeForShare, ...]


class Memory(Frozen):
    """A kind of memory a replica can have more of, and what it costs."""

    tier: Tier
    max_bytes: NonNegativeFloat = Field(description="Most a replica can have of it.")
    load_bytes_per_second: Positive | None = Field(
        default=None, description="Measured or rated speed of loading KV into the GPU; none for the GPU's own memory."
    )
    usd_per_gib_hour: NonNegativeFloat | None = Field(
        default=None, description="What one GiB costs an hour; none if unknown."
    )


class TierAdvice(Frozen):
    """How much of one tier to have, and what the part of the curve it covers is worth per replica."""

    tier: Tier
    size_bytes: NonNegativeInt
    hit_ratio_before: Ratio
    hit_ratio_after: Ratio
    saved_prefill_seconds_per_hour: NonNegativeFloat | None = Field(
        description="GPU seconds of prefill not repeated per replica-hour, the time of loading taken off."
    )
    saved_gpu_usd_per_hour: float | None
    memory_usd_per_hour: NonNegativeFloat | None
    pays: bool | None = Field(description="Whether saved exceeds cost; none when one of the two is unknown.")
    reason: str


class CacheAdvice(Frozen):
    """The cache recommendation for one replica, tier by tier from the GPU outwards."""

    deployment: str
    summary: ReuseSummary
    tiers: tuple[TierAdvice, ...]
    refusals: tuple[str, ...] = Field(default=(), description="Goals the workload makes impossible, with the ceiling.")
    abstention: str | None = Field(default=None, description="Why nothing is recommended; none when something is.")


class MemoryWaste(Frozen):
    """KV memory that holds nothing: reserved and never used, or lost in half-empty last blocks."""

    reserved_bytes: NonNegativeFloat
    unused_at_peak_ratio: Ratio = Field(description="Share of the KV memory that stayed free even at the peak.")
    unused_at_peak_bytes: NonNegativeFloat
    fragmentation_ratio: Ratio | None = Field(description="Share of allocated tokens that no sequence filled.")


class WorkingSet(Frozen):
    """What a KV event stream shows of one replica's cache. Hits leave no event: no hit ratio can be made of it."""

    batches: NonNegativeInt
    stored_events: NonNegativeInt
    removed_events: NonNegativeInt
    cleared_events: NonNegativeInt
    unknown_events: NonNegativeInt = Field(description="Events of a type or shape that is not understood; skipped.")
    stored_blocks: NonNegativeInt = Field(description="Stores, block by block: an event may store several.")
    unique_blocks: NonNegativeInt = Field(description="Distinct blocks stored.")
    max_live_blocks: NonNegativeInt
    median_residency_seconds: NonNegativeFloat | None = Field(
        description="Median time from store to removal of the blocks seen both stored and removed."
    )
    restored_blocks: NonNegativeInt = Field(description="Stores of a block that had been removed before.")
    restored_tokens: NonNegativeInt
    missing_batches: NonNegativeInt = Field(description="Sequence numbers skipped: events that were never received.")
    joined_late: bool = Field(description="The first sequence number is not 0: blocks stored earlier are unknown.")


class GhostSize(Frozen):
    """A lower bound of what more cache would have saved: re-stores within reach of `extra_blocks` more blocks."""

    extra_blocks: Annotated[int, Field(ge=1)]
    saved_stores_at_least: NonNegativeInt
    saved_tokens_at_least: NonNegativeInt
