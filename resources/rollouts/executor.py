"""Carry out one rollout, look by look: what is decided elsewhere is done here, in an order that survives any death.

Every outside action is written down before it is done and read back after. Taking traffic off a candidate comes
before everything else: at a takeover, after a gap, at a failure. The row is the truth: a person's abort or pause is
seen at the next look. `step` does one look and never sleeps; the caller keeps the pace (`defs.rollouts`).
Decisions come from `optiinfra_pipelines.rollout`; rows from `store`; the target is a `targets`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import structlog

from optiinfra_pipelines.domain.rollout_policy import RolloutPolicy
from optiinfra_pipelines.domain.rollouts import PauseReason, Rollout, RolloutState, Stage
from optiinfra_pipelines.rollout.gate import approval_fault, start_refusal
from optiinfra_pipelines.rollout.machine import Input
from optiinfra_pipelines.rollout.watch import Act
from resources.rollouts.clock import Moment
from resources.rollouts.ports import Feed, Progress, Staging, is_near
from resources.rollouts.rollback import RollBack
from resources.rollouts.stages import StagingStage, TrafficStage
from resources.rollouts.store import ConflictError, LeaseLostError, RolloutError, RolloutStore
from resources.rollouts.targets import RolloutTarget, StaleTokenError, TargetError

# The two clocks may drift apart by NTP's steps; more means that somebody set the clock, and freezes and expiries lie.
CLOCK_JUMP_SECONDS = 60.0
# A gateway that is restarted is back within this; a rollout that cannot see its target for longer goes back.
TARGET_PATIENCE_SECONDS = 30.0
# One line a minute in the log while nothing changes.
NOTE_SECONDS = 60.0
# After 10 minutes of failed attempts the run ends with an alert; the watchdog goes on trying.
ROLLBACK_PATIENCE_SECONDS = 600.0


_log = structlog.get_logger(__name__)


class Executor:
    """One owner of one rollout. owner: unique to this executor; a second one on the same rollout is refused.

    stamp: the real clock, for the lease and the log; `step`'s moment may run faster in a rehearsal. may_not_start: why
    something outside of rollouts, such as an error budget, refuses a start.
    """

    def __init__(
        self,
        store: RolloutStore,
        rollout_id: str,
        *,
        owner: str,
        target: RolloutTarget,
        feed: Feed,
        staging: Staging,
        policy: RolloutPolicy,
        stamp: Callable[[], Moment],
        run_id: str | None = None,
        may_not_start: Callable[[Rollout], str | None] = lambda _: None,
    ) -> None:
        self.store = store
        self.rollout_id = rollout_id
        self.owner = owner
        self.run_id = run_id
        self.target = target
        self.policy = policy
        self.stamp = stamp
        self.token = -1
        self._may_not_start = may_not_start
        self._last: Moment | None = None
        self._noted_at = float("-inf")
        self._unseen_since: float | None = None
        self._failed_at: float | None = None
        self._paused_at: float | None = None
        self.staging_stage = StagingStage(self, feed, staging)
        self.traffic_stage = TrafficStage(self, feed, staging)
        self._roll_back = RollBack(self)

    # --- what stages use ---------------------------------------------------------------------------

    def act(self, what: str, do: Callable[[], Any], **evidence: Any) -> None:
        """Do one thing outside: intent, action, read-back. TargetError goes to the caller, logged."""
        self.note("intent", what, evidence)
        try:
            do()
            actual = self.target.observe()
        except TargetError as error:
            self.note("result", f"failed: {what}: {error}", evidence)
            raise
        self.note("result", what, {**evidence, "percent": actual.percent, "candidates": actual.candidates})

    def note(self, kind: Any, reason: str, evidence: Mapping[str, Any] | None = None) -> None:
        """One line in the log, as the owner; LeaseLostError when somebody else is."""
        self.store.note(
            self.rollout_id,
            kind,
            reason,
            actor=self.owner,
            now=self.stamp(),
            evidence=evidence,
            run_id=self.run_id,
            token=self.token,
        )

    def move(self, row: Rollout, given: Input, reason: str, **more: Any) -> Rollout:
        """Move the row as the owner."""
        return self.store.move(
            row, given, actor=self.owner, reason=reason, now=self.stamp(), token=self.token, run_id=self.run_id, **more
        )

    def set_share(self, percent: float) -> None:
        """Set the candidate's share and read it back."""
        self.act(
            f"give the candidate {percent:g} % of new requests", lambda: self.target.set_share(percent, self.token)
        )
        actual = self.target.observe().percent
        if not is_near(actual, percent):
            raise TargetError(f"asked for {percent:g} % at the candidate, the target shows {actual:g} %")

    # --- the run ---------------------------------------------------------------------------------------

    def begin(self, now: Moment) -> Progress:
        """Take the lease and the target. RolloutError, with its reason, when this rollout may not be executed now.

        A rollout found in progress lost its executor: the candidate's traffic is taken off before anything else, and
        the present step runs again from its start.
        """
        row = self.store.get(self.rollout_id)
        self._refuse_unless_executable(row, now)
        row = self.store.acquire(self.rollout_id, self.owner, self.stamp(), run_id=self.run_id)
        self.token = row.token
        try:
            self._refuse_unless_executable(row, now)
            self.target.claim(self.rollout_id, self.token)
        except (RolloutError, TargetError) as error:
            self.store.release(self.rollout_id, self.token, self.stamp())
            raise RolloutError(f"rollout {self.rollout_id} cannot be executed: {error}") from error
        if row.position.state is RolloutState.APPROVED:
            row = self.move(row, Input.START, f"started with the approval of {_approver(row)}")
        elif row.position.state is RolloutState.IN_PROGRESS:
            row = self._take_over(row)
        self._last = now
        return Progress(row.position, False, f"began as {row.position} with token {self.token}")

    def step(self, now: Moment) -> Progress:
        """One look: obey the row, check the clocks and the target, then do what the stage asks for."""
        try:
            row = self.store.renew(self.rollout_id, self.token, self.stamp())
            return self._look(row, now)
        except (LeaseLostError, StaleTokenError) as error:
            row = self.store.get(self.rollout_id)
            return Progress(row.position, True, f"stopped acting: {error}")
        except ConflictError as error:
            return Progress(self.store.get(self.rollout_id).position, False, str(error))

    def end(self) -> None:
        """Give the lease back at the end of the run."""
        self.store.release(self.rollout_id, self.token, self.stamp())

    def stop_now(self, reason: str) -> None:
        """The run is being ended from outside: traffic off first, then FAILED, so that what follows is the rollback."""
        try:
            self.set_share(0.0)
            row = self.store.get(self.rollout_id)
            if row.position.state is RolloutState.IN_PROGRESS:
                self.move(row, Input.FAIL, reason)
            self.end()
        except (RolloutError, TargetError) as error:
            # The process is going; what it could not do is the watchdog's to do, 30 s from now at the latest.
            _log.error("rollout_not_stopped", rollout_id=self.rollout_id, cause=str(error))

    def _look(self, row: Rollout, now: Moment) -> Progress:
        position = row.position
        last, self._last = self._last or now, now
        if position.state is RolloutState.COMPLETED and not row.is_settled:
            return self.settle(row, f"the rollout is {position}")
        if position.is_terminal:
            return Progress(position, True, f"the rollout is {position}")
        if position.state is RolloutState.FAILED:
            return self._fail_back(row, now)
        fault = approval_fault(row, now.at, may_be_old=True)
        if fault is not None:
            return self.fail(row, now, fault)
        try:
            paused = self._interrupted(row, last, now)
            progress = paused or self._by_stage(row, now)
        except TargetError as error:
            if isinstance(error, StaleTokenError):
                raise
            return self._unseen(row, now, error)
        self._unseen_since = None
        return progress

    def _by_stage(self, row: Rollout, now: Moment) -> Progress:
        if row.position.pause is not None:
            return self._waiting(row, now)
        if self._paused_at is not None:
            # A step that waited begins anew, with fresh counts: what was seen meanwhile was not judged.
            self._leave()
            self._paused_at = None
        if row.position.stage is Stage.STAGING:
            return self.staging_stage.look(row, now)
        return self.traffic_stage.look(row, now)

    def _interrupted(self, row: Rollout, last: Moment, now: Moment) -> Progress | None:
        """A gap without looks, or a clock that was set: traffic off where nobody watched it, then a person."""
        gap = now.seconds - last.seconds
        if gap > self.policy.max_gap_seconds and self.target.observe().percent > 0:
            self.set_share(0.0)
            return self.pause(row, PauseReason.UNWATCHED, f"nobody looked for {gap:.0f} s while it had traffic")
        jump = (now.at - last.at).total_seconds() - gap
        if abs(jump) > CLOCK_JUMP_SECONDS and row.position.pause is None:
            return self.pause(
                row,
                PauseReason.CLOCK_JUMP,
                f"the clock was set by {jump:+.0f} s; freezes cannot be judged",
            )
        return None

    def _waiting(self, row: Rollout, now: Moment) -> Progress:
        """Paused: guards and silence still fail it, and so does waiting too long."""
        self._paused_at = now.seconds if self._paused_at is None else self._paused_at
        hours = (now.seconds - self._paused_at) / 3600
        if hours > row.proposal.plan.pause_hours:
            return self.fail(row, now, f"paused ({row.position.pause}) for {hours:.0f} h without a decision")
        decision = self.traffic_stage.guard_only(row, now)
        if decision is not None and decision.act is Act.FAIL:
            return self.fail(row, now, decision.reason)
        return self.say(row, now, f"waits for a person: {row.position.pause}")

    def _unseen(self, row: Rollout, now: Moment, error: TargetError) -> Progress:
        """The target does not answer or obey: wait for a restart of it, then go back."""
        self._unseen_since = now.seconds if self._unseen_since is None else self._unseen_since
        silent = now.seconds - self._unseen_since
        if silent >= TARGET_PATIENCE_SECONDS:
            return self.fail(row, now, f"the target failed for {silent:.0f} s: {error}")
        return self.say(row, now, f"the target failed: {error}")

    # --- what a look can end in -------------------------------------------------------------------------

    def fail(self, row: Rollout, now: Moment, reason: str, evidence: Mapping[str, Any] | None = None) -> Progress:
        """The verdict is given; the way back begins in the same look."""
        try:
            # Off first, recorded second: a death between the two leaves a rollout without traffic, never the reverse.
            self.set_share(0.0)
        except StaleTokenError:
            raise
        except TargetError as error:
            self.note("alert", f"traffic could not be taken off: {error}")
        row = self.move(row, Input.FAIL, reason, evidence=evidence)
        return self._fail_back(row, now)

    def settle(self, row: Rollout, message: str) -> Progress:
        """After COMPLETED: the candidates become the stable replicas. Repeated until it is recorded as done."""
        is_done = [False]

        def promote() -> None:
            is_done[0] = self.target.promote(row.rollout_id, self.token)

        try:
            self.act("make the candidates the stable replicas", promote)
        except StaleTokenError:
            raise
        except TargetError as error:
            self.note("alert", f"completed, but the old replicas are not out of service: {error}")
            return Progress(row.position, True, f"{message}; not settled: {error}")
        if not is_done[0]:
            return Progress(row.position, False, f"{message}; the old replicas drain")
        self.store.settle(row.rollout_id, self.token, self.stamp(), actor=self.owner)
        return Progress(row.position, True, message)

    def pause(self, row: Rollout, why: PauseReason, reason: str, evidence: Mapping[str, Any] | None = None) -> Progress:
        """Wait for a person. Traffic stays where it is, under guard, unless it was taken off before."""
        row = self.move(row, Input.PAUSE, reason, pause=why, evidence=evidence)
        self._leave()
        return Progress(row.position, False, reason)

    def _leave(self) -> None:
        self.staging_stage.leave()
        self.traffic_stage.leave()

    def say(self, row: Rollout, now: Moment, message: str, numbers: Mapping[str, float] | None = None) -> Progress:
        """Go on as before; one line a minute in the log."""
        if now.seconds - self._noted_at >= NOTE_SECONDS:
            self._noted_at = now.seconds
            self.note("decision", message, {"numbers": dict(numbers or {}), "position": str(row.position)})
        return Progress(row.position, False, message, numbers or {})

    def _fail_back(self, row: Rollout, now: Moment) -> Progress:
        self._failed_at = now.seconds if self._failed_at is None else self._failed_at
        message = self._roll_back.look(row, now)
        position = self.store.get(self.rollout_id).position
        if position.is_terminal:
            return Progress(position, True, message)
        is_over = now.seconds - self._failed_at > ROLLBACK_PATIENCE_SECONDS
        if is_over:
            self.note("alert", f"not rolled back after {ROLLBACK_PATIENCE_SECONDS:.0f} s: {message}")
        return Progress(position, is_over, message)

    def _refuse_unless_executable(self, row: Rollout, now: Moment) -> None:
        state = row.position.state
        refusal: str | None
        if state is RolloutState.APPROVED:
            others = [other for other in self.store.all() if other.rollout_id != row.rollout_id]
            refusal = start_refusal(row, now=now.at, policy=self.policy, others=others) or self._may_not_start(row)
        elif state is RolloutState.IN_PROGRESS:
            # An edited proposal is not continued, but it is rolled back: that `step` does.
            refusal = None
        elif state is RolloutState.FAILED or (state is RolloutState.COMPLETED and not row.is_settled):
            refusal = None
        else:
            refusal = f"the rollout is {row.position}; only an approved one can be executed"
        if refusal is not None:
            self.store.note(row.rollout_id, "refused", refusal, actor=self.owner, now=self.stamp(), run_id=self.run_id)
            raise RolloutError(f"rollout {row.rollout_id} is not executed: {refusal}")

    def _take_over(self, row: Rollout) -> Rollout:
        try:
            percent: float | None = self.target.observe().percent
        except TargetError as error:
            # What cannot be seen is taken off like what can.
            percent = None
            self.note("decision", f"took over {row.position}; the candidate's share is not known: {error}")
        else:
            self.note("decision", f"took over {row.position} with {percent:g} % at the candidate")
        if percent is None or percent > 0:
            self.set_share(0.0)
        if row.position.pause is PauseReason.EXECUTOR_LOST:
            row = self.store.get(row.rollout_id)
            row = self.move(row, Input.RESUME, "the step runs again from its start, with fresh counts")
        return row


def _approver(row: Rollout) -> str:
    return row.approval.approver if row.approval is not None else "nobody"
