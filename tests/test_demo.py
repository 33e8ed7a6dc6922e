"""The main job shows what the recorded engines really went through, and says that they are recordings."""

import json
import re
import subprocess
from pathlib import Path

import duckdb
import pytest

from tests.conftest import OPTIINFRA, DemoOnce

pytestmark = pytest.mark.timeout(300)


def ask(demo: DemoOnce, query: str) -> list[tuple[object, ...]]:
    with duckdb.connect(str(demo.read_copy), read_only=True) as connection:
        return connection.execute(query).fetchall()


def test_the_screen_says_which_targets_are_recordings(demo_once: DemoOnce) -> None:
    assert "these targets are RECORDINGS" in demo_once.output
    assert "the engine behind it was simulated" in demo_once.output
    assert "this host is live" in demo_once.output


def test_every_asset_is_built_and_every_data_test_passes(demo_once: DemoOnce) -> None:
    built, passed, tests = re.search(r"built (\d+) assets\s+(\d+) of (\d+) data tests pass", demo_once.output).groups()  # type: ignore[union-attr]
    assert int(built) > 50
    assert passed == tests


def test_the_counts_are_what_the_clients_counted(demo_once: DemoOnce) -> None:
    """vLLM, phases 01 to 06: 30 + 93 + 29 + 395 requests answered, 33,068 tokens, 14 preemptions."""
    [found] = ask(
        demo_once,
        "select sum(requests_finished), sum(generation_tokens), sum(preemptions) from fct_replica_load_5m "
        "where target = 'vllm-recorded'",
    )

    assert found == (547, 1165 + 5476 + 8491 + 17936, 14)


def test_the_findings_are_what_the_recordings_went_through(demo_once: DemoOnce) -> None:
    """vLLM ran out of KV blocks, then of batch slots; llama.cpp of slots; nothing is found that did not happen."""
    found = set(ask(demo_once, "select subject_name, kind, cause from findings where source = 'recorded'"))

    assert {
        ("vllm-recorded", "MEMORY_PRESSURE", "preemptions"),
        ("vllm-recorded", "QUEUE_BUILDUP", "batch_slot_bound"),
        ("llamacpp-recorded", "QUEUE_BUILDUP", "batch_slot_bound"),
        ("dynamo-worker-recorded", "MEMORY_PRESSURE", "preemptions"),
        ("dynamo-frontend-recorded", "QUEUE_BUILDUP", "workers_full"),
        ("sglang-recorded", "MEMORY_PRESSURE", "requests_wait_for_blocks"),
    } == found


def test_each_trouble_that_a_flag_can_end_gets_the_change_to_try_first(demo_once: DemoOnce) -> None:
    """Preemptions call for KV blocks, then a queue at 17 % KV for batch slots: one is open, on screen and stored."""
    found = ask(
        demo_once,
        "select state, change_text, effect_signal, effect_low, effect_high from recommendations "
        "where subject_name = 'chat-vllm' order by made_at",
    )

    [(before, blocks, ended, *_), (now, slots, relieved, low, high)] = found
    assert (before, ended) == ("superseded", "preemptions_per_request")
    assert str(blocks).startswith("--num-gpu-blocks-override 256 -> --num-gpu-blocks-override ")
    assert (now, relieved) == ("open", "requests_waiting_mean")
    assert str(slots).startswith("--max-num-seqs 16 -> --max-num-seqs 32")
    assert isinstance(low, float)
    assert isinstance(high, float)
    assert low < high < 0
    assert "What to change first" in demo_once.output
    assert "--max-num-seqs 32" in (demo_once.home / "reports" / "fleet_report.html").read_text()


def test_what_is_shortened_for_the_recordings_is_said(demo_once: DemoOnce) -> None:
    """Recorded trouble lasts a minute: the demo judges one short window and says what is shipped."""
    assert "as shipped it takes two of 300 s in a row" in demo_once.output


def test_this_host_is_live_beside_the_recordings(demo_once: DemoOnce) -> None:
    """Its CPU share is known and is a share; no recording pretends to be live."""
    [(source, busy)] = ask(
        demo_once, "select source, cpu_busy_ratio from fct_host_utilization_5m order by period_at desc limit 1"
    )
    assert source == "live"
    assert isinstance(busy, float)
    assert 0 <= busy <= 1
    assert ask(demo_once, "select distinct source from fct_scrape_health") == [("recorded",)]


def test_sql_answers_as_table_csv_and_json(demo_once: DemoOnce) -> None:
    query = "select target, is_up from fct_scrape_health where target = 'vllm-recorded'"

    def told(*options: str) -> str:
        command = [OPTIINFRA, "--home", str(demo_once.home), "sql", *options, query]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "vllm-recorded" in told()
    assert told("--csv") == "target,is_up\nvllm-recorded,true\n"
    assert json.loads(told("--json")) == [{"target": "vllm-recorded", "is_up": True}]


def test_a_wrong_question_names_the_tables_there_are(demo_once: DemoOnce) -> None:
    command = [OPTIINFRA, "--home", str(demo_once.home), "sql", "select * from nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert "nowhere" in done.stderr
    assert "fct_scrape_health" in done.stderr


def test_the_question_before_the_first_refresh_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [OPTIINFRA, "--home", str(tmp_path), "sql", "select 1"], capture_output=True, text=True, check=False
    )

    assert done.returncode != 0
    assert "optiinfra up" in done.stderr
