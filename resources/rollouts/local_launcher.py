"""Candidate replicas as processes of this host, which outlive whoever started them and are found again by file.

One folder: per replica a JSON file with pid, start time and command, and a log. A pid alone is no identity: the
kernel gives it again, so the start time is compared too. No shell is involved. Containers and other hosts are not
here: their replicas are started by what runs them, and the target waits for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import psutil

from resources.rollouts.targets.base import TargetError

# A process that has been told twice is gone within this, or hangs in the kernel.
KILL_SECONDS = 10.0
POLL_SECONDS = 0.1


class LauncherError(TargetError):
    """A process did not start or end. The text names it and says where its log is."""


def command_line(launch: Sequence[str], url: str, flags: Mapping[str, str | None]) -> list[str]:
    """The arguments of one replica: {port} and {url} filled in, {flags} replaced by one argument per flag and value."""
    line: list[str] = []
    port = urlsplit(url).port or 80
    for part in launch:
        if part == "{flags}":
            for flag, value in flags.items():
                if value is None:
                    continue
                line += [f"--{flag.replace('_', '-')}", *([value] if value else [])]
        else:
            line.append(part.replace("{port}", str(port)).replace("{url}", url))
    return line


class Launcher(Protocol):
    """What starts and stops replicas on this host."""

    def start(self, name: str, launch: Sequence[str], url: str, flags: Mapping[str, str | None]) -> None: ...

    def is_alive(self, name: str) -> bool: ...

    def stop(self, name: str, grace_seconds: float) -> None: ...

    def revive(self, name: str) -> bool: ...


class LocalLauncher:
    """Processes under one folder, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)

    def start(self, name: str, launch: Sequence[str], url: str, flags: Mapping[str, str | None]) -> None:
        """Start it, unless it runs already with the same command. LauncherError when it runs with another."""
        line = command_line(launch, url, flags)
        known = self._read(name)
        if known is not None and self._process(known) is not None:
            if known["command"] == line:
                return
            raise LauncherError(f"{name} runs already with other flags (pid {known['pid']}); stop it first")
        self._folder.mkdir(parents=True, exist_ok=True)
        found = _running(line)
        if found is not None:
            # Somebody died between starting it and writing it down.
            self._write(name, {"pid": found.pid, "created": found.create_time(), "command": line})
            return
        self._launch(name, line)

    def revive(self, name: str) -> bool:
        """Start one that was started here and is gone, with the command it had; False when there is nothing to do."""
        known = self._read(name)
        if known is None or self._process(known) is not None:
            return False
        command = known["command"]
        assert isinstance(command, list)
        self._launch(name, command)
        return True

    def _launch(self, name: str, line: list[str]) -> None:
        with self.log_path(name).open("ab") as log:
            try:
                process = subprocess.Popen(
                    line, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                raise LauncherError(f"{name} cannot be started: {line[0]}: {error.strerror}") from error
        self._write(name, {"pid": process.pid, "created": psutil.Process(process.pid).create_time(), "command": line})

    def is_alive(self, name: str) -> bool:
        """Whether the process that was started under this name still runs."""
        known = self._read(name)
        return known is not None and self._process(known) is not None

    def stop(self, name: str, grace_seconds: float) -> None:
        """SIGTERM, then SIGKILL after the grace, to the process and its children. Nothing to stop is no error."""
        known = self._read(name)
        process = self._process(known) if known is not None else None
        if process is not None:
            family = [*process.children(recursive=True), process]
            for one in family:
                _quietly(one.terminate)
            for one in _still_alive(family, grace_seconds):
                _quietly(one.kill)
            if _still_alive(family, KILL_SECONDS):
                raise LauncherError(f"{name} (pid {process.pid}) does not end; see {self.log_path(name)}")
        self._file(name).unlink(missing_ok=True)

    def log_path(self, name: str) -> Path:
        """Where the output of a replica goes."""
        return self._folder / f"{name}.log"

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _read(self, name: str) -> dict[str, object] | None:
        try:
            known: dict[str, object] = json.loads(self._file(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return known

    def _write(self, name: str, known: Mapping[str, object]) -> None:
        temporary = self._file(name).with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(self._file(name))

    @staticmethod
    def _process(known: Mapping[str, object]) -> psutil.Process | None:
        try:
            process = psutil.Process(int(str(known["pid"])))
            is_same = abs(process.create_time() - float(str(known["created"]))) < 1.0
        except psutil.NoSuchProcess:
            return None
        return process if is_same and _is_alive(process) else None


def _is_alive(process: psutil.Process) -> bool:
    """Whether it still runs. One that has ended and that nobody waited for is gone; if it is our child, we wait."""
    try:
        if process.status() != psutil.STATUS_ZOMBIE:
            return True
    except psutil.NoSuchProcess:
        return False
    _quietly(lambda: process.wait(timeout=0))
    return False


def _still_alive(family: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that have not ended after so many seconds. psutil's own wait takes a zombie of another parent for alive."""
    until = time.monotonic() + seconds
    while (alive := [one for one in family if _is_alive(one)]) and time.monotonic() < until:
        psutil.wait_procs(alive, timeout=POLL_SECONDS)
    return alive


def _running(line: Sequence[str]) -> psutil.Process | None:
    """A process with exactly this command line."""
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] == list(line):
            return process
    return None


def _quietly(do: Callable[[], object]) -> None:
    """For processes that may be gone by now."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
        do()
