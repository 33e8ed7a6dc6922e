"""Child processes are restarted when they die and gone when we are."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from resources.dagster_home.stack import PortTakenError, claim_port
from resources.dagster_home.supervisor import Child, ChildFailedError, Supervisor

# A child with a child of its own, as the code server has its runs.
FAMILY = (
    "import subprocess, sys, time;"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
)


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def supervisor(tmp_path: Path):
    events: list[str] = []
    made = Supervisor(environ=os.environ, cwd=tmp_path, on_event=events.append)
    made.events = events  # type: ignore[attr-defined]
    yield made
    made.stop()


def test_a_child_that_dies_is_restarted_and_the_event_says_how(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start([Child("worker", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")])
    first = supervisor.pids["worker"]

    os.kill(first, signal.SIGKILL)
    until(lambda: supervisor.poll() is None and supervisor.pids["worker"] != first)

    assert psutil.pid_exists(supervisor.pids["worker"])
    assert "SIGKILL" in supervisor.events[0]  # type: ignore[attr-defined]


def test_stop_ends_the_whole_family(supervisor: Supervisor, tmp_path: Path) -> None:
    """A run that the code server started must not outlive it."""
    supervisor.start([Child("code", [sys.executable, "-c", FAMILY], tmp_path / "log")])
    parent = psutil.Process(supervisor.pids["code"])
    until(lambda: len(parent.children()) == 1)
    family = [parent, *parent.children()]

    supervisor.stop()

    # A killed grandchild is init's to reap: it may still be on its way.
    until(lambda: not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE])


def test_a_child_that_cannot_start_is_an_error_with_its_last_words(supervisor: Supervisor, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such fleet')"]

    with pytest.raises(ChildFailedError, match=r"(?s)worker did not start.*no such fleet"):
        supervisor.start([Child("worker", command, tmp_path / "log", is_ready=lambda: False)])


def test_children_end_when_the_supervisor_is_killed_outright(tmp_path: Path) -> None:
    """kill -9 of the parent leaves nothing running."""
    script = (
        "import os, sys, time; from pathlib import Path; from resources.dagster_home.supervisor import *;"
        "s = Supervisor(os.environ, Path('.'), print);"
        "s.start([Child('w', [sys.executable, '-c', 'import time; time.sleep(60)'], Path('log'))]);"
        "print(s.pids['w'], flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))

    parent.kill()
    parent.wait()

    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_taken_port_is_named_with_its_remedy() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]

        with pytest.raises(PortTakenError, match=rf"port {port} .* --port {port + 1}"):
            claim_port("127.0.0.1", port)
