"""What several test files share: the demo, run once for all of them."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

# Files that look at the one run of the demo stay together on one worker, so that it runs once.
OF_THE_DEMO = {"test_demo.py", "test_readme.py"}
OPTIINFRA = str(Path(sys.executable).parent / "optiinfra")


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
    """Workers take whole files: what a file shares is made once."""
    for item in items:
        group = "demo" if item.path.name in OF_THE_DEMO else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
