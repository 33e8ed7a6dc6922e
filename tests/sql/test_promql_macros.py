"""The PromQL macros against Prometheus' published results, and against the rules in plain Python on generated input."""

from __future__ import annotations

import math
from collections.abc import Iterator

import duckdb
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.sql.macros import install_macros
from tests.sql import promql_reference as rules
from tests.sql.promql_cases import FRACTIONS, QUANTILES, RANGES, FractionCase, QuantileCase, RangeCase

EPOCH = 1_760_000_000  # an arbitrary moment, so that small times are not special


@pytest.fixture(scope="module")
def macros() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as con:
        con.execute("set threads = 1; set timezone = 'America/New_York'")
        install_macros(con)
        yield con


def same(found: float | None, expected: float | None, tolerance: float = 1e-9) -> bool:
    if found is None or expected is None:
        return found is expected
    if math.isnan(expected):
        return math.isnan(found)
    return math.isclose(found, expected, rel_tol=tolerance, abs_tol=1e-12)


def ranged(
    con: duckdb.DuckDBPyConnection, function: str, samples: rules.Samples, start: float, end: float
) -> float | None:
    row = con.execute(
        f"select promql_{function}(list_transform(?::double[], lambda x: to_timestamp(x)), ?::double[], "
        "to_timestamp(?), to_timestamp(?))",
        [[EPOCH + t for t, _ in samples], [v for _, v in samples], EPOCH + start, EPOCH + end],
    ).fetchone()
    assert row
    value: float | None = row[0]
    return value


def asked(con: duckdb.DuckDBPyConnection, call: str, *parameters: object) -> object:
    row = con.execute(f"select {call}", list(parameters)).fetchone()
    assert row
    return row[0]


@pytest.mark.parametrize("case", RANGES, ids=lambda case: f"{case.function}: {case.name}")
def test_published_results_of_rate_increase_and_delta(macros: duckdb.DuckDBPyConnection, case: RangeCase) -> None:
    """Prometheus' own answers, to 1e-9."""
    samples = [(k * case.spacing, value) for k, value in enumerate(case.values)]

    assert same(ranged(macros, case.function, samples, case.at - case.range, case.at), case.expected)


@pytest.mark.parametrize("case", QUANTILES, ids=lambda case: case.name)
def test_published_results_of_histogram_quantile(macros: duckdb.DuckDBPyConnection, case: QuantileCase) -> None:
    """Prometheus' own answers, to 1e-9; a published one is itself rounded to ten digits."""
    found = asked(macros, "histogram_quantile(?, ?::double[], ?::double[])", case.q, case.bounds, case.counts)

    assert same(found, case.expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", FRACTIONS, ids=lambda case: case.name)
def test_published_results_of_histogram_fraction(macros: duckdb.DuckDBPyConnection, case: FractionCase) -> None:
    """Prometheus' own answers, to 1e-9."""
    call = "histogram_fraction(?, ?, ?::double[], ?::double[])"
    found = asked(macros, call, case.low, case.high, case.bounds, case.counts)

    assert same(found, case.expected)  # type: ignore[arg-type]


def test_a_range_is_open_on_the_left(macros: duckdb.DuckDBPyConnection) -> None:
    """A sample exactly at the start of the window belongs to the window before."""
    assert ranged(macros, "increase", [(0, 5), (60, 6)], 0, 60) is None


def test_a_value_that_is_not_a_number_is_no_reset(macros: duckdb.DuckDBPyConnection) -> None:
    """PromQL compares with NaN as IEEE does; DuckDB sorts it above every number. Checked with Prometheus 2.42."""
    samples = [(0.0, 10.0), (15.0, math.nan), (30.0, 14.0), (45.0, 16.0)]

    assert same(ranged(macros, "increase", samples, -1, 45), 6 * 46 / 45)
    assert math.isnan(ranged(macros, "increase", samples, -1, 15) or 0)


def test_unknown_values_and_other_windows_are_left_out(macros: duckdb.DuckDBPyConnection) -> None:
    """A NULL is a scrape without the series, and samples outside the window are not the caller's to remove."""
    query = """
        with s as (select * from (values (0, 1000), (10, 0), (20, null), (30, 4), (90, 7)) as s(t, v))
        select promql_delta(list(to_timestamp(t)), list(v), to_timestamp(5), to_timestamp(35)) from s
    """
    row = macros.execute(query).fetchone()

    assert row
    assert row[0] == pytest.approx(4 * 30 / 20)


@pytest.mark.parametrize("name", ["w", "s", "g", "p", "b", "h", "i", "k", "x", "z", "q", "v", "t", "le", "n"])
def test_names_of_the_caller_do_not_leak_into_macros(macros: duckdb.DuckDBPyConnection, name: str) -> None:
    """A table or column called like an inner name of a macro changes nothing."""
    row = macros.execute(f"""
        with {name} as (select to_timestamp(k * 10) as taken_at, k::double as {name} from range(1, 7) as r(k))
        select
            promql_rate(list(taken_at), list({name}), to_timestamp(0), to_timestamp(60)),
            histogram_quantile(0.5, list({name} * 'inf'::double), list({name})),
            histogram_quantile(0.5, [1, 'inf'::double], [max({name}), max({name})]),
            (histogram_quantile_interval(0.5, [1, 'inf'::double], [max({name}), max({name})])).upper,
            histogram_share_at_or_under(1, [1, 'inf'::double], [max({name}), max({name})]),
            histogram_fraction(0, 0.5, [1, 'inf'::double], [max({name}), max({name})])
        from {name}
    """).fetchone()

    assert row
    assert row[0] == pytest.approx(0.1)
    assert math.isnan(row[1])
    assert row[2:] == (0.5, 1.0, 1.0, 0.5)


times = st.lists(st.integers(0, 600_000), min_size=0, max_size=25, unique=True).map(
    lambda millis: sorted(m / 1000 for m in millis)
)
generous = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@generous
@given(times=times, data=st.data(), start=st.integers(0, 300), width=st.integers(1, 400))
def test_rate_increase_and_delta_follow_the_rules(
    macros: duckdb.DuckDBPyConnection, times: list[float], data: st.DataObject, start: int, width: int
) -> None:
    """Any spacing, gaps, resets, values below zero: the macros and the rules in Python agree."""
    values = data.draw(st.lists(st.integers(-3, 1000), min_size=len(times), max_size=len(times)))
    samples = list(zip(times, map(float, values), strict=True))
    for function, is_counter, per in (("increase", True, 1), ("rate", True, width), ("delta", False, 1)):
        expected = rules.extrapolated(samples, start, start + width, is_counter=is_counter)
        found = ranged(macros, function, samples, start, start + width)
        assert same(found, None if expected is None else expected / per)


counts = st.one_of(st.integers(0, 20).map(float), st.floats(0, 1e6))
buckets = st.lists(st.tuples(st.sampled_from([-2.0, -0.5, 0.0, 0.1, 0.25, 1.0, 2.5, math.inf]), counts), max_size=12)


@generous
@given(buckets=buckets, q=st.one_of(st.sampled_from([0.0, 0.5, 0.99, 1.0, -0.1, 1.1, math.nan]), st.floats(0, 1)))
@example(buckets=[(1.0, 1e15), (2.0, 1e15 + 1), (math.inf, 1e15)], q=0.9)
@example(buckets=[(0.1, 0.0), (math.inf, 3.0)], q=0.0)
def test_histogram_quantile_follows_the_rules(
    macros: duckdb.DuckDBPyConnection, buckets: list[tuple[float, float]], q: float
) -> None:
    """Any order, equal bounds, falling counts, no +Inf, rounding noise: the macro and the rules in Python agree."""
    bounds, totals = [b for b, _ in buckets], [n for _, n in buckets]
    found = asked(macros, "histogram_quantile(?, ?::double[], ?::double[])", q, bounds, totals)

    assert same(found, rules.quantile(q, bounds, totals))  # type: ignore[arg-type]


@generous
@given(values=st.lists(st.floats(0.001, 9.0), min_size=1, max_size=40), q=st.sampled_from([0.01, 0.5, 0.9, 0.95, 0.99]))
@example(values=[1.0] * 11 + [2.0], q=0.9)
def test_the_interval_holds_the_true_quantile(macros: duckdb.DuckDBPyConnection, values: list[float], q: float) -> None:
    """Whatever was observed and whichever definition is used, the sample quantile lies in the reported interval."""
    bounds = [0.005, 0.05, 0.1, 0.5, 1.0, 5.0, math.inf]
    totals = [sum(value <= bound for value in values) for bound in bounds]
    found = asked(macros, "histogram_quantile_interval(?, ?::double[], ?::double[])", q, bounds, totals)

    assert isinstance(found, dict)
    for truth in rules.sample_quantiles(q, values):
        assert found["lower"] <= truth <= found["upper"]


def test_the_enclosing_bucket_of_a_quantile(macros: duckdb.DuckDBPyConnection) -> None:
    """Lower and upper are the edges of the quantile's bucket; the last bucket has no upper edge."""
    edges, totals = [0.1, 0.2, 1, math.inf], [50, 70, 110, 120]

    def of(q: float) -> tuple[object, object]:
        call = "(?, ?::double[], ?::double[])"
        return tuple(asked(macros, f"histogram_quantile_{end}{call}", q, edges, totals) for end in ("lower", "upper"))  # type: ignore[return-value]

    assert of(0.2) == (0, 0.1)
    assert of(0.8) == (0.2, 1)
    assert of(0.99) == (1, math.inf)
    assert of(1.5) == (None, None)


def test_a_share_is_known_at_bucket_edges_only(macros: duckdb.DuckDBPyConnection) -> None:
    """At an edge the share is exact; between edges nobody knows, and nothing observed has no share."""
    share = "histogram_share_at_or_under(?, [0.1, 0.2, 1, 'inf'::double], ?::double[])"

    assert asked(macros, share, 0.2, [50, 70, 110, 120]) == pytest.approx(70 / 120)
    assert asked(macros, share, 0.1 + 0.1, [50, 70, 110, 120]) == pytest.approx(70 / 120)
    assert asked(macros, share, 0.3, [50, 70, 110, 120]) is None
    assert asked(macros, share, 0.2, [0, 0, 0, 0]) is None


def test_bucket_lists_add_up_element_by_element(macros: duckdb.DuckDBPyConnection) -> None:
    """Merged buckets of replicas are the buckets of the whole; one unknown list does not spoil the others."""
    query = "select histogram_merge(list(b)) from (values ([1.0, 2, 3]), (null), ([10.0, 20, 30])) as t(b)"
    row = macros.execute(query).fetchone()

    assert row == ([11, 22, 33],)


def test_steps_of_time_do_not_depend_on_the_time_zone(macros: duckdb.DuckDBPyConnection) -> None:
    """A UTC day starts at midnight UTC for a session in New York as well."""
    found = asked(macros, "epoch(utc_step(86400, timestamptz '2026-03-08 23:30:00+00'))")

    assert found == 1772928000
