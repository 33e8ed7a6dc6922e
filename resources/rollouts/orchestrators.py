"""Keeps orchestrators informed: registration and heartbeat of this installation, approvals and demands of their people.

Their people's word counts like a word in the launchpad and passes the same gate: another person than the requester,
the hash of exactly this proposal, freeze windows, limits. A demand to take a rollout back is always obeyed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Protocol

import structlog
from pydantic import ValidationError

from optiinfra_pipelines.domain.rollout_policy import RolloutPolicy
from optiinfra_pipelines.domain.rollout_targets import OrchestratorSettings
from optiinfra_pipelines.domain.rollouts import Rollout, RolloutState
from resources.rollouts.clock import Clock
from resources.rollouts.store import RolloutError, RolloutStore
from resources.rollouts.targets import TargetError
from resources.rollouts.targets.orchestrator.answers import DecisionAnswer, DemandsAnswer
from resources.rollouts.targets.orchestrator.client import OrchestratorClient

# An approval that was refused (a freeze window, another rollout) may be valid later; asking costs a line in the log.
ASK_AGAIN = timedelta(minutes=10)
_log = structlog.get_logger(__name__)


class Desk(Protocol):
    """What is needed of `desk.Rollouts`."""

    policy: RolloutPolicy
    clock: Clock
    store: RolloutStore
    environ: Mapping[str, str]

    def all(self) -> list[Rollout]: ...

    def approve(
        self, rollout_id: str, approver: str, stated_hash: str, comment: str, code: str, run_id: str | None
    ) -> Rollout: ...

    def reject(self, rollout_id: str, person: str, comment: str, run_id: str | None) -> Rollout: ...

    def abort(self, rollout_id: str, person: str, comment: str, run_id: str | None) -> Rollout: ...


@dataclass(frozen=True)
class Said:
    """What one look did with one rollout."""

    rollout_id: str
    did: str


class Orchestrators:
    """All orchestrators that the settings name. One that does not answer keeps nothing else from being done."""

    def __init__(self, desk: Desk, connect: Callable[[OrchestratorSettings], OrchestratorClient] | None = None) -> None:
        self._desk = desk
        self._connect = connect or (lambda settings: OrchestratorClient(settings, desk.environ))

    def look(self) -> list[Said]:
        """One heartbeat to each orchestrator with rollouts that are not over, and what its people decided."""
        said: list[Said] = []
        rows = [
            row for row in self._desk.all() if row.proposal.target == "orchestrator" and not row.position.is_terminal
        ]
        by_agent: dict[tuple[str, str], list[tuple[Rollout, OrchestratorSettings]]] = {}
        for row in rows:
            settings = self._desk.policy.of(row.deployment).orchestrator
            if settings is not None:
                by_agent.setdefault((settings.url, settings.agent), []).append((row, settings))
        for held in by_agent.values():
            try:
                said += self._ask(held)
            except (TargetError, RolloutError, ValidationError) as error:
                _log.warning("orchestrator_not_asked", url=held[0][1].url, cause=str(error))
        return said

    def _ask(self, held: list[tuple[Rollout, OrchestratorSettings]]) -> list[Said]:
        settings = held[0][1]
        client = self._connect(settings)
        names = sorted({one.deployment or row.deployment for row, one in held})
        client.put(f"/v1/agents/{settings.agent}", {"version": version("optiinfra-pipelines"), "deployments": names})
        heartbeat = {
            "at": self._desk.clock().at.isoformat(),
            "rollouts": [
                {
                    "rollout_id": row.rollout_id,
                    "deployment": one.deployment or row.deployment,
                    "position": str(row.position),
                    "fencing_token": row.token,
                }
                for row, one in held
            ],
        }
        answer = client.put(f"/v1/agents/{settings.agent}/heartbeat", heartbeat)
        said = self._obey(DemandsAnswer.model_validate(answer.body), {row.rollout_id: row for row, _ in held})
        taken = {one.rollout_id for one in said}
        for row, one in held:
            is_waiting = row.position.state is RolloutState.PENDING_APPROVAL and one.asks_approval
            if is_waiting and row.rollout_id not in taken:
                said += self._decide(client, row)
        return said

    def _obey(self, demands: DemandsAnswer, held: Mapping[str, Rollout]) -> list[Said]:
        said = []
        for demand in demands.rollbacks:
            row = held.get(demand.rollout_id)
            if row is None or row.position.state is RolloutState.FAILED:
                # Not ours, or on its way back already.
                continue
            self._desk.abort(row.rollout_id, demand.by, demand.reason, None)
            said.append(Said(row.rollout_id, f"taken back for {demand.by}: {demand.reason}"))
        return said

    def _decide(self, client: OrchestratorClient, row: Rollout) -> list[Said]:
        request = {
            "proposal_hash": row.proposal_hash,
            "deployment": row.deployment,
            "requester": row.proposal.requester,
            "reason": row.proposal.reason,
            "proposal": row.proposal.model_dump(mode="json"),
        }
        answer = client.put(f"/v1/approval-requests/{row.rollout_id}", request)
        decision = DecisionAnswer.model_validate(answer.body)
        if decision.state == "pending":
            return []
        if decision.state == "rejected":
            self._desk.reject(row.rollout_id, decision.decided_by, decision.comment, None)
        else:
            last = self._desk.store.events(row.rollout_id)[-1]
            if last.kind == "refused" and self._desk.clock().at - last.at < ASK_AGAIN:
                return []
            try:
                self._desk.approve(
                    row.rollout_id, decision.decided_by, decision.proposal_hash, decision.comment, "", None
                )
            except RolloutError as refusal:
                return [Said(row.rollout_id, f"the approval of {decision.decided_by} is not valid: {refusal}")]
        return [Said(row.rollout_id, f"{decision.state} by {decision.decided_by}")]
