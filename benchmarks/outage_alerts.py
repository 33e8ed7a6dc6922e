"""How soon `optiinfra up` tells people of an outage: from the first bad scrape to the webhook's POST.

    python -m benchmarks.outage_alerts [--targets 20] [--minutes 5] [--port 3998]

Live: the real product with its sensors, and real HTTP over loopback in both directions. SIMULATED: the engines, which
are one recorded page of vLLM under load whose counters go on. Each target fails once at a random moment, in one of five
ways, and stays down. The first bad scrape is taken from the product's own rows, or, where the page stays well-formed
and half of its requests fail, from when that page was first served.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path

import numpy as np
import yaml

from benchmarks.advice_acceptance import RECORDINGS, VLLM, moved
from tests.analysis.findings_recordings import pages_of
from tests.scrape.loopback import Exchange, Loopback, answer, page, silent, status

KINDS = ("connection refused", "no answer", "HTTP 500", "not a metrics page", "half of all requests fail")
# Before the first fault every target has been seen well for some scrapes; after the last one its alert may take this.
SETTLE_SECONDS, WAIT_SECONDS = 45.0, 60.0
AIM_SECONDS = 15.0


@dataclass
class Replica:
    """One target: a busy page that goes on until it is broken in its way."""

    name: str
    kind: str
    busy: str
    server: Loopback = field(init=False)
    is_broken: bool = False
    served_bad_at: float | None = None

    def __post_init__(self) -> None:
        self.server = Loopback({"/metrics": self.serve})
        self._bad = 0

    def serve(self, exchange: Exchange) -> None:
        if not self.is_broken:
            page(moved(self.busy, exchange.ordinal))(exchange)
            return
        if self.served_bad_at is None:
            self.served_bad_at = time.time()
        self._bad += 1
        handlers: dict[str, Callable[[Exchange], None]] = {
            # What was being answered when the listener closed is cut off.
            "connection refused": lambda one: setattr(one, "close", True),
            "no answer": silent,
            "HTTP 500": status(500),
            "not a metrics page": lambda one: one.send(answer(b"<html>Bad gateway</html>", "Content-Type: text/html")),
            "half of all requests fail": page(moved(self.busy, exchange.ordinal, failed=20 * self._bad)),
        }
        handlers[self.kind](exchange)

    def break_down(self) -> None:
        self.is_broken = True
        if self.kind == "connection refused":
            self.server.__exit__()


class Webhook(ThreadingHTTPServer):
    """Takes the alerts and notes when each came."""

    def __init__(self) -> None:
        self.told: list[tuple[float, str]] = []
        told = self.told

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
                told.append((time.time(), text))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing: the report is what this script prints."""

        super().__init__(("127.0.0.1", 0), Handler)

    def first(self, target: str, since: float) -> float | None:
        """When the first alert about a target came."""
        times = [at for at, text in self.told if at >= since and f" {target} " in text and "resolved" not in text]
        return min(times, default=None)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--targets", type=int, default=20)
    arguments.add_argument("--minutes", type=float, default=5.0)
    arguments.add_argument("--port", type=int, default=3998)
    arguments.add_argument("--seed", type=int, default=1)
    given = arguments.parse_args()
    busy = pages_of(RECORDINGS / VLLM / "05_overload_queue_c64_low_kv")[3].read_text()
    replicas = [Replica(f"r{n}", KINDS[n % len(KINDS)], busy) for n in range(given.targets)]
    home = Path(tempfile.mkdtemp(prefix="optiinfra-outages-"))
    with ExitStack() as stack:
        hook = Webhook()
        threading.Thread(target=hook.serve_forever, daemon=True).start()
        stack.callback(hook.shutdown)
        for replica in replicas:
            replica.server.__enter__()
            stack.callback(lambda one=replica: one.server.__exit__() if one.kind != KINDS[0] else None)
        fleet = home / "fleet.yaml"
        targets = [
            {"name": one.name, "url": one.server.url("/metrics"), "deployment": "chat", "source": "simulated"}
            for one in replicas
        ]
        fleet.write_text(
            yaml.safe_dump(
                {
                    "targets": targets,
                    "deployments": [{"name": "chat", "model": "tiny"}],
                    "alerts": {"webhook": "${OUTAGE_HOOK}"},
                    "cadence": {"refresh_minutes": 1},
                }
            )
        )
        command = [str(Path(sys.executable).parent / "optiinfra"), "--home", str(home / "state"), "--fleet", str(fleet)]
        environment = {**os.environ, "OUTAGE_HOOK": f"http://127.0.0.1:{hook.server_port}/"}
        product = subprocess.Popen(
            [*command, "up", "--port", str(given.port)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment,
        )
        stack.callback(end, product)
        assert product.stdout is not None
        for line in product.stdout:
            if "stop    Ctrl-C" in line:
                break
        else:
            raise SystemExit("optiinfra up ended by itself")
        broken_at = run(replicas, given.minutes * 60, random.Random(given.seed))
        report(replicas, broken_at, hook, first_bad(command, environment, broken_at))


def end(product: subprocess.Popen[str]) -> None:
    product.send_signal(signal.SIGTERM)
    product.wait(timeout=60)


def run(replicas: list[Replica], seconds: float, rng: random.Random) -> dict[str, float]:
    """Break each target at its moment; the moments, by target."""
    time.sleep(SETTLE_SECONDS)
    begun = time.time()
    moments = sorted(rng.uniform(0, seconds) for _ in replicas)
    broken_at = {}
    for replica, moment in zip(rng.sample(replicas, len(replicas)), moments, strict=True):
        time.sleep(max(0.0, begun + moment - time.time()))
        broken_at[replica.name] = time.time()
        replica.break_down()
    time.sleep(WAIT_SECONDS)
    return broken_at


def first_bad(command: list[str], environment: dict[str, str], broken_at: dict[str, float]) -> dict[str, float]:
    """Start of each target's first failed scrape after it was broken, from the product's own rows."""
    query = "select target, epoch(scraped_at) as began from raw_scrapes where not is_up order by began"
    answered = subprocess.run([*command, "sql", "--csv", query], env=environment, capture_output=True, text=True)
    if answered.returncode:
        raise SystemExit(answered.stderr)
    found: dict[str, float] = {}
    for row in csv.DictReader(StringIO(answered.stdout)):
        # A scrape that had begun when the target broke is its first bad one.
        if float(row["began"]) >= broken_at[row["target"]] - 5.0:
            found.setdefault(row["target"], float(row["began"]))
    return found


def report(replicas: list[Replica], broken_at: dict[str, float], hook: Webhook, bad: dict[str, float]) -> None:
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for replica in replicas:
        since = replica.served_bad_at if replica.kind == KINDS[-1] else bad.get(replica.name)
        told = hook.first(replica.name, broken_at[replica.name])
        if told is None or since is None:
            when = datetime.fromtimestamp(broken_at[replica.name], UTC)
            print(f"  {replica.name} ({replica.kind}), broken at {when:%H:%M:%S}: NOT TOLD")
            continue
        took[replica.kind].append(told - since)
    print(f"{len(replicas)} outages of simulated engines under `optiinfra up`, first bad scrape to webhook:")
    for kind, seconds in took.items():
        if seconds:
            print(f"  {kind:<27} {min(seconds):4.1f} to {max(seconds):4.1f} s, {len(seconds)} outages")
    every = [one for seconds in took.values() for one in seconds]
    early = sum(at < broken_at[name] for at, text in hook.told for name in broken_at if f" {name} " in text)
    p95 = float(np.quantile(every, 0.95)) if every else float("nan")
    is_met = len(every) == len(replicas) and p95 <= AIM_SECONDS
    print(f"p95 {p95:.1f} s, longest {max(every, default=float('nan')):.1f} s, told {len(every)} of {len(replicas)}")
    print(f"alerts about a target that was still well: {early}")
    print(f"aim p95 <= {AIM_SECONDS:g} s: {'met' if is_met else 'MISSED'}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the end")


if __name__ == "__main__":
    main()
