"""A proposal, its row and an approval, as tests of the pure parts need them."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from optiinfra_pipelines.domain.rollouts import Approval, Change, KnobGroup, Position, Proposal, Rollout, RolloutState
from optiinfra_pipelines.rollout.proposal import proposal_hash

NOW = datetime(2026, 11, 18, 12, 0, tzinfo=UTC)  # a Wednesday


def proposal(**changed: Any) -> Proposal:
    change = Change(
        deployment="chat",
        knob_group=KnobGroup.BATCHING,
        current={"max_num_seqs": "64"},
        proposed={"max_num_seqs": "128"},
    )
    given = {
        "rollout_id": "chat-1",
        "change": change,
        "requester": "alice",
        "reason": "more slots",
        "created_at": NOW - timedelta(hours=1),
    }
    return Proposal.model_validate(given | changed)


def rollout(state: RolloutState = RolloutState.PENDING_APPROVAL, **changed: Any) -> Rollout:
    asked = changed.pop("proposal", None) or proposal()
    given = {
        "proposal": asked,
        "proposal_hash": proposal_hash(asked),
        "position": Position(state=state),
        "version": 0,
        "updated_at": NOW,
    }
    return Rollout.model_validate(given | changed)


def approved(**changed: Any) -> Rollout:
    row = rollout(RolloutState.APPROVED)
    approval = Approval(
        approver="bob",
        proposal_hash=row.proposal_hash,
        approved_at=NOW - timedelta(minutes=5),
        expires_at=NOW + timedelta(hours=23, minutes=55),
    )
    return row.model_copy(update={"approval": approval, **changed})


@pytest.fixture
def now() -> datetime:
    return NOW
