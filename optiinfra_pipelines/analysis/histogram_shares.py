"""Shares and quantiles of bucketed observations: exact at an edge, an interval elsewhere.

Pure. `bounds` ascend and end in +Inf; `counts` are cumulative over them and may be increments over time. The same
semantics in SQL are the macros of `dbt_like_sql/macros/histograms.sql`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

# Flags that put a bucket edge where an objective is, by engine; knowledge of releases and of their command lines.
EDGE_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "vllm": "--custom-histogram-buckets (vLLM 0.32 and later)",
        "sglang": "--bucket-time-to-first-token, --bucket-inter-token-latency or --bucket-e2e-request-latency",
    }
)
# An edge is near when it leaves out less than this share of the threshold.
NEAR_RATIO = 0.2


@dataclass(frozen=True)
class Interval:
    """A value known to lie between two bucket edges; upper may be +Inf."""

    lower: float
    upper: float


@dataclass(frozen=True)
class Snapped:
    """The bucket edge that stands for a threshold: the largest one at or under it. remedy: None when it is near."""

    threshold: float
    edge: float
    remedy: str | None

    @property
    def is_exact(self) -> bool:
        return math.isclose(self.edge, self.threshold, rel_tol=1e-9)


def snap(threshold: float, bounds: Sequence[float], engine: str | None) -> Snapped | None:
    """The edge to judge by, rounded down so that nothing over the threshold counts as good; None when all lie above."""
    under = [bound for bound in bounds if bound <= threshold * (1 + 1e-9) and math.isfinite(bound) and bound > 0]
    if not under:
        return None
    edge = max(under)
    near = threshold - edge <= NEAR_RATIO * threshold
    return Snapped(threshold, edge, None if near else edge_remedy(threshold, engine))


def edge_remedy(threshold: float, engine: str | None) -> str:
    """What adds a bucket edge at a threshold."""
    flag = EDGE_FLAGS.get(engine or "")
    if flag is None:
        return f"no known flag of {engine or 'this engine'} adds a bucket edge at {threshold:g} s; move the objective"
    return f"start the engine with {flag} so that {threshold:g} s is a bucket edge"


def at_or_under(edge: float, bounds: Sequence[float], counts: Sequence[float]) -> tuple[float, float] | None:
    """Observations at or under an edge, and all of them; None when the edge is none or nothing was observed."""
    repaired = _repaired(bounds, counts)
    place = next((i for i, bound in enumerate(bounds) if math.isclose(bound, edge, rel_tol=1e-9)), None)
    if repaired is None or place is None:
        return None
    return repaired[place], repaired[-1]


def quantile_interval(q: float, bounds: Sequence[float], counts: Sequence[float]) -> Interval | None:
    """Edges that hold the sample quantile under every usual definition; None when nothing was observed."""
    repaired = _repaired(bounds, counts)
    if repaired is None or not 0 <= q <= 1:
        return None
    total = repaired[-1]
    low_rank = max(1.0, math.floor(q * total))
    high_rank = min(total, math.floor(q * (total - 1)) + 2)
    low, high = _place(repaired, low_rank), _place(repaired, high_rank)
    lower = bounds[low - 1] if low else (0.0 if bounds[0] > 0 else -math.inf)
    return Interval(lower, bounds[high])


def _place(counts: Sequence[float], rank: float) -> int:
    return next((i for i, count in enumerate(counts[:-1]) if count >= rank), len(counts) - 1)


def _repaired(bounds: Sequence[float], counts: Sequence[float]) -> list[float] | None:
    """Counts that never fall; None where nothing can be said."""
    if len(bounds) != len(counts) or len(bounds) < 2 or bounds[-1] != math.inf:
        return None
    if any(math.isnan(count) for count in counts) or counts[-1] <= 0:
        return None
    return list(accumulate(counts, max))
