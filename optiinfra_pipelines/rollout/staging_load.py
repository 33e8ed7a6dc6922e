"""The load a candidate is tried with away from traffic, and what both arms' answers to it say.

Pure; randomness is a seed. The load is open loop, at the rate and with the lengths that a stable replica has now, so a
slow server does not slow its own load. A stable replica carries its own traffic while it is asked; the candidate gets
so much beside the compared requests that it carries as much in all, or it would look good by being idle. More than that
would bring down a candidate that is as good as a stable replica at its limit. Sending is `resources.rollouts.staging`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binom

from optiinfra_pipelines.domain.verdicts import VerdictKind
from optiinfra_pipelines.rollout.margins import StableHistogram

# Compared requests of one round, and how many rounds there are at most.
ROUND_REQUESTS, MAX_ROUNDS = 40, 3
# They come on top of what users ask of a stable replica: a quarter of that and no more, so that they hardly notice. A
# round is over in ten to eighty seconds.
COMPARED_SHARE, LEAST_COMPARED_PER_SECOND, MOST_COMPARED_PER_SECOND = 0.25, 0.5, 4.0
# Where nobody knows what a replica carries.
USUAL_COMPARED_PER_SECOND = 1.0
# A stable replica with a queue answers late and is no failure for that.
ANSWER_SECONDS = 120.0
# Seconds of a request that was given up after ANSWER_SECONDS.
LATE = math.inf
# One candidate is not asked for more than this beside them, whatever production does.
MOST_BACKGROUND_PER_SECOND = 20.0
# Away from traffic a test must find a candidate that breaks, not measure it: the canary does that.
MAX_SLOWDOWN_RATIO = 3.0
# A stable replica that is overloaded answers few of the requests in time: the rest compares a failure with a failure.
LEAST_ANSWERED_RATIO = 0.5
# Over all rounds: chance that a candidate at the limit is failed, and that one is passed.
FAIL_ERROR, PASS_ERROR = 0.01, 0.05
# Rough for every tokenizer, and only the length matters.
_WORDS_PER_TOKEN = 0.75
_LONGEST_PROMPT_TOKENS, _LONGEST_ANSWER_TOKENS = 4096.0, 256.0
# Where no history is stored: short prompts and answers, which every engine can serve.
_USUAL_PROMPT_TOKENS, _USUAL_ANSWER_TOKENS = (16, 256), (4, 32)


@dataclass(frozen=True)
class LoadMix:
    """What a stable replica serves. Histograms of tokens per request, None where not stored.

    requests_per_second: of one replica, None where not known. shared_prefix_ratio: share of each prompt's words that
    all prompts begin with; 0 asks for every prompt anew, as a cold cache would. most_in_flight: requests that one
    replica ever had at once, running and waiting.
    """

    prompt_tokens: StableHistogram | None = None
    answer_tokens: StableHistogram | None = None
    requests_per_second: float | None = None
    shared_prefix_ratio: float = 0.0
    most_in_flight: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.shared_prefix_ratio <= 1:
            raise ValueError(f"shared_prefix_ratio {self.shared_prefix_ratio} is a share from 0 to 1")


@dataclass(frozen=True)
class PlannedRequest:
    """One request: when, what, how long an answer, and whether both arms are compared by it."""

    at_seconds: float
    prompt: str
    max_tokens: int
    is_compared: bool


@dataclass(frozen=True)
class LoadVerdict:
    """What the compared requests of all rounds say."""

    kind: VerdictKind
    reason: str


def plan_round(mix: LoadMix, *, seed: int, index: int) -> list[PlannedRequest]:
    """One round, in order of time: the compared requests, and the candidate's background beside them.

    The same seed and index give the same requests; another rate gives the same compared ones at another pace.
    """
    rng, pace = random.Random(f"{seed}-{index}-compared"), compared_per_second(mix)
    compared = _arrivals(mix, rng, pace, ROUND_REQUESTS, True)
    seconds = compared[-1].at_seconds
    rate = background_per_second(mix)
    rng = random.Random(f"{seed}-{index}-background")
    background = _arrivals(mix, rng, rate, math.floor(rate * seconds), False) if rate > 0 else []
    return sorted([*compared, *background], key=lambda one: one.at_seconds)


def compared_per_second(mix: LoadMix) -> float:
    """Compared requests a second at each replica."""
    if mix.requests_per_second is None:
        return USUAL_COMPARED_PER_SECOND
    share = COMPARED_SHARE * mix.requests_per_second
    return min(MOST_COMPARED_PER_SECOND, max(LEAST_COMPARED_PER_SECOND, share))


def background_per_second(mix: LoadMix) -> float:
    """What the candidate gets beside the compared requests, so that in all it carries what a stable replica does."""
    return min(MOST_BACKGROUND_PER_SECOND, max(0.0, (mix.requests_per_second or 0.0) - compared_per_second(mix)))


def describe(mix: LoadMix) -> str:
    """The load in words, for the record of the rollout."""
    lengths = "of the stored last hour" if mix.prompt_tokens and mix.answer_tokens else "assumed, as none are stored"
    rate = background_per_second(mix)
    carried = f"beside {rate:.2g} requests/s" if rate > 0 else "at no load of its own"
    return (
        f"open loop, {compared_per_second(mix):.2g} compared requests/s, the candidate {carried}; lengths {lengths}; "
        f"{mix.shared_prefix_ratio:.0%} of each prompt shared"
    )


def judge_load(
    ours: Sequence[float | None], theirs: Sequence[float | None], *, most_rounds: int = MAX_ROUNDS
) -> LoadVerdict:
    """Judge seconds of each compared request at (candidate, stable), None where it failed; all rounds so far.

    Request by request: is the candidate over three times slower on more than half of them? An exact sign test, its
    error shared by the rounds. A LATE one is as slow as ANSWER_SECONDS at least: where that decides nothing, it is left
    out. NODATA without a request that compares, no PASS where most do not.
    """
    failed, usual = sum(one is None for one in ours), sum(one is None for one in theirs)
    late = sum(one == LATE for one in ours)
    if failed > usual + 1:
        return LoadVerdict(VerdictKind.FAIL, f"{failed} of {len(ours)} requests failed, {usual} at a stable replica")
    answered = [(one, other) for one, other in zip(ours, theirs, strict=True) if one is not None and other is not None]
    pairs = [(min(one, ANSWER_SECONDS), other) for one, other in answered if _compares(one, other)]
    if not pairs:
        return LoadVerdict(VerdictKind.NODATA, f"no request of {len(ours)} was answered in time by both replicas")
    slower = sum(1 for one, other in pairs if one > MAX_SLOWDOWN_RATIO * other)
    ratio = sorted(one / max(other, 1e-9) for one, other in pairs)[len(pairs) // 2]
    counts = (
        f"{len(ours)} requests, {failed} failed, {f'{late} unanswered in {ANSWER_SECONDS:.0f} s, ' if late else ''}"
        f"median {ratio:.2f}x a stable replica's; {slower} of {len(pairs)} took over {MAX_SLOWDOWN_RATIO:g}x"
    )
    if float(binom.sf(slower - 1, len(pairs), 0.5)) <= FAIL_ERROR / most_rounds:
        return LoadVerdict(VerdictKind.FAIL, counts)
    if len(pairs) < LEAST_ANSWERED_RATIO * len(ours):
        return LoadVerdict(
            VerdictKind.INCONCLUSIVE,
            f"{counts}; {usual} failed and {sum(one == LATE for one in theirs)} were late at the stable replica, so "
            "most compare nothing",
        )
    if float(binom.cdf(slower, len(pairs), 0.5)) <= PASS_ERROR / most_rounds:
        return LoadVerdict(VerdictKind.PASS, counts)
    return LoadVerdict(VerdictKind.INCONCLUSIVE, f"{counts}, which shows neither")


def _compares(one: float, other: float) -> bool:
    """Whether it can be told if the first is over the limit."""
    if one < LATE:
        return True
    return other < LATE and MAX_SLOWDOWN_RATIO * other < ANSWER_SECONDS


def _arrivals(mix: LoadMix, rng: random.Random, rate: float, count: int, is_compared: bool) -> list[PlannedRequest]:
    at, found = 0.0, []
    for index in range(count):
        at += rng.expovariate(rate)
        tokens = _length(mix.prompt_tokens, rng, _USUAL_PROMPT_TOKENS, _LONGEST_PROMPT_TOKENS)
        answer = _length(mix.answer_tokens, rng, _USUAL_ANSWER_TOKENS, _LONGEST_ANSWER_TOKENS)
        words = max(1, round(tokens * _WORDS_PER_TOKEN))
        shared = round(words * mix.shared_prefix_ratio)
        own = [f"{'Q' if is_compared else 'B'}{index}", *(str(rng.randrange(1000)) for _ in range(words - shared))]
        found.append(PlannedRequest(at, " ".join(["word"] * shared + own), max(1, round(answer)), is_compared))
    return found


def _length(histogram: StableHistogram | None, rng: random.Random, usual: tuple[int, int], longest: float) -> float:
    """Tokens of one request: uniform inside the bucket it is drawn from, as nothing finer is known."""
    if histogram is None or histogram.total <= 0:
        return float(rng.randint(*usual))
    rank = rng.random() * histogram.total
    index = next(i for i, count in enumerate(histogram.cumulative) if count > rank)
    low = histogram.upper_bounds[index - 1] if index else 0.0
    high = histogram.upper_bounds[index]
    return min(longest, rng.uniform(low, high) if math.isfinite(high) else low)
