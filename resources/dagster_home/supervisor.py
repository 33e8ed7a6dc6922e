"""Keep a few child processes alive, and end all of them when told to.

Here: starting, watching, restarting with backoff, and stopping processes by pid. Not here: which processes
(`resources.dagster_home.stack`). One child that dies is restarted; the others go on. The children end with us even when
we are killed outright: each asks the kernel for a SIGTERM at its parent's death.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

# A child that lived this long was well: the next death starts the backoff anew.
HEALTHY_SECONDS = 60.0
FIRST_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 30.0
# Dagster's own processes give running ticks a few seconds; past this the group is killed.
STOP_GRACE_SECONDS = 10.0

_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In the child, before exec: SIGTERM when the parent dies (Linux), and default signal handling."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass(frozen=True)
class Child:
    """One process: what to run, where its output goes, and a check that it is ready for the next to start."""

    name: str
    command: Sequence[str]
    log: Path
    is_ready: Callable[[], bool] = lambda: True
    ready_within_seconds: float = 60.0


@dataclass
class _Running:
    child: Child
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    started_at: float
    backoff_seconds: float = FIRST_BACKOFF_SECONDS
    restart_at: float | None = None


class ChildFailedError(RuntimeError):
    """A child did not come up; the message names it and ends with its last lines of output."""


@dataclass
class Supervisor:
    """Start children in order, then `watch` until stopped.

    `environ` is the children's whole environment. `on_event` gets one line per change (start, death, restart).
    """

    environ: Mapping[str, str]
    cwd: Path
    on_event: Callable[[str], None]
    _running: list[_Running] = field(default_factory=list)

    def start(self, children: Sequence[Child], *, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Start each child and wait until it is ready. Raises ChildFailedError, after stopping what ran."""
        for child in children:
            running = self._spawn(child)
            self._running.append(running)
            deadline = time.monotonic() + child.ready_within_seconds
            while not child.is_ready():
                if should_stop():
                    return
                if running.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise ChildFailedError(
                        f"{child.name} did not start; its log {child.log} ends with:\n{_tail(child.log)}"
                    )
                time.sleep(0.1)

    def restart(self, name: str) -> None:
        """End one child; the next `poll` starts it again at once."""
        for running in self._running:
            if running.child.name == name:
                _end(running.process, STOP_GRACE_SECONDS)
                running.restart_at = time.monotonic()

    def poll(self) -> None:
        """Look at every child once; restart the dead whose backoff is over."""
        now = time.monotonic()
        for i, running in enumerate(self._running):
            code = running.process.poll()
            if code is None:
                continue
            if running.restart_at is None:
                lived = now - running.started_at
                backoff = FIRST_BACKOFF_SECONDS if lived > HEALTHY_SECONDS else running.backoff_seconds
                running.restart_at = now + backoff
                running.backoff_seconds = min(backoff * 2, MAX_BACKOFF_SECONDS)
                self.on_event(f"{running.child.name} ended with {_exit_text(code)}; restart in {backoff:.0f} s")
            elif now >= running.restart_at:
                backoff = running.backoff_seconds
                _end(running.process, 0)  # what it left behind in its group
                running.output.close()
                self._running[i] = self._spawn(running.child)
                self._running[i].backoff_seconds = backoff
                self.on_event(f"{running.child.name} restarted, pid {self._running[i].process.pid}")

    def stop(self) -> None:
        """End every child, last started first, with all that its process group holds."""
        for running in reversed(self._running):
            _signal_group(running.process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_GRACE_SECONDS
        for running in reversed(self._running):
            _end(running.process, max(0.0, deadline - time.monotonic()))
            running.output.close()
        self._running.clear()

    @property
    def pids(self) -> dict[str, int]:
        return {running.child.name: running.process.pid for running in self._running}

    def _spawn(self, child: Child) -> _Running:
        child.log.parent.mkdir(parents=True, exist_ok=True)
        output = child.log.open("ab")
        process = subprocess.Popen(
            child.command,
            cwd=self.cwd,
            env=dict(self.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us alone; we end the children in order
            preexec_fn=_end_with_parent,
        )
        return _Running(child, process, output, time.monotonic())


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _end(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """SIGTERM to the group, SIGKILL to what is left of it after the grace."""
    _signal_group(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=grace_seconds)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _exit_text(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
