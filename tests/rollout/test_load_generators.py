"""What a generator is given is the same for both arms; what it wrote is read request by request, or refused."""

import json
from pathlib import Path

import pytest

from optiinfra_pipelines.rollout.load_generators import (
    RESULT_FILES,
    GeneratorError,
    GeneratorName,
    command,
    read_result,
    requests_text,
)
from optiinfra_pipelines.rollout.staging_load import LoadMix, plan_round

RECORDED = Path(__file__).parents[1] / "fixtures/load_generators/aiperf/0.13.0"
PLANNED = [one for one in plan_round(LoadMix(), seed=20_260_102, index=0) if one.is_compared]


def recorded(name: str) -> list[str]:
    return [(RECORDED / name / file).read_text() for file in RESULT_FILES["aiperf"]]


def vllm(errors: list[str], **changed: object) -> str:
    """As `--save-detailed` is documented, in the order of the requests; no vLLM wrote this."""
    shape = {"ttfts": [0.1] * len(errors), "itls": [[0.05, 0.05]] * len(errors), "errors": errors, "completed": 2}
    return json.dumps(shape | changed)


def test_a_recorded_run_against_the_mocker_is_read_in_the_order_of_its_requests() -> None:
    """Its records lie in the order in which they ended; the longest answer took the longest."""
    found = read_result("aiperf", recorded("mocker"), 40, "unknown")

    assert found.version == "0.13.0"
    taken = [seconds for seconds in found.seconds if seconds is not None]
    assert len(taken) == 40
    assert all(0.005 < seconds < 1 for seconds in taken)
    records = [json.loads(line) for line in recorded("mocker")[1].splitlines()]
    assert [one["metadata"]["session_num"] for one in records] != list(range(40))
    lengths = {one["metadata"]["session_num"]: one["metrics"]["output_sequence_length"]["value"] for one in records}
    assert [lengths[index] for index in range(40)] == [one.max_tokens for one in PLANNED]


def test_requests_that_a_recorded_run_saw_fail_have_no_time() -> None:
    found = read_result("aiperf", recorded("errors"), 40, "unknown")

    assert sum(seconds is None for seconds in found.seconds) == 7


def test_a_request_without_a_record_was_not_answered() -> None:
    summary, records = recorded("mocker")
    short = "\n".join(line for line in records.splitlines() if '"session_num":7,' not in line)

    assert read_result("aiperf", [summary, short], 40, "").seconds[7] is None


@pytest.mark.parametrize(
    ("name", "texts", "says"),
    [
        ("aiperf", ["{}", "{}"], "KeyError"),
        ("aiperf", ["", ""], "cannot be read"),
        ("aiperf", [*recorded("mocker")[:1], recorded("mocker")[1].replace('"ms"', '"s"')], "is in s, not in ms"),
        (
            "aiperf",
            [*recorded("mocker")[:1], recorded("mocker")[1].replace('"session_num":7,', '"session_num":41,')],
            "41|40",
        ),
        ("vllm", [vllm([""])], "1 of 40 requests"),
        ("vllm", ["{}"], "KeyError"),
    ],
)
def test_a_result_of_another_shape_is_refused(name: GeneratorName, texts: list[str], says: str) -> None:
    with pytest.raises(GeneratorError, match=says):
        read_result(name, texts, 40, "")


def test_the_documented_result_of_vllm_gives_end_to_end_seconds() -> None:
    newer = vllm(["", "Internal Server Error"], latencies=[0.3, 0.0])

    assert read_result("vllm", [vllm(["", "timeout"])], 2, "0.32.0").seconds == (pytest.approx(0.2), None)
    assert read_result("vllm", [newer], 2, "0.32.0").seconds == (0.3, None)
    assert read_result("vllm", [newer], 2, "0.32.0").version == "0.32.0"


def test_each_generator_is_given_the_same_requests_without_sampling() -> None:
    replayed = [json.loads(line) for line in requests_text("aiperf", PLANNED, "m").splitlines()]
    read = [json.loads(line) for line in requests_text("vllm", PLANNED, "m").splitlines()]

    assert [row["payload"]["prompt"] for row in replayed] == [row["prompt"] for row in read]
    assert [row["timestamp"] for row in replayed] == [round(1000 * one.at_seconds) for one in PLANNED]
    assert {row["payload"]["temperature"] for row in replayed} == {0}
    assert [row["output_tokens"] for row in read] == [one.max_tokens for one in PLANNED]


@pytest.mark.parametrize("name", ["aiperf", "vllm"])
def test_the_arms_differ_in_nothing_but_the_address(name: GeneratorName) -> None:
    """A program's path and a tokenizer's folder may hold spaces: each is one argument."""
    ours, theirs = (
        command(
            name,
            "/opt/a b/tool",
            url=url,
            model="m",
            tokenizer="/my models/t",
            folder="/tmp/x",
            count=40,
            seed=7,
            rate=0.5,
        )
        for url in ("http://a:1", "http://b:2")
    )

    assert [one for one, other in zip(ours, theirs, strict=True) if one != other] == ["http://a:1"]
    assert ours[0] == "/opt/a b/tool"
    assert ours[-1] == "/my models/t"
    assert "7" in ours
