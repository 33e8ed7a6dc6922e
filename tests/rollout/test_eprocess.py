"""The bet against the canary is fair under the null, whatever the load, and exact to published check values."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.rollout.eprocess import (
    ERROR_ALTERNATIVES,
    EdgeProcess,
    TickCounts,
    combined_log_e,
    log_increments,
)


@pytest.mark.parametrize(
    ("canary_total", "canary_over", "baseline_total", "baseline_over", "null", "ratio", "log_e"),
    [
        (10, 5, 90, 15, 1.335, 1.6, 1.005225),
        (10, 0, 90, 15, 1.335, 1.6, -1.035856),
        (50, 20, 450, 80, 1.335, 3.5, 2 * 1.227613),
        (3, 3, 27, 0, 2.0, 15.0, 4.902742),
        (3, 0, 27, 0, 2.0, 15.0, 0.0),
    ],
)
def test_single_increments_equal_the_check_values(
    canary_total: int,
    canary_over: int,
    baseline_total: int,
    baseline_over: int,
    null: float,
    ratio: float,
    log_e: float,
) -> None:
    """Values measured with an independent implementation."""
    found = log_increments(
        canary_over, canary_total, baseline_over, baseline_total, math.log(null), np.log(np.array([ratio]))
    )

    assert found[0] == pytest.approx(log_e, abs=2e-6)


def test_three_ticks_at_three_edges_equal_the_check_values() -> None:
    edges = [EdgeProcess(null) for null in (1.293, 1.335, 1.380)]
    ticks = [
        (10, (6, 3, 2), 90, (33, 16, 8)),
        (12, (8, 5, 3), 88, (30, 15, 7)),
        (9, (7, 4, 2), 91, (35, 17, 9)),
    ]

    for canary_total, canary_over, baseline_total, baseline_over in ticks:
        for edge, x, y in zip(edges, canary_over, baseline_over, strict=True):
            edge.observe(TickCounts(canary_total, x, baseline_total, y))

    assert edges[0].log_e == pytest.approx((1.111344, -3.838057), abs=2e-6)
    assert edges[2].log_e == pytest.approx((0.117804, -4.747755), abs=2e-6)
    assert combined_log_e(edges) == pytest.approx(-0.073105, abs=2e-6)


@settings(deadline=None, max_examples=120)
@given(
    st.integers(0, 40),
    st.integers(0, 120),
    st.data(),
    st.floats(0.3, 6),
    st.floats(1.01, 20),
    st.sampled_from([1.0, 0.5]),
    st.sampled_from([1, -1]),
)
def test_the_bet_is_fair_at_the_null_and_loses_inside_it(
    canary_total: int, baseline_total: int, data: st.DataObject, null: float, ratio: float, stake: float, direction: int
) -> None:
    """E[e] = 1 where the odds ratio is the null's, and at most 1 on its harmless side: by exact enumeration."""
    over = data.draw(st.integers(0, canary_total + baseline_total))
    harmless = data.draw(st.floats(0.2, 1.0)) ** direction
    support = np.arange(max(0, over - baseline_total), min(over, canary_total) + 1)
    log_ratio = direction * np.log(np.array([ratio]))
    e = np.array(
        [
            np.exp(
                stake
                * log_increments(int(x), canary_total, over - int(x), baseline_total, math.log(null), log_ratio)[0]
            )
            for x in support
        ]
    )

    def mean(odds: float) -> float:
        """By exact binomials: scipy's law of this name aborts the process on some inputs."""
        weights = [math.comb(canary_total, x) * math.comb(baseline_total, over - x) * odds**x for x in support.tolist()]
        return float(np.array(weights) @ e / sum(weights))

    if stake == 1.0:
        assert mean(null) == pytest.approx(1, abs=1e-7)
    assert mean(null) <= 1 + 1e-7
    assert mean(null * harmless) <= 1 + 1e-7


@settings(deadline=None, max_examples=40)
@given(
    st.floats(0.001, 0.999),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 7)), min_size=1, max_size=3),
    st.floats(0.05, 1.0),
    st.floats(0.05, 2.0),
    st.floats(0.1, 1.0),
)
def test_the_mean_over_both_kinds_of_start_is_fair_at_any_weight(
    share: float, ticks: list[tuple[int, int, int]], gain: float, scale: float, harmless: float
) -> None:
    """Mean wealth over every outcome of a short step, with the edge judged twice: never over one, at no tick."""
    null, alternatives = 1.4, (1.3, 2.2)
    rule = np.array([[0.65, gain, 0.3], [0.65, 1.7 * gain, 0.2]])
    paths: list[tuple[float, list[TickCounts]]] = [(1.0, [])]
    for canary_total, baseline_total, wanted in ticks:
        over = min(wanted, canary_total + baseline_total)
        support = range(max(0, over - baseline_total), min(over, canary_total) + 1)
        weights = [
            math.comb(canary_total, x) * math.comb(baseline_total, over - x) * (null * harmless) ** x for x in support
        ]
        paths = [
            (chance * weight / sum(weights), [*path, TickCounts(canary_total, x, baseline_total, over - x)])
            for chance, path in paths
            for x, weight in zip(support, weights, strict=True)
        ]
        mean = 0.0
        for chance, path in paths:
            edges = [EdgeProcess(null, alternatives, max_ticks=len(ticks), rule=rule) for _ in range(2)]
            for edge in edges:
                for tick in path:
                    edge.observe(tick, scale)
            mean += chance * math.exp(combined_log_e(edges, share))
        assert mean <= 1 + 1e-9


def test_looking_at_every_tick_keeps_the_error_rate() -> None:
    """800 harmless canaries looked at 150 times each cross 1/alpha at most alpha of the time."""
    random = np.random.default_rng(7)
    alpha, crossed = 0.05, 0
    for _ in range(800):
        process = EdgeProcess(1.0, ERROR_ALTERNATIVES, stake=1.0, max_ticks=150)
        rates = random.uniform(0.0, 0.6, 150)
        canary, baseline = random.binomial(4, rates), random.binomial(36, rates)
        for x, y in zip(canary.tolist(), baseline.tolist(), strict=True):
            process.observe(TickCounts(4, x, 36, y))
            if combined_log_e([process]) >= math.log(1 / alpha):
                crossed += 1
                break

    assert crossed / 800 <= alpha


def test_a_canary_that_fails_half_its_requests_is_found_in_seconds() -> None:
    process = EdgeProcess(2.0, ERROR_ALTERNATIVES, stake=1.0)

    for _ in range(2):
        process.observe(TickCounts(10, 5, 90, 0))

    assert combined_log_e([process]) >= math.log(100)


def test_a_tick_without_requests_changes_nothing_but_the_prior_of_a_start() -> None:
    process = EdgeProcess(1.3)
    before = process.log_e[0]

    process.observe(TickCounts(0, 0, 90, 10))

    assert process.log_e[0] == before == pytest.approx(0)
    assert process.log_e[1] == pytest.approx(-math.log(360))


def test_impossible_counts_and_overlong_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="canary: 5 of 4"):
        TickCounts(4, 5, 10, 1)
    process = EdgeProcess(1.3, max_ticks=1)
    process.observe(TickCounts(1, 0, 1, 0))
    with pytest.raises(ValueError, match="planned for 1 ticks"):
        process.observe(TickCounts(1, 0, 1, 0))
    with pytest.raises(ValueError, match="stake"):
        EdgeProcess(1.3, stake=0)
    with pytest.raises(ValueError, match="no edge"):
        combined_log_e([])
