"""Candidate replicas as transient systemd units: they outlive whoever started them and log to the journal.

`systemd-run` makes the unit, `systemctl` asks and stops it; nothing is written under /etc. A unit does not restart by
itself, because a candidate that died must be seen dead, and none survives a reboot: `revive` starts it again with what
it ran with, where the target says that it is a stable replica now.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from resources.rollouts.local_launcher import KILL_SECONDS, LauncherError, command_line

# systemd answers in milliseconds; one that does not within this is not going to.
ASK_SECONDS = 10.0
_ALIVE = ("active", "activating", "reloading", "deactivating")


class SystemdLauncher:
    """Units `optiinfra-<prefix>-<name>.service` of this host.

    folder: keeps what each was started with. units: servers that run under a unit of the operator's own, by name;
    those are stopped by it and never started here. is_user: the user's own systemd instead of the system's.
    """

    def __init__(self, folder: Path, prefix: str, units: Mapping[str, str], *, is_user: bool = False) -> None:
        self._folder = Path(folder)
        self._prefix = prefix
        self._units = dict(units)
        self._scope = ["--user"] if is_user else []

    def start(self, name: str, launch: Sequence[str], url: str, flags: Mapping[str, str | None]) -> None:
        """Start it, unless it runs already with the same command. LauncherError when it runs with another."""
        line = command_line(launch, url, flags)
        unit = self._own_unit(name)
        if self._state(unit) in _ALIVE:
            if self._started_with(name) == line:
                return
            raise LauncherError(f"unit {unit} runs already with other flags; stop it first: systemctl stop {unit}")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._launch(name, line)

    def revive(self, name: str) -> bool:
        """Start one that was started here and is gone, with the command it had; False when there is nothing to do."""
        line = self._started_with(name)
        if line is None or self.is_alive(name):
            return False
        self._launch(name, line)
        return True

    def _launch(self, name: str, line: Sequence[str]) -> None:
        # Before the start: one that was started and not written down would look like another's.
        self._file(name).write_text(json.dumps(line), encoding="utf-8")
        # Gone once it ended, also by a crash; else the next start finds a failed unit in its place.
        options = [
            "--quiet",
            "--collect",
            f"--unit={self._own_unit(name)}",
            "--property=Restart=no",
            "--property=KillMode=mixed",
        ]
        self._run("systemd-run", [*self._scope, *options, "--", *line], ASK_SECONDS)

    def is_alive(self, name: str) -> bool:
        """Whether the unit of this name is active or on its way there."""
        return any(self._state(unit) in _ALIVE for unit in self._all_units(name))

    def stop(self, name: str, grace_seconds: float) -> None:
        """SIGTERM, then SIGKILL after the grace, and wait for its end. Nothing to stop is no error."""
        for unit in self._all_units(name):
            if self._state(unit) not in _ALIVE:
                continue
            # The grace is ours: a transient unit's own would have to be known before it is started.
            if not self._ended(unit, grace_seconds):
                self._run("systemctl", [*self._scope, "kill", "--signal=KILL", unit], ASK_SECONDS)
                if not self._ended(unit, KILL_SECONDS):
                    raise LauncherError(f"unit {unit} does not end; see journalctl -u {unit}")
        self._file(name).unlink(missing_ok=True)

    def _ended(self, unit: str, seconds: float) -> bool:
        """Ask for its end and wait so long; systemd goes on with it also when we do not wait any more."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._run("systemctl", [*self._scope, "stop", unit], seconds)
        return self._state(unit) not in _ALIVE

    def _own_unit(self, name: str) -> str:
        return f"optiinfra-{self._prefix}-{name}.service"

    def _all_units(self, name: str) -> list[str]:
        return [self._own_unit(name), *([self._units[name]] if name in self._units else [])]

    def _state(self, unit: str) -> str:
        """What `systemctl is-active` says, such as active, inactive or failed."""
        # Its exit status is 3 for whatever is not active.
        return self._run("systemctl", [*self._scope, "is-active", unit], ASK_SECONDS, is_status=True)

    def _started_with(self, name: str) -> list[str] | None:
        try:
            line: list[str] = json.loads(self._file(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return line

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.systemd.json"

    @staticmethod
    def _run(program: str, arguments: Sequence[str], seconds: float, *, is_status: bool = False) -> str:
        try:
            done = subprocess.run(
                [program, *arguments],
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except OSError as error:
            raise LauncherError(f"{program} cannot be run: {error.strerror}; is this host run by systemd?") from error
        except subprocess.TimeoutExpired as error:
            if "stop" in arguments:
                raise
            raise LauncherError(f"{program} {' '.join(arguments)} did not answer in {seconds:.0f} s") from error
        if done.returncode and not (is_status and done.stdout.strip()):
            cause = (done.stderr or done.stdout).strip()[:400]
            raise LauncherError(f"{program} {' '.join(arguments)} failed with {done.returncode}: {cause}")
        return done.stdout.strip()
