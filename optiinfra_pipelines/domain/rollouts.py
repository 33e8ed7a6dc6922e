"""Nouns of gated rollouts: change, plan, proposal, approval, position, event, and the row that holds them.

Frozen and closed; units in the names. What may follow what is `rollout.machine`; what an operator may set is
`domain.rollout_policy`; where rows live is `resources.rollouts.store`.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field, NonNegativeFloat, NonNegativeInt

from optiinfra_pipelines.domain.base import Engine, Frozen, Name, Positive


class RolloutState(StrEnum):
    """FAILED: the verdict was given. ROLLED_BACK: the stable state was verified at the target."""

    PENDING_APPROVAL = "PENDING_APPROVAL"
    APPROVED = "APPROVED"
    REJECTED = "REJECTED"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    ROLLED_BACK = "ROLLED_BACK"


TERMINAL = frozenset({RolloutState.REJECTED, RolloutState.COMPLETED, RolloutState.ROLLED_BACK})
# States in which a rollout holds its deployment: no second one may be approved beside it.
HOLDING = frozenset({RolloutState.APPROVED, RolloutState.IN_PROGRESS, RolloutState.FAILED})


class Stage(StrEnum):
    """Where an IN_PROGRESS rollout is."""

    STAGING = "STAGING"
    CANARY = "CANARY"
    VALIDATION = "VALIDATION"
    GRADUAL = "GRADUAL"
    BAKE = "BAKE"


class PauseReason(StrEnum):
    """Why an IN_PROGRESS rollout waits. Only EXECUTOR_LOST goes on by itself, from the start of its step."""

    INCONCLUSIVE = "INCONCLUSIVE"
    OPERATOR = "OPERATOR"
    FREEZE = "FREEZE"
    BLAST_RADIUS = "BLAST_RADIUS"
    WEIGHT_DRIFT = "WEIGHT_DRIFT"
    CLOCK_JUMP = "CLOCK_JUMP"
    UNWATCHED = "UNWATCHED"
    EXECUTOR_LOST = "EXECUTOR_LOST"


class KnobGroup(StrEnum):
    """Knobs that act on one thing; a rollout changes one group, so that its effect has one cause."""

    KV_CACHE = "kv_cache"
    KV_CACHE_DTYPE = "kv_cache_dtype"
    BATCHING = "batching"
    QUANTIZATION = "quantization"
    PARALLELISM = "parallelism"
    CONTEXT_LENGTH = "context_length"
    OFFLOAD = "offload"
    SPECULATION = "speculation"
    SCHEDULING = "scheduling"
    OTHER = "other"


# What metrics cannot see: a change of the numbers' precision may leave every latency fine and every answer wrong.
NEEDS_QUALITY_GATE = frozenset({KnobGroup.QUANTIZATION, KnobGroup.KV_CACHE_DTYPE})

Flag = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*([_\-][a-z0-9]+)*$", max_length=80)]
# One argument of one process: printable, on one line. It is never handed to a shell.
FlagValue = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=400)]
Percent = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
LatencySignal = Literal[
    "time_to_first_token_seconds",
    "time_per_output_token_seconds",
    "inter_token_latency_seconds",
    "request_duration_seconds",
]
TargetKind = Literal["dry_run", "haproxy", "kubernetes", "orchestrator"]


class Change(Frozen):
    """Engine flags of one deployment, now and as proposed; without leading dashes.

    A value of None means that the flag is absent, an empty text that it stands without a value. Flags of current that
    proposed does not name stay as they are.
    """

    deployment: Name
    engine: Engine | None = None
    knob_group: KnobGroup
    current: dict[Flag, FlagValue | None]
    proposed: dict[Flag, FlagValue | None]


class RolloutPlan(Frozen):
    """How far, how long and by what the candidate is tried. Shares are percent of the deployment's traffic."""

    percents: tuple[Percent, ...] = (1.0, 5.0, 25.0, 50.0, 100.0)
    step_minutes: Annotated[float, Field(ge=0, le=1440)] | None = Field(
        default=None, description="Least time of each step; none: what the expected detection time asks for."
    )
    max_extensions: Annotated[int, Field(ge=0, le=10)] = Field(
        default=2, description="How often a step without enough requests is prolonged by its own length."
    )
    bake_minutes: NonNegativeFloat = 60.0
    detect_ratio: Annotated[float, Field(gt=0, le=10)] = Field(
        default=0.5, description="Regression that each step must be long enough to find: 0.5 is +50 % latency."
    )
    margin_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.10, description="Latencies scaled by up to 1 + this are acceptable."
    )
    alpha: Annotated[float, Field(gt=0, le=0.1)] = Field(
        default=0.01, description="Chance that a harmless candidate fails a step."
    )
    min_requests: Annotated[int, Field(ge=1)] = 300
    warm_up_seconds: NonNegativeFloat = Field(
        default=60.0,
        description="Least time not judged after each growth of the share; lasts on until the cache's hit rate has "
        "settled, ten times this at most. 0: none.",
    )
    latency_signals: Annotated[tuple[LatencySignal, ...], Field(min_length=1)] = (
        "time_to_first_token_seconds",
        "time_per_output_token_seconds",
    )
    candidate_replicas: Annotated[int, Field(ge=1)] = 1
    expected_kv_tokens: Positive | None = Field(
        default=None, description="KV cache the candidate should have; over 5 % less stops the rollout."
    )
    pause_hours: Positive = Field(default=24.0, description="A pause longer than this is rolled back.")


class Proposal(Frozen):
    """A change with its plan and its reason. The hash over all of it is what an approval binds to."""

    rollout_id: Name
    change: Change
    plan: RolloutPlan = RolloutPlan()
    target: TargetKind = "dry_run"
    requester: Annotated[str, Field(min_length=1, max_length=120)]
    reason: Annotated[str, Field(min_length=1, max_length=2000)]
    recommendation_id: str | None = None
    undoes: str | None = Field(default=None, description="Rollout that this one takes back; freezes do not hold it.")
    is_fix: bool = Field(default=False, description="A fix may start although the error budget is used up.")
    created_at: AwareDatetime


class Approval(Frozen):
    """One person's word for one exact proposal."""

    approver: Annotated[str, Field(min_length=1, max_length=120)]
    proposal_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    approved_at: AwareDatetime
    expires_at: AwareDatetime
    comment: str = ""
    is_token_checked: bool = Field(
        default=False, description="The approver proved a shared secret; else the name is self-declared text."
    )


class Position(Frozen):
    """Where a rollout stands. stage and step are set while IN_PROGRESS; pause as well while it waits."""

    state: RolloutState
    stage: Stage | None = None
    step: NonNegativeInt = 0
    pause: PauseReason | None = None

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL

    def __str__(self) -> str:
        where = f" {self.stage} step {self.step}" if self.stage else ""
        return f"{self.state}{where}{f' PAUSED ({self.pause})' if self.pause else ''}"


class Step(Frozen):
    """One share of traffic and how long it is watched. max_seconds includes every extension.

    Both count from the end of the warm-up, which takes warm_up_seconds to max_warm_up_seconds.
    """

    stage: Stage
    percent: Annotated[float, Field(ge=0, le=100)]
    dwell_seconds: NonNegativeFloat
    max_seconds: NonNegativeFloat
    warm_up_seconds: NonNegativeFloat = 0.0
    max_warm_up_seconds: NonNegativeFloat = 0.0


class Rollout(Frozen):
    """The row. version moves by one with every change; token only ever grows, and the higher one owns the target.

    attempts: executors that were lost while they held it. run_id: Dagster run of the present owner. is_settled: after
    COMPLETED, the old replicas are out of service and the candidates are the stable ones. latency_stake: how boldly
    the judge bets, from the A/A replay at its start.
    """

    proposal: Proposal
    proposal_hash: str
    position: Position
    version: NonNegativeInt
    approval: Approval | None = None
    steps: tuple[Step, ...] = ()
    owner: str | None = None
    run_id: str | None = None
    token: NonNegativeInt = 0
    attempts: NonNegativeInt = 0
    is_settled: bool = False
    latency_stake: Annotated[float, Field(gt=0, le=1)] = 0.5
    started_at: AwareDatetime | None = Field(default=None, description="When its first executor took it.")
    updated_at: AwareDatetime

    @property
    def rollout_id(self) -> str:
        return self.proposal.rollout_id

    @property
    def deployment(self) -> str:
        return self.proposal.change.deployment

    @property
    def step(self) -> Step | None:
        """The present step of the plan; None before and after the steps."""
        return self.steps[self.position.step] if self.position.step < len(self.steps) else None


EventKind = Literal["transition", "intent", "result", "verdict", "decision", "alert", "refused", "lease"]


class RolloutEvent(Frozen):
    """One line of the append-only log. hash covers the line and the hash before it, so a removed line shows."""

    seq: NonNegativeInt
    rollout_id: str
    at: datetime
    actor: str
    kind: EventKind
    from_position: str | None = None
    to_position: str | None = None
    reason: str
    evidence: dict[str, Any] = Field(default_factory=dict)
    run_id: str | None = None
    token: NonNegativeInt = 0
    hash: str
