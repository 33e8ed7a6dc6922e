"""How much of a workload a prefix cache would serve, and which size of it pays."""

from optiinfra_pipelines.analysis.kv_cache.accesses import AccessError, block_trace
from optiinfra_pipelines.analysis.kv_cache.curve import (
    hit_ratio_by_period,
    hit_ratio_curve,
    measure_reuse,
    optimal_hit_ratio,
    summarize_reuse,
)

__all__ = [
    "AccessError",
    "block_trace",
    "hit_ratio_by_period",
    "hit_ratio_curve",
    "measure_reuse",
    "optimal_hit_ratio",
    "summarize_reuse",
]
