"""The executor keeps its promises in simulated time: traffic off first, then everything else, whoever dies when."""

from pathlib import Path

import pytest

from optiinfra_pipelines.domain.rollout_policy import DryRunSettings, RolloutPolicy
from optiinfra_pipelines.domain.rollouts import PauseReason, RolloutPlan, RolloutState, Stage
from resources.rollouts.store import LeaseLostError, RolloutError
from resources.rollouts.targets import StaleTokenError
from resources.rollouts.watchdog import Watchdog
from tests.rollouts.kit import QUICK, Kit


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


def watchdog(kit: Kit, state: str = "alive") -> Watchdog:
    return Watchdog(kit.rollouts, lambda _: state)  # type: ignore[arg-type, return-value]


def test_every_action_is_announced_before_and_read_back_after(kit: Kit) -> None:
    kit.approved()
    kit.run(kit.executor("a"), "COMPLETED")

    kinds = [(event.kind, event.reason) for event in kit.store.events("chat-1") if event.kind in ("intent", "result")]
    actions = [reason for kind, reason in kinds if kind == "intent"]
    assert "give the candidate 100 % of new requests" in actions
    for index, (kind, reason) in enumerate(kinds):
        if kind == "intent":
            assert kinds[index + 1] == ("result", reason)


def test_two_executors_on_one_rollout_and_exactly_one_acts(kit: Kit) -> None:
    kit.approved()
    first = kit.executor("a")

    with pytest.raises(RolloutError, match="executed by a, seen 0 s ago"):
        kit.executor("b")
    assert kit.run(first, "COMPLETED").is_done


def test_an_executor_that_was_replaced_stops_acting_at_its_next_look(kit: Kit) -> None:
    """Paused for 31 s (a long collection, a frozen machine), it comes back to a higher token and touches nothing."""
    kit.approved()
    first = kit.executor("a")
    kit.run(first, "GRADUAL")
    kit.run(first, "50 %")
    kit.clock.go(31)
    second = kit.executor("b")

    assert kit.percent() == 0
    stopped = first.step(kit.clock.go(5))
    assert stopped.is_done
    assert "stopped acting" in stopped.message
    with pytest.raises(StaleTokenError):
        first.target.set_share(100.0, first.token)
    with pytest.raises(LeaseLostError):
        first.note("intent", "something")
    assert kit.percent() == 0
    assert kit.run(second, "COMPLETED").is_done


def test_a_takeover_takes_traffic_off_first_and_runs_the_step_again(kit: Kit) -> None:
    kit.approved()
    first = kit.executor("a")
    kit.run(first, "GRADUAL: 50 %")
    kit.clock.go(40)
    second = kit.executor("b")

    events = kit.store.events("chat-1")
    after = [event.reason for event in events if event.token == second.token]
    assert "took over IN_PROGRESS GRADUAL" in after[1]
    assert after[2] == "give the candidate 0 % of new requests"
    assert kit.percent() == 0
    assert kit.store.get("chat-1").position.stage is Stage.GRADUAL
    assert kit.run(second, "GRADUAL: 50 %")


def test_the_watchdog_makes_a_dead_executor_safe_and_hands_over(kit: Kit) -> None:
    kit.approved()
    kit.run(kit.executor("a", run_id="run-a"), "GRADUAL: 50 %")
    kit.clock.go(29)
    assert watchdog(kit).look() == []
    assert kit.percent() == 50
    kit.clock.go(2)

    [done] = watchdog(kit).look()

    assert kit.percent() == 0
    assert done.run_key == "chat-1:execute:1"
    assert kit.store.get("chat-1").position.pause is PauseReason.EXECUTOR_LOST
    assert kit.run(kit.executor("b"), "COMPLETED").is_done


@pytest.mark.parametrize(("state", "ends"), [("canceled", "ROLLED_BACK"), ("over", "PAUSED (EXECUTOR_LOST)")])
def test_a_run_that_ended_is_noticed_before_its_lease_does(kit: Kit, state: str, ends: str) -> None:
    """A canceled run is a person's wish to stop; one that failed gets a new executor."""
    kit.approved()
    kit.run(kit.executor("a", run_id="run-a"), "GRADUAL: 50 %")

    watchdog(kit, state).look()

    assert kit.percent() == 0
    assert ends in str(kit.store.get("chat-1").position)


def test_the_third_lost_executor_ends_in_the_rollback(kit: Kit) -> None:
    kit.approved()
    for owner in ("a", "b", "c"):
        kit.run(kit.executor(owner), "GRADUAL: 50 %")
        kit.clock.go(31)
        watchdog(kit).look()

    assert kit.store.get("chat-1").position.state is RolloutState.ROLLED_BACK
    assert kit.percent() == 0


def test_a_new_executor_that_never_comes_counts_as_lost(kit: Kit) -> None:
    kit.approved()
    kit.run(kit.executor("a"), "GRADUAL: 50 %")
    keys = []
    for _ in range(200):
        kit.clock.go(5)
        keys += [one.run_key for one in watchdog(kit).look() if one.run_key]

    assert keys == ["chat-1:execute:1", "chat-1:execute:2"]
    assert kit.store.get("chat-1").position.state is RolloutState.ROLLED_BACK


def test_an_approval_that_nobody_used_expires(kit: Kit) -> None:
    kit.approved()
    kit.clock.go(24 * 3600 + 1)
    with pytest.raises(RolloutError, match="the approval expired"):
        kit.executor("a")

    watchdog(kit).look()

    assert kit.store.get("chat-1").position.state is RolloutState.REJECTED


def test_a_gap_without_looks_takes_traffic_off_and_asks_a_person(kit: Kit) -> None:
    kit.approved()
    executor = kit.executor("a")
    kit.run(executor, "GRADUAL: 50 %")

    executor.step(kit.clock.go(31))

    assert kit.percent() == 0
    assert kit.store.get("chat-1").position.pause is PauseReason.UNWATCHED
    kit.rollouts.resume("chat-1", "carol", "the host was suspended", None)
    assert kit.run(executor, "COMPLETED").is_done


@pytest.mark.parametrize("jump", [7200.0, -7200.0])
def test_a_clock_that_is_set_pauses_and_ends_no_lease(kit: Kit, jump: float) -> None:
    kit.approved()
    executor = kit.executor("a")
    kit.run(executor, "GRADUAL: 50 %")
    kit.clock.set_by(jump)

    assert watchdog(kit).look() == []
    executor.step(kit.clock.go(5))

    assert kit.store.get("chat-1").position.pause is PauseReason.CLOCK_JUMP
    assert kit.percent() == 50


def test_an_edited_proposal_is_taken_back_in_the_middle(kit: Kit) -> None:
    """Somebody writes into the file past the store: the approval no longer covers what runs."""
    import sqlite3

    kit.approved()
    executor = kit.executor("a")
    kit.run(executor, "GRADUAL: 50 %")
    with sqlite3.connect(kit.store.path) as connection:
        connection.execute("update rollouts set row = replace(row, '\"128\"', '\"512\"')")

    progress = kit.run(executor, "ROLLED_BACK")

    assert progress.is_done
    [failed] = [event for event in kit.store.events("chat-1") if event.to_position == RolloutState.FAILED]
    assert "edited after its approval" in failed.reason


def test_a_weight_that_somebody_else_changed_pauses_without_traffic(kit: Kit) -> None:
    kit.approved()
    executor = kit.executor("a")
    kit.run(executor, "GRADUAL: 50 %")
    executor.target.set_share(90.0, executor.token)

    executor.step(kit.clock.go(5))

    assert kit.store.get("chat-1").position.pause is PauseReason.WEIGHT_DRIFT
    assert kit.percent() == 0


def test_a_person_pauses_resumes_and_aborts_while_it_runs(kit: Kit) -> None:
    kit.approved()
    executor = kit.executor("a")
    kit.run(executor, "GRADUAL: 50 %")
    kit.rollouts.pause("chat-1", "carol", "lunch", None)
    waiting = kit.run(executor, "waits for a person")
    assert kit.percent() == 50
    kit.rollouts.resume("chat-1", "carol", "", None)
    kit.run(executor, "GRADUAL: 50 %")

    taken = kit.rollouts.abort("chat-1", "carol", "customers call", None)

    assert waiting.position.pause is PauseReason.OPERATOR
    assert taken.position.state is RolloutState.ROLLED_BACK
    assert kit.percent() == 0
    assert executor.step(kit.clock.go(5)).is_done


def test_a_pause_that_nobody_ends_is_taken_back(kit: Kit) -> None:
    kit.approved(plan=QUICK.model_copy(update={"pause_hours": 0.5}))
    executor = kit.executor("a")
    kit.run(executor, "GRADUAL: 50 %")
    kit.rollouts.pause("chat-1", "carol", "", None)

    assert kit.run(executor, "ROLLED_BACK").is_done


def test_too_few_requests_are_inconclusive_and_wait_for_a_person(tmp_path: Path) -> None:
    """The load falls after planning: the step ends without enough requests, and that is no pass."""
    kit = Kit(tmp_path, DryRunSettings(requests_per_second=20.0))
    kit.approved(plan=RolloutPlan(percents=(10.0, 50.0, 100.0), bake_minutes=1.0, max_extensions=0))
    executor = kit.executor("a")
    kit.run(executor, "VALIDATION: 10 %")
    executor.traffic_stage._feed._settings = DryRunSettings(requests_per_second=10.0)  # type: ignore[attr-defined]

    progress = kit.run(executor, "PAUSED")

    assert progress.position.pause is PauseReason.INCONCLUSIVE
    assert "requests in the smaller arm" in progress.message


def test_a_plan_too_short_for_its_traffic_is_refused_with_what_would_suffice(kit: Kit) -> None:
    kit.approved(plan=QUICK.model_copy(update={"step_minutes": 1.0}))

    kit.run(kit.executor("a"), "ROLLED_BACK")

    [failed] = [event for event in kit.store.events("chat-1") if event.to_position == RolloutState.FAILED]
    assert "too short to find +50%" in failed.reason
    assert "needed after each warm-up: 10 %" in failed.reason


def test_a_freeze_that_begins_meanwhile_stops_the_growth_and_not_the_way_back(tmp_path: Path) -> None:
    from datetime import time

    from optiinfra_pipelines.domain.rollout_policy import FreezeWindow

    freeze = FreezeWindow(name="evening", since=time(12, 1), until=time(23))
    kit = Kit(tmp_path, policy=RolloutPolicy(freeze_windows=(freeze,)))
    kit.approved()
    executor = kit.executor("a")

    progress = kit.run(executor, "PAUSED")

    assert progress.position.pause is PauseReason.FREEZE
    assert "evening" in progress.message
    assert kit.rollouts.abort("chat-1", "carol", "", None).position.state is RolloutState.ROLLED_BACK


def test_a_second_rollout_of_a_deployment_waits_for_the_first(kit: Kit) -> None:
    kit.approved()
    second = kit.propose("chat-2")

    with pytest.raises(RolloutError, match="held by rollout chat-1"):
        kit.approve(second)
    kit.run(kit.executor("a"), "COMPLETED")
    assert kit.approve(second).position.state is RolloutState.APPROVED


def test_a_target_that_fails_is_waited_for_and_then_given_up(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """HAProxy restarts: 25 s are forgiven, 30 s end in FAILED, and the way back is tried until it works."""
    from resources.rollouts.targets import TargetError

    kit.approved()
    executor = kit.executor("a")
    kit.run(executor, "GRADUAL: 50 %")
    observe = executor.target.observe

    def gone() -> None:
        raise TargetError("socket does not answer")

    monkeypatch.setattr(executor.target, "observe", gone)
    for _ in range(6):
        assert executor.step(kit.clock.go(5)).position.state is RolloutState.IN_PROGRESS
    assert executor.step(kit.clock.go(5)).position.state is RolloutState.FAILED
    assert "cannot be rolled back" in [e.reason for e in kit.store.events("chat-1") if e.kind == "alert"][-1]
    monkeypatch.setattr(executor.target, "observe", observe)

    assert kit.run(executor, "ROLLED_BACK").is_done
    assert kit.percent() == 0
