"""The whole product under kill -9: every rollout ends, and no failed candidate keeps traffic past its time."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.rollouts.haproxy_kit import HAPROXY

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "rollout_kills_stack.py"


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(1800)
@pytest.mark.skipif(HAPROXY is None, reason="HAProxy is not installed")
def test_runs_daemon_code_server_and_gateways_may_be_killed_at_any_moment() -> None:
    """A few minutes of kills on two deployments; the script fails when anything that must hold did not."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--minutes", "5", "--deployments", "2", "--seed", "7"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
