"""`optiinfra up` is there within a minute, refuses what it cannot do, and leaves nothing behind."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import OPTIINFRA

pytestmark = pytest.mark.timeout(240)
FLEET = "hosts:\n  - {name: here, local: true}\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(home: Path, port: int, *, fleet: str = FLEET) -> subprocess.Popen[str]:
    home.mkdir(parents=True, exist_ok=True)
    (home / "fleet.yaml").write_text(fleet)
    command = [OPTIINFRA, "--home", str(home), "--fleet", str(home / "fleet.yaml"), "up", "--port", str(port)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=home, env={**os.environ}
    )


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def sensor_states(port: int) -> dict[str, str]:
    query = """{ sensorsOrError(repositorySelector:
        {repositoryName: "__repository__", repositoryLocationName: "optiinfra"}) {
        ... on Sensors { results { name sensorState { status } } } } }"""
    try:
        answer = httpx.post(f"http://127.0.0.1:{port}/graphql", json={"query": query}, timeout=10, trust_env=False)
    except httpx.HTTPError:
        return {}
    found = answer.json()["data"]["sensorsOrError"].get("results", [])
    return {sensor["name"]: sensor["sensorState"]["status"] for sensor in found}


def materializations(port: int, asset: str) -> int:
    query = (
        f'{{ assetNodes(assetKeys: [{{path: ["{asset}"]}}]) {{ assetMaterializations(limit: 5) {{ timestamp }} }} }}'
    )
    answer = httpx.post(f"http://127.0.0.1:{port}/graphql", json={"query": query}, timeout=10, trust_env=False)
    return len(answer.json()["data"]["assetNodes"][0]["assetMaterializations"])


def test_numbers_come_by_themselves_and_sigterm_leaves_nothing_running(tmp_path: Path) -> None:
    """Sensors run from the first start, this host's rows are reported, a second start is refused, all of it ends."""
    home, port = tmp_path / "state", free_port()
    product = start(home, port)
    try:
        until(lambda: len(sensor_states(port)) >= 4, 120)
        assert set(sensor_states(port).values()) == {"RUNNING"}
        until(lambda: materializations(port, "raw_host_samples") > 0, 60)

        other = start(home, free_port())
        assert "another optiinfra" in (other.communicate(timeout=120)[0])
        assert other.returncode != 0
    finally:
        family = [psutil.Process(product.pid), *psutil.Process(product.pid).children(recursive=True)]
        product.send_signal(signal.SIGTERM)
        output, _ = product.communicate(timeout=60)

    assert product.returncode == 0, output
    assert "nothing is left running" in output
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_taken_port_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]

        output, _ = (product := start(tmp_path, port)).communicate(timeout=60)

    assert product.returncode != 0
    assert f"port {port}" in output
    assert "--port" in output


def test_a_faulty_fleet_is_told_with_its_line_before_anything_starts(tmp_path: Path) -> None:
    output, _ = (product := start(tmp_path, free_port(), fleet="hosts:\n  - {nam: here}\n")).communicate(timeout=60)

    assert product.returncode != 0
    assert "fleet.yaml" in output
    assert "nam" in output
    assert ":2:" in output or "line 2" in output


def test_check_tells_a_down_target_and_fails(tmp_path: Path) -> None:
    """The doctor's exit status says whether all that fleet.yaml names can be read; alerts that cannot fire and flags
    that nothing reads are told."""
    fleet = tmp_path / "fleet.yaml"
    promised = "deployments:\n  - {name: a, model: m, objectives: [{kind: error_ratio, target_ratio: 0.9}]}\n"
    promised += "  - {name: b, model: m, engine: vllm, flags: {max-num-seq: 8, block-size: 16}}\n"
    fleet.write_text("targets:\n  - {name: gone, url: 'http://127.0.0.1:1/metrics'}\n" + promised + FLEET)
    done = subprocess.run(
        [OPTIINFRA, "--fleet", str(fleet), "check"], capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode == 1
    assert "gone" in done.stdout
    assert "connect_refused" in done.stdout
    assert "can never fire" in done.stdout
    assert "flags of b: no advice for vllm reads max-num-seq;" in " ".join(done.stdout.split())
