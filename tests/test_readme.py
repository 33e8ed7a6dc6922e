"""The README says what works: its two commands are the ones that land changes, and its examples run."""

import re
import shlex
import subprocess
from pathlib import Path

import duckdb
import polars as pl
import pytest

from optiinfra_pipelines.settings import parse_fleet
from tests.conftest import OPTIINFRA, DemoOnce

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.timeout(300)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands(block: str) -> list[str]:
    return [line.split("  #")[0].strip() for line in block.splitlines() if line.strip() and not line.startswith("#")]


def test_the_two_commands_are_on_the_first_screen_and_are_what_lands_a_change() -> None:
    """`.ci/run` calls the test command letter by letter, and the main job with --once."""
    first_screen = "\n".join(README.splitlines()[:30])
    run = (ROOT / ".ci" / "run").read_text()
    [demo], [test] = (commands(block) for block in blocks("sh")[:2])

    assert demo in first_screen
    assert test in first_screen
    assert test in run.splitlines()
    assert f"{demo} --once" in run.splitlines()


def test_every_optiinfra_command_exists() -> None:
    named = {line.split()[1] for block in blocks("sh") for line in commands(block) if line.startswith("optiinfra ")}

    told = subprocess.run([OPTIINFRA, "--help"], capture_output=True, text=True, check=True).stdout
    assert named <= set(re.findall(r"^  ([\w-]+) ", told, re.M)), named


def test_every_sql_question_is_answered_with_rows(demo_once: DemoOnce) -> None:
    asked = [
        shlex.split(line)[-1] for block in blocks("sh") for line in commands(block) if line.startswith("optiinfra sql")
    ]
    assert len(asked) >= 3

    with duckdb.connect(str(demo_once.read_copy), read_only=True) as connection:
        for query in [*asked, *blocks("sql")]:
            rows = connection.execute(query).fetchall()
            assert rows, query


def test_the_polars_example_gives_a_frame(demo_once: DemoOnce) -> None:
    [example] = blocks("python")
    scope: dict[str, object] = {}

    exec(example.replace("state/warehouse/read.duckdb", str(demo_once.read_copy)), scope)

    frame = scope["frame"]
    assert isinstance(frame, pl.DataFrame)
    assert frame.height > 0


def test_the_fleet_examples_are_valid() -> None:
    fleet = parse_fleet("".join(blocks("yaml")), {"OPS_WEBHOOK": "http://127.0.0.1:9/hook"})

    assert [target.name for target in fleet.targets] == ["chat-0"]
    assert fleet.alerts.webhook is not None


def test_every_picture_and_file_it_names_is_there() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    files = re.findall(r"`((?:optiinfra_pipelines|resources|dbt_like_sql|benchmarks|tests)/[\w/.]+\.\w+)`", README)

    assert pictures
    for name in [*pictures, *files]:
        assert (ROOT / name).is_file(), name
