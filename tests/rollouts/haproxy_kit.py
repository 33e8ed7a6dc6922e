"""A real gateway on loopback, HAProxy or the built-in, before small HTTP servers; clients that count what they lose."""

import http.client
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

from optiinfra_pipelines.domain.rollout_policy import HaproxyServer, HaproxySettings
from resources.demo.live.gateways import GatewayKind, gateway_command
from resources.rollouts.local_launcher import LocalLauncher

FAKE_ENGINE = Path(__file__).parent / "fake_engine.py"
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")

CONFIG = """
global
    stats socket {socket} mode 600 level admin
    server-state-file {state}
    log /dev/null local0
defaults
    mode http
    timeout connect 2s
    timeout client 30s
    timeout server 30s
    load-server-state-from-file global
frontend api
    bind 127.0.0.1:{port}
    default_backend chat
backend chat
    balance roundrobin
    option redispatch
    retries 3
    option httpchk GET /health
    default-server check inter 200ms fall 2 rise 1
{servers}
"""


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Gateway:
    """A gateway with stable servers that run and candidate servers that nobody has started.

    replicas: folder of the processes' records; that of the target, where a completed rollout is to end the old ones.
    """

    def __init__(
        self,
        folder: Path,
        stable: int,
        candidates: int,
        kind: GatewayKind = "haproxy",
        replicas: Path | None = None,
    ) -> None:
        self.folder = folder
        self.kind = kind
        self.port, *ports = free_ports(1 + stable + candidates)
        names = [f"s{index}" for index in range(stable)] + [f"c{index}" for index in range(candidates)]
        self.servers = [
            HaproxyServer(server=name, url=f"http://127.0.0.1:{port}") for name, port in zip(names, ports, strict=True)
        ]
        self.settings = HaproxySettings(
            socket=str(folder / "haproxy.sock"),
            backend="chat",
            state_file=str(folder / "haproxy.state"),
            stable=tuple(self.servers[:stable]),
            candidates=tuple(self.servers[stable:]),
            launch=(sys.executable, str(FAKE_ENGINE), "--port", "{port}", "--hit-ratio", "0.4", "{flags}"),
            drain_seconds=10.0,
        )
        lines = [
            f"    server {one.server} {one.url.removeprefix('http://')} weight {100 if index < stable else 0}"
            for index, one in enumerate(self.servers)
        ]
        self.config = folder / "haproxy.cfg"
        self.config.write_text(
            CONFIG.format(
                socket=self.settings.socket,
                state=self.settings.state_file,
                port=self.port,
                servers="\n".join(lines),
            )
        )
        # Under the launcher of the target, so that a completed rollout can end them.
        self.launcher = LocalLauncher(replicas or folder / "replicas")
        for one in self.settings.stable:
            self.launcher.start(one.server, self.settings.launch or (), one.url, {})
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start the gateway and wait until a request passes."""
        if self.kind == "builtin":
            command = gateway_command("builtin", self.settings, self.port, self.folder)
        else:
            assert HAPROXY is not None
            command = [HAPROXY, "-W", "-db", "-f", str(self.config)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 15
        while request(self.port) is None:
            assert time.monotonic() < until, "no request passes the gateway"
            time.sleep(0.05)

    def kill(self) -> None:
        """kill -9 of the gateway with its worker."""
        assert self.process is not None
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for one in family:
            one.kill()
        psutil.wait_procs(family, timeout=5)
        self.process.wait()

    def close(self) -> None:
        """End everything."""
        self.kill()
        for one in self.servers:
            process = process_at(one)
            if process is not None:
                process.kill()
                process.wait(5)


def process_at(server: HaproxyServer) -> psutil.Process | None:
    """The fake engine that serves this server, whoever started it."""
    port = server.url.rsplit(":", 1)[1]
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if str(FAKE_ENGINE) in line and port in line:
            return process
    return None


def request(port: int) -> str | None:
    """One request: the server that answered with 200, or None."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", "/v1/completions", body=b"{}", headers={"Content-Type": "application/json"})
        reply = connection.getresponse()
        reply.read()
        return reply.getheader("X-Server") if reply.status == 200 else None
    except OSError:
        return None
    finally:
        connection.close()


class Clients:
    """Threads that ask without pause; what was answered by whom, and what was lost."""

    def __init__(self, port: int, threads: int = 8, pause: float = 0.01) -> None:
        self.answered: Counter[str] = Counter()
        self.lost = 0
        self._stop = threading.Event()
        self._pause = pause
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(port,), daemon=True) for _ in range(threads)]

    def __enter__(self) -> "Clients":
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for one in self._threads:
            one.join(15)

    def _ask(self, port: int) -> None:
        while not self._stop.wait(self._pause):
            server = request(port)
            with self._lock:
                if server is None:
                    self.lost += 1
                else:
                    self.answered[server] += 1

    def share(self, ports: set[str], requests: int) -> float:
        """Share of the next so many answers that came from these servers."""
        with self._lock:
            before = Counter(self.answered)
        until = time.monotonic() + 60
        while sum(self.answered.values()) - sum(before.values()) < requests and time.monotonic() < until:
            time.sleep(0.02)
        with self._lock:
            gained = self.answered - before
        return sum(gained[port] for port in ports) / max(1, sum(gained.values()))
