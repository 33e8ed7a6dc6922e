"""A candidate is tried over real HTTP, away from traffic, before anybody is sent to it."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from optiinfra_pipelines.domain.verdicts import VerdictKind
from optiinfra_pipelines.rollout import staging_load
from optiinfra_pipelines.rollout.quality import Prompt
from resources.rollouts.clock import Moment
from resources.rollouts.staging import HttpStaging
from resources.rollouts.targets.base import Address, ServedTarget
from tests.rollout.conftest import NOW
from tests.rollouts.haproxy_kit import free_ports

ENGINE = Path(__file__).parent / "fake_engine.py"
LOOK = Moment(NOW, 0.0, "boot")


@dataclass
class Arms:
    """The two arms of a target, and no gateway."""

    candidates: list[Address]
    stable: list[Address]

    def not_started(self) -> str | None:
        return None

    def started_arm(self) -> list[Address]:
        return self.candidates

    def stable_arm(self) -> list[Address]:
        return self.stable


@contextlib.contextmanager
def engine(*flags: str) -> Iterator[Address]:
    [port] = free_ports(1)
    process = subprocess.Popen([sys.executable, str(ENGINE), "--port", str(port), *flags])
    url = f"http://127.0.0.1:{port}"
    try:
        yield Address(f"e{port}", url, f"{url}/metrics")
    finally:
        process.terminate()
        process.wait(10)


def staging(candidate: Address, stable: Address, **given: Any) -> HttpStaging:
    arms = Arms([candidate], [stable])
    made = HttpStaging(cast(ServedTarget, arms), model="tiny", **given)
    for one in (candidate, stable):
        other = HttpStaging(cast(ServedTarget, Arms([one], [])), model="tiny")
        for _ in range(2000):
            if other.not_ready(LOOK) is None:
                break
    return made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round in a second or two: the rate is not what these tests are about."""
    monkeypatch.setattr(staging_load, "compared_per_second", lambda _: 30.0)


def test_a_candidate_like_its_peer_passes_and_the_load_is_on_record() -> None:
    with engine("--latency-ms", "5") as candidate, engine("--latency-ms", "5") as stable:
        report = staging(candidate, stable, mix=lambda: staging_load.LoadMix(requests_per_second=35.0)).test()

    assert report.kind is VerdictKind.PASS, report.reason
    assert report.evidence["requests"] == 40
    assert report.evidence["kv_cache"] == "not checked: the proposal expects no size"
    assert report.evidence["load"].startswith("open loop, 30 compared requests/s, the candidate beside 5 requests/s")


def test_one_that_is_far_slower_or_fails_its_requests_does_not() -> None:
    with (
        engine("--latency-ms", "2") as stable,
        engine("--latency-ms", "1500") as slow,
        engine("--error-ratio", "0.4", "--latency-ms", "2") as broken,
    ):
        assert "took over 3x" in (slower := staging(slow, stable).test()).reason
        assert "requests failed" in (failing := staging(broken, stable).test()).reason
    assert slower.kind is VerdictKind.FAIL
    assert failing.kind is VerdictKind.FAIL


def test_the_background_of_a_slow_candidate_waits_for_answers_as_users_do() -> None:
    """Twenty a second beside the compared ones, and never more than two at once: a stable replica never had three."""
    mix = staging_load.LoadMix(requests_per_second=50.0, most_in_flight=2)
    with engine("--latency-ms", "2") as stable, engine("--latency-ms", "1500") as slow:
        report = staging(slow, stable, mix=lambda: mix).test()
        page = httpx.get(slow.metrics).text

    assert report.kind is VerdictKind.FAIL
    [served] = [line.split()[-1] for line in page.splitlines() if line.startswith("vllm:request_success_total")]
    rounds = report.evidence["requests"] // 40
    # Every compared one, the proof of readiness, and two at a time for the few seconds of each round.
    assert 40 * rounds + 1 <= float(served) <= 40 * rounds + 1 + 12 * rounds


@pytest.mark.slow
def test_one_whose_every_second_request_is_slow_is_inconclusive_and_may_be_tried_again() -> None:
    """Half of the requests over the limit, after all rounds: neither broken nor fine. The repetition asks anew."""
    with engine("--latency-ms", "5") as stable, engine("--latency-ms", "5", "--slow-every", "2") as wavering:
        tried = staging(wavering, stable)
        report, again = tried.test(), tried.test()

    assert report.kind is again.kind is VerdictKind.INCONCLUSIVE
    assert report.evidence["requests"] == again.evidence["requests"] == 120
    assert "shows neither" in report.reason


def test_a_candidate_that_is_not_there_is_no_data() -> None:
    report = HttpStaging(cast(ServedTarget, Arms([], [])), model="tiny").test()

    assert report.kind is VerdictKind.NODATA
    assert "no candidate" in report.reason


def test_a_cache_smaller_than_planned_is_not_ready() -> None:
    with engine() as candidate, engine() as stable:
        for tokens, why in ((9_400.0, "6% under the expected 10000"), (None, "does not tell"), (9_600.0, None)):
            tried = staging(candidate, stable, kv_tokens=lambda _, t=tokens: t, expected_kv_tokens=10_000)
            found = tried.not_ready(LOOK)
            assert (found is None) if why is None else (found is not None and why in found)


@pytest.mark.slow
def test_the_baseline_answers_the_quality_prompts_twice() -> None:
    """Answers that differ between the arms only where the prompt is not met by either are wrong on both sides."""
    prompts = [Prompt(prompt=f"Say yes {number}", expect="^yes") for number in range(30)]
    with engine("--latency-ms", "1") as candidate, engine("--latency-ms", "1") as stable:
        good = staging(candidate, stable, prompts=prompts).test()
        port = candidate.url.rsplit(":", 1)[1]
        only_stable = [one.model_copy(update={"expect": f"(?<!{port})$"}) for one in prompts]
        bad = staging(candidate, stable, prompts=only_stable).test()

    assert good.kind is VerdictKind.PASS, good.reason
    assert good.evidence["identical_answers"] == 0
    assert bad.kind is VerdictKind.FAIL
    assert bad.reason.startswith("quality: 0 of 30 right, the baseline 30; 30 lost")
