"""The gate refuses, each time with its reason: self-approval, edits, old approvals, freezes, clocks, too much."""

from datetime import datetime, time, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.domain.people import same_person, secret_name
from optiinfra_pipelines.domain.rollout_policy import BlastRadius, DeploymentRollouts, FreezeWindow, RolloutPolicy
from optiinfra_pipelines.domain.rollouts import (
    Change,
    KnobGroup,
    PauseReason,
    Position,
    Rollout,
    RolloutPlan,
    RolloutState,
    Stage,
    Step,
)
from optiinfra_pipelines.rollout.gate import (
    approval_code,
    approval_refusal,
    start_refusal,
    step_refusal,
)
from optiinfra_pipelines.rollout.proposal import change_faults, faults, full_flags, proposal_hash
from tests.rollout.conftest import NOW, approved, proposal, rollout

POLICY = RolloutPolicy()
LUNCH = FreezeWindow(name="lunch", since=time(11), until=time(13))


def refusal(row: Rollout, **changed: Any) -> str:
    asked = {
        "approver": "bob",
        "stated_hash": row.proposal_hash,
        "code": "",
        "now": NOW,
        "policy": POLICY,
        "environ": {},
        "others": [],
    }
    return approval_refusal(row, **(asked | changed)) or ""


def test_another_person_may_approve_what_was_proposed() -> None:
    assert refusal(rollout()) == ""
    assert refusal(rollout(), stated_hash=rollout().proposal_hash[:12].upper()) == ""


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"approver": "alice"}, "another person must approve"),
        ({"approver": "  "}, "needs a name"),
        ({"approver": "OptiInfra"}, "executes rollouts"),
        ({"stated_hash": "0" * 64}, "read the proposal"),
        ({"stated_hash": ""}, "is missing"),
        ({"stated_hash": rollout().proposal_hash[:11]}, "copy its hash"),
        ({"policy": RolloutPolicy(approvers=("carol",))}, "not among the approvers"),
        ({"policy": RolloutPolicy(must_prove_approver=True)}, "must prove themselves"),
        ({"policy": RolloutPolicy(freeze_windows=(LUNCH,))}, "freeze window lunch holds until 13:00 UTC"),
        ({"code": "abc"}, "cannot be checked"),
        ({"now": NOW - timedelta(hours=2)}, "the clock jumped back"),
    ],
)
def test_an_approval_is_refused_with_its_reason(changed: dict[str, Any], why: str) -> None:
    assert why in refusal(rollout(), **changed)


def test_a_secret_in_the_environment_must_be_proven_and_never_enters_the_config() -> None:
    """The code is bound to the proposal: that of another proposal, or another secret's, proves nothing."""
    row, environ = rollout(), {secret_name("bob"): "hunter2"}
    code = approval_code("hunter2", row.proposal_hash)

    assert refusal(row, environ=environ, code=code) == ""
    assert "hunter2" not in code
    for wrong in ("", "hunter2", approval_code("hunter3", row.proposal_hash), approval_code("hunter2", "f" * 64)):
        assert "does not prove bob" in refusal(row, environ=environ, code=wrong)


def test_one_deployment_holds_one_rollout_and_the_fleet_so_many() -> None:
    other = approved(position=Position(state=RolloutState.FAILED)).model_copy(
        update={"proposal": proposal(rollout_id="chat-0")}
    )
    elsewhere = other.model_copy(
        update={
            "proposal": proposal(
                rollout_id="code-0",
                change=Change(
                    deployment="code", knob_group=KnobGroup.BATCHING, current={}, proposed={"max_num_seqs": "1"}
                ),
            )
        }
    )

    assert "held by rollout chat-0" in refusal(rollout(), others=[other])
    assert "1 rollouts are in progress (code-0)" in refusal(rollout(), others=[elsewhere])
    wide = RolloutPolicy(blast_radius=BlastRadius(max_concurrent_rollouts=2))
    assert refusal(rollout(), others=[elsewhere], policy=wide) == ""


@pytest.mark.parametrize(
    ("row", "at", "why"),
    [
        (approved(approval=None), NOW, "nobody has approved it"),
        (approved(), NOW + timedelta(hours=24), "the approval expired"),
        (approved(), NOW - timedelta(minutes=30), "the clock jumped back"),
        (approved(proposal=proposal(reason="something else")), NOW, "edited after its approval"),
        (approved(proposal_hash="a" * 64), NOW, "edited after its approval"),
        (rollout(), NOW, "not APPROVED"),
    ],
)
def test_a_start_is_refused_with_its_reason(row: Rollout, at: datetime, why: str) -> None:
    assert why in (start_refusal(row, now=at, policy=POLICY, others=[]) or "")


def test_a_valid_approval_starts() -> None:
    assert start_refusal(approved(), now=NOW, policy=POLICY, others=[]) is None


@given(st.data())
def test_any_edit_of_a_proposal_changes_its_hash(data: st.DataObject) -> None:
    original = proposal()
    field = data.draw(
        st.sampled_from(["requester", "reason", "recommendation_id", "is_fix", "plan", "change", "undoes"])
    )
    edits: dict[str, Any] = {
        "requester": "mallory",
        "reason": original.reason + " ",
        "recommendation_id": "r-1",
        "is_fix": True,
        "undoes": "chat-0",
        "plan": RolloutPlan(alpha=data.draw(st.floats(0.011, 0.1))),
        "change": original.change.model_copy(
            update={"proposed": {"max_num_seqs": data.draw(st.text("01234", max_size=5))}}
        ),
    }

    assert proposal_hash(original.model_copy(update={field: edits[field]})) != proposal_hash(original)
    assert proposal_hash(type(original).model_validate_json(original.model_dump_json())) == proposal_hash(original)


@given(st.text(min_size=1, max_size=20), st.sampled_from([str.upper, str.swapcase, lambda name: f"  {name}\u200b "]))
def test_case_and_spaces_do_not_make_another_person(name: str, spell: Any) -> None:
    assert same_person(name, name)
    if name.upper().casefold() == name.casefold():
        assert same_person(name, spell(name))


def test_a_share_grows_only_outside_freezes_and_within_the_blast_radius() -> None:
    row = approved(
        steps=tuple(
            Step(stage=Stage.GRADUAL, percent=percent, dwell_seconds=1, max_seconds=1) for percent in (0, 5, 50, 100)
        ),
        position=Position(state=RolloutState.IN_PROGRESS, stage=Stage.GRADUAL, step=2),
    )
    frozen = RolloutPolicy(freeze_windows=(LUNCH,))

    def asked(percent: float, present: float, policy: RolloutPolicy = POLICY) -> PauseReason | None:
        step = Step(stage=Stage.GRADUAL, percent=percent, dwell_seconds=1, max_seconds=1)
        found = step_refusal(row, step, present, now=NOW, policy=policy)
        return found[0] if found else None

    assert asked(60, 5) is PauseReason.BLAST_RADIUS
    assert asked(50, 5) is None
    assert asked(50, 0) is None  # it runs again after weight 0: the plan rises from 5
    assert asked(50, 5, frozen) is PauseReason.FREEZE
    assert asked(5, 50, frozen) is None  # going back is never refused


def test_taking_a_rollout_back_is_free_of_freezes() -> None:
    back = rollout(proposal=proposal(undoes="chat-0"))

    assert refusal(back, policy=RolloutPolicy(freeze_windows=(LUNCH,))) == ""


@pytest.mark.parametrize(
    ("at", "holds"),
    [
        ("2026-11-20T21:59:00+00:00", False),  # Friday 22:59 in Berlin
        ("2026-11-20T22:00:00+00:00", True),  # Friday 23:00
        ("2026-11-21T04:59:00+00:00", True),  # Saturday 05:59, of Friday's window
        ("2026-11-21T05:00:00+00:00", False),
        ("2026-11-21T22:30:00+00:00", False),  # Saturday has none
    ],
)
def test_a_freeze_past_midnight_belongs_to_the_day_it_begins_on(at: str, holds: bool) -> None:
    window = FreezeWindow(name="night", days=("fri",), since=time(23), until=time(6), time_zone="Europe/Berlin")

    assert window.holds(datetime.fromisoformat(at)) is holds


def test_an_unknown_time_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="IANA"):
        FreezeWindow(name="x", since=time(1), until=time(2), time_zone="Berlin")


@pytest.mark.parametrize(
    ("current", "proposed", "group", "why"),
    [
        ({"max_num_seqs": "64"}, {"max_num_seqs": "64"}, KnobGroup.BATCHING, "are the same"),
        ({"max-num-seqs": "64"}, {"max_num_seqs": "64"}, KnobGroup.BATCHING, "are the same"),
        ({}, {"max_num_seqs": "8", "block_size": "32"}, KnobGroup.BATCHING, "more than one knob group"),
        ({}, {"max_num_seqs": "8", "made_up": "1"}, KnobGroup.BATCHING, "more than one knob group"),
        ({}, {"made_up": "1", "other": "2"}, KnobGroup.OTHER, "change one at a time"),
        ({}, {"max_num_seqs": "8"}, KnobGroup.KV_CACHE, "correct one of the two"),
        ({}, {"port": "9000"}, KnobGroup.OTHER, "belongs to the replica's place"),
    ],
)
def test_a_change_that_is_not_one_knob_group_is_refused(
    current: dict[str, str | None], proposed: dict[str, str | None], group: KnobGroup, why: str
) -> None:
    change = Change(deployment="chat", knob_group=group, current=current, proposed=proposed)

    assert why in "; ".join(change_faults(change))


def test_a_flag_may_be_unknown_when_it_is_alone_and_absent_when_it_is_removed() -> None:
    change = Change(
        deployment="c", knob_group=KnobGroup.OTHER, current={"old": "1", "new": None}, proposed={"new": "2"}
    )

    assert change_faults(change) == []
    assert full_flags(change) == {"old": "1", "new": "2"}
    removed = change.model_copy(update={"proposed": {"old": None}})
    assert full_flags(removed) == {"old": None, "new": None}


@pytest.mark.parametrize("value", ["a\nb", "\x00", "x" * 401])
def test_a_flag_value_is_one_printable_argument(value: str) -> None:
    with pytest.raises(ValueError, match="proposed"):
        Change(deployment="c", knob_group=KnobGroup.OTHER, current={}, proposed={"flag": value})


@pytest.mark.parametrize("group", [KnobGroup.QUANTIZATION, KnobGroup.KV_CACHE_DTYPE])
def test_a_change_of_precision_without_prompts_of_known_answers_is_refused(group: KnobGroup) -> None:
    flag = "quantization" if group is KnobGroup.QUANTIZATION else "kv_cache_dtype"
    change = Change(deployment="chat", knob_group=group, current={}, proposed={flag: "fp8"})
    with_prompts = RolloutPolicy(deployments=(DeploymentRollouts(deployment="chat", quality_prompts="p.jsonl"),))

    assert "quality_prompts" in "; ".join(faults(proposal(change=change), POLICY))
    assert faults(proposal(change=change), with_prompts) == []


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (RolloutPlan(percents=(5, 1, 100)), "do not rise"),
        (RolloutPlan(percents=(1, 5)), "must be 100"),
        (RolloutPlan(percents=(20, 100)), "the first step is 20 %"),
        (RolloutPlan(percents=(10, 100)), "adds 90 percentage points"),
        (RolloutPlan(candidate_replicas=9), "9 candidate replicas"),
    ],
)
def test_a_plan_beyond_the_blast_radius_is_refused(plan: RolloutPlan, why: str) -> None:
    assert why in "; ".join(faults(proposal(plan=plan), POLICY))
