"""What one replica carries within its objectives: from its own history, from a profile until then, else unknown.

Pure. Never from GPU utilization: at the sequence limit utilization falls while the queue grows (in all recorded vLLM
runs its correlation with throughput was negative). The unit is whatever the work column counts, tokens or requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from optiinfra_pipelines.domain.scaling import Capacity

# Minutes near the limit that a fit stands on; under this a profile is better evidence than a handful of busy minutes.
MIN_BUSY_MINUTES = 30
# A minute shows what a replica can do when it had work to wait for it, or most of its sequence slots in use.
BUSY_RUNNING_RATIO = 0.8
BOOTSTRAP_DRAWS = 400
# What batches measured alone, without queueing or mixed lengths, are worth on a serving engine: 50 to 80 % of them.
PROFILE_RATIOS = (0.5, 0.65, 0.8)


@dataclass(frozen=True)
class ProfilePoint:
    """Tokens per second of one replica on 512-token prompts: prefill at batch 4 (its best), decode at batch 32."""

    billion_parameters: float
    gpu: str  # lower case, as the name of the GPU type contains it
    gpus: int
    prefill_per_second: float
    decode_per_second: float


# Medians of Splitwise's published measurements (Mutinifni/splitwise-sim, data/perf_model.csv, MIT).
PROFILE_POINTS = (
    ProfilePoint(70, "a100", 8, 7007, 604),
    ProfilePoint(70, "h100", 8, 11877, 829),
    ProfilePoint(176, "a100", 8, 3874, 489),
    ProfilePoint(176, "h100", 8, 6596, 698),
)
SIZE_TOLERANCE_RATIO = 0.2  # a 65B or 72B model stands for 70B, an 8B one for nothing in the table


def profile_tokens_per_second(
    billion_parameters: float, gpu: str, gpus: int, input_tokens: float, output_tokens: float
) -> float | None:
    """Tokens (in and out) per second that a published measurement gives for a mix; None where none is near.

    A request takes input / prefill + output / decode seconds of the replica: no overlap of the two is assumed.
    """
    for point in PROFILE_POINTS:
        near = abs(billion_parameters / point.billion_parameters - 1) <= SIZE_TOLERANCE_RATIO
        if near and point.gpu in gpu.lower() and point.gpus == gpus and input_tokens + output_tokens > 0:
            seconds = input_tokens / point.prefill_per_second + output_tokens / point.decode_per_second
            return (input_tokens + output_tokens) / seconds
    return None


def replica_capacity(minutes: pl.DataFrame, seed: int = 0, profile_per_second: float | None = None) -> Capacity | None:
    """Capacity of one replica of a configuration; None when neither history nor profile says anything.

    minutes: one row per replica and minute: work_per_second (served), running, waiting (means), max_running (the
    engine's sequence limit, NULL if unknown), is_within_objective (whether the minute kept its objectives, NULL if
    unknown, which counts for nothing). The 90th percentile of the work served in busy minutes that kept their
    objectives, with a bootstrap interval. profile_per_second: used while history is thin, at a discount.
    """
    needed = {"work_per_second", "running", "waiting", "max_running", "is_within_objective"}
    missing = needed - set(minutes.columns)
    if missing:
        raise ValueError(f"minutes lack {sorted(missing)}; see the docstring for what each is")
    known = minutes.drop_nulls(["work_per_second", "running", "waiting"]).filter(pl.col("work_per_second") > 0)
    busy = known.filter(
        (pl.col("waiting") > 0) | (pl.col("running") >= BUSY_RUNNING_RATIO * pl.col("max_running")).fill_null(False)
    )
    kept = busy.filter(pl.col("is_within_objective"))["work_per_second"].to_numpy()
    if len(kept) >= MIN_BUSY_MINUTES:
        rng = np.random.default_rng(seed)
        drawn = np.quantile(rng.choice(kept, (BOOTSTRAP_DRAWS, len(kept))), 0.9, axis=1)
        low, high = np.quantile(drawn, [0.05, 0.95])
        best = float(np.quantile(kept, 0.9))
        return Capacity(
            per_second=best,
            low_per_second=min(float(low), best),
            high_per_second=max(float(high), best),
            origin="history",
            minutes=len(kept),
            reason=f"P90 of the work served in {len(kept)} busy minutes that kept their objectives",
        )
    if profile_per_second is not None and profile_per_second > 0:
        low, middle, high = (profile_per_second * ratio for ratio in PROFILE_RATIOS)
        return Capacity(
            per_second=middle,
            low_per_second=low,
            high_per_second=high,
            origin="profile",
            minutes=0,
            reason=f"{len(kept)} of {MIN_BUSY_MINUTES} busy minutes within objectives: a public measurement stands in",
        )
    return None
