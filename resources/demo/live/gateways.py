"""The gateway before the live demo's replicas: HAProxy where it is installed, else the built-in one.

Both take the same runtime commands on a unix socket, so one rollout target drives either. Here: their configuration
and command lines. Not here: forwarding (`resources.gateway`), weights (`resources.rollouts.targets.haproxy`).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from optiinfra_pipelines.domain.rollout_policy import HaproxySettings
from resources.gateway.pool import GatewaySettings, ServerSettings

GatewayKind = Literal["haproxy", "builtin"]
# Of a stable server at the start; a candidate's is 0.
STABLE_WEIGHT = 100

_HAPROXY = """global
    stats socket {socket} mode 600 level admin
    server-state-file {state_file}
    log /dev/null local0
defaults
    mode http
    timeout connect 2s
    timeout client 65s
    timeout server 65s
    load-server-state-from-file global
frontend api
    bind 127.0.0.1:{port}
    default_backend {backend}
backend {backend}
    # By weights alone: a balance by load would send a slow candidate fewer requests and hide it.
    balance roundrobin
    option redispatch
    retries 3
    option httpchk GET /health
    default-server check inter 500ms fall 2 rise 1
{servers}
"""


def find_haproxy() -> str | None:
    """HAProxy's path, also where a user's PATH leaves out /usr/sbin; None where it is not installed."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")


def haproxy_config(settings: HaproxySettings, port: int) -> str:
    """haproxy.cfg: API on 127.0.0.1:port, stable servers with weight, candidates at weight 0."""
    lines = [
        f"    server {one.server} {urlsplit(one.url).netloc} weight {STABLE_WEIGHT if one in settings.stable else 0}"
        for one in (*settings.stable, *settings.candidates)
    ]
    return _HAPROXY.format(
        socket=settings.socket,
        state_file=settings.state_file,
        backend=settings.backend,
        port=port,
        servers="\n".join(lines),
    )


def builtin_config(settings: HaproxySettings, port: int) -> GatewaySettings:
    """The same for the built-in gateway."""
    servers = tuple(
        ServerSettings(
            name=one.server,
            port=urlsplit(one.url).port or 80,
            weight=STABLE_WEIGHT if one in settings.stable else 0,
        )
        for one in (*settings.stable, *settings.candidates)
    )
    return GatewaySettings(
        backend=settings.backend, port=port, socket=settings.socket, state_file=settings.state_file, servers=servers
    )


def gateway_command(kind: GatewayKind, settings: HaproxySettings, port: int, folder: Path) -> Sequence[str]:
    """Write the configuration of a gateway into the folder; returns its command line."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "builtin":
        path = folder / "gateway.json"
        path.write_text(builtin_config(settings, port).model_dump_json(indent=1), encoding="utf-8")
        return [sys.executable, "-m", "resources.gateway", str(path)]
    executable = find_haproxy()
    if executable is None:
        raise FileNotFoundError("haproxy is not installed; install it (apt-get install haproxy) or use the built-in")
    path = folder / "haproxy.cfg"
    path.write_text(haproxy_config(settings, port), encoding="utf-8")
    return [executable, "-W", "-db", "-f", str(path)]
