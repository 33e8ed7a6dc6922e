"""Whatever happens to a rollout in whatever order, it stands somewhere legal, and what is final stays."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.domain.rollouts import TERMINAL, PauseReason, Position, RolloutState, Stage, Step
from optiinfra_pipelines.rollout.machine import PENDING, STAGE_ORDER, Input, Refusal, is_legal, transition


def step(stage: Stage, percent: float) -> Step:
    return Step(stage=stage, percent=percent, dwell_seconds=60, max_seconds=180)


STEPS = (
    step(Stage.STAGING, 0),
    step(Stage.CANARY, 1),
    step(Stage.CANARY, 5),
    step(Stage.VALIDATION, 10),
    step(Stage.GRADUAL, 50),
    step(Stage.GRADUAL, 100),
    step(Stage.BAKE, 100),
)
INPUTS = st.tuples(st.sampled_from(list(Input)), st.sampled_from([*PauseReason, None]))


@given(st.lists(INPUTS, max_size=60))
def test_no_sequence_of_inputs_leads_to_an_illegal_position(inputs: list[tuple[Input, PauseReason | None]]) -> None:
    """States only go forward along the product's own arrows, stages never back, and a final state never moves."""
    arrows = {
        RolloutState.PENDING_APPROVAL: {RolloutState.APPROVED, RolloutState.REJECTED},
        RolloutState.APPROVED: {RolloutState.IN_PROGRESS, RolloutState.REJECTED},
        RolloutState.IN_PROGRESS: {RolloutState.COMPLETED, RolloutState.FAILED},
        RolloutState.FAILED: {RolloutState.ROLLED_BACK},
    }
    position = PENDING
    for given_input, pause in inputs:
        after = transition(position, given_input, steps=STEPS, pause=pause)
        if isinstance(after, Refusal):
            assert after.reason
            continue
        assert position.state not in TERMINAL
        assert is_legal(after, STEPS)
        if after.state is not position.state:
            assert after.state in arrows[position.state]
        elif after.state is RolloutState.IN_PROGRESS:
            assert after.step - position.step in (0, 1)
            assert position.stage is not None
            assert after.stage is not None
            assert STAGE_ORDER.index(after.stage) >= STAGE_ORDER.index(position.stage)
        position = after


def every_position() -> list[Position]:
    in_progress = [
        Position(state=RolloutState.IN_PROGRESS, stage=one.stage, step=index, pause=pause)
        for (index, one), pause in itertools.product(enumerate(STEPS), [None, *PauseReason])
    ]
    others = [Position(state=state) for state in RolloutState if state is not RolloutState.IN_PROGRESS]
    return [*others, *in_progress]


def test_the_function_is_total_over_positions_and_inputs() -> None:
    for position, given_input, pause in itertools.product(every_position(), Input, [None, *PauseReason]):
        after = transition(position, given_input, steps=STEPS, pause=pause)
        assert isinstance(after, Refusal) or is_legal(after, STEPS)


def test_a_paused_rollout_neither_advances_nor_completes() -> None:
    for position in every_position():
        if position.pause is not None:
            for given_input in (Input.ADVANCE, Input.COMPLETE):
                assert isinstance(transition(position, given_input, steps=STEPS), Refusal)


def test_going_back_is_possible_from_everywhere_in_progress() -> None:
    for position in every_position():
        if position.state is RolloutState.IN_PROGRESS:
            assert transition(position, Input.ABORT, steps=STEPS) == Position(state=RolloutState.FAILED)
            assert transition(position, Input.FAIL, steps=STEPS) == Position(state=RolloutState.FAILED)


def test_only_the_end_of_the_bake_completes() -> None:
    completing = [
        position
        for position in every_position()
        if not isinstance(transition(position, Input.COMPLETE, steps=STEPS), Refusal)
    ]

    assert completing == [Position(state=RolloutState.IN_PROGRESS, stage=Stage.BAKE, step=6)]


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_what_is_final_says_what_to_do_instead(state: RolloutState) -> None:
    refused = transition(Position(state=state), Input.START)

    assert isinstance(refused, Refusal)
    assert "new proposal" in refused.reason
