"""Rollouts survive real processes killed with -9, races and vandals: one row, one owner, one whole log."""

import multiprocessing
import os
import random
import signal
import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.rollout_policy import RolloutPolicy
from optiinfra_pipelines.domain.rollouts import RolloutPlan, RolloutState
from optiinfra_pipelines.rollout.machine import Input
from resources.rollouts.clock import Moment, now_here
from resources.rollouts.desk import Rollouts
from resources.rollouts.store import ConflictError, LeaseLostError, RolloutError, RolloutStore
from resources.rollouts.watchdog import Watchdog
from tests.rollouts.kit import QUICK, START, Kit

FORK = multiprocessing.get_context("fork")
# Long enough for a look under load, short enough to wait it out.
HASTY = RolloutPolicy(lease_seconds=0.3)


def execute(root: Path, owner: str) -> None:
    """One executor in a process of its own, in rehearsal time and with the real lease."""
    rollouts = Rollouts(Fleet(), HASTY, root, environ={})
    while True:
        executor = rollouts.executor("chat-1", owner)
        pace = rollouts.pace(executor.target)
        try:
            executor.begin(pace.clock())
        except RolloutError as error:
            if "two may not act" not in str(error):
                return
            time.sleep(0.02)
            continue
        while not executor.step(pace.clock()).is_done:
            pace.sleep(5.0)
        executor.end()
        return


def proposed(root: Path) -> Rollouts:
    kit = Kit(root)
    kit.clock.now = now_here()
    kit.approved(plan=QUICK.model_copy(update={"percents": (1.0, 5.0, 10.0, 25.0, 50.0, 100.0), "bake_minutes": 30.0}))
    return Rollouts(Fleet(), HASTY, root, environ={})


@pytest.mark.parametrize("seed", range(4))
def test_executors_killed_at_random_moments_leave_a_rollout_that_ends(tmp_path: Path, seed: int) -> None:
    """Killed again and again, helped by the watchdog only: it ends COMPLETED or ROLLED_BACK, with the weights recorded
    and every announced action read back by whoever came after."""
    rng = random.Random(seed)
    rollouts = proposed(tmp_path)
    watchdog = Watchdog(rollouts, lambda _: "unknown")
    kills = 0
    for attempt in range(12):
        child = FORK.Process(target=execute, args=(tmp_path, f"executor-{attempt}"))
        child.start()
        child.join(timeout=rng.uniform(0.02, 1.5))
        if child.is_alive():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        time.sleep(HASTY.lease_seconds + 0.05)
        watchdog.look()
        row = rollouts.store.get("chat-1")
        if row.position.state is RolloutState.IN_PROGRESS:
            assert rollouts.target(row).observe().percent == 0
        if row.position.is_terminal:
            break

    row = rollouts.store.get("chat-1")
    assert row.position.state in (RolloutState.COMPLETED, RolloutState.ROLLED_BACK), (
        f"{row.position} after {kills} kills"
    )
    assert rollouts.target(row).observe().percent == 0
    assert row.is_settled is (row.position.state is RolloutState.COMPLETED)
    assert rollouts.store.broken_link() is None
    tokens = [event.token for event in rollouts.store.events("chat-1")]
    assert tokens == sorted(tokens)


def test_eight_processes_start_one_rollout_and_one_of_them_owns_it(tmp_path: Path) -> None:
    rollouts = proposed(tmp_path)
    children = [FORK.Process(target=_begin_once, args=(tmp_path, f"p{index}")) for index in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)

    events = rollouts.store.events("chat-1")
    starts = [event for event in events if event.to_position and event.to_position.startswith("IN_PROGRESS")]
    assert len(starts) == 1
    assert sum(child.exitcode == 0 for child in children) == 1
    assert rollouts.store.broken_link() is None


def _begin_once(root: Path, owner: str) -> None:
    rollouts = Rollouts(Fleet(), RolloutPolicy(), root, environ={})
    try:
        rollouts.executor("chat-1", owner).begin(now_here())
    except RolloutError:
        os._exit(1)
    os._exit(0)


def test_first_opens_by_many_processes_make_one_file(tmp_path: Path) -> None:
    children = [FORK.Process(target=_open_once, args=(tmp_path / "new" / "r.sqlite",)) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)

    assert [child.exitcode for child in children] == [0] * 8


def _open_once(path: Path) -> None:
    RolloutStore(path).all()


def test_a_row_that_moved_meanwhile_is_not_moved_again(tmp_path: Path) -> None:
    """Two approvers at the same moment: the second is told, and the log has one approval."""
    kit = Kit(tmp_path)
    row = kit.approved()
    stale = row.model_copy(update={"version": row.version - 1})

    with pytest.raises(ConflictError, match="moved meanwhile"):
        kit.store.move(stale, Input.REJECT, actor="dave", reason="no", now=kit.clock())
    assert kit.store.get("chat-1").position.state is RolloutState.APPROVED


def test_a_move_that_the_machine_refuses_changes_nothing(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    row = kit.propose()

    with pytest.raises(RolloutError, match="launch approve_rollout first"):
        kit.store.move(row, Input.COMPLETE, actor="x", reason="y", now=kit.clock())
    assert kit.store.get("chat-1") == row
    assert len(kit.store.events("chat-1")) == 1


def test_the_log_refuses_changes_and_shows_those_made_past_it(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.approved()
    with sqlite3.connect(kit.store.path) as connection:
        for change in ("update rollout_events set line = ''", "delete from rollout_events"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(change)
        assert kit.store.broken_link() is None
        connection.execute("drop trigger events_are_never_changed")
        connection.execute("update rollout_events set line = replace(line, 'bob', 'rob') where seq = 2")
    connection.close()

    assert kit.store.broken_link() == 2


def test_proposing_the_same_twice_is_one_proposal_and_another_content_is_refused(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    first = kit.propose()

    assert kit.propose() == first
    with pytest.raises(RolloutError, match="exists with other content"):
        kit.propose(plan=RolloutPlan())


def test_leases_count_by_the_boot_clock(tmp_path: Path) -> None:
    """A wall clock that is set changes no lease; a reboot ends every one."""
    kit = Kit(tmp_path)
    kit.approved()
    store = kit.store
    token = store.acquire("chat-1", "a", START).token
    later = Moment(datetime(2030, 1, 1, tzinfo=UTC), START.seconds + 10, START.boot_id)

    assert store.lease_age("chat-1", later) == 10
    with pytest.raises(RolloutError, match="seen 10 s ago"):
        store.acquire("chat-1", "b", later)
    rebooted = Moment(later.at, 5.0, "boot-2")
    assert store.lease_age("chat-1", rebooted) == float("inf")
    assert store.acquire("chat-1", "b", rebooted).token > token
    with pytest.raises(LeaseLostError):
        store.renew("chat-1", token, rebooted)
    store.release("chat-1", token, rebooted)
    assert store.get("chat-1").owner == "b"


def test_an_unknown_rollout_is_named(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="no rollout 'x'"):
        RolloutStore(tmp_path / "r.sqlite").get("x")
