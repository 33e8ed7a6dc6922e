"""Pods that run: one process of the fake engine for each, on a loopback address of its own, and traffic by weights.

The proxy here stands where a mesh's would: it splits requests as the HTTPRoute says and counts them in Istio's names.
"""

from __future__ import annotations

import http.client
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from tests.rollouts.haproxy_kit import FAKE_ENGINE, free_ports

Json = dict[str, Any]


class Flowing(Protocol):
    """What a gateway and its clients follow: weights by rule, and pods by their Deployment (`of`)."""

    def weights(self) -> list[dict[str, int | None]]: ...

    def all(self, plural: str) -> list[Json]: ...


class Node:
    """Runs pods. port: the one port that all of them listen on."""

    def __init__(self) -> None:
        [self.port] = free_ports(1)
        self._next = 1
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, pod: Json) -> str:
        """Start the engine of a pod; its address."""
        self._next += 1
        address = f"127.77.0.{self._next}"
        args = pod["spec"]["containers"][0]["args"]
        line = [sys.executable, str(FAKE_ENGINE), "--host", address, "--port", str(self.port), *args]
        self._processes[pod["metadata"]["name"]] = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        return address

    def end(self, pod: Json) -> None:
        """As the kubelet does: SIGTERM, then SIGKILL."""
        process = self._processes.pop(pod["metadata"]["name"], None)
        if process is not None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)

    def end_all(self) -> None:
        """Nothing is left running."""
        for name in list(self._processes):
            self.end({"metadata": {"name": name}})

    def is_up(self, address: str) -> bool:
        """Whether the pod there is ready, by its health page."""
        connection = http.client.HTTPConnection(address, self.port, timeout=1)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def until_up(self, server: Flowing) -> None:
        """Wait until every pod answers."""
        until = time.monotonic() + 60
        for pod in server.all("pods"):
            while ask(pod["status"]["podIP"], self.port) is None:
                assert time.monotonic() < until, "a pod does not answer"
                time.sleep(0.05)


def ask(address: str, port: int) -> int | None:
    """Status of one request; None when nobody answers."""
    connection = http.client.HTTPConnection(address, port, timeout=10)
    try:
        connection.request("POST", "/v1/completions", body=b"{}", headers={"Content-Type": "application/json"})
        reply = connection.getresponse()
        reply.read()
    except OSError:
        return None
    else:
        return reply.status
    finally:
        connection.close()


class Proxy:
    """Clients and the gateway in one: threads that ask by the weights in force, and a page that counts."""

    def __init__(self, server: Flowing, node: Node, threads: int = 6) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._server, self._node = server, node
        self._stop = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = outer.page().encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                return

        self._page = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._page.server_address[1]}/stats/prometheus"
        threading.Thread(target=self._page.serve_forever, args=(0.02,), daemon=True).start()
        self._threads = [threading.Thread(target=self._ask, args=(index,), daemon=True) for index in range(threads)]

    def __enter__(self) -> Proxy:
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for one in self._threads:
            one.join(15)
        self._page.shutdown()
        self._page.server_close()

    def page(self) -> str:
        """Counters as Istio's proxy tells them."""
        with self._lock:
            counts = dict(self.counts)
        lines = ["# TYPE istio_requests_total counter"]
        for (backend, code), count in counts.items():
            lines.append(f'istio_requests_total{{destination_service_name="{backend}",response_code="{code}"}} {count}')
        return "\n".join(lines) + "\n"

    def lost(self) -> int:
        """Requests that no pod answered."""
        with self._lock:
            return self.counts["chat", "0"] + self.counts["chat-candidate", "0"]

    def _ask(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop.wait(0.01):
            [weights] = self._server.weights()
            names = list(weights)
            shares = [1 if weights[name] is None else int(weights[name] or 0) for name in names]
            backend = rng.choices(names, shares)[0]
            pods = [one for one in self._server.all("pods") if one["of"] == backend]
            status = ask(rng.choice(pods)["status"]["podIP"], self._node.port) if pods else None
            with self._lock:
                self.counts[backend, str(status or 0)] += 1
