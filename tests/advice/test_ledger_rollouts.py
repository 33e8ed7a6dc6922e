"""From a recommendation on real rows to its proven effect, by way of the launchpad's jobs of the assembled product."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from optiinfra_pipelines.analysis.ledger.life import spokesmen
from optiinfra_pipelines.definitions import assemble, open_rollouts
from optiinfra_pipelines.domain.fleet import Objective
from optiinfra_pipelines.domain.recommendations import LedgerState
from optiinfra_pipelines.domain.rollout_policy import (
    DeploymentRollouts,
    HaproxyServer,
    HaproxySettings,
    RolloutPolicy,
)
from optiinfra_pipelines.domain.rollouts import Rollout, RolloutState, Stage, Step
from optiinfra_pipelines.rollout.machine import Input
from optiinfra_pipelines.settings import Paths
from resources.findings.objectives import ObjectiveStore
from resources.ledger.store import LedgerStore
from resources.warehouse import Warehouse
from tests.advice.ledger_cases import CHANGED_AT, END, FLEET, START, Clock, record

# Nothing listens there: what is tried is the way to the target and back, not the target.
HAPROXY = HaproxySettings(
    socket="/nowhere/haproxy.sock",
    backend="chat",
    state_file="/nowhere/haproxy.state",
    stable=(HaproxyServer(server="s0", url="http://127.0.0.1:1"),),
    candidates=(HaproxyServer(server="c0", url="http://127.0.0.1:2"),),
)
POLICY = RolloutPolicy(deployments=(DeploymentRollouts(deployment="chat", haproxy=HAPROXY),))
PROMISE = Objective(kind="error_ratio", target_ratio=0.999)
STEPS = (
    Step(stage=Stage.STAGING, percent=0, dwell_seconds=0, max_seconds=0),
    Step(stage=Stage.BAKE, percent=100, dwell_seconds=0, max_seconds=0),
)


class Product:
    """The assembled definitions on a copy of the recorded warehouse, at a clock of the test's own."""

    def __init__(self, recorded: Path, home: Path) -> None:
        shutil.copytree(recorded, home / "warehouse")
        self.clock = Clock(START + timedelta(minutes=20))
        self.paths = Paths(
            home=home,
            warehouse_dir=home / "warehouse",
            dagster_home=home / "dagster",
            reports_dir=home / "reports",
            rollouts_dir=home / "rollouts",
            fleet_file=home / "fleet.yaml",
        )
        promised = FLEET.deployments[0].model_copy(update={"objectives": (PROMISE,)})
        fleet = FLEET.model_copy(update={"rollouts": POLICY, "deployments": (promised,)})
        self.warehouse = Warehouse(self.paths.warehouse_dir, clock=self.clock)
        self.definitions = assemble(fleet, self.paths, self.clock, {})
        self.rollouts = open_rollouts(fleet, self.paths, self.warehouse, self.clock, {})
        self.ledger = LedgerStore(fleet, self.warehouse, self.clock)
        self.objectives = ObjectiveStore(fleet, self.warehouse, self.clock)
        self.instance = dg.DagsterInstance.ephemeral()

    def run(self, job: str, op: str, **config: Any) -> dg.ExecuteInProcessResult:
        return self.definitions.resolve_job_def(job).execute_in_process(
            run_config={"ops": {op: {"config": config}}}, instance=self.instance, raise_on_error=False
        )

    def derive(self) -> None:
        """One refresh of the recommendations, as the product does it."""
        job = self.definitions.resolve_implicit_global_asset_job_def()
        keys = [dg.AssetKey(name) for name in ("recommendations", "recommendation_ledger")]
        keys.append(dg.AssetKey("fct_recommendation_accuracy"))
        assert job.execute_in_process(asset_selection=keys, instance=self.instance).success

    def state(self) -> LedgerState:
        [entry] = self.ledger.entries()
        return entry.state

    def events(self) -> list[tuple[str, str]]:
        """Kind and reason of everything that happened to recommendations, in order of time."""
        query = "select kind, reason from recommendation_ledger order by happened_at"
        return [(str(kind), str(reason)) for kind, reason in self.warehouse.read(query).rows()]

    def propose(self, target: str) -> Rollout:
        [wanted] = self.ledger.open_recommendations()
        done = self.run(
            "propose_rollout",
            "record_proposal",
            requester="alice",
            reason="slots run out",
            recommendation_id=wanted.id,
            target=target,
            percents=[10.0, 50.0, 100.0],
            bake_minutes=2.0,
        )
        assert done.success
        return self.rollouts.all()[-1]

    def approve(self, row: Rollout) -> None:
        given = {"rollout_id": row.rollout_id, "approver": "bob", "proposal_hash": row.proposal_hash}
        assert self.run("approve_rollout", "record_approval", **given).success

    def refusal(self, job: str, op: str, **config: Any) -> str:
        """Why a job failed, as its step says."""
        refused = self.run(job, op, **config)
        [failed] = [event for event in refused.all_events if event.is_step_failure]
        said = failed.step_failure_data.user_failure_data
        assert said is not None
        return " ".join(str(said.description).split())

    def complete(self, row: Rollout) -> None:
        """What an executor writes at the start and at the end; the target between them is not part of this."""
        for given, more in ((Input.START, {"steps": STEPS}), (Input.ADVANCE, {}), (Input.COMPLETE, {})):
            row = self.rollouts.store.move(
                row, given, actor="run:1", reason=str(given), now=self.rollouts.clock(), **more
            )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ledger") / "warehouse"
    record(root)
    return root


@pytest.fixture
def product(recorded: Path, tmp_path: Path) -> Iterator[Product]:
    made = Product(recorded, tmp_path / "home")
    made.derive()
    yield made
    made.instance.dispose()


def test_a_recommendation_is_proposed_approved_applied_and_verified(product: Product) -> None:
    """The flags of the evidence are the flags of the proposal; the ledger follows the rollout, then the rows."""
    row = product.propose("haproxy")
    assert row.proposal.change.current == {"max-num-seqs": "16"}
    assert row.proposal.change.proposed == {"max-num-seqs": "32"}
    product.derive()
    assert product.state() is LedgerState.PROPOSED

    product.approve(row)
    product.clock.now = CHANGED_AT
    product.complete(product.rollouts.store.get(row.rollout_id))
    product.clock.now = CHANGED_AT + timedelta(minutes=20)
    product.derive()
    assert product.state() is LedgerState.APPLIED
    assert [reason for kind, reason in product.events() if kind == "applied"] == [
        f"rollout {row.rollout_id} is COMPLETED"
    ]

    product.clock.now = END
    product.derive()
    assert product.state() is LedgerState.VERIFIED


def test_a_canary_that_shows_the_change_does_not_apply_it(product: Product) -> None:
    """32 requests run at two of four replicas because the rollout made it so: only its own end says applied."""
    row = product.propose("haproxy")
    product.approve(row)
    product.clock.now = CHANGED_AT
    started = product.rollouts.store.move(
        product.rollouts.store.get(row.rollout_id),
        Input.START,
        actor="run:1",
        reason="start",
        now=product.rollouts.clock(),
        steps=STEPS,
    )
    product.clock.now = CHANGED_AT + timedelta(minutes=20)
    product.derive()
    assert product.state() is LedgerState.PROPOSED

    product.clock.now += timedelta(minutes=1)
    for given in (Input.FAIL, Input.ROLLED_BACK):
        started = product.rollouts.store.move(
            started, given, actor="run:1", reason=str(given), now=product.rollouts.clock()
        )
    product.clock.now += timedelta(seconds=40)
    product.derive()

    assert product.state() is LedgerState.OPEN
    [told] = [one for one in product.events() if one[0] == "withdrawn"]
    assert f"rollout {row.rollout_id} is ROLLED_BACK" in told[1]


def test_what_somebody_changes_by_hand_after_a_rollout_is_seen_again(product: Product) -> None:
    """Rejected before it started, it held nothing: what runs an hour later is somebody's doing."""
    row = product.propose("haproxy")
    assert product.run("reject_rollout", "record_rejection", rollout_id=row.rollout_id, person="bob").success
    product.clock.now = CHANGED_AT + timedelta(minutes=20)
    product.derive()

    assert product.state() is LedgerState.APPLIED
    [told] = [reason for kind, reason in product.events() if kind == "applied"]
    assert "more than the former ceiling of 16" in told


def test_a_rejected_proposal_opens_the_recommendation_again(product: Product) -> None:
    row = product.propose("haproxy")
    product.derive()
    rejected = product.run("reject_rollout", "record_rejection", rollout_id=row.rollout_id, person="bob")
    assert rejected.success

    product.derive()

    assert product.state() is LedgerState.OPEN


def test_a_rehearsal_says_nothing_about_a_recommendation(product: Product) -> None:
    """A dry run that completes has changed nothing: the recommendation stays open."""
    row = product.propose("dry_run")
    product.approve(row)
    assert product.run("execute_rollout", "take_rollout", rollout_id=row.rollout_id).success
    assert product.rollouts.store.get(row.rollout_id).position.state is RolloutState.COMPLETED

    product.derive()

    assert product.state() is LedgerState.OPEN


def test_an_earlier_attempt_does_not_undo_what_a_later_one_came_to(product: Product) -> None:
    """Only the newest rollout of a recommendation speaks, and after it the one that takes it back."""
    first = product.propose("haproxy")
    product.run("reject_rollout", "record_rejection", rollout_id=first.rollout_id, person="bob")
    product.clock.now += timedelta(minutes=1)
    second = product.propose("haproxy")
    undone = second.model_copy(
        update={
            "proposal": second.proposal.model_copy(
                update={"rollout_id": "back", "undoes": second.rollout_id, "created_at": product.clock()}
            )
        }
    )

    assert [one.rollout_id for one in spokesmen(product.rollouts.all())] == [second.rollout_id]
    assert [one.rollout_id for one in spokesmen([undone, *product.rollouts.all()])] == [second.rollout_id, "back"]


def test_what_is_not_open_any_more_cannot_be_proposed(product: Product) -> None:
    [found] = product.ledger.open_recommendations()
    product.clock.now = END
    product.derive()

    refusal = product.refusal(
        "propose_rollout", "record_proposal", requester="alice", reason="late", recommendation_id=found.id
    )

    assert f"recommendation {found.id} is verified; choose an open one" in refusal
    assert not product.rollouts.root.exists()


def test_a_used_up_error_budget_holds_a_start_back_and_a_kept_one_does_not(product: Product) -> None:
    """The newest judgement in the published copy decides, however the run is launched; before any, none is known."""
    row = product.propose("haproxy")
    product.approve(row)
    execute = ("execute_rollout", "take_rollout")

    assert "the error budgets cannot be read" in product.refusal(*execute, rollout_id=row.rollout_id)
    product.objectives.refresh()
    with product.warehouse.connect() as connection:
        connection.execute("update objective_status set state = 'exhausted', remaining_ratio = -0.2")
    product.warehouse.publish()
    refusal = product.refusal(*execute, rollout_id=row.rollout_id)
    assert "the error budget is used up: error_ratio@0.999 (-20% left)" in refusal
    assert product.rollouts.store.get(row.rollout_id).position.state is RolloutState.APPROVED
    product.clock.now += timedelta(minutes=1)
    product.objectives.refresh()
    product.warehouse.publish()
    # No request failed in the recorded hours: what refuses now is the gateway that is not there.
    assert "HAProxy's socket /nowhere/haproxy.sock does not answer" in product.refusal(
        *execute, rollout_id=row.rollout_id
    )
