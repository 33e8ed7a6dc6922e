"""A small process that outlives a rollout's executor and takes traffic off the candidate when its lease runs out.

    python -m resources.rollouts.deadman <capsule.json>

Started by the run that executes a rollout, in a session of its own: it needs neither Dagster nor the warehouse nor the
executor, only the store's file and the target, whose way back is in the capsule. Where Dagster's daemon lives, its
watchdog does the same and more; both may act, and whoever comes second finds the work done.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import Field

from optiinfra_pipelines.domain.base import Frozen
from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts
from optiinfra_pipelines.domain.rollouts import RolloutState, TargetKind
from resources.rollouts.clock import Clock, now_here
from resources.rollouts.store import WATCHDOG, RolloutStore
from resources.rollouts.targets.base import RolloutTarget
from resources.rollouts.targets.build import served_target

# Two looks of the executor fit between two of ours; the lease itself gives 30 s.
LOOK_SECONDS = 2.0


class Capsule(Frozen):
    """The way back of one rollout, on disk before its first change. token: of the executor that wrote it.

    root: folder of the rollouts' state. settings: of the deployment; secrets are not in them, they are read from the
    environment that the process inherits.
    """

    store: str
    root: str
    rollout_id: str
    token: int
    lease_seconds: float = Field(gt=0)
    kind: TargetKind
    settings: DeploymentRollouts

    def target(self, environ: Mapping[str, str]) -> RolloutTarget:
        """The target to take traffic off."""
        return served_target(self.kind, self.settings, Path(self.root), environ)


def spawn(capsule: Capsule) -> int:
    """Write the capsule and start the process; returns its pid. It ends by itself."""
    path = Path(capsule.root) / capsule.kind / f"{capsule.rollout_id}.capsule.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(capsule.model_dump_json(), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "resources.rollouts.deadman", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return process.pid


def look(capsule: Capsule, store: RolloutStore, target: RolloutTarget, clock: Clock) -> bool:
    """One look; True when there is nothing left to guard: the rollout ended, or another executor took over."""
    row = store.get(capsule.rollout_id)
    if row.position.is_terminal or row.token > capsule.token:
        return True
    age = store.lease_age(row.rollout_id, clock())
    is_safe = row.position.state not in (RolloutState.IN_PROGRESS, RolloutState.FAILED)
    if is_safe or (age is not None and age <= capsule.lease_seconds):
        return False
    seen = "released its lease" if age is None else f"was last seen {age:.0f} s ago"
    fenced = store.fence(row.rollout_id, WATCHDOG, clock(), f"the executor {seen}")
    try:
        target.claim(row.rollout_id, fenced.token)
        target.set_share(0.0, fenced.token)
        percent = target.observe().percent
        store.note(
            row.rollout_id,
            "alert" if percent > 0 else "result",
            f"dead-man: the executor {seen}; the candidate's share is {percent:g} %",
            actor=WATCHDOG,
            now=clock(),
            token=fenced.token,
        )
    finally:
        # Without a lease the watchdog, or a new executor, goes on at once.
        store.release(row.rollout_id, fenced.token, clock())
    return percent == 0


def watch(
    capsule: Capsule,
    environ: Mapping[str, str],
    clock: Clock = now_here,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Look until there is nothing to guard. Whatever goes wrong is tried again: nobody else is left to do it."""
    store = RolloutStore(Path(capsule.store), capsule.lease_seconds)
    target = capsule.target(environ)
    is_over = False
    while not is_over:
        with contextlib.suppress(Exception):
            is_over = look(capsule, store, target, clock)
        sleep(LOOK_SECONDS)


if __name__ == "__main__":
    watch(Capsule.model_validate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), os.environ)
