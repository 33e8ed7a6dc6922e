"""A deployment that an orchestrator runs, through its REST contract: every change names what it was decided on.

The orchestrator keeps the fencing token, the weights to restore and the replicas; nothing is remembered here.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from optiinfra_pipelines.domain.base import Name
from optiinfra_pipelines.domain.rollout_targets import OrchestratorSettings
from resources.rollouts.targets.base import (
    Actual,
    Address,
    ArmCounts,
    Counted,
    Flags,
    StaleTokenError,
    TargetError,
)
from resources.rollouts.targets.orchestrator.answers import DeploymentAnswer, ReplicaAnswer
from resources.rollouts.targets.orchestrator.client import MovedError, OrchestratorClient

Json = dict[str, Any]
# Replicas come and go and change the ETag; so often in a row is somebody who fights us.
MAX_MOVES = 6


class OrchestratorTarget:
    """One deployment of one orchestrator. name: what the orchestrator calls it."""

    kind = "orchestrator"
    is_simulated = False

    def __init__(self, settings: OrchestratorSettings, name: Name, client: OrchestratorClient) -> None:
        self._settings = settings
        self._path = f"/v1/deployments/{name}"
        self._client = client
        # Told by each answer; a deployment whose gateway counts nothing has null there.
        self.counts_errors = True
        self.drain_seconds = settings.drain_seconds
        self._is_alive: dict[str, bool | None] = {}

    # --- reading ---------------------------------------------------------------------------------------

    def observe(self) -> Actual:
        found, _ = self._read()
        detail = {"rollout_id": found.rollout_id, "fencing_token": found.fencing_token, "promoted": found.promoted}
        return Actual(found.percent, found.candidates, found.stable_ready, found.candidates_in_flight, detail)

    def stable_replicas(self) -> int:
        return self._read()[0].stable_replicas

    def candidate_slots(self) -> int:
        return self._read()[0].candidate_slots

    def started_arm(self) -> tuple[Address, ...]:
        ours = [one for one in self._read()[0].replicas if one.arm == "candidate"]
        self._is_alive = {one.name: one.is_alive for one in ours}
        return tuple(_address(one) for one in ours)

    def not_started(self) -> str | None:
        found, _ = self._read()
        there = sum(1 for one in found.replicas if one.arm == "candidate")
        return None if there >= found.candidates_wanted else f"{there} of {found.candidates_wanted} candidates run"

    def stable_arm(self) -> tuple[Address, ...]:
        return tuple(_address(one) for one in self._read()[0].replicas if one.arm == "stable")

    def arm_counts(self) -> ArmCounts | None:
        counters = self._read()[0].counters
        if counters is None:
            return None
        ours, theirs = counters.candidate, counters.stable
        return ArmCounts(
            {"candidate": Counted(ours.requests, ours.failed)}, {"stable": Counted(theirs.requests, theirs.failed)}
        )

    def is_alive(self, server: str) -> bool | None:
        return self._is_alive.get(server)

    # --- acting ----------------------------------------------------------------------------------------

    def claim(self, rollout_id: str, token: int) -> None:
        found = self._change("PUT", "claim", {"rollout_id": rollout_id}, token)
        if found.rollout_id != rollout_id or found.fencing_token != token:
            raise TargetError(
                f"the orchestrator shows rollout {found.rollout_id} with token {found.fencing_token} after rollout "
                f"{rollout_id} claimed it with {token}"
            )

    def start_candidates(self, count: int, flags: Flags, token: int) -> None:
        self._change("PUT", "candidates", {"count": count, "flags": dict(flags)}, token)

    def set_share(self, percent: float, token: int) -> None:
        if percent <= 0:
            self._roll_back(token)
            return
        self._change("PUT", "share", {"percent": percent}, token)

    def drain(self, token: int) -> bool:
        """New requests are kept off by the share of 0; not known is not drained, the caller's patience ends that."""
        found, _ = self._read()
        if found.percent > 0:
            found = self._roll_back(token)
        self._refuse_stale(found, token)
        return found.candidates == 0 or found.candidates_in_flight == 0

    def stop_candidates(self, token: int) -> None:
        self._change("DELETE", "candidates", None, token)

    def promote(self, rollout_id: str, token: int) -> bool:
        return self._change("PUT", "promotion", {"rollout_id": rollout_id}, token).promoted == rollout_id

    # --- parts -----------------------------------------------------------------------------------------

    def _roll_back(self, token: int) -> DeploymentAnswer:
        """Needs no version: nothing that moved meanwhile is a reason to leave traffic on a failed candidate."""
        return _read_answer(self._client.change("POST", f"{self._path}/rollback", None, token, None).body)

    def _change(self, method: str, what: str, body: Json | None, token: int) -> DeploymentAnswer:
        """Read, refuse a stale token, change exactly what was read."""
        for _ in range(MAX_MOVES):
            found, etag = self._read()
            self._refuse_stale(found, token)
            try:
                answer = self._client.change(method, f"{self._path}/{what}", body, token, etag)
            except MovedError:
                continue
            return _read_answer(answer.body)
        raise TargetError(f"{self._path} moved {MAX_MOVES} times while {what} was being changed; find who else acts")

    @staticmethod
    def _refuse_stale(found: DeploymentAnswer, token: int) -> None:
        if token < found.fencing_token:
            raise StaleTokenError(f"token {token} is stale; {found.fencing_token} owns {found.deployment} now")

    def _read(self) -> tuple[DeploymentAnswer, str]:
        answer = self._client.get(self._path)
        if answer.etag is None:
            raise TargetError(f"the orchestrator answers GET {self._path} without an ETag; its contract asks for one")
        found = _read_answer(answer.body)
        self.counts_errors = found.counters is not None
        return found, answer.etag


def _read_answer(body: Json) -> DeploymentAnswer:
    try:
        return DeploymentAnswer.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise TargetError(f"the orchestrator's answer breaks its contract at {where}: {first['msg']}") from error


def _address(one: ReplicaAnswer) -> Address:
    return Address(one.name, one.url, one.metrics_url)
