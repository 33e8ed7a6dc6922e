"""What the launchpad asks for a rollout: config with defaults and help, and the proposal made from it.

Names and checks of shape only; whether a proposal is fit is `rollout.proposal`, who may approve is `rollout.gate`.
"""

from datetime import datetime
from typing import cast

import dagster as dg
from pydantic import Field

from optiinfra_pipelines.domain.rollouts import Change, KnobGroup, LatencySignal, Proposal, RolloutPlan
from optiinfra_pipelines.rollout.knobs import group_of

_PLAN = RolloutPlan()


class ProposeConfig(dg.Config):
    """A change of one deployment, from a recommendation or written here, and how far and how long to try it."""

    requester: str = Field(description="Who asks. Open-source Dagster has no users: this is self-declared text.")
    reason: str = Field(description="Why, in words or as a ticket; kept in the log.")
    recommendation_id: str = Field("", description="A recommendation to carry out; or leave it out and write a change.")
    deployment: str = Field("", description="Deployment of fleet.yaml, when no recommendation is given.")
    proposed: dict[str, str] = Field(
        default_factory=dict,
        description="Engine flags to set, without dashes, such as {max_num_seqs: '256'}; '' for one without a value.",
    )
    current: dict[str, str] = Field(default_factory=dict, description="The flags as they are now, for the way back.")
    remove: list[str] = Field(default_factory=list, description="Flags to leave out.")
    target: str = Field(
        "dry_run",
        description="dry_run rehearses with SIMULATED traffic and changes nothing; haproxy, kubernetes and "
        "orchestrator are real and need their settings in fleet.yaml.",
    )
    percents: list[float] = Field(
        list(_PLAN.percents),
        description="Shares of traffic, rising to 100; a replica's fair share is added.",
    )
    step_minutes: float = Field(
        0.0, ge=0, description="Least minutes per step; 0 takes what finding the regression needs."
    )
    bake_minutes: float = Field(_PLAN.bake_minutes, ge=0, description="How long to watch at 100 % before it is done.")
    detect_percent: float = Field(
        _PLAN.detect_ratio * 100, gt=0, description="Slowdown that each step must be able to find, in percent."
    )
    margin_percent: float = Field(_PLAN.margin_ratio * 100, ge=0, description="Acceptable slowdown, in percent.")
    alpha: float = Field(_PLAN.alpha, gt=0, le=0.1, description="Chance that a harmless candidate fails a step.")
    min_requests: int = Field(_PLAN.min_requests, ge=1, description="Requests of each arm before a step can pass.")
    warm_up_seconds: float = Field(
        _PLAN.warm_up_seconds,
        ge=0,
        description="Least time not judged after each growth; lasts on until the cache's hit rate has settled, ten "
        "times this at most. 0: none.",
    )
    latency_signals: list[str] = Field(
        list(_PLAN.latency_signals),
        description="Latencies that must not suffer, of time_to_first_token_seconds, time_per_output_token_seconds, "
        "inter_token_latency_seconds and request_duration_seconds. More batch slots make each token later by design.",
    )
    candidate_replicas: int = Field(1, ge=1, description="Replicas to begin with.")
    expected_kv_tokens: float | None = Field(
        None, gt=0, description="KV cache that the candidate should have, in tokens; left out, it is not checked."
    )
    is_fix: bool = Field(False, description="Allowed although the error budget is used up.")


class ApproveConfig(dg.Config):
    """One person's word for one exact proposal."""

    rollout_id: str = Field(description="As propose_rollout printed it.")
    approver: str = Field(description="Who approves; another person than the requester.")
    proposal_hash: str = Field(description="The hash that propose_rollout printed, 12 digits of it or more.")
    comment: str = Field("", description="Kept in the log.")
    code: str = Field(
        "",
        description="Proof of identity, where OPTIINFRA_APPROVER_SECRET_<NAME> is set: "
        "printf %s <proposal_hash> | openssl dgst -sha256 -hmac <secret>. Never the secret itself: config is kept.",
    )


class PersonConfig(dg.Config):
    """Who does it and why."""

    rollout_id: str = Field(description="As propose_rollout printed it.")
    person: str = Field(description="Who you are; kept in the log.")
    comment: str = Field("", description="Why; kept in the log.")


class ExecuteConfig(dg.Config):
    """Which approved rollout to carry out."""

    rollout_id: str = Field(description="It must be approved; launching it by hand changes nothing about that.")


def to_proposal(config: ProposeConfig, rollout_id: str, change: Change, now: datetime) -> Proposal:
    """The proposal that a config and its change make. pydantic's ValidationError names what does not fit."""
    plan = RolloutPlan(
        percents=tuple(config.percents),
        step_minutes=config.step_minutes or None,
        bake_minutes=config.bake_minutes,
        detect_ratio=config.detect_percent / 100,
        margin_ratio=config.margin_percent / 100,
        alpha=config.alpha,
        min_requests=config.min_requests,
        warm_up_seconds=config.warm_up_seconds,
        # The plan tells which there are.
        latency_signals=cast("tuple[LatencySignal, ...]", tuple(config.latency_signals)),
        candidate_replicas=config.candidate_replicas,
        expected_kv_tokens=config.expected_kv_tokens,
    )
    return Proposal.model_validate(
        {
            "rollout_id": rollout_id,
            "change": change,
            "plan": plan,
            "target": config.target,
            "requester": config.requester.strip(),
            "reason": config.reason.strip(),
            "recommendation_id": config.recommendation_id or None,
            "is_fix": config.is_fix,
            "created_at": now,
        }
    )


def to_change(config: ProposeConfig) -> Change:
    """The change written in the config; its knob group is that of its flags."""
    proposed: dict[str, str | None] = {**config.proposed, **dict.fromkeys(config.remove)}
    groups = [group_of(flag) for flag in proposed]
    group = next((group for group in groups if group is not None), KnobGroup.OTHER)
    return Change(deployment=config.deployment, knob_group=group, current=dict(config.current), proposed=proposed)
