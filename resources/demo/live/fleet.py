"""The live demo's fleet on loopback: replicas behind a gateway, which a rollout really changes.

Real: the HTTP servers, their metrics pages, the gateway, the traffic, the processes that a rollout starts and stops.
SIMULATED, unless it is a real vLLM: the engine inside each replica. Here: starting and ending all of it, and the
fleet.yaml that describes it. Not here: the command (`optiinfra_pipelines.commands.live_demo`), what a replica is
(`engines`), the load (`traffic`).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import httpx
import yaml

from optiinfra_pipelines.domain.rollout_policy import (
    BlastRadius,
    DeploymentRollouts,
    HaproxyServer,
    HaproxySettings,
    RolloutPolicy,
)
from resources.dagster_home.supervisor import Child, Supervisor
from resources.demo.live.engines import MOCKER, LiveEngine
from resources.demo.live.gateways import GatewayKind, find_haproxy, gateway_command
from resources.demo.live.model import write_model
from resources.demo.live.replica import MODEL_NAME, metrics_port
from resources.rollouts.local_launcher import LocalLauncher
from resources.rollouts.targets.build import REPLICAS, haproxy_folder

DEPLOYMENT = "chat"
# Written into the demo's folder; only a folder that has it is emptied at the next start.
MARKER = ".optiinfra-live-demo"
_LOOK_SECONDS = 0.5
# Dynamo takes the port of its metrics page for a 16-bit number with a sign: 32767 is the highest.
_PORTS = (20_000, 32_000)


class LiveDemoError(RuntimeError):
    """The live demo cannot run; the text names what is missing and the remedy."""


class LiveFleet:
    """All of it under one folder. Use as a context manager: what was started is ended, also what rollouts started.

    rollouts_dir: where the pipeline keeps its rollouts; the replicas are known to the launcher there. gateway: which
    one; None takes HAProxy where it is installed. on_event: one line per thing that happens to the gateway.
    """

    def __init__(
        self,
        folder: Path,
        rollouts_dir: Path,
        *,
        engine: LiveEngine = MOCKER,
        gateway: GatewayKind | None = None,
        on_event: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self.engine = engine
        self.gateway: GatewayKind = gateway or ("haproxy" if find_haproxy() else "builtin")
        self.launcher = LocalLauncher(_replicas(rollouts_dir))
        self.port, *ports = _free_ports(engine.stable + engine.candidates)
        self.settings = self._settings(ports)
        self._supervisor = Supervisor(environ=dict(os.environ), cwd=folder, on_event=on_event)
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="gateway watch", daemon=True)

    @property
    def url(self) -> str:
        """Where clients ask."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def servers(self) -> tuple[HaproxyServer, ...]:
        """Every replica there is room for."""
        return (*self.settings.stable, *self.settings.candidates)

    @property
    def policy(self) -> RolloutPolicy:
        """What rollouts may do here: a demo's first step is a quarter of the traffic, and it grows in large steps."""
        radius = BlastRadius(max_first_percent=self.engine.max_first_percent, max_increase_percent=50.0)
        deployment = DeploymentRollouts(deployment=DEPLOYMENT, haproxy=self.settings)
        return RolloutPolicy(blast_radius=radius, deployments=(deployment,))

    def __enter__(self) -> Self:
        why = self.engine.missing()
        if why is not None:
            raise LiveDemoError(why)
        write_model(self.folder / "model")
        try:
            for one in self.settings.stable:
                self.launcher.start(one.server, self.settings.launch or (), one.url, {})
            for one in self.settings.stable:
                self._wait_until_ready(one)
            command = gateway_command(self.gateway, self.settings, self.port, self.folder)
            child = Child(
                "gateway", command, self.folder / "gateway.log", is_ready=self._passes, ready_within_seconds=30
            )
            self._supervisor.start([child])
        except BaseException:
            self._end()
            raise
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._watcher.join()
        self._end()

    def kill_gateway(self) -> None:
        """kill -9, as an accident would; it is started again within seconds."""
        os.killpg(self._supervisor.pids["gateway"], 9)

    def write_fleet(self, path: Path) -> None:
        """Write the fleet.yaml of all this: every replica's engine page, and this host live."""
        targets = [
            {"name": one.server, "url": one.metrics, "deployment": DEPLOYMENT, "source": self.engine.source}
            for one in self.servers
        ]
        fleet = {
            "targets": targets,
            # The mocker takes vLLM's flags and prints vLLM's names.
            "deployments": [{"name": DEPLOYMENT, "model": MODEL_NAME, "engine": "vllm"}],
            "hosts": [{"name": "this-host", "local": True}],
            # A person waits: refresh every minute, and advise on one window of one.
            "cadence": {"refresh_minutes": 1},
            "thresholds": {"advice_window_seconds": 60, "advice_windows": 1},
            "rollouts": self.policy.model_dump(mode="json", exclude_defaults=True),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        header = f"# Written by `optiinfra demo --live` at each start: {self.engine.header}.\n"
        path.write_text(header + yaml.safe_dump(fleet, sort_keys=False), encoding="utf-8")

    # --- parts -----------------------------------------------------------------------------------------

    def _settings(self, ports: list[int]) -> HaproxySettings:
        engine = self.engine
        names = [f"chat-a{index}" for index in range(engine.stable)]
        names += [f"chat-b{index}" for index in range(engine.candidates)]
        servers = [
            HaproxyServer(server=name, url=f"http://127.0.0.1:{port}", metrics_url=engine.metrics_url(port))
            for name, port in zip(names, ports, strict=True)
        ]
        # A socket's path may hold 107 bytes: a home deep in the tree would not fit.
        socket_file = Path(tempfile.mkdtemp(prefix="optiinfra-")) / "gateway.sock"
        return HaproxySettings(
            socket=str(socket_file),
            backend=DEPLOYMENT,
            state_file=str(self.folder / "gateway.state"),
            stable=tuple(servers[: engine.stable]),
            candidates=tuple(servers[engine.stable :]),
            launch=engine.launch(self.folder),
            drain_seconds=60.0,
        )

    def _wait_until_ready(self, server: HaproxyServer) -> None:
        until = time.monotonic() + self.engine.ready_seconds
        while not completes(server.url):
            if time.monotonic() > until or not self.launcher.is_alive(server.server):
                log = self.launcher.log_path(server.server)
                raise LiveDemoError(f"replica {server.server} did not start; its log is {log}")
            time.sleep(0.2)

    def _passes(self) -> bool:
        return completes(self.url)

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            self._supervisor.poll()

    def _end(self) -> None:
        self._supervisor.stop()
        for one in self.servers:
            self.launcher.stop(one.server, 5.0)
        shutil.rmtree(Path(self.settings.socket).parent, ignore_errors=True)


def completes(url: str) -> bool:
    """Whether a server answers one real request."""
    body = {"model": MODEL_NAME, "prompt": "Say yes.", "max_tokens": 1}
    with contextlib.suppress(httpx.HTTPError):
        return httpx.post(f"{url}/v1/completions", json=body, timeout=10.0, trust_env=False).status_code == 200
    return False


def clear_home(home: Path, rollouts_dir: Path) -> None:
    """Empty the live demo's own state folder: each demo begins anew. Ends replicas that a killed demo left behind.

    LiveDemoError for a folder that holds something and was not made by a live demo.
    """
    if home.exists() and any(home.iterdir()):
        if not (home / MARKER).exists():
            raise LiveDemoError(f"{home} holds something that is no live demo; choose another folder with --home")
        launcher = LocalLauncher(_replicas(rollouts_dir))
        for known in sorted(_replicas(rollouts_dir).glob("*.json")):
            launcher.stop(known.stem, 2.0)
        shutil.rmtree(home)
    home.mkdir(parents=True, exist_ok=True)
    (home / MARKER).touch()


def _replicas(rollouts_dir: Path) -> Path:
    """Where the rollout's own launcher keeps its replicas: what it starts we end, and what we start it ends."""
    return haproxy_folder(rollouts_dir, DEPLOYMENT) / REPLICAS


def _free_ports(replicas: int) -> list[int]:
    """A port for the gateway and, for each replica, one whose successor is free too; from a random place on."""
    found: list[int] = []
    first = random.randrange(*_PORTS)
    with contextlib.ExitStack() as stack:
        for place in range(0, _PORTS[1] - _PORTS[0], 2):
            port = _PORTS[0] + (first - _PORTS[0] + place) % (_PORTS[1] - _PORTS[0])
            with contextlib.suppress(OSError):
                for one in (port, metrics_port(port)):
                    stack.enter_context(socket.create_server(("127.0.0.1", one)))
                found.append(port)
            if len(found) > replicas:
                return found
    raise LiveDemoError(f"fewer than {replicas + 1} pairs of ports are free between {_PORTS[0]} and {_PORTS[1]}")
