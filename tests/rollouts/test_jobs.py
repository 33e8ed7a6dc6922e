"""Rollouts through real Dagster job executions: a rehearsal completes, a bad one goes back, the gate holds."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.errors import DagsterExecutionInterruptedError

from optiinfra_pipelines.defs.rollouts import rollout_assets, rollout_jobs
from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts, DryRunSettings, RolloutPolicy
from optiinfra_pipelines.domain.rollouts import Rollout, RolloutState
from resources.alert_outlet import AlertOutlet
from resources.rollouts.desk import Pace, Rollouts
from sensors.rollouts import rollout_sensors

QUICK = {"percents": [10.0, 50.0, 100.0], "bake_minutes": 2.0}
BROKEN = DeploymentRollouts(deployment="broken", dry_run=DryRunSettings(error_ratio=0.3))
SLOW = DeploymentRollouts(deployment="slow", dry_run=DryRunSettings(latency_factor=2.0))


class Desk:
    """Jobs and sensors of one state folder with an ephemeral Dagster instance."""

    def __init__(self, root: Path, policy: RolloutPolicy) -> None:
        self.rollouts = Rollouts(Fleet(), policy, root, environ={})
        self.instance = dg.DagsterInstance.ephemeral()
        self.definitions = dg.Definitions(
            assets=rollout_assets(),
            jobs=rollout_jobs(self.rollouts),
            sensors=rollout_sensors(self.rollouts, AlertOutlet(None)),
        )

    def run(self, job: str, op: str, **config: Any) -> dg.ExecuteInProcessResult:
        return self.definitions.resolve_job_def(job).execute_in_process(
            run_config={"ops": {op: {"config": config}}}, instance=self.instance, raise_on_error=False
        )

    def propose(self, deployment: str = "chat", **config: Any) -> Rollout:
        given = {
            "requester": "alice",
            "reason": "more slots",
            "deployment": deployment,
            "current": {"max_num_seqs": "64"},
            "proposed": {"max_num_seqs": "128"},
            **QUICK,
            **config,
        }
        assert self.run("propose_rollout", "record_proposal", **given).success
        return self.rollouts.store.all()[-1]

    def approve(self, row: Rollout, approver: str = "bob") -> dg.ExecuteInProcessResult:
        return self.run(
            "approve_rollout",
            "record_approval",
            rollout_id=row.rollout_id,
            approver=approver,
            proposal_hash=row.proposal_hash,
        )

    def execute(self, row: Rollout) -> dg.ExecuteInProcessResult:
        return self.run("execute_rollout", "take_rollout", rollout_id=row.rollout_id)

    def state(self, row: Rollout) -> RolloutState:
        return self.rollouts.store.get(row.rollout_id).position.state


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path, RolloutPolicy(deployments=(BROKEN, SLOW)))
    yield made
    made.instance.dispose()


def failure(result: dg.ExecuteInProcessResult) -> str:
    """Why the run failed, as its step says."""
    [event] = [event for event in result.all_events if event.is_step_failure]
    return re.sub(r"\s+", " ", event.step_failure_data.user_failure_data.description or "")


def test_a_rehearsal_goes_from_proposal_to_completed(desk: Desk) -> None:
    """Proposed by one, approved by another, executed through every stage; the log is whole and says SIMULATED."""
    row = desk.propose()
    assert desk.approve(row).success
    executed = desk.execute(row)

    assert executed.success
    done = desk.rollouts.store.get(row.rollout_id)
    assert done.position.state is RolloutState.COMPLETED
    assert done.is_settled
    assert done.owner is None
    events = desk.rollouts.store.events(row.rollout_id)
    moves = [event.to_position.split()[0:2] for event in events if event.kind == "transition" and event.to_position]
    stages = [move[1] for move in moves if move[0] == "IN_PROGRESS"]
    assert stages == ["STAGING", "VALIDATION", "GRADUAL", "GRADUAL", "BAKE"]
    assert [move[0] for move in (moves[0], moves[1], moves[-1])] == ["PENDING_APPROVAL", "APPROVED", "COMPLETED"]
    assert desk.rollouts.store.broken_link() is None
    journal = (desk.rollouts.root / "dry_run" / "chat.dry_run.jsonl").read_text()
    assert "give the candidate 100 % of new requests" in journal
    pictures = [
        event.materialization.metadata["evidence"].value
        for event in executed.all_events
        if event.is_step_materialization and "evidence" in event.materialization.metadata
    ]
    assert pictures
    assert all(picture.startswith("![evidence over time](data:image/png;base64,iVBOR") for picture in pictures)
    observed = [event for event in executed.all_events if event.is_asset_observation]
    assert observed
    assert any("SIMULATED" in str(event.asset_observation_data.asset_observation.metadata) for event in observed)


def test_a_kv_cache_without_an_expected_size_is_not_checked_and_that_is_said(desk: Desk) -> None:
    """Zero is no size and no way to say "not checked"."""
    asked = {"requester": "alice", "reason": "r", "deployment": "chat", "proposed": {"max_num_seqs": "128"}}
    plain = desk.run("propose_rollout", "record_proposal", **asked)
    sized = desk.run("propose_rollout", "record_proposal", **asked, expected_kv_tokens=8192.0)

    assert [kv_cache(one) for one in (plain, sized)] == ["not checked", "checked against 8192 tokens"]
    assert [row.proposal.plan.expected_kv_tokens for row in desk.rollouts.all()] == [None, 8192.0]
    refused = desk.run("propose_rollout", "record_proposal", **asked, expected_kv_tokens=0.0)
    assert not refused.success
    assert len(desk.rollouts.all()) == 2


def kv_cache(result: dg.ExecuteInProcessResult) -> object:
    [event] = [event for event in result.all_events if event.is_step_materialization]
    return event.materialization.metadata["kv_cache"].value


@pytest.mark.parametrize(("deployment", "why"), [("broken", "errors"), ("slow", "time_to_first_token_seconds")])
def test_a_bad_candidate_is_failed_and_taken_back_by_itself(desk: Desk, deployment: str, why: str) -> None:
    row = desk.propose(deployment)
    assert desk.approve(row).success

    executed = desk.execute(row)

    assert not executed.success
    assert desk.state(row) is RolloutState.ROLLED_BACK
    [failed] = [
        event for event in desk.rollouts.store.events(row.rollout_id) if event.to_position == RolloutState.FAILED
    ]
    assert failed.reason.startswith(why)
    assert failed.evidence["verdict"]["kind"] == "FAIL"
    assert desk.rollouts.target(row).observe().percent == 0


def test_execution_is_refused_without_an_approval_however_it_is_launched(desk: Desk) -> None:
    row = desk.propose()

    refused = desk.execute(row)

    assert "only an approved one can be executed" in failure(refused)
    assert desk.state(row) is RolloutState.PENDING_APPROVAL
    assert not (desk.rollouts.root / "dry_run").exists()


def test_the_requester_cannot_approve_under_any_spelling_of_the_name(desk: Desk) -> None:
    row = desk.propose()

    for name in ("alice", " Alice ", "ALICE", "ａｌｉｃｅ", "a.lice", "ali\u200bce"):
        assert "another person must approve" in failure(desk.approve(row, name)), name
    assert desk.state(row) is RolloutState.PENDING_APPROVAL


def test_a_second_launch_of_a_rollout_is_refused_with_its_reason(desk: Desk) -> None:
    row = desk.propose()
    assert desk.approve(row).success
    assert desk.execute(row).success

    assert "COMPLETED" in failure(desk.execute(row))


def test_an_unfit_proposal_is_refused_in_the_launchpad(desk: Desk) -> None:
    """Quantization without prompts of known answers, two knob groups, and a target that is not there."""
    for change, why in (
        ({"proposed": {"quantization": "fp8"}, "current": {}}, "quality_prompts"),
        ({"proposed": {"max_num_seqs": "8", "block_size": "32"}}, "more than one knob group"),
        ({"target": "kubernetes"}, "has no kubernetes settings"),
        ({"percents": [50.0, 100.0]}, "blast radius allows 10 %"),
        ({"proposed": {"max_num_seqs": "64"}}, "are the same"),
    ):
        given = {
            "requester": "alice",
            "reason": "r",
            "deployment": "chat",
            "current": {"max_num_seqs": "64"},
            "proposed": {"max_num_seqs": "128"},
            **QUICK,
            **change,
        }
        assert why in failure(desk.run("propose_rollout", "record_proposal", **given)), change
    assert desk.rollouts.all() == []


def test_an_abort_before_the_start_withdraws_it_and_a_rejection_is_final(desk: Desk) -> None:
    first, second = desk.propose(), desk.propose("other")
    assert desk.run("abort_rollout", "abort_rollout_now", rollout_id=first.rollout_id, person="carol").success
    rejected = desk.run("reject_rollout", "record_rejection", rollout_id=second.rollout_id, person="bob")

    assert rejected.success
    assert desk.state(first) is desk.state(second) is RolloutState.REJECTED
    assert "only one that waits for approval" in failure(desk.approve(second))


def test_taking_back_a_completed_rollout_is_a_new_proposal_with_the_flags_exchanged(desk: Desk) -> None:
    row = desk.propose()
    desk.approve(row)
    desk.execute(row)

    assert desk.run("rollback_rollout", "rollback_rollout_now", rollout_id=row.rollout_id, person="carol").success

    back = desk.rollouts.all()[-1]
    assert back.proposal.undoes == row.rollout_id
    assert back.proposal.change.proposed == {"max_num_seqs": "64"}
    assert desk.state(row) is RolloutState.COMPLETED


def test_the_dispatch_sensor_asks_for_one_run_per_approved_rollout(desk: Desk) -> None:
    dispatch = desk.definitions.resolve_sensor_def("dispatch_rollouts")
    row = desk.propose()
    with dg.build_sensor_context(instance=desk.instance, definitions=desk.definitions) as context:
        assert not dispatch.evaluate_tick(context).run_requests
        desk.approve(row)
        [request] = dispatch.evaluate_tick(context).run_requests or []

    assert request.run_key == f"{row.rollout_id}:execute"
    assert desk.rollouts.launch_key(row.rollout_id, ["a"], are_over=False) is None
    assert desk.rollouts.launch_key(row.rollout_id, ["a"], are_over=True) == f"{row.rollout_id}:execute:launch-1"
    assert desk.rollouts.launch_key(row.rollout_id, ["a", "b", "c"], are_over=True) is None
    assert request.run_config["ops"]["take_rollout"]["config"] == {"rollout_id": row.rollout_id}


def test_a_run_that_is_ended_from_outside_takes_traffic_off_before_it_goes(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terminate in the UI raises in the middle of a wait; the watchdog finishes the way back."""
    row = desk.propose()
    desk.approve(row)
    slept = 0

    def terminate(pace_of: Any) -> Pace:
        pace = pace_to_real(pace_of)

        def sleep(seconds: float) -> None:
            nonlocal slept
            slept += 1
            if slept == 8:
                assert desk.rollouts.target(row).observe().percent > 0
                raise DagsterExecutionInterruptedError
            pace.sleep(seconds)

        return Pace(pace.clock, sleep)

    pace_to_real = desk.rollouts.pace
    monkeypatch.setattr(desk.rollouts, "pace", terminate)
    with pytest.raises(DagsterExecutionInterruptedError):
        desk.definitions.resolve_job_def("execute_rollout").execute_in_process(
            run_config={"ops": {"take_rollout": {"config": {"rollout_id": row.rollout_id}}}}, instance=desk.instance
        )

    assert desk.rollouts.target(row).observe().percent == 0
    assert desk.state(row) is RolloutState.FAILED
    watch = desk.definitions.resolve_sensor_def("watch_rollouts")
    with dg.build_sensor_context(instance=desk.instance, definitions=desk.definitions) as context:
        watch.evaluate_tick(context)
        assert desk.state(row) is RolloutState.ROLLED_BACK
        assert watch.evaluate_tick(context).skip_message == "every rollout is in good hands"
