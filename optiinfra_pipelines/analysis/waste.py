"""What GPUs did with their hours, what that cost, and what a token cost: states, GPU-hours, dollars, joules.

Pure: rows of five minutes in, rows out; an unknown price or energy gives NULL. Decided by activity counters first,
then by the engine's queue and the processes that hold the card; `gpu_util` alone proves idleness, never load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import polars as pl

from optiinfra_pipelines.domain.prices import GpuPrice

# Below this an SM counter shows housekeeping, not work (energy paper's parking threshold, and our judgment).
ACTIVE_RATIO = 0.02
# A driver's context and nothing else: under 1 % of the card. Weights or a KV cache: over 10 %.
FREE_MEMORY_RATIO = 0.01
HELD_MEMORY_RATIO = 0.10
PERIOD_HOURS = 5 / 60


class GpuState(StrEnum):
    """idle_free: nobody holds it. idle_held: held, and nothing done. active: work. unknown: the rows do not tell."""

    IDLE_FREE = "idle_free"
    IDLE_HELD = "idle_held"
    ACTIVE = "active"
    UNKNOWN = "unknown"


def gpu_states(gpus: pl.DataFrame, host_requests: pl.DataFrame | None = None) -> pl.DataFrame:
    """The state of each GPU in each five minutes.

    gpus: host, gpu_uuid, mig_instance, name, period_at, sample_count, unhealthy_count, gpu_utilization_max_ratio,
    sm_active_mean_ratio, memory_used_max_bytes, memory_total_bytes, process_count_max (fct_gpu_utilization_5m).
    host_requests: host, period_at, requests_running_mean of the host's engines, gpu_count of the host; it decides for
    a card without activity counters, on a host of one card, where the requests must run on it.
    Adds `state`. MIG instances are left out: only whole GPUs cost money.
    """
    whole = gpus.filter(pl.col("mig_instance") == "")
    if host_requests is None:
        joined = whole.with_columns(requests=pl.lit(None, dtype=pl.Float64))
    else:
        alone = whole.group_by("host").agg(pl.col("gpu_uuid").n_unique().alias("cards"))
        joined = (
            whole.join(
                host_requests.select("host", "period_at", "requests_running_mean"), on=["host", "period_at"], how="left"
            )
            .join(alone, on="host", how="left")
            .with_columns(requests=pl.when(pl.col("cards") == 1).then(pl.col("requests_running_mean")))
        )
    share = pl.col("memory_used_max_bytes") / pl.col("memory_total_bytes")
    never_busy = pl.col("gpu_utilization_max_ratio") == 0
    sm = pl.col("sm_active_mean_ratio")
    is_idle = pl.coalesce(
        pl.when(never_busy).then(True),
        pl.when(sm.is_not_null()).then(sm < ACTIVE_RATIO),
        pl.when(pl.col("requests").is_not_null()).then(pl.col("requests") == 0),
    )
    processes = pl.col("process_count_max")
    is_free = pl.coalesce(
        pl.when(processes > 0).then(False),
        pl.when(share < FREE_MEMORY_RATIO).then(True),
        pl.when(share > HELD_MEMORY_RATIO).then(False),
    )
    broken = (pl.col("sample_count") == 0) | (pl.col("unhealthy_count") == pl.col("sample_count"))
    state = (
        pl.when(broken.fill_null(True) | is_idle.is_null())
        .then(pl.lit(GpuState.UNKNOWN.value))
        .when(~is_idle)
        .then(pl.lit(GpuState.ACTIVE.value))
        .when(is_free)
        .then(pl.lit(GpuState.IDLE_FREE.value))
        .when(~is_free)
        .then(pl.lit(GpuState.IDLE_HELD.value))
        .otherwise(pl.lit(GpuState.UNKNOWN.value))
    )
    return joined.with_columns(state=state).select(*gpus.columns, "state")


def gpu_hours(
    states: pl.DataFrame, prices: Mapping[str, GpuPrice | None], by: Sequence[str] = ("host",)
) -> pl.DataFrame:
    """GPU-hours and dollars by `by` (columns of states, such as host, deployment, gpu_uuid) and state.

    prices: GPU product name -> price of an hour. A row whose price is unknown makes the dollars of its group NULL.
    Columns: by, state, gpu_hours, usd, usd_low, usd_high.
    """
    figures = {
        name: (None, None, None)
        if price is None
        else (price.usd_per_gpu_hour, price.low_usd_per_hour, price.high_usd_per_hour)
        for name, price in prices.items()
    }
    priced = states.with_columns(
        pl.col("name")
        .replace_strict({key: value[i] for key, value in figures.items()}, default=None, return_dtype=pl.Float64)
        .alias(column)
        for i, column in enumerate(("usd", "usd_low", "usd_high"))
    )
    return (
        priced.group_by(*by, "state")
        .agg(
            (pl.len() * PERIOD_HOURS).alias("gpu_hours"),
            *(
                pl.when(pl.col(column).null_count() == 0).then(pl.col(column).sum() * PERIOD_HOURS).alias(column)
                for column in ("usd", "usd_low", "usd_high")
            ),
        )
        .sort(*by, "state")
    )


def deployment_costs(load: pl.DataFrame, deployments: pl.DataFrame, energy: pl.DataFrame | None = None) -> pl.DataFrame:
    """What the tokens of each deployment cost, by deployment.

    load: deployment, period_at, target, prompt_tokens, generation_tokens, prefill_seconds, decode_seconds (sums of
    the period; NULL where unknown). deployments: deployment, gpus_per_replica, usd_per_gpu_hour (NULL when unknown).
    energy: deployment, energy_joules of the GPUs that serve nothing else; a deployment without a row has none known.
    Columns: deployment, gpu_hours, usd, prompt_tokens, generation_tokens, usd_per_million_tokens, and the cost shared
    out by the time spent in prefill and decode: usd_per_million_prompt_tokens, usd_per_million_generation_tokens;
    joules_per_generation_token. A replica that answered no scrape of a period is not counted in it.
    """
    sums = load.group_by("deployment").agg(
        pl.struct("target", "period_at").n_unique().alias("replica_periods"),
        *(
            pl.when(pl.col(name).null_count() == 0).then(pl.col(name).sum()).alias(name)
            for name in ("prompt_tokens", "generation_tokens", "prefill_seconds", "decode_seconds")
        ),
    )
    joined = sums.join(deployments, on="deployment", how="left")
    if energy is None:
        joined = joined.with_columns(energy_joules=pl.lit(None, dtype=pl.Float64))
    else:
        joined = joined.join(energy, on="deployment", how="left")
    hours = pl.col("replica_periods") * PERIOD_HOURS * pl.col("gpus_per_replica")
    busy = pl.col("prefill_seconds") + pl.col("decode_seconds")
    costed = joined.with_columns(gpu_hours=hours).with_columns(usd=pl.col("gpu_hours") * pl.col("usd_per_gpu_hour"))
    return costed.select(
        "deployment",
        "gpu_hours",
        "usd",
        "prompt_tokens",
        "generation_tokens",
        usd_per_million_tokens=_per_million(pl.col("usd"), pl.col("prompt_tokens") + pl.col("generation_tokens")),
        usd_per_million_prompt_tokens=_per_million(
            pl.col("usd") * _over(pl.col("prefill_seconds"), busy), pl.col("prompt_tokens")
        ),
        usd_per_million_generation_tokens=_per_million(
            pl.col("usd") * _over(pl.col("decode_seconds"), busy), pl.col("generation_tokens")
        ),
        joules_per_generation_token=_over(pl.col("energy_joules"), pl.col("generation_tokens")),
    ).sort("deployment")


def _over(part: pl.Expr, whole: pl.Expr) -> pl.Expr:
    """part / whole, NULL where whole is 0: nothing to divide by is not known, and not infinite."""
    return pl.when(whole > 0).then(part / whole)


def _per_million(usd: pl.Expr, tokens: pl.Expr) -> pl.Expr:
    return _over(usd * 1e6, tokens)
