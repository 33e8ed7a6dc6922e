"""What an orchestrator answers, as far as it is read here, in the shapes of docs/orchestrator.openapi.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from optiinfra_pipelines.domain.base import Name

Url = Annotated[str, Field(pattern=r"^https?://")]


class _Answer(BaseModel):
    """Closed to wrong types, open to keys of a later version."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ReplicaAnswer(_Answer):
    name: Name
    arm: Literal["stable", "candidate"]
    url: Url
    metrics_url: Url
    is_alive: bool | None = None


class CountersAnswer(_Answer):
    requests: NonNegativeInt
    failed: NonNegativeInt


class ArmsAnswer(_Answer):
    stable: CountersAnswer
    candidate: CountersAnswer


class DeploymentAnswer(_Answer):
    deployment: Name
    rollout_id: str | None = None
    promoted: str | None = None
    fencing_token: NonNegativeInt
    percent: Annotated[float, Field(ge=0, le=100)]
    stable_replicas: NonNegativeInt
    stable_ready: NonNegativeInt
    candidates: NonNegativeInt
    candidates_wanted: NonNegativeInt
    candidate_slots: NonNegativeInt
    candidates_in_flight: NonNegativeInt | None = None
    replicas: tuple[ReplicaAnswer, ...]
    counters: ArmsAnswer | None = None


class DecisionAnswer(_Answer):
    rollout_id: Name
    proposal_hash: str
    state: Literal["pending", "approved", "rejected"]
    decided_by: str = ""
    comment: str = ""


class DemandAnswer(_Answer):
    rollout_id: Name
    by: Annotated[str, Field(min_length=1, max_length=120)]
    reason: str


class DemandsAnswer(_Answer):
    rollbacks: tuple[DemandAnswer, ...]


class AgentAnswer(_Answer):
    agent: Name
    heartbeat_seconds: Annotated[float, Field(gt=0)]
