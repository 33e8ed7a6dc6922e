"""A writer that is killed with -9 loses nothing it acknowledged; a reader who stays stops nobody."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def printed(script: str, *arguments: str) -> dict[str, int]:
    """The figures a benchmark prints, by their names."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: int(number) for name, number in re.findall(r"^([a-z ]+?) (\d+)\b", done.stdout, re.MULTILINE)}


def test_kills_at_random_moments_lose_and_double_nothing(tmp_path: Path) -> None:
    """Ingest, move and publication are hit; each next start comes up on the same directory."""
    figures = printed("kill_nine.py", "--kills", "5", "--seed", "3", "--root", str(tmp_path))

    assert figures["acknowledged rows"] > 0
    assert (figures["lost"], figures["doubled"], figures["torn batches"]) == (0, 0, 0)
    assert figures["restarts that came up"] == 5


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path) -> None:
    """The same at the length that the performance table reports."""
    assert printed("kill_nine.py", "--kills", "50", "--root", str(tmp_path))["restarts that came up"] == 50


def test_a_session_held_on_the_read_copy_fails_no_write(tmp_path: Path) -> None:
    """Neither appends nor publications notice it, and it goes on answering."""
    figures = printed("held_reader.py", "--seconds", "2", "--root", str(tmp_path))

    assert figures["appends"] > 0
    assert figures["publications"] > 0
    assert figures["answers of the held session"] > 0
    assert (figures["failed writes"], figures["failed answers"]) == (0, 0)
