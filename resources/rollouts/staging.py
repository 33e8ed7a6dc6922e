"""A candidate before it gets traffic: is it really ready, and does it carry a load as a stable replica does?

Ready means more than an open port: health, one real completion, and a KV cache of the predicted size. The load test
sends the same requests, in the same order at the same times, to the candidate and to a stable replica: open loop, so
that a slow server does not slow its own load.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx

from optiinfra_pipelines.rollout.quality import Prompt, compare
from resources.rollouts.clock import Moment
from resources.rollouts.ports import StagingReport
from resources.rollouts.targets.base import Replica, ServedTarget, TargetError

# A cold engine compiles its first step; a completion of a few tokens takes seconds at most.
COMPLETION_SECONDS = 20.0
# Away from traffic a load test must find a candidate that breaks, not measure it: the canary does that.
LOAD_REQUESTS = 40
LOAD_REQUESTS_PER_SECOND = 4.0
MAX_SLOWDOWN_RATIO = 3.0
_SEED = 20_260_102


@dataclass(frozen=True)
class _Answer:
    seconds: float
    text: str | None


class HttpStaging:
    """Candidates with an OpenAI-compatible API. model: name to ask for. prompts: with known answers, for quality."""

    def __init__(
        self,
        target: ServedTarget,
        *,
        model: str,
        prompts: Sequence[Prompt] = (),
        health_path: str = "/health",
    ) -> None:
        self._target = target
        self._model = model
        self._prompts = prompts
        self._health_path = health_path
        self._proven: set[str] = set()

    @cached_property
    def _client(self) -> httpx.Client:
        return httpx.Client(timeout=COMPLETION_SECONDS, trust_env=False)

    def not_ready(self, now: Moment) -> str | None:
        """Why a started candidate cannot take traffic yet."""
        try:
            missing, started = self._target.not_started(), self._target.started_arm()
        except TargetError as error:
            return str(error)
        if missing is not None or not started:
            return missing or "no candidate runs yet"
        for server in started:
            why = self._why_not(server)
            if why is not None:
                return f"{server.server}: {why}"
        return None

    def test(self) -> StagingReport:
        """The same load to both arms, then the prompts of known answers, where there are any."""
        try:
            ours_all, theirs_all = self._target.started_arm(), self._target.stable_arm()
        except TargetError as error:
            return StagingReport(False, f"the replicas cannot be found: {error}")
        if not ours_all or not theirs_all:
            missing = "candidate" if not ours_all else "stable replica"
            return StagingReport(False, f"no {missing} is there to be tested")
        candidate, stable = ours_all[0], theirs_all[0]
        ours, theirs = self._load(candidate), self._load(stable)
        failed, usual = sum(one.text is None for one in ours), sum(one.text is None for one in theirs)
        ratio = _median(ours) / max(_median(theirs), 1e-9)
        evidence: dict[str, Any] = {
            "requests": len(ours),
            "candidate_failed": failed,
            "stable_failed": usual,
            "candidate_median_seconds": _median(ours),
            "stable_median_seconds": _median(theirs),
        }
        if failed > usual + 1:
            reason = f"{failed} of {len(ours)} requests failed, {usual} at a stable replica"
            return StagingReport(False, reason, evidence)
        if ratio > MAX_SLOWDOWN_RATIO:
            return StagingReport(False, f"the median request takes {ratio:.1f}x a stable replica's", evidence)
        if self._prompts:
            asked = [one.prompt for one in self._prompts]
            answers = [(self._ask(candidate, one, 64).text, self._ask(stable, one, 64).text) for one in asked]
            quality = compare(self._prompts, answers)
            evidence["quality"] = quality.reason
            if not quality.is_good:
                return StagingReport(False, f"quality: {quality.reason}", evidence)
        reason = f"{len(ours)} requests, {failed} failed, median {ratio:.2f}x a stable replica's"
        return StagingReport(True, reason, evidence)

    def _why_not(self, server: Replica) -> str | None:
        try:
            status = self._client.get(server.url.rstrip("/") + self._health_path).status_code
        except httpx.HTTPError as error:
            return f"health: {type(error).__name__}"
        if status != 200:
            return f"health: status {status}"
        if server.server not in self._proven:
            if self._ask(server, "Say yes.", 4).text is None:
                return "no completion yet"
            self._proven.add(server.server)
        return None

    def _load(self, server: Replica) -> list[_Answer]:
        rng = random.Random(_SEED)
        with ThreadPoolExecutor(max_workers=16) as pool:
            begun, at, futures = time.monotonic(), 0.0, []
            for index in range(LOAD_REQUESTS):
                at += rng.expovariate(LOAD_REQUESTS_PER_SECOND)
                prompt = f"Request {index}. " + "word " * rng.randint(10, 200)
                time.sleep(max(0.0, begun + at - time.monotonic()))
                futures.append(pool.submit(self._ask, server, prompt, rng.randint(4, 32)))
            return [future.result() for future in futures]

    def _ask(self, server: Replica, prompt: str, max_tokens: int) -> _Answer:
        body = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "seed": 0}
        begun = time.monotonic()
        try:
            reply = self._client.post(f"{server.url.rstrip('/')}/v1/completions", json=body)
            text = str(reply.json()["choices"][0]["text"]) if reply.status_code == 200 else None
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
            text = None
        return _Answer(time.monotonic() - begun, text)


def _median(answers: Sequence[_Answer]) -> float:
    times = sorted(one.seconds for one in answers)
    return times[len(times) // 2]
