"""A candidate before it gets traffic: is it really ready, and does it carry a load as a stable replica does?

Ready means more than an open port: health, one real completion, and a KV cache of the predicted size. The load test
sends the same requests at the same times to the candidate and to a stable replica. What load, and what the answers
say, is `optiinfra_pipelines.rollout.staging_load`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx

from optiinfra_pipelines.domain.verdicts import VerdictKind
from optiinfra_pipelines.rollout.guards import KV_SHORTFALL_RATIO
from optiinfra_pipelines.rollout.load_generators import GeneratorError, payload
from optiinfra_pipelines.rollout.quality import Prompt, compare
from optiinfra_pipelines.rollout.staging_load import (
    ANSWER_SECONDS,
    LATE,
    MAX_ROUNDS,
    LoadMix,
    LoadVerdict,
    PlannedRequest,
    describe,
    judge_load,
    plan_round,
)
from resources.rollouts.clock import Moment
from resources.rollouts.generators import Generator
from resources.rollouts.ports import StagingReport
from resources.rollouts.targets.base import Replica, ServedTarget, TargetError

# A cold engine compiles its first step; a completion of a few tokens takes seconds at most.
COMPLETION_SECONDS = 20.0
# Answers of the quality gate are short facts.
QUALITY_TOKENS = 64
# Requests in flight at one replica; a candidate that hangs fails by its timeouts, not by our threads.
_MOST_IN_FLIGHT = 64
_SEED = 20_260_102

# KV cache of a replica in tokens, as it tells now; None where it does not.
KvTokens = Callable[[Replica], float | None]
# Seconds of each compared request at the candidate and at the stable replica, None where it failed, LATE where
# it was given up.
_Arms = tuple[list[float | None], list[float | None]]


@dataclass(frozen=True)
class _Answer:
    seconds: float
    text: str | None
    is_late: bool = False

    @property
    def taken(self) -> float | None:
        """Seconds it took; LATE where it was given up, None where it failed."""
        if self.is_late:
            return LATE
        return None if self.text is None else self.seconds


class HttpStaging:
    """Candidates with an OpenAI-compatible API. model: name to ask for. prompts: with known answers, for quality.

    generator: what sends the compared requests; None: we do. mix: what stable replicas serve, asked once before the
    load. kv_tokens, expected_kv_tokens: a candidate whose cache
    is over 5 % smaller than expected is not ready, nor is one that does not tell while it could.
    """

    def __init__(
        self,
        target: ServedTarget,
        *,
        model: str,
        prompts: Sequence[Prompt] = (),
        health_path: str = "/health",
        generator: Generator | None = None,
        mix: Callable[[], LoadMix] = LoadMix,
        kv_tokens: KvTokens | None = None,
        expected_kv_tokens: float | None = None,
    ) -> None:
        self._target = target
        self._model = model
        self._prompts = prompts
        self._health_path = health_path
        self._generator = generator
        self._mix = mix
        self._kv_tokens = kv_tokens
        self._expected_kv_tokens = expected_kv_tokens
        self._proven: set[str] = set()
        self._rounds = 0

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
            return StagingReport(VerdictKind.NODATA, f"the replicas cannot be found: {error}")
        if not ours_all or not theirs_all:
            missing = "candidate" if not ours_all else "stable replica"
            return StagingReport(VerdictKind.NODATA, f"no {missing} is there to be tested")
        candidate, stable = ours_all[0], theirs_all[0]
        mix = self._mix()
        verdict, evidence = self._loaded(candidate, stable, mix)
        evidence["load"] = describe(mix)
        evidence["kv_cache"] = self._checked_cache
        if verdict.kind is not VerdictKind.PASS:
            return StagingReport(verdict.kind, verdict.reason, evidence)
        if self._prompts:
            asked = [one.prompt for one in self._prompts]
            ours = [self._ask(candidate, one, QUALITY_TOKENS).text for one in asked]
            theirs, again = ([self._ask(stable, one, QUALITY_TOKENS).text for one in asked] for _ in range(2))
            quality = compare(self._prompts, list(zip(ours, theirs, strict=True)), again)
            evidence["quality"] = quality.reason
            evidence["identical_answers"] = sum(
                one is not None and one == other for one, other in zip(ours, theirs, strict=True)
            )
            if quality.kind is not VerdictKind.PASS:
                return StagingReport(quality.kind, f"quality: {quality.reason}", evidence)
        return StagingReport(VerdictKind.PASS, verdict.reason, evidence)

    def _loaded(self, candidate: Replica, stable: Replica, mix: LoadMix) -> tuple[LoadVerdict, dict[str, Any]]:
        """Rounds of load at both until they tell them apart or are used up; and the numbers."""
        ours: list[float | None] = []
        theirs: list[float | None] = []
        verdict = LoadVerdict(VerdictKind.NODATA, "nothing was asked")
        sent: dict[str, Any] = {"generator": "optiinfra"}
        for _ in range(MAX_ROUNDS):
            # A repeated test asks new prompts: those of the one before lie in both arms' prefix caches.
            planned = plan_round(mix, seed=_SEED, index=self._rounds)
            self._rounds += 1
            most = min(_MOST_IN_FLIGHT, mix.most_in_flight or _MOST_IN_FLIGHT)
            round_ours, round_theirs = self._generated(candidate, stable, planned, most, sent) or self._sent(
                candidate, stable, planned, most
            )
            ours += round_ours
            theirs += round_theirs
            verdict = judge_load(ours, theirs)
            if verdict.kind in (VerdictKind.PASS, VerdictKind.FAIL):
                break
        numbers: dict[str, Any] = {
            **sent,
            "requests": len(ours),
            "candidate_failed": sum(one is None for one in ours),
            "candidate_late": sum(one == LATE for one in ours),
            "stable_failed": sum(one is None for one in theirs),
            "stable_late": sum(one == LATE for one in theirs),
            "candidate_median_seconds": _median(ours),
            "stable_median_seconds": _median(theirs),
        }
        return verdict, numbers

    def _sent(self, candidate: Replica, stable: Replica, planned: Sequence[PlannedRequest], most: int) -> _Arms:
        """One round by ourselves: seconds of each compared request at the candidate and at the stable replica."""
        with ThreadPoolExecutor(max_workers=2) as both:
            at_candidate = both.submit(self._send, candidate, planned, most)
            at_stable = both.submit(self._send, stable, [one for one in planned if one.is_compared], most)
            return [one.taken for one in at_candidate.result()], [one.taken for one in at_stable.result()]

    def _generated(
        self, candidate: Replica, stable: Replica, planned: Sequence[PlannedRequest], most: int, sent: dict[str, Any]
    ) -> _Arms | None:
        """One round by the standard generator, the candidate's background by ourselves; None where there is none.

        One that does not work is told in `sent` and not asked again: a test by our own load is better than none.
        """
        generator = self._generator
        if generator is None:
            return None
        compared = [one for one in planned if one.is_compared]
        background = [one for one in planned if not one.is_compared]
        is_over = threading.Event()
        try:
            with ThreadPoolExecutor(max_workers=3) as pool:
                besides = pool.submit(self._load_beside, candidate, background, most, is_over)
                arms = [
                    pool.submit(generator.run, one.url, self._model, compared, _SEED) for one in (candidate, stable)
                ]
                wait(arms)
                is_over.set()
                besides.result()
            ours, theirs = (arm.result() for arm in arms)
            if not any(one is not None for one in (*ours.seconds, *theirs.seconds)):
                # vLLM's streams, and finds no answer where a server does not.
                raise GeneratorError(f"{generator.name} found no answer to {len(compared)} requests at either replica")
        except GeneratorError as error:
            sent["generator_fault"] = str(error)
            self._generator = None
            return None
        sent["generator"] = f"{generator.name} {ours.version}"
        return list(ours.seconds), list(theirs.seconds)

    def _load_beside(
        self, server: Replica, background: Sequence[PlannedRequest], most: int, is_over: threading.Event
    ) -> None:
        """The background again and again until the compared load is over: a generator takes its time to start."""
        while background and not is_over.is_set():
            self._send(server, background, most, is_over)

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
        return self._small_cache(server)

    @property
    def _checked_cache(self) -> str:
        """What was made of the KV cache's size before the load, for the record."""
        if self._expected_kv_tokens is None:
            return "not checked: the proposal expects no size"
        if self._kv_tokens is None:
            return "not checked: nothing here reads the size"
        return f"checked: at most {KV_SHORTFALL_RATIO:.0%} under the expected {self._expected_kv_tokens:.0f} tokens"

    def _small_cache(self, server: Replica) -> str | None:
        """Why a candidate's KV cache is not what the change was planned with; None where nothing was predicted."""
        expected = self._expected_kv_tokens
        if expected is None or self._kv_tokens is None:
            return None
        actual = self._kv_tokens(server)
        if actual is None:
            return f"it does not tell the size of its KV cache; {expected:.0f} tokens are expected"
        if actual < expected * (1 - KV_SHORTFALL_RATIO):
            return f"KV cache of {actual:.0f} tokens, {1 - actual / expected:.0%} under the expected {expected:.0f}"
        return None

    def _send(
        self, server: Replica, planned: Sequence[PlannedRequest], most: int, is_over: threading.Event | None = None
    ) -> list[_Answer]:
        """Send each at its time, whatever became of those before; the answers to the compared ones.

        most: of the background in flight. One more is left out, as no user of a stable replica ever met more either:
        clients wait for answers, and a saturated candidate would drown where its peer does not.
        """
        # Apart, so that a background that is stuck keeps no compared request back.
        with (
            ThreadPoolExecutor(max_workers=_MOST_IN_FLIGHT) as asking,
            ThreadPoolExecutor(max_workers=_MOST_IN_FLIGHT) as beside,
        ):
            begun, compared, background = time.monotonic(), list[Future[_Answer]](), list[Future[_Answer]]()
            for one in planned:
                if is_over is not None and is_over.is_set():
                    break
                time.sleep(max(0.0, begun + one.at_seconds - time.monotonic()))
                told = (server, one.prompt, one.max_tokens, ANSWER_SECONDS)
                if one.is_compared:
                    compared.append(asking.submit(self._ask, *told))
                    continue
                background = [future for future in background if not future.done()]
                if len(background) < most:
                    background.append(beside.submit(self._ask, *told))
            return [future.result() for future in compared]

    def _ask(
        self, server: Replica, prompt: str, max_tokens: int, within_seconds: float = COMPLETION_SECONDS
    ) -> _Answer:
        body = payload(prompt, max_tokens, self._model)
        begun, is_late = time.monotonic(), False
        try:
            reply = self._client.post(f"{server.url.rstrip('/')}/v1/completions", json=body, timeout=within_seconds)
            text = str(reply.json()["choices"][0]["text"]) if reply.status_code == 200 else None
        except httpx.ReadTimeout:
            text, is_late = None, True
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
            text = None
        return _Answer(time.monotonic() - begun, text, is_late)


def _median(taken: Sequence[float | None]) -> float | None:
    """Of the requests that were answered; None without any."""
    times = sorted(one for one in taken if one is not None and one < LATE)
    return times[len(times) // 2] if times else None
