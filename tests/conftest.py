"""What several test files share: the demo, run once for all of them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

# A landing must not hang on the luck of a draw or on a busy machine: there the same examples are tried each time.
settings.register_profile("landing", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("landing")

# Two workers take whole files; those that take a minute begin, so that neither worker ends alone.
LONG = ("test_house.py", "test_demo.py", "test_readme.py", "test_up.py", "test_jobs.py", "test_kills.py")
OPTIINFRA = str(Path(sys.executable).parent / "optiinfra")


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """What one test sets up for its logs says nothing in another."""
    yield
    structlog.reset_defaults()


@dataclass(frozen=True)
class DemoOnce:
    """What `optiinfra demo --once` printed and kept."""

    output: str
    home: Path

    @property
    def read_copy(self) -> Path:
        return self.home / "warehouse" / "read.duckdb"


@pytest.fixture(scope="session")
def demo_once(tmp_path_factory: pytest.TempPathFactory) -> DemoOnce:
    """The main job, run as a person runs it, into a state folder of its own."""
    home = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [OPTIINFRA, "--home", str(home), "demo", "--once"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=home,  # it must not matter where one stands
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return DemoOnce(done.stdout, home / "demo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files begin."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
