"""Replicas as real processes of this host: whoever started them, they are found, told to end, and gone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from resources.rollouts.local_launcher import LauncherError, LocalLauncher

URL = "http://127.0.0.1:1"
PATIENT = [sys.executable, "-c", "import time; time.sleep(600)", "{flags}"]
DEAF = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)",
    "{flags}",
]


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[LocalLauncher]:
    made = LocalLauncher(tmp_path)
    yield made
    for file in tmp_path.glob("*.json"):
        made.stop(file.stem, 1.0)


def pid_of(folder: Path, name: str) -> int:
    return int((folder / f"{name}.json").read_text().partition('"pid": ')[2].partition(",")[0])


def test_a_replica_that_another_living_process_started_is_stopped(launcher: LocalLauncher, tmp_path: Path) -> None:
    """Its parent never waits for it, so it stays in the process table as a zombie: it has ended all the same."""
    starter = (
        "import sys; from pathlib import Path; from resources.rollouts.local_launcher import LocalLauncher\n"
        f"LocalLauncher(Path({str(tmp_path)!r})).start('r0', {PATIENT!r}, {URL!r}, {{}})\n"
        "print('started', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", starter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        pid = pid_of(tmp_path, "r0")
        assert launcher.is_alive("r0")

        launcher.stop("r0", 30.0)

        assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        assert not launcher.is_alive("r0")
        parent.communicate("")


def test_a_replica_that_does_not_listen_is_killed_after_its_grace(launcher: LocalLauncher, tmp_path: Path) -> None:
    launcher.start("r0", DEAF, URL, {})
    pid = pid_of(tmp_path, "r0")
    while "deaf" not in launcher.log_path("r0").read_text():
        assert launcher.is_alive("r0")

    launcher.stop("r0", 0.2)

    assert not psutil.pid_exists(pid)


def test_a_second_start_changes_nothing_and_other_flags_are_refused(launcher: LocalLauncher, tmp_path: Path) -> None:
    launcher.start("r0", PATIENT, URL, {"max-num-seqs": "8"})
    pid = pid_of(tmp_path, "r0")

    launcher.start("r0", PATIENT, URL, {"max-num-seqs": "8"})

    assert pid_of(tmp_path, "r0") == pid
    with pytest.raises(LauncherError, match=f"runs already with other flags .pid {pid}."):
        launcher.start("r0", PATIENT, URL, {"max-num-seqs": "16"})


def test_a_command_that_is_not_there_says_so(launcher: LocalLauncher) -> None:
    with pytest.raises(LauncherError, match="r0 cannot be started: /no/such/engine: No such file"):
        launcher.start("r0", ["/no/such/engine"], URL, {})
    launcher.stop("r0", 1.0)
