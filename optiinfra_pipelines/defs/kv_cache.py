"""The assets `kv_reuse_curve`, `kv_working_set` and `kv_cache_recommendations`.

Names, launchpad config and metadata only; the curve is `kv_cache.curve`, the sizes are `kv_cache.sizing`.
"""

from collections.abc import Callable
from datetime import datetime

import dagster as dg
import polars as pl
from pydantic import Field

from optiinfra_pipelines.analysis.kv_cache.rows import CacheQuestion
from optiinfra_pipelines.analysis.kv_cache.sizing import GIB
from optiinfra_pipelines.analysis.plots import as_markdown, reuse_plot
from optiinfra_pipelines.defs.advice import advice_asset, result
from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.kv_cache import Memory
from resources.advice.advisor import Advisor
from resources.warehouse import Warehouse


class CacheConfig(dg.Config):
    """What a replica has and what memory costs; 0 is unknown, and what needs it then abstains."""

    bytes_per_token: float = Field(0.0, ge=0, description="KV bytes of one token on the whole replica.")
    present_gpu_gib: float = Field(0.0, ge=0, description="KV memory a replica has on its GPUs now.")
    gpu_gib: float = Field(0.0, ge=0, description="Most KV memory its GPUs could give.")
    cpu_gib: float = Field(0.0, ge=0, description="Most host memory a replica could have for KV.")
    disk_gib: float = Field(0.0, ge=0, description="Most disk a replica could have for KV.")
    cpu_load_gib_per_second: float = Field(0.0, ge=0, description="Measured speed of loading KV from host memory.")
    disk_load_gib_per_second: float = Field(0.0, ge=0, description="Measured speed of loading KV from disk.")
    cpu_usd_per_gib_hour: float = Field(0.0, ge=0, description="Price of a GiB of host memory an hour.")
    disk_usd_per_gib_hour: float = Field(0.0, ge=0, description="Price of a GiB of disk an hour.")
    prefill_tokens_per_second: float = Field(0.0, ge=0, description="Prompt tokens a replica computes a second.")
    input_tokens_per_hour: float = Field(0.0, ge=0, description="Prompt tokens a replica gets an hour.")
    usd_per_replica_hour: float = Field(0.0, ge=0, description="Price of a replica's GPUs an hour.")
    goal_hit_ratio: float = Field(0.0, ge=0, le=1, description="A hit ratio to be told possible or impossible.")

    def question(self) -> CacheQuestion:
        """The same with unknown as None, in bytes."""
        tiers = [
            Memory(tier="gpu", max_bytes=self.gpu_gib * GIB),
            Memory(
                tier="cpu",
                max_bytes=self.cpu_gib * GIB,
                load_bytes_per_second=self.cpu_load_gib_per_second * GIB or None,
                usd_per_gib_hour=self.cpu_usd_per_gib_hour or None,
            ),
            Memory(
                tier="disk",
                max_bytes=self.disk_gib * GIB,
                load_bytes_per_second=self.disk_load_gib_per_second * GIB or None,
                usd_per_gib_hour=self.disk_usd_per_gib_hour or None,
            ),
        ]
        return CacheQuestion(
            bytes_per_token=self.bytes_per_token or None,
            present_gpu_bytes=self.present_gpu_gib * GIB,
            tiers=[memory for memory in tiers if memory.max_bytes > 0],
            prefill_tokens_per_second=self.prefill_tokens_per_second or None,
            input_tokens_per_hour=self.input_tokens_per_hour or None,
            usd_per_replica_hour=self.usd_per_replica_hour or None,
            goal_hit_ratio=self.goal_hit_ratio or None,
        )


def kv_cache_assets(warehouse: Warehouse, clock: Callable[[], datetime], fleet: Fleet) -> list[dg.AssetsDefinition]:
    """The reuse curve, what KV events show, and what to make of the curve, hourly."""
    advisor = Advisor(warehouse, clock, fleet)

    @advice_asset("kv_reuse_curve", ["int_latency_minutes", "int_scrape_minutes"])
    def kv_reuse_curve(config: CacheConfig) -> dg.MaterializeResult[None]:
        rows = advisor.measure_reuse(config.bytes_per_token or None)
        known = rows.drop_nulls("capacity_blocks")
        names = known["deployment"].unique(maintain_order=True).to_list()[:3]
        pictures = [
            as_markdown(reuse_plot(known.filter(pl.col("deployment") == name), f"{name}: prefix reuse"), name)
            for name in names
        ]
        return result(
            known.sort("capacity_blocks", descending=True) if known.height else rows,
            ["deployment", "origin", "capacity_blocks", "token_hit_ratio", "block_hit_ratio", "reason"],
            curves=len(known["deployment"].unique()),
            abstentions=rows.height - known.height,
            reuse_curve=dg.MetadataValue.md("\n\n".join(pictures) or "no curve: the rows say why"),
        )

    @advice_asset("kv_working_set", [])
    def kv_working_set() -> dg.MaterializeResult[None]:
        rows = advisor.measure_working_set()
        return result(
            rows,
            ["deployment", "medium", "max_live_blocks", "unique_blocks", "median_residency_seconds", "restored_tokens",
             "extra_blocks_for_95", "reason"],
            known=rows["batches"].count(),
            abstentions=rows["batches"].null_count(),
        )  # fmt: skip

    @advice_asset("kv_cache_recommendations", ["kv_reuse_curve"])
    def kv_cache_recommendations(config: CacheConfig) -> dg.MaterializeResult[None]:
        rows = advisor.advise_cache(config.question())
        return result(
            rows,
            ["deployment", "tier", "size_bytes", "hit_ratio_after", "pays", "token_ceiling_ratio", "refusal", "reason"],
            advised=rows["tier"].count(),
            abstentions=rows["tier"].null_count(),
            refusals=rows["refusal"].count(),
        )

    return [kv_reuse_curve, kv_working_set, kv_cache_recommendations]
