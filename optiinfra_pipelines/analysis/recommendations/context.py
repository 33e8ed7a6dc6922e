"""What a rule may know of a deployment beside its measures, and the measures that follow from it.

Pure. Everything here may be unknown: then what needs it abstains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from optiinfra_pipelines.analysis.kv_arithmetic import whole
from optiinfra_pipelines.analysis.recommendations.flags import Flag, Knob
from optiinfra_pipelines.analysis.recommendations.measures import Measures
from optiinfra_pipelines.domain.base import Engine
from optiinfra_pipelines.domain.fleet import Deployment, ModelShape, Objective
from optiinfra_pipelines.domain.kv_cache import TierAdvice
from optiinfra_pipelines.domain.prices import GpuPrice
from optiinfra_pipelines.domain.recommendations import Effect

# Objective kind -> histogram it is judged on; ITL's stands in for TPOT where the engine has no other.
_OBJECTIVE_METRICS: Mapping[str, tuple[str, ...]] = {
    "ttft": ("time_to_first_token_seconds",),
    "itl": ("inter_token_latency_seconds",),
    "tpot": ("time_per_output_token_seconds", "inter_token_latency_seconds"),
}


@dataclass(frozen=True)
class PastEffect:
    """What earlier changes by the same rule did, relative to the value before: least, most, and how many."""

    relative_low: float
    relative_high: float
    n: int


@dataclass(frozen=True)
class GpuFacts:
    """The GPUs of the deployment's hosts in the window: the least free, the busiest."""

    name: str | None = None
    memory_total_bytes: float | None = None
    memory_free_min_bytes: float | None = None
    dram_active_p95_ratio: float | None = None
    tensor_active_p95_ratio: float | None = None
    power_mean_watts: float | None = None
    power_limit_watts: float | None = None
    sm_clock_max_mhz: float | None = None


@dataclass(frozen=True)
class Context:
    """One deployment (or a target without one). declared: knob values that a page does not tell and a person did.

    reuse_ceiling_ratio: share of prompt tokens that an infinite cache would serve. cache_tiers: those that pay.
    """

    engine: Engine | None = None
    engine_version: str | None = None
    deployment: Deployment | None = None
    replicas: int = 1
    shape: ModelShape | None = None
    declared: Mapping[Knob, str] = field(default_factory=dict)
    gpu: GpuFacts = GpuFacts()
    price: GpuPrice | None = None
    reuse_ceiling_ratio: float | None = None
    cache_tiers: Sequence[TierAdvice] | None = None
    past: Mapping[str, PastEffect] = field(default_factory=dict)

    @property
    def tensor_parallel(self) -> int:
        """GPUs of a replica, taken as one tensor-parallel group unless declared; 1 when not told."""
        declared = whole(self.declared.get("tensor_parallel"))
        return declared or max(1, self.deployment.gpus_per_replica if self.deployment else 1)

    @property
    def gpu_name(self) -> str | None:
        return (self.deployment.gpu if self.deployment else None) or self.gpu.name


@dataclass(frozen=True)
class Sized:
    """How far a knob is turned: the flag, its value now (None when absent or not told), the new one, what it does."""

    flag: Flag
    current: str | None
    proposed: str | None
    effects: tuple[Effect, ...]
    note: str = ""
    quality_gate: str | None = None
    usd_per_hour_change: float | None = None


@dataclass(frozen=True)
class Refused:
    """Why a rule that holds proposes nothing. is_held: it would, were it not for what was advised or done before."""

    reason: str
    is_held: bool = False


Sizing = Callable[[Measures, Context], Sized | Refused]


def current_value(flag: Flag, knob: Knob, measures: Measures, context: Context) -> str | None:
    """The knob's value now: as the page tells it, else as declared; None when neither does."""
    told = measures.settings.get(flag.setting) if flag.setting else None
    if told is not None and told not in ("None", ""):
        return told
    return context.declared.get(knob)


def with_context(measures: Measures, context: Context) -> Measures:
    """The measures and those that need more than the target's own rows."""
    values = dict(measures.values)
    budget = values.get("token_budget") or whole(context.declared.get("token_budget"))
    declared = whole(context.declared.get("max_sequences"))  # of one rank, as the flag is
    steps = measures.histograms.get("step_tokens")
    upper = steps.quantile_bounds(0.9) if steps is not None else None
    waiting, deferred = values.get("waiting_mean"), values.get("waiting_deferred_mean")
    queue, ttft = values.get("queue_seconds_mean"), values.get("time_to_first_token_seconds_mean")
    power, limit = context.gpu.power_mean_watts, context.gpu.power_limit_watts
    caching = measures.settings.get("enable_prefix_caching")
    values |= {
        "token_budget": budget,
        "slots": values.get("slots") or (declared * measures.ranks if declared else None),
        # The bucket edge above quantile 0.9 of the tokens in a step; the budget itself is the ceiling.
        "budget_use_ratio": min(1.0, upper[1] / budget) if upper and budget else None,
        "deferred_share_ratio": deferred / waiting if deferred is not None and waiting else None,
        "queue_share_ratio": queue / ttft if queue is not None and ttft else None,
        "prefix_caching_off": None if caching is None else float(caching == "False"),
        "reuse_ceiling_ratio": context.reuse_ceiling_ratio,
        "cache_advice_bytes": None
        if context.cache_tiers is None
        else float(sum(tier.size_bytes for tier in context.cache_tiers if tier.tier != "gpu")),
        "dram_active_p95_ratio": context.gpu.dram_active_p95_ratio,
        "tensor_active_p95_ratio": context.gpu.tensor_active_p95_ratio,
        "power_share_ratio": power / limit if power is not None and limit else None,
        "ttft_burn": _burn(measures, context, ("ttft",)),
        "itl_burn": _burn(measures, context, ("itl", "tpot")),
    }
    return dataclasses.replace(measures, values=values)


def _burn(measures: Measures, context: Context, kinds: Sequence[str]) -> float | None:
    """How fast the window spends the budget of these objectives, 1 = exactly as promised; the worst of several."""
    objectives = context.deployment.objectives if context.deployment else ()
    burns = [_burn_of(measures, objective) for objective in objectives if objective.kind in kinds]
    known = [burn for burn in burns if burn is not None]
    return max(known) if known else None


def _burn_of(measures: Measures, objective: Objective) -> float | None:
    names = _OBJECTIVE_METRICS[objective.kind]
    histogram = next((measures.histograms[name] for name in names if name in measures.histograms), None)
    if histogram is None or objective.threshold_seconds is None:
        return None
    good = histogram.share_at_or_under(objective.threshold_seconds)
    return None if good is None else (1 - good) / (1 - objective.target_ratio)
