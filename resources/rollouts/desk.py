"""Everything rollouts are done with in one process: the store, the targets of a fleet, executors, and people's moves.

`Rollouts` is what jobs and sensors hold. It decides nothing: who may do what is `rollout.gate`, what may follow what
is `rollout.machine`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts, RolloutPolicy
from optiinfra_pipelines.domain.rollouts import Change, PauseReason, Proposal, Rollout, RolloutState
from optiinfra_pipelines.rollout import gate
from optiinfra_pipelines.rollout.budget import budget_refusal
from optiinfra_pipelines.rollout.machine import Input
from optiinfra_pipelines.rollout.present import present_flags, with_present
from optiinfra_pipelines.rollout.proposal import faults
from resources.rollouts.budgets import Read, read_budgets
from resources.rollouts.clock import Clock, Moment, now_here
from resources.rollouts.deadman import Capsule, spawn
from resources.rollouts.store import RolloutError, RolloutStore
from resources.rollouts.targets import RolloutTarget, TargetError
from resources.rollouts.targets.build import served_target
from resources.rollouts.targets.dry_run import DryRunTarget
from resources.rollouts.targets.haproxy import HaproxyTarget

if TYPE_CHECKING:
    from resources.rollouts.executor import Executor

STORE_FILE = "rollouts.sqlite"
# Runs that never came to take the lease; more of them are no accident.
MAX_LOST_LAUNCHES = 2


@dataclass(frozen=True)
class Pace:
    """The clock and the wait of one execution: real, or running ahead in a rehearsal."""

    clock: Clock
    sleep: Callable[[float], None]


class Rollouts:
    """Rollouts of one fleet. root: folder of their state, made when first written to.

    read_history: SQL on the published copy, for error budgets, and for margins and stakes from the stable replicas'
    past; read_live: SQL on the live file, for faults of the candidates' GPUs. None: nothing is kept.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: RolloutPolicy,
        root: Path,
        *,
        environ: Mapping[str, str],
        clock: Clock = now_here,
        read_history: Read | None = None,
        read_live: Read | None = None,
    ) -> None:
        self.fleet = fleet
        self.policy = policy
        self.root = Path(root)
        self.clock = clock
        self.store = RolloutStore(self.root / STORE_FILE, policy.lease_seconds)
        self.environ = environ
        self.read_history = read_history
        self.read_live = read_live

    def all(self) -> list[Rollout]:
        """Every rollout, oldest first; none, without touching the disk, where none was ever proposed."""
        return self.store.all() if self.store.path.exists() else []

    # --- parts ---------------------------------------------------------------------------------------

    def budget_refusal(self, row: Rollout) -> str | None:
        """Why the error budgets of its deployment do not let a rollout start; None when they do."""
        deployment = next((one for one in self.fleet.deployments if one.name == row.deployment), None)
        if deployment is None or not deployment.objectives or self.read_history is None:
            return None
        return budget_refusal(row.proposal, read_budgets(self.read_history, row.deployment), self.clock().at)

    def target(self, row: Rollout) -> RolloutTarget:
        """What a rollout acts on. RolloutError when its target is not available here."""
        settings = self.policy.of(row.deployment)
        if row.proposal.target == "dry_run":
            return DryRunTarget(row.deployment, settings.dry_run, self.root / "dry_run")
        try:
            return served_target(row.proposal.target, settings, self.root, self.environ)
        except TargetError as error:
            raise RolloutError(f"rollout {row.rollout_id} has no target: {error}") from error

    def haproxy(self, settings: DeploymentRollouts) -> HaproxyTarget:
        """The HAProxy target of a deployment that has one."""
        target = served_target("haproxy", settings, self.root, self.environ)
        assert isinstance(target, HaproxyTarget)
        return target

    def executor(self, rollout_id: str, owner: str, run_id: str | None = None) -> Executor:
        """A new executor; nothing is touched before its `begin`. RolloutError when its target is not available here."""
        # scipy and numba cost seconds of CPU and 150 MB, which ticks and runs that judge nothing must not pay.
        from resources.rollouts.assembly import make_executor

        return make_executor(self, self.store.get(rollout_id), owner, run_id)

    def launch_key(self, rollout_id: str, runs: Sequence[str], are_over: bool) -> str | None:
        """The key of the run to launch for an approved rollout; None when none is to be launched.

        runs: those launched for it before. One that ended without a word (a host too busy to start it, a code server
        that was killed) is replaced twice; one that was refused is for a person, who launches it when the reason is
        gone.
        """
        if not runs:
            return f"{rollout_id}:execute"
        if not are_over or len(runs) > MAX_LOST_LAUNCHES:
            return None
        is_refused = any(event.kind == "refused" and event.run_id in runs for event in self.store.events(rollout_id))
        return None if is_refused else f"{rollout_id}:execute:launch-{len(runs)}"

    def guard(self, executor: Executor) -> None:
        """Start the process that outlives an executor with a real target. A rehearsal needs none."""
        row = self.store.get(executor.rollout_id)
        if executor.target.is_simulated:
            return
        spawn(
            Capsule(
                store=str(self.store.path),
                root=str(self.root),
                rollout_id=row.rollout_id,
                token=executor.token,
                lease_seconds=self.policy.lease_seconds,
                kind=row.proposal.target,
                settings=self.policy.of(row.deployment),
            )
        )

    def pace(self, target: RolloutTarget) -> Pace:
        """Real time, or a rehearsal's."""
        if not target.is_simulated:
            return Pace(self.clock, time.sleep)
        from resources.rollouts.rehearsal import RehearsalClock

        rehearsal = RehearsalClock(self.clock())
        return Pace(rehearsal, rehearsal.sleep)

    def with_present_flags(self, change: Change, target: str) -> Change:
        """The change beside what completed rollouts left: the present values of its flags, for the way back."""
        return with_present(change, present_flags(self.all(), change.deployment, target))

    # --- people's moves --------------------------------------------------------------------------------

    def propose(self, proposal: Proposal, run_id: str | None = None) -> Rollout:
        """Enter a proposal. RolloutError with every fault and its remedy."""
        found = [*faults(proposal, self.policy), *gate.stale_refusals(proposal, self.policy, self.all())]
        known = [deployment.name for deployment in self.fleet.deployments]
        if proposal.target != "dry_run" and proposal.change.deployment not in known:
            listed = ", ".join(known) or "none"
            found.append(f"fleet.yaml has no deployment {proposal.change.deployment}; these are: {listed}")
        if found:
            raise RolloutError(f"the proposal is not fit: {'; '.join(found)}")
        return self.store.propose(proposal, self.clock(), run_id)

    def approve(
        self, rollout_id: str, approver: str, stated_hash: str, comment: str, code: str, run_id: str | None
    ) -> Rollout:
        """One person's word for one exact proposal. RolloutError with the reason of a refusal, which is logged."""
        row, now = self.store.get(rollout_id), self.clock()
        refusal = gate.approval_refusal(
            row,
            approver=approver,
            stated_hash=stated_hash,
            code=code,
            now=now.at,
            policy=self.policy,
            environ=self.environ,
            others=[other for other in self.store.all() if other.rollout_id != rollout_id],
        )
        if refusal is not None:
            self._refuse(row, approver, f"not approved: {refusal}", now, run_id)
        approval = gate.approve(row, approver, now.at, self.policy, comment, code)
        reason = comment or f"approved by {approver}"
        return self.store.move(
            row, Input.APPROVE, actor=approver, reason=reason, now=now, approval=approval, run_id=run_id
        )

    def reject(self, rollout_id: str, person: str, comment: str, run_id: str | None) -> Rollout:
        """A proposal that is not to be carried out."""
        return self._move(rollout_id, Input.REJECT, person, comment, run_id)

    def pause(self, rollout_id: str, person: str, comment: str, run_id: str | None) -> Rollout:
        """Hold a rollout where it is; its guards stay awake."""
        return self._move(rollout_id, Input.PAUSE, person, comment, run_id, PauseReason.OPERATOR)

    def resume(self, rollout_id: str, person: str, comment: str, run_id: str | None) -> Rollout:
        """Go on: the step runs again from its start, with fresh counts."""
        return self._move(rollout_id, Input.RESUME, person, comment, run_id)

    def abort(self, rollout_id: str, person: str, comment: str, run_id: str | None) -> Rollout:
        """End a rollout: withdrawn before its start, FAILED with traffic off at once after it. Always allowed."""
        row = self._move(rollout_id, Input.ABORT, person, comment, run_id)
        return self.take_back(row, person, run_id) if row.position.state is RolloutState.FAILED else row

    def roll_back(self, rollout_id: str, person: str, comment: str, run_id: str | None) -> Rollout:
        """Take a rollout back. A completed one becomes a new proposal with the flags exchanged, free of freezes."""
        row = self.store.get(rollout_id)
        if row.position.state is RolloutState.COMPLETED:
            return self._propose_reverse(row, person, comment, run_id)
        if row.position.state is RolloutState.FAILED:
            return self.take_back(row, person, run_id)
        return self.abort(rollout_id, person, comment, run_id)

    def _propose_reverse(self, row: Rollout, person: str, comment: str, run_id: str | None) -> Rollout:
        now = self.clock()
        change, old = row.proposal.change, row.proposal
        before = {**dict.fromkeys(change.proposed), **change.current}
        reverse = old.model_copy(
            update={
                "rollout_id": f"{row.deployment}-{now.at:%Y%m%d-%H%M%S}-back",
                "change": change.model_copy(update={"current": change.proposed, "proposed": before}),
                "requester": person,
                "reason": comment or f"takes back {row.rollout_id}",
                "undoes": row.rollout_id,
                "created_at": now.at,
            }
        )
        return self.propose(reverse, run_id)

    def take_back(self, row: Rollout, person: str, run_id: str | None) -> Rollout:
        """Begin the way back of a failed rollout here and now, whoever executed it. One look; others follow."""
        owner = f"{person}:{run_id or 'rollback'}"
        self.store.fence(row.rollout_id, owner, self.clock(), f"{person} takes it back")
        executor = self.executor(row.rollout_id, owner, run_id)
        executor.begin(self.clock())
        executor.step(self.clock())
        return self.store.get(row.rollout_id)

    def _move(
        self,
        rollout_id: str,
        given: Input,
        person: str,
        comment: str,
        run_id: str | None,
        pause: PauseReason | None = None,
    ) -> Rollout:
        if not person.strip():
            raise RolloutError("say who you are; the log keeps who did what")
        row = self.store.get(rollout_id)
        reason = comment or f"{given} by {person}"
        return self.store.move(
            row, given, actor=person.strip(), reason=reason, now=self.clock(), pause=pause, run_id=run_id
        )

    def _refuse(self, row: Rollout, actor: str, reason: str, now: Moment, run_id: str | None) -> None:
        self.store.note(row.rollout_id, "refused", reason, actor=actor or "nobody", now=now, run_id=run_id)
        raise RolloutError(f"rollout {row.rollout_id} is {reason}")
