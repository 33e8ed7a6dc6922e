"""A warm-up ends when hit rates have settled: never before its least time, always by its longest, by counts alone."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.rollout.warm_up import (
    SETTLED_RATIO,
    CacheTick,
    WarmUp,
    WarmUpEnd,
    WarmUpRule,
    longest_warm_up,
)

LEAST, TICK = 60.0, 5.0
TICKS = st.builds(
    lambda queries, share: CacheTick(queries, int(queries * share)), st.integers(0, 9999), st.floats(0, 1)
)
ARM = st.lists(st.none() | TICKS, min_size=130, max_size=130)


def rates(*ratios: float, queries: int = 1000) -> list[CacheTick | None]:
    return [CacheTick(queries, round(queries * ratio)) for ratio in ratios]


def end(canary: list[CacheTick | None], baseline: list[CacheTick | None], least: float = LEAST) -> WarmUpEnd | None:
    one = WarmUp(least)
    for index, (ours, theirs) in enumerate(zip(canary, baseline, strict=True), start=1):
        one.observe(index * TICK, ours, theirs)
        if one.end is not None:
            return one.end
    return None


@given(ARM, ARM)
def test_it_ends_between_its_least_and_its_longest_time_whatever_is_counted(
    canary: list[CacheTick | None], baseline: list[CacheTick | None]
) -> None:
    found = end(canary, baseline)

    assert found is not None
    assert LEAST <= found.seconds <= longest_warm_up(LEAST)
    assert found.reason
    assert (found.rule is WarmUpRule.MAXIMUM) is (found.seconds == longest_warm_up(LEAST) and "not" in found.reason)


@given(ARM, ARM, st.integers(2, 7))
def test_only_the_ratio_counts(canary: list[CacheTick | None], baseline: list[CacheTick | None], times: int) -> None:
    def more(arm: list[CacheTick | None]) -> list[CacheTick | None]:
        return [None if one is None else CacheTick(one.queries * times, one.hits * times) for one in arm]

    assert end(more(canary), more(baseline)) == end(canary, baseline)


@given(st.floats(0, 1), st.floats(0, 1))
def test_steady_arms_end_it_at_once_and_a_lower_candidate_later(ours: float, theirs: float) -> None:
    found = end(rates(*[ours] * 130), rates(*[theirs] * 130))

    assert found is not None
    assert found.rule is WarmUpRule.HIT_RATE
    is_level = round(1000 * ours) / 1000 >= round(1000 * theirs) / 1000 - SETTLED_RATIO
    assert found.seconds == (LEAST if is_level else 3 * LEAST)


@pytest.mark.parametrize("seconds", [20.0, 60.0, 120.0])
@pytest.mark.parametrize("level", [0.3, 0.6, 0.9])
def test_a_cache_that_fills_is_nearly_full_when_it_ends(seconds: float, level: float) -> None:
    """Exponentially, with these time constants: what is still missing at the end is less than a tenth."""
    filling = rates(*[level * (1 - math.exp(-tick * TICK / seconds)) for tick in range(130)])
    found = end(filling, rates(*[level] * 130))

    assert found is not None
    assert found.rule is WarmUpRule.HIT_RATE
    assert level * math.exp(-found.seconds / seconds) <= 2 * SETTLED_RATIO
    assert found.seconds <= max(LEAST, 5 * seconds)


def test_a_cache_that_never_settles_is_judged_all_the_same_with_a_note() -> None:
    swinging = rates(*[0.5 + 0.4 * math.sin(tick / 40) for tick in range(130)])
    rising = rates(*[tick / 130 for tick in range(130)])

    assert end(swinging, swinging) is not None
    found = end(rising, rates(*[0.9] * 130))

    assert found is not None
    assert (found.rule, found.seconds) == (WarmUpRule.MAXIMUM, 600.0)
    assert "judged although the hit rate has not settled: the candidate's hit rate went from" in found.reason


@pytest.mark.parametrize(
    ("canary", "says"),
    [
        ([None] * 130, "the candidate's pages do not count cache hits"),
        (rates(*[0.0] * 130, queries=0), "no cache lookup"),
    ],
)
def test_without_counts_it_is_time_alone(canary: list[CacheTick | None], says: str) -> None:
    found = end(canary, rates(*[0.5] * 130))

    assert found is not None
    assert (found.rule, found.seconds) == (WarmUpRule.TIME, LEAST)
    assert says in found.reason


def test_a_baseline_without_counts_or_traffic_holds_nothing_up() -> None:
    """All traffic at the candidate, or another engine version beside it."""
    left = [*rates(0.4, 0.4), *rates(*[0.0] * 128, queries=0)]
    for baseline in ([None] * 130, rates(*[0.0] * 130, queries=0), left):
        found = end(rates(*[0.5] * 130), baseline)

        assert found == WarmUpEnd(LEAST, WarmUpRule.HIT_RATE, "the hit rate has settled, 0.50 at the candidate")


def test_none_is_none() -> None:
    assert WarmUp(0.0).end == WarmUpEnd(0.0, WarmUpRule.TIME, "no warm-up was asked for")
