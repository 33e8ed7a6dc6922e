"""Prometheus' published results for rate, increase, delta, histogram_quantile and histogram_fraction, as numbers.

Facts taken from promql/promqltest/testdata (functions, histograms, name_label_dropping, operators, selectors,
subquery, type_and_unit) of prometheus/prometheus at d15adb9. Left out, because the macros have no such thing: native
histograms, `@`, offset, subqueries, smoothed and anchored ranges, start timestamps, and failures by label sets.

A series is its values at a fixed spacing from time 0; None is a scrape without the series. A range query is answered
at a moment over the `range` seconds before it.
"""

from __future__ import annotations

from dataclasses import dataclass

MINUTE = 60
NAN = float("nan")
INF = float("inf")
Histogram = tuple[list[float], list[float]]  # bounds, cumulative counts


def ramp(start: float, step: float, more: int) -> list[float]:
    """A value and `more` values after it, each `step` larger."""
    return [start + step * k for k in range(more + 1)]


@dataclass(frozen=True)
class RangeCase:
    """One answer of a range function: None where Prometheus returns nothing for the series."""

    name: str
    function: str
    values: list[float]
    spacing: float
    at: float
    range: float
    expected: float | None


@dataclass(frozen=True)
class QuantileCase:
    name: str
    q: float
    bounds: list[float]
    counts: list[float]
    expected: float


@dataclass(frozen=True)
class FractionCase:
    name: str
    low: float
    high: float
    bounds: list[float]
    counts: list[float]
    expected: float


FOO, BAR = ramp(0, 10, 10), ramp(0, 18, 5) + ramp(0, 18, 5)
DINGS, BUMMS = ramp(10, 10, 10), ramp(1, 10, 10)
_M50 = 50 * MINUTE
FIBONACCI: list[float] = [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233]
SELECTORS: list[tuple[list[float], tuple[float, float]]] = [
    (ramp(0, 10, 1000) + ramp(100, 30, 1000), (1, 3)),
    (ramp(0, 20, 1000) + ramp(200, 30, 1000), (2, 3)),
    (ramp(0, 30, 1000) + ramp(300, 80, 1000), (3, 8)),
    (ramp(0, 40, 2000), (4, 4)),
]

RANGES = [
    RangeCase("increase foo", "increase", FOO, 300, _M50, _M50, 100),
    RangeCase("increase across a reset", "increase", BAR, 300, _M50, _M50, 160),
    RangeCase("increase dings", "increase", DINGS, 300, _M50, _M50, 100),
    RangeCase("increase bumms", "increase", BUMMS, 300, _M50, _M50, 100),
    RangeCase("a counter at zero is not extrapolated", "increase", FOO, 300, _M50, 2 * _M50, 100),
    RangeCase("a counter at zero is not extrapolated, reset", "increase", BAR, 300, _M50, 2 * _M50, 162),
    RangeCase("extrapolated by half an interval", "increase", DINGS, 300, _M50, 2 * _M50, 105),
    RangeCase("extrapolated to the zero point", "increase", BUMMS, 300, _M50, 2 * _M50, 101),
    RangeCase("a reset starts from zero", "increase", [0, 1, 2, 3, 2, 3, 4], 300, 30 * MINUTE, 30 * MINUTE, 7),
    RangeCase("reset in the middle", "rate", ramp(0, 27, 4) + ramp(0, 27, 5), 300, _M50, _M50, 0.08),
    RangeCase("one sample", "rate", [*ramp(0, 10, 9), 0, 10], 300, _M50, 5 * MINUTE, None),
    RangeCase("reset at the end", "rate", [*ramp(0, 10, 9), 0, 10], 300, _M50, 6 * MINUTE, 0),
    RangeCase("rate of a window", "rate", ramp(0, 80, 10), 300, _M50, _M50, 0.26666666666666666),
    *(
        RangeCase(f"zero cut-off, start {k} m", "rate", ramp(60 * k, 240, 10), 240, 10 * MINUTE, 20 * MINUTE, expected)
        for k, expected in enumerate([0.5, 0.55, 0.6, 0.6, 0.6, 0.6])
    ),
    *(
        RangeCase(f"half-interval cut-off, start {k} m", "rate", ramp(60 * k, 240, 10), 240, _M50, 20 * MINUTE, 0.6)
        for k in range(6)
    ),
    RangeCase("delta up", "delta", [0, 50, 100, 150, 200], 300, 20 * MINUTE, 20 * MINUTE, 200),
    RangeCase("delta down", "delta", [200, 150, 100, 50, 0], 300, 20 * MINUTE, 20 * MINUTE, -200),
    RangeCase("name label, from zero", "rate", ramp(0, 60, 2), 300, 10 * MINUTE, 10 * MINUTE, 0.2),
    RangeCase("name label, a minute apart", "rate", ramp(0, 3, 10), 60, 10 * MINUTE, 5 * MINUTE, 0.05),
    # subquery: Fibonacci numbers every 7 s, 3 at 21 s and 144 at 77 s; published to nine decimals, exact as a quotient.
    RangeCase("not constant", "rate", FIBONACCI, 7, 80, MINUTE, (144 - 3) / (77 - 21)),
    # operators and type_and_unit: rate over 25 min, times 25 min.
    *(
        RangeCase(f"operators, step {10 * k}", "increase", ramp(0, 10 * k, 10), 300, _M50, 25 * MINUTE, 50 * k)
        for k in range(1, 9)
    ),
    # selectors: counters every 10 s that change their pace after 1,001 scrapes.
    *(
        RangeCase(f"selectors, {pace} at {at}", "rate", values, 10, at, MINUTE, pace)
        for values, paces in SELECTORS
        for at, pace in zip((8000, 18000), paces, strict=True)
    ),
]

POSITIVE: Histogram = ([0.1, 0.2, 1, INF], [50, 70, 110, 120])
NEGATIVE: Histogram = ([-0.2, -0.1, 0.3, INF], [10, 20, 20, 30])
SECOND: Histogram = ([0, 2, 4, 6, INF], [0, 1, 2, 3, 3])
THIRD_POSITIVE: Histogram = ([0, 0.1, 0.2, 1, INF], [0, 50, 70, 110, 110])
THIRD_NEGATIVE: Histogram = ([-0.25, -0.2, -0.1, 0.3, INF], [0, 10, 20, 20, 20])
# Requests by job and instance: bounds 0.1, 0.2 and +Inf, growth per 5 min.
REQUESTS = {
    ("job1", "ins1"): [1, 3, 4],
    ("job1", "ins2"): [2, 5, 6],
    ("job2", "ins1"): [3, 4, 6],
    ("job2", "ins2"): [4, 7, 9],
}
_EDGES = [0.1, 0.2, INF]


def added_up(*keys: tuple[str, str]) -> list[float]:
    return [float(sum(column)) for column in zip(*(REQUESTS[key] for key in keys), strict=True)]


_ALL = list(REQUESTS)
NON_MONOTONE: Histogram = ([0.1, 1, 10, 100, 1000, INF], [20, 10, 50, 40, 90, 80])
MIXED: Histogram = ([0.1, 0.2, 0.2, 0.2, INF], [10, 10, 10, 10, 40])

_QUANTILE_ANSWERS: list[tuple[str, Histogram, dict[float, float]]] = [
    ("third positive", THIRD_POSITIVE, {0: 0, 0.25: 0.055, 0.5: 0.125, 0.75: 0.45, 1: 1}),
    ("third negative", THIRD_NEGATIVE, {0: -0.25, 0.25: -0.225, 0.5: -0.2, 0.75: -0.15, 1: -0.1}),
    ("positive", POSITIVE, {-0.1: -INF, 1.01: INF, NAN: NAN, 0: 0, 1: 1, 0.2: 0.048, 0.5: 0.15, 0.8: 0.72}),
    ("negative", NEGATIVE, {-0.1: -INF, 1.01: INF, NAN: NAN, 0: -0.2, 1: 0.3, 0.2: -0.2, 0.5: -0.15, 0.8: 0.3}),
    ("second", SECOND, {1 / 6: 1, 0.5: 3, 5 / 6: 5}),
    ("all requests", (_EDGES, added_up(*_ALL)), {0.3: 0.075, 0.5: 0.1277777777777778}),
    ("instance 1", (_EDGES, added_up(_ALL[0], _ALL[2])), {0.3: 0.075, 0.5: 0.13333333333333333}),
    ("instance 2", (_EDGES, added_up(_ALL[1], _ALL[3])), {0.3: 0.075, 0.5: 0.125}),
    ("job 1", (_EDGES, added_up(_ALL[0], _ALL[1])), {0.3: 0.1, 0.5: 0.14}),
    ("job 2", (_EDGES, added_up(_ALL[2], _ALL[3])), {0.3: 0.0642857142857143, 0.5: 0.1125}),
    ("job 1 instance 1", (_EDGES, added_up(_ALL[0])), {0.3: 0.11, 0.5: 0.15}),
    ("job 1 instance 2", (_EDGES, added_up(_ALL[1])), {0.3: 0.09, 0.5: 0.13333333333333333}),
    ("job 2 instance 1", (_EDGES, added_up(_ALL[2])), {0.3: 0.06, 0.5: 0.1}),
    ("job 2 instance 2", (_EDGES, added_up(_ALL[3])), {0.3: 0.0675, 0.5: 0.11666666666666667}),
    ("not monotone", NON_MONOTONE, {0.01: 0.0045, 0.5: 8.5, 0.99: 979.75}),
    ("equal bounds", MIXED, {0.5: 0.15, 0.75: 0.2, 1: 0.2}),
    ("equal bounds, two of +Inf, nothing counted", ([INF, INF], [0, 0]), {0.5: NAN, 0.75: NAN, 1: NAN}),
    ("nothing counted", (_EDGES, [0, 0, 0]), {0.2: NAN}),
    ("constant buckets have no rate", ([0, 1, 2, INF], [0, 0, 0, 0]), {1: NAN}),
]
QUANTILES = [
    QuantileCase(f"{name} {q}", q, bounds, counts, expected)
    for name, (bounds, counts), answers in _QUANTILE_ANSWERS
    for q, expected in answers.items()
]

FIRST: Histogram = ([1, 2, 3, INF], [1, 3, 6, 100])
BELOW_ZERO: Histogram = ([-3, -2, -1, INF], [10, 12, 15, 100])
_FRACTION_ANSWERS: list[tuple[str, Histogram, dict[tuple[float, float], float]]] = [
        ("second", SECOND, {(0, 4): 2 / 3, (0, 6): 1, (0, 3.5): 0.5833333333333334}),
        ("third positive", THIRD_POSITIVE, {(0, 0.2): 0.6363636363636364}),
        ("third negative", THIRD_NEGATIVE, {(0, 0.2): 0}),
        (
            "positive buckets",
            FIRST,
            {
                (0, 1.5): 0.02, (-INF, INF): 1, (4, 5): 0, (2, 5): 0.03, (400, INF): 0.94, (2, 2): 0, (3, 2): 0,
                (2, 3.5): 0.03, (0.5, 2): 0.025, (1, 3): 0.05,
            },
        ),
        ("negative buckets", BELOW_ZERO, {(-4, -2): 0.02, (-INF, -1.5): 0.135, (-INF, INF): 1, (0, 1): 0}),
        ("one bucket", ([INF], [100]), {(0, 1): 0}),
        ("nothing counted", ([1, 2, 3, INF], [0, 0, 0, 0]), {(0, 5): NAN}),
        ("fractional bounds", ([0.5, 1, INF], [2.5, 7.5, 100]), {(0.1, 0.75): 0.045}),
        ("across zero", ([-2, -1, 0, 1, INF], [5, 10, 15, 20, 100]), {(-1, 1): 0.1}),
        ("NaN", ([1, INF], [1, 100]), {(NAN, 1): NAN, (0, NAN): NAN}),
        ("outside", ([1, 2, INF], [1, 3, 10]), {(-10, -5): 0, (5, 10): 0}),
]  # fmt: skip
FRACTIONS = [
    FractionCase(f"{name} {low} to {high}", low, high, bounds, counts, expected)
    for name, (bounds, counts), answers in _FRACTION_ANSWERS
    for (low, high), expected in answers.items()
]
