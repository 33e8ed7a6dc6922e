"""kill -9 of runs, daemon, code server and gateways of the real product over whole rollouts: how each of them ends.

    python benchmarks/rollout_kills_stack.py [--minutes 15] [--deployments 4] [--lease 30] [--seed 1]

Real: `optiinfra up` with its processes, its sensors and its dead-man processes, HAProxy with its runtime socket, HTTP
traffic over loopback. The engines behind it are small servers of the tests, no engines. Each deployment is rolled out
again and again; the script proposes, approves and, where a rollout waits for a person, resumes. A killed gateway is
started again as an init system would. Exit status 1 when anything that must hold did not.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from optiinfra_pipelines.domain.rollouts import (
    Change,
    KnobGroup,
    PauseReason,
    Proposal,
    Rollout,
    RolloutPlan,
    RolloutState,
)
from optiinfra_pipelines.settings import load_fleet
from resources.rollouts.desk import Rollouts
from resources.rollouts.store import RolloutError
from resources.rollouts.targets import TargetError
from tests.rollouts.haproxy_kit import Clients, Gateway

# Short, and real all the same: every step is as long as the planner asks for at this load, two minutes at least.
PLAN = RolloutPlan(
    percents=(10.0, 50.0, 100.0),
    bake_minutes=0.5,
    detect_ratio=4.0,
    min_requests=40,
    warm_up_seconds=5.0,
    latency_signals=("time_to_first_token_seconds",),
)
# What the product promises beyond the lease.
OFF_AFTER_LEASE_SECONDS = 15.0
POLL_SECONDS = 0.25
# A rollout that is left alone takes ten minutes; a paused one that nobody resumes would take a day.
SETTLE_SECONDS = 900.0


@dataclass
class Lane:
    """One deployment: its gateway, its clients and its present rollout."""

    name: str
    gateway: Gateway
    clients: Clients
    rollout_id: str = ""
    count: int = 0
    next_kill: float = 0.0
    # Since when an executor is dead while the candidate has traffic; since when a failed one has.
    orphaned_at: float | None = None
    failed_at: float | None = None
    is_gateway_down: bool = False


@dataclass
class Tally:
    """What happened."""

    kills: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    off_after: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Stack:
    """`optiinfra up` on a fresh home, found process by process."""

    def __init__(self, home: Path, fleet: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = [str(Path(sys.executable).parent / "optiinfra"), "--home", str(home), "--fleet", str(fleet)]
        self.log = (home.parent / "up.log").open("ab")
        self.process = subprocess.Popen([*command, "up", "--port", str(port)], stdout=self.log, stderr=self.log)

    def child(self, words: tuple[str, ...]) -> psutil.Process | None:
        """The process of Dagster whose command line has these words."""
        for one in psutil.Process(self.process.pid).children():
            try:
                if set(words) <= set(one.cmdline()):
                    return one
            except psutil.NoSuchProcess:
                continue
        return None

    def code_server(self) -> psutil.Process | None:
        return self.child(("api", "grpc"))

    def daemon(self) -> psutil.Process | None:
        return self.child(("dagster._daemon",))

    def run(self, run_id: str | None) -> psutil.Process | None:
        """The process of one run: it has its compute log open."""
        server = self.code_server()
        if server is None or run_id is None:
            return None
        for one in server.children(recursive=True):
            try:
                if any(run_id in file.path for file in one.open_files()):
                    return one
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return None

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.log.close()


class Trial:
    """All lanes under one product."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.rng = random.Random(given.seed)
        self.tally = Tally()
        self.lease = given.lease
        home = folder / "home"
        self.lanes = [self._lane(folder, home, f"d{index}") for index in range(given.deployments)]
        file = folder / "fleet.yaml"
        file.write_text(yaml.safe_dump(self._fleet(given)))
        fleet = load_fleet(file, {})
        self.rollouts = Rollouts(fleet, fleet.rollouts, home / "rollouts", environ={})
        home.mkdir(exist_ok=True)
        self.stack = Stack(home, file)

    def _lane(self, folder: Path, home: Path, name: str) -> Lane:
        place = folder / name
        place.mkdir()
        gateway = Gateway(place, 1, 1, replicas=home / "rollouts" / "haproxy" / name / "replicas")
        return Lane(name, gateway, Clients(gateway.port, threads=1, pause=0.12))

    def _fleet(self, given: argparse.Namespace) -> dict[str, object]:
        look = min(5.0, given.lease / 3)
        return {
            "hosts": [{"name": "here", "local": True}],
            "deployments": [{"name": lane.name, "model": "tiny"} for lane in self.lanes],
            "rollouts": {
                "lease_seconds": given.lease,
                "look_seconds": look,
                "blast_radius": {"max_concurrent_rollouts": len(self.lanes)},
                "deployments": [
                    {"deployment": lane.name, "haproxy": lane.gateway.settings.model_dump(mode="json")}
                    for lane in self.lanes
                ],
            },
        }

    # --- people ------------------------------------------------------------------------------------------

    def propose(self, lane: Lane) -> None:
        """A proposal of one person and the approval of another; the product's sensor launches it."""
        lane.count += 1
        value = str(64 * (2 + lane.count % 2))
        change = Change(
            deployment=lane.name, knob_group=KnobGroup.BATCHING, current={}, proposed={"max_num_seqs": value}
        )
        proposal = Proposal(
            rollout_id=f"{lane.name}-{lane.count}",
            change=change,
            plan=PLAN,
            target="haproxy",
            requester="alice",
            reason="benchmark",
            created_at=self.rollouts.clock().at,
        )
        row = self.rollouts.propose(proposal)
        self.rollouts.approve(row.rollout_id, "bob", row.proposal_hash, "", "", None)
        lane.rollout_id = row.rollout_id
        lane.next_kill = time.monotonic() + self._wait()

    def _wait(self) -> float:
        """Some die early, some late: the third lost executor ends a rollout, and it should be lost anywhere."""
        return self.rng.expovariate(1 / self.rng.choice([45.0, 240.0]))

    # --- the kills -----------------------------------------------------------------------------------------

    def kill_one(self, lane: Lane, row: Rollout) -> None:
        """One kill at this rollout's moment: mostly its run, else something it lives on."""
        kind = self.rng.choices(["run", "gateway", "daemon", "code server"], [5, 3, 2, 1])[0]
        if kind == "gateway":
            threading.Thread(target=self._kill_gateway, args=(lane,), daemon=True).start()
        else:
            found = {
                "run": lambda: self.stack.run(row.run_id),
                "daemon": self.stack.daemon,
                "code server": self.stack.code_server,
            }[kind]()
            if found is None:
                return
            os.kill(found.pid, signal.SIGKILL)
            for other in self.lanes if kind == "code server" else [lane] if kind == "run" else []:
                self._orphan(other)
        self.tally.kills[kind] += 1
        self.tally.stages[str(row.position.stage or row.position.state)] += 1

    def _orphan(self, lane: Lane) -> None:
        if lane.orphaned_at is None and self._percent(lane) > 0:
            lane.orphaned_at = time.monotonic()

    def _kill_gateway(self, lane: Lane) -> None:
        lane.is_gateway_down = True
        lane.gateway.kill()
        time.sleep(1 + 4 * random.random())
        lane.gateway.start()
        lane.is_gateway_down = False

    # --- what must hold ----------------------------------------------------------------------------------------

    def look(self, lane: Lane) -> None:
        """Time how long a candidate keeps traffic without a living executor, and after its failure."""
        row = self.rollouts.store.get(lane.rollout_id)
        percent = self._percent(lane)
        now = time.monotonic()
        limit = self.lease + OFF_AFTER_LEASE_SECONDS
        if lane.orphaned_at is not None:
            waited = now - lane.orphaned_at
            if percent == 0:
                self.tally.off_after.append(waited)
                lane.orphaned_at = None
            elif waited > limit:
                self.tally.wrong.append(f"{lane.rollout_id}: {percent:g} % of traffic {waited:.0f} s after a death")
                lane.orphaned_at = None
        is_failed = row.position.state in (RolloutState.FAILED, RolloutState.ROLLED_BACK)
        if not is_failed or percent == 0:
            lane.failed_at = None
        else:
            lane.failed_at = lane.failed_at or now
            if now - lane.failed_at > limit:
                self.tally.wrong.append(f"{lane.rollout_id}: failed, and {percent:g} % of traffic")
        if row.position.pause in (PauseReason.WEIGHT_DRIFT, PauseReason.INCONCLUSIVE, PauseReason.UNWATCHED):
            try:
                self.rollouts.resume(lane.rollout_id, "carol", f"after {row.position.pause}", None)
            except RolloutError:
                return

    def _percent(self, lane: Lane) -> float:
        """0 while the gateway is down: nothing has traffic then."""
        try:
            return self.rollouts.target(self.rollouts.store.get(lane.rollout_id)).observe().percent
        except (RolloutError, TargetError):
            return 0.0

    def finish(self, lane: Lane, row: Rollout) -> None:
        """A rollout that ended: is what the gateway does what the record says?"""
        self.tally.ends[str(row.position.state)] += 1
        state = self.rollouts.target(row).observe()
        if row.position.state not in (RolloutState.COMPLETED, RolloutState.ROLLED_BACK):
            self.tally.wrong.append(f"{row.rollout_id} ended as {row.position}")
        if state.percent > 0 or state.candidates or not state.stable:
            self.tally.wrong.append(f"{row.rollout_id} is {row.position}, the gateway shows {state}")
        weights = [weight for weight in state.detail["weights"].values() if weight]
        if len(weights) != 1:
            self.tally.wrong.append(f"{row.rollout_id}: weights {state.detail['weights']}")

    # --- the trial ---------------------------------------------------------------------------------------------

    def go(self, minutes: float) -> None:
        """Rollout after rollout with kills until the time is up; then each open one comes to its end."""
        begun = time.monotonic()
        for lane in self.lanes:
            self.propose(lane)
        is_open = True
        while is_open:
            elapsed = time.monotonic() - begun
            is_killing = elapsed < minutes * 60
            is_open = False
            for lane in self.lanes:
                if lane.is_gateway_down:
                    is_open = True
                    continue
                row = self.rollouts.store.get(lane.rollout_id)
                is_over = row.position.state is RolloutState.ROLLED_BACK or row.is_settled
                if not is_over:
                    is_open = True
                    self.look(lane)
                    if is_killing and time.monotonic() > lane.next_kill and row.owner is not None:
                        self.kill_one(lane, row)
                        lane.next_kill = time.monotonic() + self._wait()
                elif lane.rollout_id and is_killing:
                    is_open = True
                    self.finish(lane, row)
                    self.propose(lane)
                elif lane.count:
                    self.finish(lane, row)
                    lane.count = 0
            if elapsed > minutes * 60 + SETTLE_SECONDS:
                stuck = [lane.rollout_id for lane in self.lanes if lane.count]
                self.tally.wrong.append(f"did not end: {', '.join(stuck)}")
                return
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        self.stack.stop()
        for lane in self.lanes:
            lane.clients.__exit__(None, None, None)
            lane.gateway.close()


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--minutes", type=float, default=15.0)
    arguments.add_argument("--deployments", type=int, default=4)
    arguments.add_argument("--lease", type=float, default=30.0)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--folder", type=Path, help="Where to keep everything; a temporary folder by default.")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        trial = Trial(folder, given)
        try:
            for lane in trial.lanes:
                lane.clients.__enter__()
            trial.go(given.minutes)
            broken = trial.rollouts.store.broken_link()
        finally:
            trial.close()
        tally, lanes = trial.tally, trial.lanes
    off = sorted(tally.off_after)
    print(
        f"seed {given.seed}, lease {given.lease:g} s, {given.deployments} deployments, {given.minutes:g} min of kills"
    )
    print(f"kills     {sum(tally.kills.values())}: {dict(tally.kills)}")
    print(f"killed in {dict(tally.stages)}")
    print(f"ended     {sum(tally.ends.values())} rollouts: {dict(tally.ends)}")
    if off:
        median = statistics.median(off)
        print(
            f"off after {len(off)} deaths with traffic: median {median:.1f} s, latest {off[-1]:.1f} s after the death"
        )
    answered = sum(sum(lane.clients.answered.values()) for lane in lanes)
    print(f"requests  {answered} answered, {sum(lane.clients.lost for lane in lanes)} lost while gateways were down")
    print(f"log       {'whole' if broken is None else f'broken at {broken}'}")
    for line in sorted(set(tally.wrong)):
        print(f"WRONG     {line}")
    return 1 if tally.wrong or broken is not None else 0


if __name__ == "__main__":
    sys.exit(main())
