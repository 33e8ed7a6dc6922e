"""The live demo's walk, around SIMULATED engines and around a real vLLM: a good change completes, a bad one comes back.

uv sync --group live && pytest -n 0 -m engine tests/demo
OPTIINFRA_VLLM=v/bin/vllm pytest -n 0 -m engine tests/demo -k vllm      # made as docs/live-demo.md says
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from resources.demo.live.engines import MOCKER
from tests.conftest import OPTIINFRA
from tests.rollouts.haproxy_kit import free_ports

pytestmark = [
    pytest.mark.engine,
    # Half an hour of real time: seven minutes of before, two references, steps of two minutes and more, a first look
    # ten minutes after; a real engine starts for minutes on top.
    pytest.mark.timeout(5400),
]
VLLM = os.environ.get("OPTIINFRA_VLLM")


@pytest.mark.skipif(MOCKER.missing() is not None, reason=MOCKER.missing() or "")
def test_the_walk_completes_a_good_change_and_takes_a_bad_one_back(tmp_path: Path) -> None:
    """Finding, recommendation, proposal, approval by another, rollout, ledger; no client loses a request."""
    told = walked(tmp_path)

    assert "ENGINES ARE SIMULATED" in told
    # 32 slots hold requests back: with more of them fewer wait, and the ledger's first look is sure of it.
    assert re.search(r"requests_waiting_mean changed by -[\d.]+ requests \(-[\d.]+ to -[\d.]+;", told)


@pytest.mark.skipif(VLLM is None, reason="OPTIINFRA_VLLM names no vllm; docs/live-demo.md says how to make one")
def test_the_walk_with_a_real_vllm_on_the_cpu(tmp_path: Path) -> None:
    """The same with real scheduling and random weights; how much it helps depends on the host's cores."""
    assert VLLM is not None
    told = walked(tmp_path, "--vllm", VLLM)

    assert "SIMULATED" not in told
    assert "a real vLLM on this host's CPU" in told


def walked(home: Path, *options: str) -> str:
    """Everything the walk said."""
    [port] = free_ports(1)
    done = subprocess.run(
        [OPTIINFRA, "--home", str(home), "demo", "--live", "--script", "--port", str(port), *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = " ".join(done.stdout.split())
    order = ["finding: ", "recommendation ", "COMPLETED", "ROLLED_BACK", "ledger: ", "the walk is over"]
    places = [told.index(part) for part in order]
    assert places == sorted(places)
    assert re.search(r"clients: \d+ requests sent, \d+ answered so far, 0 lost", told)
    return told
