"""kill -9 of executors at random moments over whole rollouts: how each ends, and how soon traffic is off.

    python benchmarks/rollout_kills.py [--kills 100] [--lease 1.0] [--seed 1]

Real processes, the real store and watchdog, the rehearsal target (its traffic is SIMULATED, its share is real state on
disk). Each rollout is executed by child processes that are killed at a random moment; the watchdog looks every tenth
of a second of a clock in which the lease is --lease seconds instead of 30.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.rollout_policy import RolloutPolicy
from optiinfra_pipelines.domain.rollouts import Change, KnobGroup, Proposal, RolloutPlan
from resources.rollouts.desk import Rollouts
from resources.rollouts.store import RolloutError
from resources.rollouts.watchdog import Watchdog

LOOK_SECONDS = 0.1


def execute(root: Path, policy: RolloutPolicy, rollout_id: str, owner: str) -> None:
    """One executor; waits for the lease when another one still has it."""
    rollouts = Rollouts(Fleet(), policy, root, environ={})
    executor = rollouts.executor(rollout_id, owner)
    pace = rollouts.pace(executor.target)
    while True:
        try:
            executor.begin(pace.clock())
            break
        except RolloutError as error:
            if "two may not act" not in str(error):
                return
            time.sleep(0.02)
    while not executor.step(pace.clock()).is_done:
        pace.sleep(5.0)
        # Without it a rehearsal is over in half a second, and every kill would find the same moments.
        time.sleep(0.002)
    executor.end()


def propose(rollouts: Rollouts, number: int) -> str:
    change = Change(
        deployment=f"d{number}",
        knob_group=KnobGroup.BATCHING,
        current={"max_num_seqs": "64"},
        proposed={"max_num_seqs": "128"},
    )
    proposal = Proposal(
        rollout_id=f"d{number}-1",
        change=change,
        plan=RolloutPlan(bake_minutes=10.0),
        requester="alice",
        reason="benchmark",
        created_at=rollouts.clock().at,
    )
    row = rollouts.propose(proposal)
    rollouts.approve(row.rollout_id, "bob", row.proposal_hash, "", "", None)
    return row.rollout_id


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=100)
    arguments.add_argument("--lease", type=float, default=1.0)
    arguments.add_argument("--seed", type=int, default=1)
    given = arguments.parse_args()
    rng, fork = random.Random(given.seed), multiprocessing.get_context("fork")
    policy = RolloutPolicy(lease_seconds=given.lease)
    kills, rollout = 0, 0
    ends: Counter[str] = Counter()
    where: Counter[str] = Counter()
    off_after: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rollouts = Rollouts(Fleet(), policy, root, environ={})
        watchdog = Watchdog(rollouts, lambda _: "unknown")
        while kills < given.kills:
            rollout_id = propose(rollouts, rollout)
            rollout += 1
            attempt = 0
            while not rollouts.store.get(rollout_id).position.is_terminal:
                attempt += 1
                child = fork.Process(target=execute, args=(root, policy, rollout_id, f"executor-{attempt}"))
                child.start()
                # Some die early, some late: the third lost executor ends a rollout, and it should be lost anywhere.
                child.join(timeout=rng.expovariate(1 / rng.choice([0.7, 6.0])))
                row = rollouts.store.get(rollout_id)
                if child.is_alive() and child.pid is not None:
                    os.kill(child.pid, signal.SIGKILL)
                    child.join()
                    kills += 1
                    died = time.monotonic()
                    had_traffic = rollouts.target(row).observe().percent > 0
                    where[f"{row.position.stage or row.position.state}"] += 1
                    while rollouts.target(row).observe().percent > 0:
                        time.sleep(LOOK_SECONDS)
                        watchdog.look()
                    if had_traffic:
                        off_after.append(time.monotonic() - died)
                    while rollouts.store.get(rollout_id).owner not in (None, "watchdog"):
                        time.sleep(LOOK_SECONDS)
                        watchdog.look()
                child.join()
                watchdog.look()
            row = rollouts.store.get(rollout_id)
            ends[str(row.position.state)] += 1
            assert rollouts.target(row).observe().percent == 0, row
        broken = rollouts.store.broken_link()
    late = sum(1 for seconds in off_after if seconds > given.lease + 15)
    print(f"{kills} kills over {rollout} rollouts, seed {given.seed}, lease {given.lease} s (product: 30 s)")
    print(f"ended: {dict(ends)}; log {'whole' if broken is None else f'broken at {broken}'}")
    print(f"killed in: {dict(where)}")
    worst = max(off_after, default=0.0) - given.lease
    print(f"had traffic: {len(off_after)}; off at the latest lease + {worst:.2f} s after the death")
    print(f"later than lease + 15 s: {late}")


if __name__ == "__main__":
    main()
