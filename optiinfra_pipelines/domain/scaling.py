"""Nouns of scaling: the policies that can be replayed, what a replay found, what one replica carries, what to do.

Frozen and closed; units in the names. Demand is counted in one unit of work throughout a replay (tokens, or requests)
that the caller chooses; a capacity is that unit per second and replica. Replaying is `analysis.backtest.replay`,
deciding is `analysis.scaling.replicas`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from optiinfra_pipelines.domain.base import Frozen, Positive, Ratio

TargetRatio = Annotated[float, Field(gt=0, le=1, description="Load a ready replica should carry, 1 = its capacity.")]


class StaticPolicy(Frozen):
    """The same number of replicas always."""

    kind: Literal["static"] = "static"
    replicas: Annotated[int, Field(ge=0)]


class HpaPolicy(Frozen):
    """Kubernetes' horizontal autoscaler on load per replica: scale by load / (replicas * capacity) / target."""

    kind: Literal["hpa"] = "hpa"
    target_ratio: TargetRatio
    tolerance_ratio: Ratio = 0.1  # Kubernetes' default
    window_seconds: Positive = 60.0
    sync_seconds: Positive = 15.0  # Kubernetes' default
    stabilization_seconds: NonNegativeFloat = 300.0  # Kubernetes' default, downwards


class KedaWaitingPolicy(Frozen):
    """KEDA on waiting requests alone: one replica for every so many in the queue (average value)."""

    kind: Literal["keda_waiting"] = "keda_waiting"
    waiting_per_replica: Positive = 5.0  # what the vLLM production stack's example sets
    sync_seconds: Positive = 15.0
    stabilization_seconds: NonNegativeFloat = 300.0


class KedaLoadPolicy(Frozen):
    """KEDA on load plus queue: (mean load + queue / drain time) / (target * capacity) replicas."""

    kind: Literal["keda_load"] = "keda_load"
    target_ratio: TargetRatio
    window_seconds: Positive = 60.0
    queue_drain_seconds: Positive = 60.0
    sync_seconds: Positive = 15.0
    stabilization_seconds: NonNegativeFloat = 300.0


class SloRatioPolicy(Frozen):
    """Control by how near the objective is (llm-d style, simplified): grow with wait / bound, shrink when spare."""

    kind: Literal["slo_ratio"] = "slo_ratio"
    wait_target_seconds: Positive = 5.0
    spare_ratio: TargetRatio = 0.8  # one replica less only if the others would then stay under this load
    window_seconds: Positive = 60.0
    sync_seconds: Positive = 30.0
    stabilization_seconds: NonNegativeFloat = 300.0


class PlannerPolicy(Frozen):
    """A planner that provisions for its prediction at long intervals (a simplification of Dynamo's, not its code)."""

    kind: Literal["planner"] = "planner"
    target_ratio: TargetRatio = 0.8
    interval_seconds: Positive = 180.0
    window_seconds: Positive = 600.0  # the prediction is the mean of the last window: its constant predictor


class TrendPolicy(Frozen):
    """Ours: provision for where the load will be once a replica ordered now is ready, for the queue, and for bursts.

    Up at once to the larger of (line through the last trend window, carried over the cold start, with headroom for
    its own recent misses, + queue / drain time) / (up_ratio * capacity) and the reserve over the recent peak; down
    only to what keeps the remaining replicas under down_ratio, after that held for the stabilization, and never before
    a whole reserve window has been seen. The defaults are for a load without history; with days of it, tune.
    """

    kind: Literal["trend"] = "trend"
    up_ratio: TargetRatio = 0.95
    down_ratio: TargetRatio = 0.95
    trend_window_seconds: Positive = 180.0
    trend_damping_ratio: Annotated[float, Field(ge=0, le=2)] = 1.0  # 1 trusts the line whole
    miss_quantile_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9,
        description="Headroom: this quantile of how far, relative to the load, the line fell short lately; 0: none.",
    )
    miss_window_seconds: Positive = 3600.0
    reserve_ratio: NonNegativeFloat = Field(
        default=1.25, description="Replicas for this many times the peak of the reserve window, at full capacity."
    )
    reserve_window_seconds: Positive = 300.0
    window_seconds: Positive = 60.0
    queue_drain_seconds: Positive = 60.0
    sync_seconds: Positive = 15.0
    stabilization_seconds: NonNegativeFloat = 60.0


class ForesightPolicy(Frozen):
    """Perfect knowledge of the load ahead, through the same actuator: what a forecast could gain at the most."""

    kind: Literal["foresight"] = "foresight"
    horizon_seconds: Positive = 480.0
    window_seconds: Positive = 60.0
    stabilization_seconds: NonNegativeFloat = 300.0


Policy = Annotated[
    StaticPolicy
    | HpaPolicy
    | KedaWaitingPolicy
    | KedaLoadPolicy
    | SloRatioPolicy
    | PlannerPolicy
    | TrendPolicy
    | ForesightPolicy,
    Field(discriminator="kind"),
]


class BacktestResult(Frozen):
    """What a policy would have cost and kept on a recorded load."""

    policy: Policy
    steps: NonNegativeInt
    step_seconds: Positive
    replica_hours: NonNegativeFloat = Field(description="Paid from the order to the end of the drain.")
    attainment_ratio: Ratio | None = Field(
        description="Share of the demand that found a wait within the bound; none without any demand."
    )
    arrived: NonNegativeFloat
    served: NonNegativeFloat
    queued_at_end: NonNegativeFloat
    longest_wait_seconds: NonNegativeFloat | None = Field(description="None where demand met no ready replica.")
    peak_replicas: NonNegativeInt
    scale_ups: NonNegativeInt
    scale_downs: NonNegativeInt
    oracle_replica_hours: NonNegativeFloat = Field(
        description="The offline optimum that lets nothing wait past its step, cold starts paid."
    )

    @property
    def cost_ratio(self) -> float | None:
        """Replica-hours in oracles: 1.12 is 12 % regret."""
        return self.replica_hours / self.oracle_replica_hours if self.oracle_replica_hours else None


class Capacity(Frozen):
    """What one replica carries within its objectives, in units of work per second."""

    per_second: Positive
    low_per_second: Positive
    high_per_second: Positive
    origin: Literal["history", "profile"]
    minutes: NonNegativeInt = Field(description="Minutes of history it stands on; 0 for a profile.")
    reason: str


class ScalingAdvice(Frozen):
    """One decision about a deployment's replicas, with what it stands on."""

    deployment: str
    decided_at: datetime
    action: Literal["up", "down", "hold", "abstain"]
    current_replicas: NonNegativeInt | None
    proposed_replicas: NonNegativeInt | None = Field(description="None when abstaining.")
    reason: str
    evidence: dict[str, float | None] = Field(default_factory=dict)
    breach_probability: Ratio | None = Field(
        default=None, description="Chance that the load exceeds the proposed replicas' capacity over the horizon."
    )
    usd_per_hour_change: float | None = None
