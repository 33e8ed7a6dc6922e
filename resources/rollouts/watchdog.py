"""Keeps rollouts safe when their executor is not: traffic off the candidate first, everything else after.

One look goes over all rollouts that hold something. It never advances one: a lost rollout is handed to a new executor
that runs its step again from the start, or, when executors were lost too often or a person canceled the run, is rolled
back. Calling it every 5 s is the work of `sensors.rollouts`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import structlog

from optiinfra_pipelines.domain.rollouts import PauseReason, Rollout, RolloutState
from optiinfra_pipelines.rollout.gate import approval_fault
from optiinfra_pipelines.rollout.machine import Input
from resources.rollouts.desk import Rollouts
from resources.rollouts.orchestrators import Orchestrators
from resources.rollouts.store import WATCHDOG, RolloutError
from resources.rollouts.targets import TargetError

RunState = Literal["alive", "canceled", "over", "unknown"]
# A dropped executor is replaced twice; the third loss is no accident.
MAX_ATTEMPTS = 2
# Queue, daemon loop and a cold import of Dagster: measured 5 to 16 s, on a busy host a minute.
RELAUNCH_SECONDS = 120.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Watched:
    """What one look did with one rollout. run_key: set when a new executor is to be launched; fault: why it could not
    be made safe.
    """

    rollout_id: str
    did: str
    run_key: str | None = None
    fault: str | None = None


class Watchdog:
    """The safety of all rollouts of one fleet. run_state: what became of a Dagster run."""

    def __init__(self, rollouts: Rollouts, run_state: Callable[[str], RunState]) -> None:
        self._rollouts = rollouts
        self._store = rollouts.store
        self._run_state = run_state
        self._orchestrators = Orchestrators(rollouts)

    def look(self) -> list[Watched]:
        """Go over all rollouts; one that cannot be helped never keeps another from being helped."""
        found = []
        for row in self._store.all():
            try:
                done = self._watch(row)
            except (RolloutError, TargetError) as error:
                _log.error("rollout_not_safe", rollout_id=row.rollout_id, cause=str(error))
                done = Watched(row.rollout_id, f"could not be helped: {error}", fault=str(error))
            if done is not None:
                found.append(done)
        found += self._revive()
        # Last: an orchestrator that does not answer costs seconds, which safety must not wait for.
        return [*found, *(Watched(said.rollout_id, said.did) for said in self._orchestrators.look())]

    def _revive(self) -> list[Watched]:
        """Stable replicas that a completed rollout left to us come back with its flags after a crash or a reboot."""
        found = []
        for settings in self._rollouts.policy.deployments:
            if settings.haproxy is None or settings.haproxy.launch is None:
                continue
            target = self._rollouts.haproxy(settings)
            completed = target.completed_by
            if completed is None:
                continue
            try:
                revived = target.revive_stable(self._rollouts.clock().at)
            except TargetError as error:
                _log.error("stable_replica_not_started", deployment=settings.deployment, cause=str(error))
                found.append(Watched(completed, f"a stable replica could not be started: {error}"))
                continue
            if revived:
                did = f"{', '.join(revived)} was gone and is started again with the flags of the completed rollout"
                self._store.note(completed, "alert", did, actor=WATCHDOG, now=self._rollouts.clock())
                found.append(Watched(completed, did))
        return found

    def _watch(self, row: Rollout) -> Watched | None:
        state = row.position.state
        if state is RolloutState.APPROVED:
            return self._expire(row)
        if state is RolloutState.IN_PROGRESS:
            lost = self._lost(row)
            return None if lost is None else self._make_safe(row, lost)
        is_unsettled = state is RolloutState.COMPLETED and not row.is_settled
        if (state is RolloutState.FAILED or is_unsettled) and self._lost(row) is not None:
            return self._finish(row)
        return None

    def _lost(self, row: Rollout) -> str | None:
        """Why nobody executes it; None while somebody does."""
        now = self._rollouts.clock()
        age = self._store.lease_age(row.rollout_id, now)
        if age is None:
            return "nobody executes it"
        if row.owner == WATCHDOG:
            return f"no executor came for {age:.0f} s" if age > RELAUNCH_SECONDS else None
        if age > self._store.lease_seconds:
            return f"its executor was last seen {age:.0f} s ago"
        run = self._run_state(row.run_id) if row.run_id else "unknown"
        return f"its run is {run}" if run in ("canceled", "over") else None

    def _make_safe(self, row: Rollout, why: str) -> Watched:
        """Traffic off, then a new executor or the way back."""
        is_canceled = row.run_id is not None and self._run_state(row.run_id) == "canceled"
        fenced = self._store.fence(row.rollout_id, WATCHDOG, self._rollouts.clock(), why)
        try:
            target = self._rollouts.target(fenced)
            target.claim(fenced.rollout_id, fenced.token)
            target.set_share(0.0, fenced.token)
            percent = target.observe().percent
        except BaseException:
            # Not safe: without the lease the next look, or a new executor, tries at once.
            self._store.release(row.rollout_id, fenced.token, self._rollouts.clock())
            raise
        now = self._rollouts.clock()
        self._store.note(
            row.rollout_id,
            "alert" if percent > 0 else "result",
            f"{why}: the candidate's share is {percent:g} %",
            actor=WATCHDOG,
            now=now,
            token=fenced.token,
        )
        if is_canceled or fenced.attempts >= MAX_ATTEMPTS:
            reason = "its run was canceled" if is_canceled else f"{fenced.attempts + 1} executors were lost; {why}"
            self._store.move(fenced, Input.FAIL, actor=WATCHDOG, reason=reason, now=now, token=fenced.token)
            return self._finish(self._store.get(row.rollout_id))
        counted = self._store.count_attempt(fenced)
        if counted.position.pause is None:
            self._store.move(
                counted,
                Input.PAUSE,
                actor=WATCHDOG,
                reason=why,
                now=now,
                pause=PauseReason.EXECUTOR_LOST,
                token=fenced.token,
            )
        return Watched(row.rollout_id, f"{why}; traffic is off", f"{row.rollout_id}:execute:{counted.attempts}")

    def _finish(self, row: Rollout) -> Watched:
        """One look of the way back, or of taking old replicas out of service; the next look goes on."""
        executor = self._rollouts.executor(row.rollout_id, WATCHDOG)
        now = self._rollouts.clock()
        executor.begin(now)
        try:
            progress = executor.step(now)
        finally:
            executor.end()
        return Watched(row.rollout_id, progress.message)

    def _expire(self, row: Rollout) -> Watched | None:
        now = self._rollouts.clock()
        approval = row.approval
        if approval is None or now.at < approval.expires_at:
            return None
        reason = approval_fault(row, now.at) or "the approval expired"
        self._store.move(row, Input.EXPIRE, actor=WATCHDOG, reason=reason, now=now)
        return Watched(row.rollout_id, reason)
