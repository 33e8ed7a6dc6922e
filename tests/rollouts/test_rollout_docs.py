"""What docs/rollout-targets.md shows is valid, and what it names is there."""

import re
from pathlib import Path

import pytest

from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts
from optiinfra_pipelines.settings import parse_fleet

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "rollout-targets.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", TEXT, re.S))
def test_an_example_of_settings_is_valid(block: str) -> None:
    fleet = parse_fleet(f"deployments:\n  - {{name: chat, model: tiny}}\n{block}", {})

    [one] = fleet.rollouts.deployments
    assert one != DeploymentRollouts(deployment=one.deployment)


def test_files_it_names_are_there() -> None:
    named = re.findall(r"\]\(([\w./-]+)\)", TEXT)
    assert named
    for name in named:
        assert (DOCS / name).is_file(), name
    for name in re.findall(r"(tests/[\w/]+\.py)", TEXT):
        assert (DOCS.parent / name).is_file(), name
