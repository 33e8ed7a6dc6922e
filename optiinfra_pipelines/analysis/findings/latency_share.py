"""Which phase of a request spends its time, and whether an objective of latency is missed beyond chance.

Pure. Shares come from sums over counts, which are exact; buckets are only asked at their edges. Here: numbers. Not
here: error budgets and burn rates (`objectives`, `burn_rate`), findings (`load`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from optiinfra_pipelines.analysis.findings.window import Step
from optiinfra_pipelines.analysis.histogram_shares import Snapped, snap
from optiinfra_pipelines.domain.fleet import Objective

Phase = Literal["queue", "prefill", "decode", "host"]
# Histogram that an objective of this kind is judged on.
METRICS: Mapping[str, str] = MappingProxyType(
    {
        "ttft": "time_to_first_token_seconds",
        "tpot": "time_per_output_token_seconds",
        "itl": "inter_token_latency_seconds",
        "e2e": "request_duration_seconds",
    }
)
# Time to first token is queue, prefill and what the host adds; every later token is decode.
_PARTS: Mapping[str, tuple[Phase, ...]] = MappingProxyType(
    {
        "ttft": ("queue", "prefill"),
        "e2e": ("queue", "prefill", "decode"),
    }
)


@dataclass(frozen=True)
class PhaseShares:
    """Mean seconds of a request, and what share of them each phase took; host is what no phase accounts for."""

    mean_seconds: float
    shares: Mapping[Phase, float]

    @property
    def largest(self) -> Phase:
        return max(self.shares, key=lambda phase: self.shares[phase])


def phase_shares(kind: str, steps: Sequence[Step]) -> PhaseShares | str:
    """How a latency divides into phases over some steps; a reason when a phase is not measured.

    A phase's mean is its own sum over its own count: the phases of a request may be counted in different steps.
    """
    if kind not in _PARTS:
        return f"{kind} is all decode"
    whole = _mean(steps, METRICS[kind])
    if not whole:
        return f"no {METRICS[kind]} was observed"
    means: dict[Phase, float] = {}
    for phase in _PARTS[kind]:
        mean = _mean(steps, f"{phase}_seconds")
        if mean is None:
            return f"{phase}_seconds is not exposed"
        means[phase] = mean
    means["host"] = max(0.0, whole - sum(means.values()))
    total = sum(means.values())
    return PhaseShares(whole, {phase: seconds / total for phase, seconds in means.items()})


def _mean(steps: Sequence[Step], metric: str) -> float | None:
    made = [step.observed[metric] for step in steps if metric in step.observed]
    count = sum(n for _, n in made)
    return sum(total for total, _ in made) / count if count else None


@dataclass(frozen=True)
class Miss:
    """An objective whose share of slow requests is beyond what chance explains."""

    objective: Objective
    snapped: Snapped
    bad: float
    total: float
    at_least_bad_ratio: float


def miss(
    objective: Objective,
    good_and_total: tuple[float, float] | None,
    bounds: Sequence[float],
    engine: str | None,
    fewest: float,
) -> Miss | str | None:
    """Whether requests miss an objective: a Miss, None when they do not, or the reason why nobody can tell.

    Missed means that the lower end of the share's 95 % interval (Wilson 1927) is above the share allowed.
    """
    if objective.threshold_seconds is None:
        return "it names no threshold"
    snapped = snap(objective.threshold_seconds, bounds, engine)
    if snapped is None:
        return f"no bucket edge lies at or under {objective.threshold_seconds:g} s"
    if good_and_total is None or good_and_total[1] < fewest:
        count = good_and_total[1] if good_and_total else 0
        return f"{count:g} of {fewest:g} requests needed were observed"
    good, total = good_and_total
    at_least = wilson_lower(total - good, total)
    if at_least <= 1 - objective.target_ratio:
        return None
    return Miss(objective, snapped, total - good, total, at_least)


def wilson_lower(count: float, total: float) -> float:
    """Lower end of the one-sided 97.5 % interval of a share. 1.96 is the normal quantile of 97.5 %."""
    z = 1.959964
    share = count / total
    center = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, (center - spread) / (1 + z * z / total))
