"""Candidates as transient units, through a stand-in `systemctl` and `systemd-run` on PATH; the processes are real."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts, HaproxyServer, HaproxySettings
from resources.rollouts.local_launcher import LauncherError
from resources.rollouts.systemd_launcher import SystemdLauncher
from resources.rollouts.targets.build import served_target

FAKE = Path(__file__).parent / "fake_systemd.py"
URL = "http://127.0.0.1:8001"
# Ends at SIGTERM, as an engine does; the second does not.
GENTLE = (sys.executable, "-c", "import time; time.sleep(60)", "{flags}")
STUBBORN = (sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)")


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in on PATH; what it was asked is in asked.jsonl."""
    root, programs = tmp_path / "units", tmp_path / "bin"
    root.mkdir()
    programs.mkdir()
    for name in ("systemctl", "systemd-run"):
        (programs / name).write_text(f"#!{sys.executable}\n" + FAKE.read_text().split("\n", 1)[1])
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("FAKE_SYSTEMD", str(root))
    yield root
    for file in root.glob("*.service"):
        SystemdLauncher(tmp_path, "", {"any": file.name}).stop("any", 0.3)


@pytest.fixture
def launcher(units: Path, tmp_path: Path) -> SystemdLauncher:
    return SystemdLauncher(tmp_path / "started", "chat", {})


def asked(units: Path) -> list[list[str]]:
    return [json.loads(line) for line in (units / "asked.jsonl").read_text().splitlines()]


def test_a_unit_is_started_once_and_stopped(launcher: SystemdLauncher, units: Path, tmp_path: Path) -> None:
    """Started again with the same flags, also by another process, it is the same unit; with others it is refused."""
    assert not launcher.is_alive("c0")
    launcher.start("c0", GENTLE, URL, {"max_num_seqs": "128"})
    another = SystemdLauncher(tmp_path / "started", "chat", {})
    another.start("c0", GENTLE, URL, {"max_num_seqs": "128"})
    assert another.is_alive("c0")
    with pytest.raises(LauncherError, match=r"optiinfra-chat-c0\.service runs already with other flags"):
        another.start("c0", GENTLE, URL, {"max_num_seqs": "64"})
    launcher.stop("c0", 5.0)
    assert not launcher.is_alive("c0")
    launcher.stop("c0", 5.0)

    [run] = [line for line in asked(units) if line[0] == "systemd-run"]
    assert "--collect" in run
    assert "--property=Restart=no" in run
    assert run[run.index("--") + 1 :] == [*GENTLE[:-1], "--max-num-seqs", "128"]


def test_a_unit_that_does_not_end_is_killed_after_its_grace(launcher: SystemdLauncher, units: Path) -> None:
    launcher.start("c0", STUBBORN, URL, {})
    launcher.stop("c0", 3.0)  # the stand-in is a Python program: its start alone takes a while

    assert not launcher.is_alive("c0")
    assert [line[1] for line in asked(units) if line[0] == "systemctl" and line[1] != "is-active"] == [
        "stop",
        "kill",
        "stop",
    ]


def test_a_unit_of_the_operators_own_is_stopped_by_its_name(units: Path, tmp_path: Path) -> None:
    """What served before the first rollout runs under vllm@8000.service; a completed rollout ends that."""
    SystemdLauncher(tmp_path, "operators", {}).start("s0", GENTLE, URL, {})
    (units / "optiinfra-operators-s0.service").rename(units / "vllm@8000.service")
    launcher = SystemdLauncher(tmp_path / "started", "chat", {"s0": "vllm@8000.service"})
    assert launcher.is_alive("s0")
    launcher.stop("s0", 5.0)

    assert not launcher.is_alive("s0")


def test_the_users_own_systemd_is_asked_when_told_so(units: Path, tmp_path: Path) -> None:
    launcher = SystemdLauncher(tmp_path / "started", "chat", {}, is_user=True)
    launcher.start("c0", GENTLE, URL, {})
    launcher.stop("c0", 5.0)

    assert all("--user" in line for line in asked(units))


def test_a_host_without_systemd_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(LauncherError, match=r"systemctl cannot be run: No such file.*is this host run by systemd"):
        SystemdLauncher(tmp_path, "chat", {}).is_alive("c0")


def test_a_start_that_systemd_refuses_tells_its_reason(
    launcher: SystemdLauncher, units: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SystemdLauncher, "_state", lambda *_: "inactive")
    launcher.start("c0", GENTLE, URL, {})

    with pytest.raises(LauncherError, match=r"systemd-run .* failed with 1: .* was already loaded"):
        launcher.start("c0", GENTLE, URL, {})


def test_settings_choose_the_launcher(units: Path, tmp_path: Path) -> None:
    one, other = HaproxyServer(server="s0", url=URL, unit="vllm@8000.service"), HaproxyServer(server="c0", url=URL)
    haproxy = HaproxySettings(
        socket="s",
        backend="chat",
        state_file="f",
        stable=(one,),
        candidates=(other,),
        launch=GENTLE,
        launcher="systemd",
    )
    target = served_target("haproxy", DeploymentRollouts(deployment="chat", haproxy=haproxy), tmp_path, {})

    assert target.is_alive("c0") is False
    assert asked(units) == [["systemctl", "is-active", "optiinfra-chat-c0.service"]]
