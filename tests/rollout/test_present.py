"""What completed rollouts left is what the next proposal begins from, whoever spelled the flag how."""

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts, HaproxyServer, HaproxySettings, RolloutPolicy
from optiinfra_pipelines.domain.rollouts import Change, KnobGroup, Position, Rollout, RolloutState
from optiinfra_pipelines.rollout.gate import approval_refusal, stale_refusals
from optiinfra_pipelines.rollout.present import Present, declared_now, present_flags, stale_faults, with_present
from optiinfra_pipelines.rollout.proposal import full_flags
from tests.rollout.conftest import NOW, proposal, rollout

HAPROXY = HaproxySettings(
    socket="/s",
    backend="chat",
    state_file="/f",
    stable=(HaproxyServer(server="s0", url="http://127.0.0.1:1"),),
    candidates=(HaproxyServer(server="c0", url="http://127.0.0.1:2"),),
    launch=("engine", "{flags}"),
)
POLICY = RolloutPolicy(deployments=(DeploymentRollouts(deployment="chat", haproxy=HAPROXY),))
VALUES = st.sampled_from(["64", "128", "256", None])
NAMES = st.sampled_from(["max_num_seqs", "max-num-seqs", "block_size"])


def change(current: dict[str, str | None], proposed: dict[str, str | None]) -> Change:
    return Change(deployment="chat", knob_group=KnobGroup.BATCHING, current=current, proposed=proposed)


def completed(minute: int, made: Change, **changed: object) -> Rollout:
    row = Rollout(
        proposal=proposal(rollout_id=f"r-{minute}", change=made, target="haproxy"),
        proposal_hash="h",
        position=Position(state=RolloutState.COMPLETED),
        version=1,
        is_settled=True,
        updated_at=NOW + timedelta(minutes=minute),
    )
    return row.model_copy(update=changed)


@given(st.lists(st.tuples(NAMES, VALUES), min_size=1, max_size=6))
def test_the_last_completed_value_of_a_flag_is_the_present_one(changes: list[tuple[str, str | None]]) -> None:
    rows = [completed(minute, change({}, {flag: value})) for minute, (flag, value) in enumerate(changes)]
    wanted = {flag.replace("-", "_"): Present(value, f"r-{minute}") for minute, (flag, value) in enumerate(changes)}

    assert present_flags(reversed(rows), "chat") == wanted


def test_what_was_not_completed_or_was_elsewhere_or_a_rehearsal_left_nothing() -> None:
    made = change({}, {"max_num_seqs": "128"})
    rows = [
        completed(1, made, position=Position(state=RolloutState.ROLLED_BACK)),
        completed(2, made.model_copy(update={"deployment": "other"})),
        completed(3, made, proposal=proposal(change=made, target="dry_run")),
    ]

    assert present_flags(rows, "chat") == {}
    assert present_flags([completed(1, made)], "chat", "kubernetes") == {}
    assert set(present_flags([completed(1, made)], "chat", "dry_run")) == {"max_num_seqs"}


def test_a_proposal_without_current_gets_the_way_back_from_the_record() -> None:
    present = present_flags([completed(1, change({}, {"max_num_seqs": "128"}))], "chat")
    made = with_present(change({}, {"max-num-seqs": "256"}), present)

    assert made.current == {"max-num-seqs": "128"}
    assert full_flags(made) == {"max-num-seqs": "256"}
    told = change({"max_num_seqs": "64"}, {"max-num-seqs": "256"})
    assert with_present(told, present) == told


def test_a_stale_current_is_refused_when_proposed_and_when_approved() -> None:
    """Proposed before the other completed, it may not be approved after: the way back would lead elsewhere."""
    others = [completed(1, change({"max_num_seqs": "64"}, {"max_num_seqs": "128"}))]
    waiting = proposal(rollout_id="late", target="haproxy")
    row = rollout(proposal=waiting)
    said = approval_refusal(
        row,
        approver="bob",
        stated_hash=row.proposal_hash,
        code="",
        now=NOW,
        policy=POLICY,
        environ={},
        others=others,
    )

    assert said == stale_refusals(waiting, POLICY, others)[0]
    assert said.startswith("current says max_num_seqs is '64', rollout r-1 left it at '128'; propose it anew")
    assert stale_refusals(waiting, RolloutPolicy(), others) == []


def test_taking_back_a_completed_one_is_never_stale() -> None:
    forward = change({"max_num_seqs": "64"}, {"max_num_seqs": "128"})
    back = change({"max_num_seqs": "128"}, {"max_num_seqs": "64"})

    assert stale_faults(back, present_flags([completed(1, forward)], "chat")) == []


def test_declared_flags_give_way_to_what_was_rolled_out() -> None:
    declared = {"max-num-seqs": "64", "block-size": "16", "enable-prefix-caching": ""}
    present = {"max_num_seqs": Present("128", "r"), "enable_prefix_caching": Present(None, "r")}

    assert declared_now(declared, present) == {"max_num_seqs": "128", "block-size": "16"}
