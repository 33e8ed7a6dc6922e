"""Decide how many replicas a deployment needs to keep its objectives.

Pure: a forecast, a capacity and the present state in, one decision out. Capacity is `capacity`, what a policy
would have cost is `backtest`; changing the fleet is a rollout's.
"""

from __future__ import annotations

import math
from datetime import datetime
from statistics import NormalDist
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from optiinfra_pipelines.domain.base import Frozen, Positive
from optiinfra_pipelines.domain.scaling import Capacity, ScalingAdvice, TargetRatio

# z of P10 and P90 of a normal distribution.
DECILE_SIGMAS = 1.2816


class ScalingSettings(Frozen):
    """How eager to be. Defaults: what the replayed public fleets kept their objectives with, see benchmarks/."""

    min_replicas: NonNegativeInt = 1
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    step_replicas: Annotated[int, Field(ge=1)] = 1  # replicas that come and go together, as on one host
    up_ratio: TargetRatio = 0.95
    down_ratio: TargetRatio = 0.85  # of what remains after a removal; the gap to up_ratio is the hysteresis
    queue_drain_seconds: Positive = 60.0
    cooldown_seconds: NonNegativeFloat = 300.0


class LoadOutlook(Frozen):
    """Units of work per second: now, and over the time that a replica takes to start (or longer)."""

    present: NonNegativeFloat | None
    p10: NonNegativeFloat | None
    p50: NonNegativeFloat | None
    p90: NonNegativeFloat | None
    horizon_seconds: Positive
    queued_work: NonNegativeFloat | None = None


def replicas_needed(
    load_per_second: float,
    capacity_per_second: float,
    *,
    target_ratio: float,
    queued_work: float = 0.0,
    queue_drain_seconds: float = 60.0,
) -> int:
    """Replicas that carry a load at target_ratio of their capacity and drain the queue beside it in time."""
    work = load_per_second / target_ratio + queued_work / queue_drain_seconds
    return math.ceil(work / capacity_per_second - 1e-9)


# Below one request in thirty thousand years a load is none; ratios of smaller numbers overflow.
NOTHING_PER_SECOND = 1e-12


def breach_probability(outlook: LoadOutlook, carried_per_second: float) -> float | None:
    """Chance that the load exceeds what is carried, from P10, P50, P90 as two half log-normals; None if unknown."""
    if outlook.p10 is None or outlook.p50 is None or outlook.p90 is None:
        return None
    if carried_per_second <= 0:
        return 1.0 if outlook.p90 > 0 else 0.0
    if outlook.p50 <= NOTHING_PER_SECOND:
        return 0.0 if outlook.p90 <= carried_per_second else 0.1
    far = outlook.p90 if carried_per_second >= outlook.p50 else outlook.p10
    spread = abs(math.log(max(far, NOTHING_PER_SECOND) / outlook.p50)) / DECILE_SIGMAS
    distance = math.log(carried_per_second / outlook.p50)
    if spread == 0:
        return 0.0 if distance >= 0 else 1.0
    return 1 - NormalDist().cdf(distance / spread)


def recommend_scaling(
    deployment: str,
    decided_at: datetime,
    *,
    current_replicas: int | None,
    outlook: LoadOutlook,
    capacity: Capacity | None,
    seconds_since_change: float | None,
    settings: ScalingSettings,
    draining_replicas: int = 0,
    usd_per_replica_hour: float | None = None,
) -> ScalingAdvice:
    """Up, down, hold, or abstain, with the evidence.

    Up at once, to the larger of the P90 ahead and the present load, plus the queue. Down only when nothing waits or
    drains, the cool-down is over (None: unknown, so it is not), and the replicas that remain stay under down_ratio at
    that same load: from N to N - 1 each carries N / (N - 1) of before.
    """
    refusal = _refusal(current_replicas, outlook, capacity)
    if refusal or current_replicas is None or capacity is None or outlook.present is None or outlook.p90 is None:
        return ScalingAdvice(
            deployment=deployment,
            decided_at=decided_at,
            action="abstain",
            current_replicas=current_replicas,
            proposed_replicas=None,
            reason=refusal or "an input is missing",
        )
    load, queued = max(outlook.p90, outlook.present), outlook.queued_work or 0.0

    def whole(target_ratio: float) -> int:
        need = replicas_needed(
            load,
            capacity.per_second,
            target_ratio=target_ratio,
            queued_work=queued,
            queue_drain_seconds=settings.queue_drain_seconds,
        )
        return math.ceil(need / settings.step_replicas) * settings.step_replicas

    most = settings.max_replicas if settings.max_replicas is not None else max(whole(settings.up_ratio), 1)
    up = min(max(whole(settings.up_ratio), settings.min_replicas), most)
    down = min(max(whole(settings.down_ratio), settings.min_replicas), max(most, current_replicas))
    action: Literal["up", "down", "hold"] = "hold"
    proposed, reason = current_replicas, "the present replicas carry the load within both thresholds"
    if up > current_replicas:
        action, proposed = "up", up
        reason = f"{load:.4g} a second ahead and {queued:.4g} queued need {up} replicas"
        if whole(settings.up_ratio) > most:
            reason += f"; {whole(settings.up_ratio)} were needed, the maximum is {most}"
    elif whole(settings.up_ratio) > most:
        reason = f"{whole(settings.up_ratio)} replicas are needed, the maximum is {most}"
    elif down < current_replicas:
        blocked = _blocks_removal(queued, draining_replicas, seconds_since_change, settings)
        if blocked:
            reason = f"{down} replicas would do, but {blocked}"
        else:
            action, proposed = "down", down
            after = load / (down * capacity.per_second) if down else 0.0
            reason = f"the {down} that remain would carry {after:.0%} of their capacity at the load ahead"
    carried = proposed * capacity.per_second
    hourly = None if usd_per_replica_hour is None else (proposed - current_replicas) * usd_per_replica_hour
    return ScalingAdvice(
        deployment=deployment,
        decided_at=decided_at,
        action=action,
        current_replicas=current_replicas,
        proposed_replicas=proposed,
        reason=reason,
        evidence={
            "load_present_per_second": outlook.present,
            "load_p50_per_second": outlook.p50,
            "load_p90_per_second": outlook.p90,
            "horizon_seconds": outlook.horizon_seconds,
            "queued_work": outlook.queued_work,
            "capacity_per_second": capacity.per_second,
            "capacity_low_per_second": capacity.low_per_second,
            "capacity_high_per_second": capacity.high_per_second,
            "load_after_ratio": load / carried if carried else None,
            "breach_probability_at_low_capacity": breach_probability(outlook, proposed * capacity.low_per_second),
        },
        breach_probability=breach_probability(outlook, carried),
        usd_per_hour_change=hourly,
    )


def _refusal(current: int | None, outlook: LoadOutlook, capacity: Capacity | None) -> str | None:
    if current is None:
        return "how many replicas run is not known: no target of the deployment answered"
    if capacity is None:
        return "what a replica carries is not known: too few busy minutes within objectives, and no profile fits"
    if outlook.present is None:
        return "the present load is not known: the last minutes hold no samples"
    if outlook.p50 is None or outlook.p90 is None:
        return "there is no forecast: its own reason says why"
    return None


def _blocks_removal(queued: float, draining: int, since: float | None, settings: ScalingSettings) -> str | None:
    if queued > 0:
        return "requests are waiting"
    if draining > 0:
        return f"{draining} replicas are still draining"
    if since is None:
        return "when the last change was is not known"
    if since < settings.cooldown_seconds:
        return f"the last change was {since:.0f} s ago, the cool-down is {settings.cooldown_seconds:.0f} s"
    return None
