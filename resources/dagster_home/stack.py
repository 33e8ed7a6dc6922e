"""Run Dagster for one fleet: its instance settings, its three processes, and its own storage's bounds.

Here: dagster.yaml, the commands, the port check. Not here: definitions (`optiinfra_pipelines.definitions`) and
supervision (`resources.dagster_home.supervisor`).
"""

from __future__ import annotations

import socket
import sys
import tempfile
from pathlib import Path

import yaml

from resources.dagster_home.prune import PROCESS_LOGS, REFRESH_TAG
from resources.dagster_home.supervisor import Child

# Dagster would look for old ticks after each tick of a sensor, once per status: the hourly prune job does it for all.
_NEVER = {"purge_after_days": -1}
_RETENTION = {"sensor": _NEVER, "schedule": _NEVER, "auto_materialize": _NEVER}

# A rollout holds its run for hours, a paused one for days: refreshes must not wait behind it, and an abort that a
# person launches must not wait behind refreshes.
_RUNS = {
    "max_concurrent_runs": 24,
    "tag_concurrency_limits": [{"key": key, "value": value, "limit": 4} for key, value in REFRESH_TAG.items()],
}


# 8 s on an idle machine; on one with a load of 20 on two cores it took more than a minute.
START_SECONDS = 240.0


class PortTakenError(RuntimeError):
    """The port of the UI is in use; the message names it and the remedy."""


def instance_settings(dagster_home: Path) -> dict[str, object]:
    """dagster.yaml: sensors on threads (a steady 5 s), bounded history, run monitoring, no telemetry, no dialog."""
    folder = {"base_dir": str(dagster_home)}
    history = {"base_dir": str(dagster_home / "history")}
    return {
        "telemetry": {"enabled": False},
        "nux": {"enabled": False},
        # Every event of a run is stored whatever the level; on stderr each would be said again, 16 kB per refresh.
        "python_logs": {"python_log_level": "INFO"},
        # Without threads one slow sensor delays the others: 8 s instead of 5.
        "sensors": {"use_threads": True, "num_workers": 8},
        "retention": _RETENTION,
        "concurrency": {"runs": _RUNS, "pools": {"default_limit": 1, "granularity": "op"}},
        "run_monitoring": {"enabled": True, "start_timeout_seconds": 180, "max_runtime_seconds": 6 * 3600},
        "freshness": {"enabled": True},
        "run_storage": _storage("LeanRunStorage", history),
        "event_log_storage": _storage("LeanEventLogStorage", history),
        "schedule_storage": _storage("LeanScheduleStorage", {"base_dir": str(dagster_home / "schedules")}),
        "local_artifact_storage": {
            "module": "dagster._core.storage.root",
            "class": "LocalArtifactStorage",
            "config": folder,
        },
    }


def _storage(name: str, config: dict[str, str]) -> dict[str, object]:
    return {"module": "resources.dagster_home.storage", "class": name, "config": config}


def prepare_home(dagster_home: Path) -> None:
    """Create DAGSTER_HOME (an absolute path) with our dagster.yaml; what it already stores stays."""
    dagster_home.mkdir(parents=True, exist_ok=True)
    text = "# Written by optiinfra at each start.\n" + yaml.safe_dump(instance_settings(dagster_home), sort_keys=False)
    (dagster_home / "dagster.yaml").write_text(text)


def claim_port(host: str, port: int) -> None:
    """Raise PortTakenError when something listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortTakenError(
                f"port {port} on {host} is taken ({error.strerror}); stop what uses it, or choose another "
                f"with --port {port + 1}"
            ) from error


def children(dagster_home: Path, host: str, port: int) -> list[Child]:
    """The code server, the web server and the daemon, in start order, on one private socket.

    Fewer processes than `dagster dev` starts, and one that dies does not take the others along.
    """
    logs = dagster_home / PROCESS_LOGS
    # A socket's path may hold 107 bytes: a home deep in the tree would not fit.
    sock = Path(tempfile.mkdtemp(prefix="optiinfra-")) / "code.sock"
    workspace = dagster_home / "workspace.yaml"
    server = {"grpc_server": {"socket": str(sock), "location_name": "optiinfra"}}
    workspace.write_text(yaml.safe_dump({"load_from": [server]}))
    python = [sys.executable, "-m"]
    code = ["dagster", "api", "grpc", "-m", "optiinfra_pipelines.definitions", "--socket", str(sock)]
    code += ["--location-name", "optiinfra", "--log-level", "warning"]
    web = ["dagster_webserver", "-w", str(workspace), "-h", host, "-p", str(port), "--dagster-log-level", "warning"]
    daemon = ["dagster._daemon", "run", "-w", str(workspace), "--log-level", "warning"]
    return [
        Child("code server", python + code, logs / "code_server.log", sock.exists, START_SECONDS),
        Child("web server", python + web, logs / "web_server.log", lambda: _listens(host, port), START_SECONDS),
        Child("daemon", python + daemon, logs / "daemon.log"),
    ]


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0
