"""Freezes, limits, clocks and alarms hold in the launchpad's jobs and in the sensors, however a run is launched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import time, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pydantic import SecretStr

from optiinfra_pipelines.defs.rollouts import rollout_assets, rollout_jobs
from optiinfra_pipelines.domain.fleet import Deployment, Fleet
from optiinfra_pipelines.domain.rollout_policy import (
    BlastRadius,
    DeploymentRollouts,
    FreezeWindow,
    HaproxyServer,
    HaproxySettings,
    RolloutPolicy,
)
from optiinfra_pipelines.domain.rollouts import PauseReason, Rollout, RolloutState
from optiinfra_pipelines.rollout.machine import Input
from resources.alert_outlet import AlertOutlet
from resources.rollouts.desk import Pace, Rollouts
from sensors.rollouts import rollout_sensors
from tests.rollouts.kit import START, TestClock
from tests.test_alerts import Webhook

AFTERNOON = FreezeWindow(name="afternoon", since=time(14), until=time(15))
HAPROXY = HaproxySettings(
    socket="/nowhere/haproxy.sock",
    backend="chat",
    state_file="/nowhere/haproxy.state",
    stable=(HaproxyServer(server="s0", url="http://127.0.0.1:1"),),
    candidates=(HaproxyServer(server="c0", url="http://127.0.0.1:2"),),
)


class Desk:
    """Jobs and sensors of one state folder at a clock of the test's own (noon, UTC)."""

    def __init__(self, root: Path, policy: RolloutPolicy, outlet: AlertOutlet) -> None:
        self.clock = TestClock()
        fleet = Fleet(deployments=(Deployment(name="chat", model="tiny"),))
        self.rollouts = Rollouts(fleet, policy, root, environ={}, clock=self.clock)
        self.instance = dg.DagsterInstance.ephemeral()
        self.definitions = dg.Definitions(
            assets=rollout_assets(), jobs=rollout_jobs(self.rollouts), sensors=rollout_sensors(self.rollouts, outlet)
        )
        self.cursor: str | None = None

    def run(self, job: str, op: str, **config: Any) -> str:
        """Why the run failed, as its step says; nothing when it went well."""
        result = self.definitions.resolve_job_def(job).execute_in_process(
            run_config={"ops": {op: {"config": config}}}, instance=self.instance, raise_on_error=False
        )
        failed = [event for event in result.all_events if event.is_step_failure]
        said = failed[0].step_failure_data.user_failure_data if failed else None
        return re.sub(r"\s+", " ", said.description or "") if said is not None else ""

    def propose(self, target: str = "dry_run", percents: tuple[float, ...] = (10.0, 50.0, 100.0)) -> Rollout:
        given: dict[str, Any] = {"requester": "alice", "reason": "more slots", "deployment": "chat", "target": target}
        given |= {"current": {"max_num_seqs": "64"}, "proposed": {"max_num_seqs": "128"}}
        given |= {"percents": list(percents), "bake_minutes": 2.0}
        assert self.run("propose_rollout", "record_proposal", **given) == ""
        return self.rollouts.all()[-1]

    def approve(self, row: Rollout) -> str:
        given = {"rollout_id": row.rollout_id, "approver": "bob", "proposal_hash": row.proposal_hash}
        return self.run("approve_rollout", "record_approval", **given)

    def execute(self, row: Rollout) -> str:
        """As a person would launch it from the launchpad, without the sensor."""
        return self.run("execute_rollout", "take_rollout", rollout_id=row.rollout_id)

    def row(self, row: Rollout) -> Rollout:
        return self.rollouts.store.get(row.rollout_id)

    def dispatched(self) -> list[str | None]:
        """Keys of the runs that one tick of the dispatch asks for."""
        sensor = self.definitions.resolve_sensor_def("dispatch_rollouts")
        with dg.build_sensor_context(instance=self.instance, definitions=self.definitions) as context:
            return [request.run_key for request in sensor.evaluate_tick(context).run_requests or []]

    def watch(self) -> dg.SensorResult:
        """One tick of the watch, with the cursor that the one before left."""
        sensor = self.definitions.resolve_sensor_def("watch_rollouts")
        with dg.build_sensor_context(
            instance=self.instance, definitions=self.definitions, cursor=self.cursor
        ) as context:
            ticked = sensor.evaluate_tick(context)
        self.cursor = ticked.cursor or self.cursor
        return ticked


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    made = Webhook()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def desk(tmp_path: Path, webhook: Webhook) -> Iterator[Desk]:
    policy = RolloutPolicy(
        freeze_windows=(AFTERNOON,), deployments=(DeploymentRollouts(deployment="chat", haproxy=HAPROXY),)
    )
    made = Desk(tmp_path, policy, AlertOutlet(SecretStr(webhook.url)))
    yield made
    made.instance.dispose()


def at(hour: int) -> timedelta:
    return timedelta(hours=hour - START.at.hour)


def test_a_freeze_holds_an_approval_and_a_start_that_was_approved_before_it(desk: Desk) -> None:
    row = desk.propose()
    assert desk.approve(row) == ""
    desk.clock.go(at(14).total_seconds())

    assert "freeze window afternoon holds until 15:00 UTC" in desk.execute(row)
    assert desk.row(row).position.state is RolloutState.APPROVED
    assert not (desk.rollouts.root / "dry_run").exists()
    # Refused and not lost: no sensor launches it again and again.
    assert desk.dispatched() == []
    desk.run("abort_rollout", "abort_rollout_now", rollout_id=row.rollout_id, person="alice")
    assert "freeze window afternoon" in desk.approve(desk.propose())


def test_a_freeze_that_begins_during_a_rollout_holds_the_next_step(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share that was reached stays, under guard; nothing grows until a person resumes it after the window."""
    row = desk.propose()
    desk.approve(row)
    # The first step takes three minutes and begins before the window, the second would begin in it.
    desk.clock.go(at(14).total_seconds() - 150)
    waits = _stop_when_paused(desk, row, monkeypatch)

    desk.execute(row)

    assert waits == [PauseReason.FREEZE]
    steps = [event.to_position for event in desk.rollouts.store.events(row.rollout_id) if event.to_position]
    assert not any("GRADUAL" in step and "PAUSED" not in step for step in steps[-2:])


def test_a_clock_that_is_set_during_a_rollout_stops_it_for_a_person(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set forward by a day, past every freeze: the freezes cannot be judged, and nothing goes on by itself."""
    row = desk.propose()
    desk.approve(row)
    waits = _stop_when_paused(desk, row, monkeypatch, jump=timedelta(days=1))

    desk.execute(row)

    assert waits == [PauseReason.CLOCK_JUMP]


def test_a_clock_that_was_set_back_neither_approves_nor_starts(desk: Desk) -> None:
    row = desk.propose()
    desk.clock.set_by(-7200)
    assert "the clock jumped back" in desk.approve(row)
    desk.clock.set_by(7200)
    assert desk.approve(row) == ""
    desk.clock.set_by(-7200)

    assert "the clock jumped back" in desk.execute(row)


def test_an_approval_that_is_a_day_old_starts_nothing_even_when_launched_by_hand(desk: Desk) -> None:
    row = desk.propose()
    desk.approve(row)
    desk.clock.go(24 * 3600 + 1)

    assert "the approval expired" in desk.execute(row)
    desk.watch()
    assert desk.row(row).position.state is RolloutState.REJECTED


def test_a_policy_that_became_stricter_holds_what_was_approved_under_the_old_one(desk: Desk) -> None:
    row = desk.propose()
    desk.approve(row)
    desk.rollouts.policy = desk.rollouts.policy.model_copy(update={"blast_radius": BlastRadius(max_first_percent=5.0)})

    assert "the first step is 10 %, the blast radius allows 5 %" in desk.execute(row)


def test_a_way_back_that_does_not_work_calls_a_person_once_and_tells_its_end(desk: Desk, webhook: Webhook) -> None:
    """The gateway is gone: the watch cannot roll back, alerts after two minutes, once, and says when it is over."""
    row = desk.propose("haproxy")
    desk.approve(row)
    for given in (Input.START, Input.FAIL):
        row = desk.rollouts.store.move(desk.row(row), given, actor="run:1", reason="errors", now=desk.clock())
    desk.clock.go(60)
    assert desk.watch().asset_events == []
    desk.clock.go(61)

    [alert] = desk.watch().asset_events
    assert alert.metadata["kind"].value == "ROLLBACK_STUCK"
    desk.clock.go(10)
    assert desk.watch().asset_events == []
    row = desk.row(row)
    desk.rollouts.store.move(row, Input.ROLLED_BACK, actor="carol", reason="by hand", now=desk.clock())
    [over] = desk.watch().asset_events

    assert over.metadata["state"].value == "resolved"
    began, ended = webhook.messages
    assert began.startswith(f"ROLLBACK_STUCK: {row.rollout_id} (chat): failed and not rolled back: ")
    assert "HAProxy's socket /nowhere/haproxy.sock does not answer" in began
    assert ended.startswith(f"resolved: ROLLBACK_STUCK of {row.rollout_id}")


def test_the_watch_asks_for_a_new_executor_when_one_was_lost(desk: Desk) -> None:
    """The run of a rehearsal died in the middle: the sensor's tick launches the next, twice, then it is over."""
    row = desk.propose()
    desk.approve(row)
    asked: list[str | None] = []
    for _ in range(4):
        executor = desk.rollouts.executor(row.rollout_id, "run:lost", "run-that-was-killed")
        if desk.row(row).position.is_terminal:
            break
        executor.begin(desk.clock())
        executor.step(desk.clock())
        desk.clock.go(31)
        ticked = desk.watch()
        asked += [request.run_key for request in ticked.run_requests or []]

    assert asked == [f"{row.rollout_id}:execute:1", f"{row.rollout_id}:execute:2"]
    assert desk.row(row).position.state is RolloutState.ROLLED_BACK


def _stop_when_paused(
    desk: Desk, row: Rollout, monkeypatch: pytest.MonkeyPatch, jump: timedelta | None = None
) -> list[PauseReason]:
    """Run at the rehearsal's pace until the rollout pauses, then abort it as a person would. jump: set once traffic
    flows."""
    found: list[PauseReason] = []
    pace_of = desk.rollouts.pace

    def paced(target: Any) -> Pace:
        pace = pace_of(target)
        is_set = [False]

        def clock() -> Any:
            moment = pace.clock()
            shift = jump if jump is not None and is_set[0] else timedelta()
            return type(moment)(moment.at + shift, moment.seconds, moment.boot_id)

        def sleep(seconds: float) -> None:
            present = desk.row(row)
            is_set[0] = is_set[0] or desk.rollouts.target(row).observe().percent > 0
            if present.position.pause is not None and not found:
                found.append(present.position.pause)
                desk.rollouts.store.move(present, Input.ABORT, actor="carol", reason="enough", now=desk.clock())
            pace.sleep(seconds)

        return Pace(clock, sleep)

    monkeypatch.setattr(desk.rollouts, "pace", paced)
    return found
