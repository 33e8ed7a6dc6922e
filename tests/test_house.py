"""The plan of the house holds: style, types, import directions, and what must not be in the tree."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["lint-imports", "--no-logo"],
        ["mypy"],
    ],
    ids=lambda command: " ".join(command),
)
@pytest.mark.timeout(300)
def test_a_checker_finds_nothing(command: list[str]) -> None:
    """Style, format, import contracts and strict types are green over the whole tree."""
    found = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)

    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]


def test_our_packages_are_the_ones_that_are_imported() -> None:
    """`sensors` and `resources` are common names: another package of that name must not shadow ours."""
    import dbt_like_sql
    import resources
    import sensors

    for package in (dbt_like_sql, resources, sensors):
        assert package.__file__ is not None
        assert Path(package.__file__).parent.parent == ROOT


def test_no_file_grows_past_what_a_person_reads_at_once() -> None:
    """A Python file past 400 lines says more than one thing."""
    tracked = [*ROOT.glob("optiinfra_pipelines/**/*.py"), *ROOT.glob("resources/**/*.py"), *ROOT.glob("sensors/*.py")]

    assert not [str(path) for path in tracked if len(path.read_text().splitlines()) > 400]
