"""Spans in which a rollout holds its recommendation, and moments in and out of them."""

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.ledger.held import Span, held_spans, is_held
from optiinfra_pipelines.domain.rollouts import Position, Rollout, RolloutState, Stage
from tests.rollout.conftest import NOW, proposal

MINUTES = st.integers(0, 600)


def rollout(state: RolloutState, *, started: int | None, updated: int, target: str = "haproxy") -> Rollout:
    stage = Stage.CANARY if state is RolloutState.IN_PROGRESS else None
    return Rollout(
        proposal=proposal(recommendation_id="rec", target=target),
        proposal_hash="h",
        position=Position(state=state, stage=stage),
        version=1,
        started_at=None if started is None else NOW + timedelta(minutes=started),
        updated_at=NOW + timedelta(minutes=updated),
    )


def test_an_open_one_holds_from_its_proposal_on_and_a_closed_one_while_it_ran() -> None:
    for state in RolloutState:
        [*found] = held_spans([rollout(state, started=10, updated=30)])["rec"]
        is_over = state in (RolloutState.REJECTED, RolloutState.COMPLETED, RolloutState.ROLLED_BACK)
        expected = Span(NOW + timedelta(minutes=10), NOW + timedelta(minutes=30))
        assert found == [expected if is_over else Span(NOW - timedelta(hours=1), None)]


def test_one_that_never_started_or_was_a_rehearsal_holds_nothing() -> None:
    rejected = rollout(RolloutState.REJECTED, started=None, updated=30)
    rehearsal = rollout(RolloutState.IN_PROGRESS, started=1, updated=2, target="dry_run")

    assert held_spans([rejected, rehearsal]) == {}


@given(MINUTES, MINUTES, MINUTES, MINUTES)
def test_a_stretch_is_held_when_any_minute_of_it_is(since: int, length: int, start: int, more: int) -> None:
    span = Span(NOW + timedelta(minutes=since), NOW + timedelta(minutes=since + length))
    inside = set(range(since, since + length + 1)) & set(range(start, start + more + 1))
    begin, end = (NOW + timedelta(minutes=one) for one in (start, start + more))

    assert is_held({"rec": [span]}, "rec", begin, end) is bool(inside)
    assert not is_held({"rec": [span]}, "other", begin, end)
