"""What is left of the error budgets decides whether a rollout may start; what is not known is no permission."""

from dataclasses import replace
from datetime import timedelta

import pytest

from optiinfra_pipelines.rollout.budget import MAX_AGE, Budget, budget_refusal
from tests.rollout.conftest import NOW, proposal

REAL = proposal().model_copy(update={"target": "haproxy"})
KEPT = Budget("ttft<=1s@0.99", "met", 0.6, NOW)
SPENT = Budget("error_ratio@0.999", "exhausted", -0.2, NOW)


def test_a_used_up_budget_holds_a_change_back_and_says_which() -> None:
    refusal = budget_refusal(REAL, [KEPT, SPENT], NOW)

    assert refusal is not None
    assert refusal.startswith("the error budget is used up: error_ratio@0.999 (-20% left); wait, or mark the proposal")


@pytest.mark.parametrize("change", [{"is_fix": True}, {"undoes": "chat-1"}, {"target": "dry_run"}])
def test_a_fix_a_way_back_and_a_rehearsal_start_whatever_is_left(change: dict[str, object]) -> None:
    assert budget_refusal(REAL.model_copy(update=change), [SPENT], NOW) is None
    assert budget_refusal(REAL.model_copy(update=change), None, NOW) is None


def test_burning_is_not_used_up_and_nothing_declared_holds_nothing() -> None:
    assert budget_refusal(REAL, [replace(KEPT, state="burning")], NOW) is None
    assert budget_refusal(REAL, [], NOW) is None


def test_a_budget_that_nobody_knows_is_no_permission() -> None:
    """Unreadable, without data, or judged long ago; one known objective is enough beside one without data."""
    unknown = replace(KEPT, state="no_data", remaining_ratio=None)
    old = replace(KEPT, judged_at=NOW - MAX_AGE - timedelta(minutes=1))

    assert "cannot be read" in str(budget_refusal(REAL, None, NOW))
    assert "no error budget is known: ttft<=1s@0.99 is no_data" in str(budget_refusal(REAL, [unknown], NOW))
    assert "no error budget is known" in str(budget_refusal(REAL, [old], NOW))
    assert budget_refusal(REAL, [KEPT, unknown], NOW) is None
