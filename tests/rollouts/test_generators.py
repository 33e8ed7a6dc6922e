"""A load generator that is installed sends the compared load; one that does not work is told, and we send it."""

import os
import stat
import sys
from pathlib import Path

import pytest

from optiinfra_pipelines.domain.verdicts import VerdictKind
from optiinfra_pipelines.rollout import staging_load
from resources.rollouts.generators import Generator, find_generator
from tests.rollouts.test_staging import engine, staging

# Stands where aiperf would: reads the rows it is given, sends them at their times, writes what aiperf 0.13.0 writes.
SENDER = """
import json, sys, time, urllib.error, urllib.request
given = dict(zip(sys.argv[1:], sys.argv[2:]))
folder = given["--output-artifact-dir"]
records, begun = [], time.monotonic()
for index, line in enumerate(open(given["--input-file"])):
    row = json.loads(line)
    time.sleep(max(0.0, begun + row["timestamp"] / 1000 - time.monotonic()))
    sent, error = time.monotonic(), None
    body = json.dumps(row["payload"]).encode()
    request = urllib.request.Request(given["--url"] + "/v1/completions", body, {"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(request).read()
    except urllib.error.HTTPError as failed:
        error = {"code": failed.code}
    taken = {"request_latency": {"value": 1000 * (time.monotonic() - sent), "unit": "ms"}}
    told = {"session_num": index, "was_cancelled": False}
    records.append(json.dumps({"metadata": told, "metrics": {} if error else taken, "error": error}))
open(folder + "/profile_export.jsonl", "w").write("\\n".join(records))
open(folder + "/profile_export_aiperf.json", "w").write(json.dumps({"aiperf_version": "0.13.0"}))
"""


def installed(folder: Path, text: str, name: str = "aiperf") -> dict[str, str]:
    """An environment whose PATH has such a program."""
    program = folder / name
    program.write_text(f"#!{sys.executable}\n{text}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"PATH": str(folder)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round in a second or two: the rate is not what these tests are about."""
    monkeypatch.setattr(staging_load, "compared_per_second", lambda _: 30.0)


def test_the_installed_generator_compares_the_arms(tmp_path: Path) -> None:
    generator = find_generator("auto", None, installed(tmp_path, SENDER))
    with (
        engine("--latency-ms", "3") as stable,
        engine("--latency-ms", "3") as like,
        engine("--latency-ms", "60") as slow,
    ):
        mix = staging_load.LoadMix(requests_per_second=35.0)
        good = staging(like, stable, generator=generator, mix=lambda: mix).test()
        bad = staging(slow, stable, generator=generator, mix=lambda: mix).test()

    assert good.kind is VerdictKind.PASS, good.reason
    assert bad.kind is VerdictKind.FAIL, bad.reason
    assert good.evidence["generator"] == bad.evidence["generator"] == "aiperf 0.13.0"
    assert "generator_fault" not in good.evidence


def test_requests_that_fail_under_it_fail_the_candidate(tmp_path: Path) -> None:
    generator = find_generator("auto", None, installed(tmp_path, SENDER))
    with engine("--latency-ms", "3") as stable, engine("--error-ratio", "0.4", "--latency-ms", "3") as broken:
        report = staging(broken, stable, generator=generator).test()

    assert report.kind is VerdictKind.FAIL
    assert "requests failed" in report.reason


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "raise SystemExit('no tokenizer')",
            "aiperf left no profile_export_aiperf.json, profile_export.jsonl: no tokenizer",
        ),
        (SENDER.replace('"aiperf_version"', '"version"'), "cannot be read: KeyError"),
        (SENDER.replace("urlopen(request).read()", "no_such_server"), "aiperf left no"),
        (
            SENDER.replace(
                "urllib.request.urlopen(request).read()", "raise urllib.error.HTTPError('', 404, '', {}, None)"
            ),
            "aiperf found no answer to 40 requests at either replica",
        ),
    ],
)
def test_one_that_does_not_work_is_told_and_replaced_by_our_own_load(tmp_path: Path, text: str, says: str) -> None:
    generator = find_generator("aiperf", None, installed(tmp_path, text))
    with engine("--latency-ms", "3") as stable, engine("--latency-ms", "3") as like:
        report = staging(like, stable, generator=generator).test()

    assert report.kind is VerdictKind.PASS, report.reason
    assert report.evidence["generator"] == "optiinfra"
    assert says in report.evidence["generator_fault"]


def test_what_is_wanted_is_found_and_nothing_else(tmp_path: Path) -> None:
    environ = installed(tmp_path, "print('vllm 0.32.0')", "vllm")
    found = find_generator("auto", "folder", environ)

    assert found == Generator("vllm", str(tmp_path / "vllm"), "folder", environ)
    assert found is not None
    assert found.version == "0.32.0"
    assert find_generator("aiperf", None, environ) is None
    assert find_generator("own", None, environ) is None


def test_secrets_are_not_handed_on(tmp_path: Path) -> None:
    text = "import os\nraise SystemExit(' '.join(sorted(os.environ)))"
    environ = installed(tmp_path, text) | {"OPTIINFRA_APPROVER_SECRET_BOB": "s", "GROQ_API_KEY": "k", "HF_TOKEN": "t"}
    generator = find_generator("auto", None, environ)
    assert generator is not None

    with pytest.raises(Exception, match="left no") as refused:
        generator.run("http://127.0.0.1:9", "m", staging_load.plan_round(staging_load.LoadMix(), seed=1, index=0), 1)

    assert "HF_TOKEN" in str(refused.value)
    assert "OPTIINFRA" not in str(refused.value)
    assert "GROQ" not in str(refused.value)
    assert os.pathsep not in environ["PATH"]
