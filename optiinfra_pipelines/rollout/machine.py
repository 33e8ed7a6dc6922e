"""What may follow what in a rollout: one total function from a position and an input to a new position or a refusal.

Pure and without memory. Who may give an input, and when, is `rollout.gate`; keeping the row is
`resources.rollouts.store`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from optiinfra_pipelines.domain.rollouts import PauseReason, Position, RolloutState, Stage, Step

PENDING = Position(state=RolloutState.PENDING_APPROVAL)
# The order in which stages are passed; a plan may leave out VALIDATION or GRADUAL, never go back.
STAGE_ORDER: tuple[Stage, ...] = (Stage.STAGING, Stage.CANARY, Stage.VALIDATION, Stage.GRADUAL, Stage.BAKE)


class Input(StrEnum):
    """Everything that can move a rollout."""

    APPROVE = "approve"
    REJECT = "reject"
    EXPIRE = "expire"
    START = "start"
    ADVANCE = "advance"
    PAUSE = "pause"
    RESUME = "resume"
    FAIL = "fail"
    ABORT = "abort"
    COMPLETE = "complete"
    ROLLED_BACK = "rolled_back"


@dataclass(frozen=True)
class Refusal:
    """Why an input does not move a rollout that stands where it stands."""

    reason: str


def transition(
    position: Position, given: Input, *, steps: tuple[Step, ...] = (), pause: PauseReason | None = None
) -> Position | Refusal:
    """Where an input leads. Defined for every position and input; never raises.

    steps: the rollout's steps in order, the first in STAGING; ADVANCE goes through them. pause: why, for PAUSE.
    """
    if position.is_terminal:
        return Refusal(f"the rollout is {position.state}, which is final; a new change needs a new proposal")
    match position.state:
        case RolloutState.PENDING_APPROVAL:
            return _pending(given)
        case RolloutState.APPROVED:
            return _approved(given)
        case RolloutState.IN_PROGRESS:
            return _in_progress(position, given, steps, pause)
        case RolloutState.FAILED:
            return _failed(given)
        case RolloutState.REJECTED | RolloutState.COMPLETED | RolloutState.ROLLED_BACK:
            raise AssertionError("final states are refused above")


def _pending(given: Input) -> Position | Refusal:
    if given is Input.APPROVE:
        return Position(state=RolloutState.APPROVED)
    if given in (Input.REJECT, Input.EXPIRE, Input.ABORT):
        return Position(state=RolloutState.REJECTED)
    return Refusal(f"cannot {given} a rollout that waits for approval; launch approve_rollout first")


def _approved(given: Input) -> Position | Refusal:
    if given is Input.START:
        return Position(state=RolloutState.IN_PROGRESS, stage=Stage.STAGING)
    if given in (Input.REJECT, Input.EXPIRE, Input.ABORT):
        return Position(state=RolloutState.REJECTED)
    if given is Input.APPROVE:
        return Refusal("it is approved already; one approval is enough, and it cannot be prolonged")
    return Refusal(f"cannot {given} a rollout that has not started; launch execute_rollout first")


def _in_progress(
    position: Position, given: Input, steps: tuple[Step, ...], pause: PauseReason | None
) -> Position | Refusal:
    if given in (Input.FAIL, Input.ABORT):
        return Position(state=RolloutState.FAILED)
    if given is Input.PAUSE:
        # A second reason replaces the first: the last thing that went wrong is what a person must look at.
        if pause is None:
            return Refusal("a pause needs its reason")
        return position.model_copy(update={"pause": pause})
    if given is Input.RESUME:
        if position.pause is None:
            return Refusal("it is not paused")
        return position.model_copy(update={"pause": None})
    if given in (Input.ADVANCE, Input.COMPLETE) and position.pause is not None:
        return Refusal(f"it is paused ({position.pause}); resume it first")
    is_last = position.step + 1 >= len(steps)
    if given is Input.ADVANCE:
        if is_last:
            return Refusal("no step is left; it can only complete")
        return Position(state=RolloutState.IN_PROGRESS, stage=steps[position.step + 1].stage, step=position.step + 1)
    if given is Input.COMPLETE:
        if not is_last or position.stage is not Stage.BAKE:
            return Refusal(f"it stands in {position.stage} step {position.step}; only the end of the bake completes it")
        return Position(state=RolloutState.COMPLETED)
    return Refusal(f"cannot {given} a rollout in progress")


def _failed(given: Input) -> Position | Refusal:
    if given is Input.ROLLED_BACK:
        return Position(state=RolloutState.ROLLED_BACK)
    return Refusal("it has failed; all that can follow is its rollback, verified at the target")


def is_legal(position: Position, steps: tuple[Step, ...]) -> bool:
    """Whether a position says nothing contradictory: stage and pause only in progress, the step within the plan."""
    if position.state is not RolloutState.IN_PROGRESS:
        return position.stage is None and position.pause is None and position.step == 0
    return position.step < max(1, len(steps)) and (not steps or steps[position.step].stage is position.stage)
