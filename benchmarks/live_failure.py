"""How soon a candidate that fails under traffic is out, and what clients lose meanwhile.

    uv run --group live python benchmarks/live_failure.py [--faults 10] [--gateway haproxy|builtin]

The live demo's fleet: real HTTP servers, gateway, traffic and rollout executor on the real clock; the engines are
SIMULATED. Each fault is one rollout of a harmless change whose candidates have a quarter of the traffic when one of
them is killed with -9, or both begin to answer 3 of 10 requests with an error. Printed: fault to weight 0 as the
gateway shows it, fault to ROLLED_BACK (the stable state verified at the gateway), and lost requests. Last, weights go
25, 50, 100, 0 %, a drain and a stop under the same traffic, plain and streamed, and every lost request is counted.
"""

from __future__ import annotations

import argparse
import asyncio
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from optiinfra_pipelines.domain.fleet import Deployment, Fleet
from optiinfra_pipelines.domain.rollouts import Change, KnobGroup, Proposal, RolloutPlan, RolloutState, Stage
from resources.demo.live.engines import MOCKER
from resources.demo.live.fleet import DEPLOYMENT, LiveFleet, completes
from resources.demo.live.gateways import GatewayKind
from resources.demo.live.replica import MODEL_NAME, metrics_port
from resources.demo.live.traffic import Traffic
from resources.gateway.pool import Pool, ServerSettings
from resources.gateway.proxy import Proxy
from resources.rollouts.desk import Rollouts
from resources.rollouts.targets.build import haproxy_folder
from resources.rollouts.targets.haproxy import HaproxyTarget

LOOK_SECONDS = 5.0
ERROR_RATIO = 0.3
# The fault comes somewhere in the step, not at a look.
FAULT_AFTER_SECONDS = (12.0, 20.0)
PLAN = RolloutPlan(
    percents=(25.0, 50.0, 100.0), candidate_replicas=2, detect_ratio=1.0, min_requests=100, warm_up_seconds=10.0
)
assert MOCKER.load is not None
LOAD = MOCKER.load
CHANGE = Change(
    deployment=DEPLOYMENT,
    knob_group=KnobGroup.BATCHING,
    current={"max-num-seqs": "64"},
    proposed={"max-num-seqs": "72"},
)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--faults", type=int, default=10, help="0: only the changes of weight.")
    arguments.add_argument("--gateway", choices=["haproxy", "builtin"], default=None)
    if sys.argv[1:2] == ["--serve"]:
        # As a replica of the fleet: see `serve`.
        sys.exit(serve(sys.argv[2:]))
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="live-failure-") as folder:
        measure(Path(folder), given.faults, given.gateway)


def measure(folder: Path, faults: int, gateway: GatewayKind | None) -> None:
    rng = random.Random(1)
    (folder / "errors").mkdir()
    engine = replace(
        MOCKER,
        # 64 slots from the start: what is measured is the fault, not an overload.
        flags={**MOCKER.flags, "max-num-seqs": "64"},
        command=(sys.executable, str(Path(__file__).resolve()), "--serve", str(folder / "errors"), *MOCKER.command[3:]),
    )
    live = LiveFleet(folder / "live", folder / "rollouts", engine=engine, gateway=gateway)
    off: list[float] = []
    back: list[float] = []
    with live, Traffic(live.url, LOAD) as traffic:
        print(f"gateway: {live.gateway}; engines SIMULATED; {LOAD.requests_per_second:g} requests/s")
        for place in range(faults):
            kind = "kill -9" if place % 2 == 0 else f"{ERROR_RATIO:.0%} errors"
            seconds_off, seconds_back, failed = one_fault(live, traffic, folder, f"chat-{place}", kind, rng)
            off.append(seconds_off)
            back.append(seconds_back)
            print(
                f"  {kind:>10}: weight 0 after {seconds_off:5.1f} s, rolled back after {seconds_back:5.1f} s, "
                f"{failed} requests lost",
                flush=True,
            )
        if off:
            worst = sorted(off)[max(0, int(0.95 * len(off) + 0.5) - 1)]
            print(
                f"{len(off)} faults: fault to weight 0 median {statistics.median(off):.1f} s, p95 {worst:.1f} s, "
                f"longest {max(off):.1f} s; to ROLLED_BACK longest {max(back):.1f} s"
            )
        changes(live, folder)


def one_fault(
    live: LiveFleet, traffic: Traffic, folder: Path, name: str, kind: str, rng: random.Random
) -> tuple[float, float, int]:
    """One rollout with one fault: seconds to weight 0, seconds to ROLLED_BACK, requests lost."""
    errors = folder / "errors"
    heal(errors)
    fleet = Fleet(deployments=(Deployment(name=DEPLOYMENT, model=MODEL_NAME),))
    rollouts = Rollouts(fleet, live.policy, folder / "rollouts", environ={})
    proposal = Proposal(
        rollout_id=name,
        change=CHANGE,
        plan=PLAN,
        target="haproxy",
        requester="benchmark",
        reason="a fault will come",
        created_at=datetime.now(UTC),
    )
    row = rollouts.propose(proposal)
    rollouts.approve(name, "somebody else", row.proposal_hash, "", "", None)
    executor = rollouts.executor(name, "benchmark")
    executor.begin(rollouts.clock())
    fault_at = struck = None
    before = traffic.counts().failed
    with weight_zero(live, folder) as zero:
        while True:
            progress = executor.step(rollouts.clock())
            if progress.position.stage is Stage.CANARY and fault_at is None:
                fault_at = time.monotonic() + rng.uniform(*FAULT_AFTER_SECONDS)
            if progress.is_done:
                break
            until = time.monotonic() + LOOK_SECONDS
            while time.monotonic() < until:
                if fault_at is not None and struck is None and time.monotonic() >= fault_at:
                    before = traffic.counts().failed
                    strike(live, kind, errors)
                    struck = time.monotonic()
                    zero.clear()
                time.sleep(0.05)
    ended = time.monotonic()
    executor.end()
    state = rollouts.store.get(name).position.state
    if state is not RolloutState.ROLLED_BACK or struck is None or not zero:
        story = "\n".join(f"{one.kind}: {one.reason}" for one in rollouts.store.events(name)[-15:])
        raise SystemExit(f"{name} with {kind} is {state}:\n{story}")
    return zero[0] - struck, ended - struck, traffic.counts().failed - before


def heal(errors: Path) -> None:
    """Every replica answers again as it should."""
    for told in errors.glob("*"):
        told.unlink()


def strike(live: LiveFleet, kind: str, errors: Path) -> None:
    """The fault: the engine of the first candidate is killed, or candidates begin to fail."""
    if kind != "kill -9":
        for one in live.settings.candidates:
            (errors / one.url.rsplit(":", 1)[1]).write_text(str(ERROR_RATIO))
        return
    port = str(metrics_port(int(live.settings.candidates[0].url.rsplit(":", 1)[1])))
    for process in psutil.process_iter(["cmdline"]):
        if "dynamo.mocker" in (process.info["cmdline"] or []) and process.environ().get("DYN_SYSTEM_PORT") == port:
            process.send_signal(signal.SIGKILL)
            return
    raise SystemExit("no engine to kill")


@contextmanager
def weight_zero(live: LiveFleet, folder: Path) -> Iterator[list[float]]:
    """Watches the gateway ten times a second; the list holds the first moment since it was cleared without weight."""
    zero: list[float] = []
    stopped = threading.Event()
    target = HaproxyTarget(live.settings, haproxy_folder(folder / "rollouts", DEPLOYMENT), live.launcher)

    def look() -> None:
        while not stopped.wait(0.1):
            if target.observe().percent == 0:
                zero.append(time.monotonic())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield zero
    finally:
        stopped.set()
        thread.join()


def changes(live: LiveFleet, folder: Path) -> None:
    """Weights, drain, stop and a change of roles under traffic; what clients lose."""
    target = HaproxyTarget(live.settings, haproxy_folder(folder / "rollouts", DEPLOYMENT), live.launcher)
    token = 1_000_000
    counts = []
    heal(folder / "errors")
    for is_streamed in (False, True):
        load = replace(LOAD, is_streamed=is_streamed)
        with Traffic(live.url, load) as traffic:
            token += 1
            target.claim(f"changes-{token}", token)
            target.start_candidates(2, {"max-num-seqs": "64"}, token)
            for one in live.settings.candidates:
                while not completes(one.url):
                    time.sleep(0.2)
            time.sleep(2)
            for percent in (25.0, 50.0, 100.0, 0.0):
                target.set_share(percent, token)
                time.sleep(6)
            while not target.drain(token):
                time.sleep(0.2)
            target.stop_candidates(token)
            time.sleep(2)
        counts.append(traffic.counts())
    sent, lost = sum(one.sent for one in counts), sum(one.failed for one in counts)
    reasons = dict(sum((one.lost for one in counts), Counter[str]()))
    print(
        f"weights 25, 50, 100, 0 %, drain and stop, twice (plain and streamed): {sent} requests, {lost} lost {reasons}"
    )


class FaultyProxy(Proxy):
    """Passes requests on, and answers some with an error while a file says how many."""

    def __init__(self, pool: Pool, errors: Path) -> None:
        super().__init__(pool, "/health")
        self._errors = errors

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._errors.exists() and random.random() < float(self._errors.read_text() or 0):
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"POST"):
                writer.write(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                await writer.drain()
                writer.close()
                return
            writer.close()
            return
        await super().serve(reader, writer)


def serve(given: list[str]) -> int:
    """A replica behind a FaultyProxy: `--serve <folder> --port P …`; the folder's file P says how many fail."""
    folder, rest = Path(given[0]), given[1:]
    place = rest.index("--port") + 1
    port = int(rest[place])
    errors = folder / str(port)
    # The engine's metrics page stays where it was: only the API is passed on.
    with socket.create_server(("127.0.0.1", 0)) as free:
        inner = int(free.getsockname()[1])
    line = [sys.executable, "-m", "resources.demo.live.replica", *rest[:place], str(inner), *rest[place + 1 :]]
    process = subprocess.Popen([*line, "--metrics", str(metrics_port(port))], env=dict(os.environ))
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())

    async def run() -> None:
        pool = Pool.of(DEPLOYMENT, [ServerSettings(name="engine", port=inner)])
        server = await asyncio.start_server(FaultyProxy(pool, errors).serve, "127.0.0.1", port)
        while process.poll() is None:
            await asyncio.sleep(0.1)
        server.close()

    asyncio.run(run())
    return process.wait()


if __name__ == "__main__":
    main()
