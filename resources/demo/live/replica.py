"""One replica of the live demo: Dynamo's frontend and its mocker, a real server around a SIMULATED engine.

    python -m resources.demo.live.replica --port 9000 --model <folder> --folder <scratch> [flags of the mocker …]

The API listens on the port, the engine's metrics page on the port after it or on --metrics, all on 127.0.0.1. The two
processes live and die together, as a server and its engine do: when one ends, or this process is killed, so does the
other.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

MODEL_NAME = "mock"
# How soon a death of one is seen by the other: well within one look of a rollout.
LOOK_SECONDS = 0.1
# The frontend finishes what is in flight; a demo's request takes a few seconds.
GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
# A port where nothing listens. With a broker to connect to, the mocker's event publishers open no port of their own,
# which they would do on all addresses.
_NO_BROKER = "xsub=tcp://127.0.0.1:9 , xpub=tcp://127.0.0.1:9"


def metrics_port(port: int) -> int:
    """Where the engine's metrics page of the replica on `port` is."""
    return port + 1


def environment(folder: Path, metrics: int, environ: Mapping[str, str]) -> dict[str, str]:
    """What both processes are told: find each other through files in the folder, and stay on loopback."""
    kept = {name: value for name, value in environ.items() if not name.startswith("DYN_")}
    return kept | {
        "DYN_FILE_KV": str(folder / "discovery"),
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_ZMQ_BROKER_URL": _NO_BROKER,
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
        "DYN_SYSTEM_HOST": "127.0.0.1",
        "DYN_SYSTEM_PORT": str(metrics),
        "DYN_LOG": "warn",
        "HF_HUB_OFFLINE": "1",
        # Dynamo keeps a copy of the model's files under the user's home.
        "HOME": str(folder),
        "PYTHONSAFEPATH": "1",
    }


def commands(port: int, model: Path, flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command lines of the frontend and of the mocker."""
    python = [sys.executable, "-m"]
    frontend = ["dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port), "--router-mode", "round-robin"]
    mocker = ["dynamo.mocker", "--model-path", str(model), "--model-name", MODEL_NAME, *flags]
    return python + frontend, python + mocker


def run(port: int, metrics: int, model: Path, folder: Path, flags: Sequence[str], environ: Mapping[str, str]) -> int:
    """Serve until SIGTERM (0) or until one of the two has ended (1)."""
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopped.append(received))
    shutil.rmtree(folder / "discovery", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    told = environment(folder, metrics, environ)
    frontend_line, mocker_line = commands(port, model, flags)
    # Only the mocker has the page of metrics: the frontend's own is at its API port.
    frontend = _start(frontend_line, {**told, "DYN_SYSTEM_PORT": "-1"}, folder)
    mocker = _start(mocker_line, told, folder)
    while not stopped and frontend.poll() is None and mocker.poll() is None:
        time.sleep(LOOK_SECONDS)
    if not stopped:
        _kill(frontend, mocker)
        return 1
    frontend.terminate()
    try:
        frontend.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _kill(frontend, mocker)
    return 0


def _start(line: Sequence[str], environ: Mapping[str, str], folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(line, cwd=folder, env=dict(environ), stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent)


def _end_with_parent() -> None:
    """In the child, before exec: SIGKILL when the parent dies, however it dies (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def main() -> None:
    arguments = argparse.ArgumentParser(description="One replica: a real server around a simulated engine.")
    arguments.add_argument("--port", type=int, required=True)
    arguments.add_argument("--metrics", type=int, help="Port of the engine's metrics page.")
    arguments.add_argument("--model", type=Path, required=True)
    arguments.add_argument("--folder", type=Path, required=True)
    given, flags = arguments.parse_known_args()
    metrics = given.metrics or metrics_port(given.port)
    sys.exit(run(given.port, metrics, given.model, given.folder / str(given.port), flags, os.environ))


if __name__ == "__main__":
    main()
