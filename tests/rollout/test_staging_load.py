"""The staging load is the same each time, has production's rate and lengths, and its verdict has a stated error."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.domain.verdicts import VerdictKind
from optiinfra_pipelines.rollout.margins import StableHistogram
from optiinfra_pipelines.rollout.staging_load import (
    LATE,
    MAX_ROUNDS,
    ROUND_REQUESTS,
    LoadMix,
    compared_per_second,
    describe,
    judge_load,
    plan_round,
)

LONG = StableHistogram((100.0, 200.0, math.inf), [0.0, 1000.0, 1000.0])


def test_a_seed_gives_the_same_requests_and_the_rate_changes_their_pace_and_the_background() -> None:
    """So that two arms, two executors and two days are asked the same."""
    quiet, busy = LoadMix(LONG, LONG), LoadMix(LONG, LONG, requests_per_second=5.0)

    assert plan_round(busy, seed=1, index=0) == plan_round(busy, seed=1, index=0)
    assert plan_round(busy, seed=1, index=0) != plan_round(busy, seed=1, index=1)
    compared = [one for one in plan_round(busy, seed=1, index=0) if one.is_compared]
    slow = plan_round(quiet, seed=1, index=0)
    assert [(one.prompt, one.max_tokens) for one in compared] == [(one.prompt, one.max_tokens) for one in slow]
    assert [one.at_seconds for one in compared] == pytest.approx([one.at_seconds / 1.25 for one in slow])
    assert len(compared) == ROUND_REQUESTS


@pytest.mark.parametrize(
    ("carried", "sent"), [(None, 1.0), (0.1, 0.5), (1.8, 0.5), (4.0, 1.0), (10.0, 2.5), (200.0, 4.0)]
)
def test_a_stable_replica_gets_at_most_a_quarter_on_top_of_what_its_users_ask(
    carried: float | None, sent: float
) -> None:
    """And as little as lets a round end in eighty seconds, where they ask for next to nothing."""
    assert compared_per_second(LoadMix(requests_per_second=carried)) == sent
    assert f"open loop, {sent:.2g} compared requests/s" in describe(LoadMix(requests_per_second=carried))


def test_the_candidate_carries_what_one_stable_replica_does() -> None:
    planned = plan_round(LoadMix(requests_per_second=10.0), seed=2, index=0)
    background = [one for one in planned if not one.is_compared]

    assert len(planned) / planned[-1].at_seconds == pytest.approx(10.0, rel=0.35)
    assert len(background) == pytest.approx(3 * ROUND_REQUESTS, rel=0.35)
    assert [one.at_seconds for one in planned] == sorted(one.at_seconds for one in planned)
    assert all(one.is_compared for one in plan_round(LoadMix(requests_per_second=0.4), seed=2, index=0))


def test_no_rate_is_too_high_for_one_candidate() -> None:
    planned = plan_round(LoadMix(requests_per_second=1e6), seed=2, index=0)

    assert len(planned) < 20 * 60


def test_lengths_are_those_of_the_stored_histogram() -> None:
    for one in plan_round(LoadMix(LONG, LONG), seed=3, index=0):
        assert 75 <= len(one.prompt.split()) <= 151
        assert 100 <= one.max_tokens <= 200


def test_prefix_sharing_is_stated_and_done() -> None:
    mix = LoadMix(LONG, LONG, shared_prefix_ratio=0.5)
    first, second = (one.prompt.split() for one in plan_round(mix, seed=4, index=0)[:2])

    assert "50% of each prompt shared" in describe(mix)
    shared = min(len(first), len(second)) // 2
    assert first[: shared - 1] == second[: shared - 1]
    assert first[-1] != second[-1] or first != second
    with pytest.raises(ValueError, match="share from 0 to 1"):
        LoadMix(shared_prefix_ratio=2)


def test_equal_arms_pass_and_one_five_times_slower_fails() -> None:
    rng = random.Random(1)
    theirs = [rng.lognormvariate(-3, 0.5) for _ in range(40)]

    assert judge_load([rng.lognormvariate(-3, 0.5) for _ in theirs], theirs).kind is VerdictKind.PASS
    assert judge_load([5 * one for one in theirs], theirs).kind is VerdictKind.FAIL
    assert (
        judge_load([(2 + 2 * (i % 2)) * one for i, one in enumerate(theirs)], theirs).kind is VerdictKind.INCONCLUSIVE
    )


def test_failures_count_before_latency_and_silence_is_no_data() -> None:
    fast: list[float | None] = [0.01] * 10

    assert judge_load([None, None, *fast[2:]], fast).kind is VerdictKind.FAIL
    assert judge_load([None, *fast[1:]], fast).kind is VerdictKind.PASS
    assert judge_load([None] * 10, [None] * 10).kind is VerdictKind.NODATA
    assert judge_load([], []).kind is VerdictKind.NODATA


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.2]))
def test_few_pairs_never_decide(seed: int, share: float) -> None:
    """Four answers to either side are chance."""
    rng = random.Random(seed)
    ours = [5.0 if rng.random() < share else 1.0 for _ in range(4)]

    assert judge_load(ours, [1.0] * 4).kind is VerdictKind.INCONCLUSIVE


def test_a_candidate_at_the_limit_rarely_fails_over_all_rounds() -> None:
    """Three looks, each pair slower than the limit with a chance of one half: exactly, by following every count."""
    left, failed = {0: 1.0}, 0.0
    for asked in range(ROUND_REQUESTS, ROUND_REQUESTS * MAX_ROUNDS + 1, ROUND_REQUESTS):
        after: dict[int, float] = {}
        for count, chance in left.items():
            for more in range(ROUND_REQUESTS + 1):
                weight = chance * math.comb(ROUND_REQUESTS, more) / 2**ROUND_REQUESTS
                after[count + more] = after.get(count + more, 0.0) + weight
        left = {}
        for count, chance in after.items():
            if judge_load([10.0] * count + [1.0] * (asked - count), [1.0] * asked).kind is VerdictKind.FAIL:
                failed += chance
            else:
                left[count] = chance
    assert 0 < failed <= 0.01


def test_failures_at_both_replicas_are_no_pass() -> None:
    """26 of 40 failed at the candidate and 30 at an overloaded stable replica: ten pairs say little."""
    theirs = [0.1] * 10 + [None] * 30
    ours = [0.1] * 14 + [None] * 26

    verdict = judge_load(ours, theirs)

    assert verdict.kind is VerdictKind.INCONCLUSIVE
    assert "30 failed and 0 were late at the stable replica" in verdict.reason
    assert judge_load([0.1] * 40, [0.1] * 20 + [None] * 20).kind is VerdictKind.PASS


def test_an_answer_that_was_given_up_is_slow_where_that_is_sure() -> None:
    """After two minutes: three times a stable replica's 30 s, not of 50 s; a stable replica's own makes no slow one."""
    hung, quick, slow = [LATE] * 40, [30.0] * 40, [50.0] * 40

    assert judge_load(hung, quick).kind is VerdictKind.FAIL
    assert "40 unanswered in 120 s" in judge_load(hung, quick).reason
    assert judge_load(hung, slow).kind is VerdictKind.NODATA
    assert judge_load([*hung[:26], *slow[26:]], slow).kind is VerdictKind.INCONCLUSIVE
    assert judge_load([*hung[:5], *slow[5:]], slow).kind is VerdictKind.PASS
    assert judge_load(slow, [*hung[:30], *slow[30:]]).kind is VerdictKind.PASS
    assert judge_load(hung, hung).kind is VerdictKind.NODATA
