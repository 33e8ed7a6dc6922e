"""The live demo's walk on real servers around SIMULATED engines: a good change completes, a bad one comes back.

uv sync --group live && pytest -m engine tests/demo
"""

import re
import subprocess
from pathlib import Path

import pytest

from resources.demo.live.fleet import missing
from tests.conftest import OPTIINFRA
from tests.rollouts.haproxy_kit import free_ports

pytestmark = [
    pytest.mark.engine,
    # Ten to fifteen minutes of real time: two references of two minutes and three steps of two.
    pytest.mark.timeout(2400),
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]


def test_the_walk_completes_a_good_change_and_takes_a_bad_one_back(tmp_path: Path) -> None:
    """Finding, recommendation, proposal, approval by another, rollout, ledger; no client loses a request."""
    [port] = free_ports(1)
    done = subprocess.run(
        [OPTIINFRA, "--home", str(tmp_path), "demo", "--live", "--script", "--port", str(port)],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout
    assert "ENGINES ARE SIMULATED" in told
    order = ["finding: ", "recommendation ", "COMPLETED", "ROLLED_BACK", "ledger: ", "the walk is over"]
    places = [told.index(part) for part in order]
    assert places == sorted(places)
    assert re.search(r"clients: \d+ requests sent, \d+ answered so far, 0 lost", told)
