"""Whatever rows come in, a diagnosis ends without an error, and what is unknown never becomes a verdict."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.findings.diagnosis import LOAD_KINDS, diagnose
from optiinfra_pipelines.analysis.findings.update import update_findings
from optiinfra_pipelines.analysis.findings.window import EngineWindow
from optiinfra_pipelines.domain.findings import Diagnosis, Finding, FindingKind, Severity, Subject, finding_id
from optiinfra_pipelines.domain.thresholds import threshold_values
from optiinfra_pipelines.sql.sources import raw_tables

VALUES = threshold_values({})
START = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
GAUGES = ("requests_running", "requests_waiting", "requests_waiting_capacity", "kv_cache_usage_ratio")
COUNTERS = ("requests_finished_total", "preemptions_total", "generation_tokens_total", "prompt_tokens_total")

wild = st.none() | st.sampled_from([0.0, -1.0, 0.5, 1.0, 1.5, 1e18, math.nan, math.inf]) | st.floats(0, 100)
rank_row = st.fixed_dictionaries(dict.fromkeys((*GAUGES, *COUNTERS, "max_running_requests"), wild))
scrape = st.fixed_dictionaries(
    {
        "gap": st.floats(0.0, 90.0),
        "is_up": st.booleans(),
        "started": st.none() | st.integers(-5_000, 600),
        "ranks": st.lists(rank_row, max_size=2),
        "vantage": st.sampled_from(["engine", "engine", "frontend", "cache", None]),
        "queue": st.none() | st.tuples(wild, wild),
    }
)


def made(scrapes: list[dict[str, Any]], end_gap: float = 0.0) -> EngineWindow:
    """A window of arbitrary scrapes."""
    at, rows, samples, histograms = START, [], [], []
    for one in scrapes:
        at += timedelta(seconds=one["gap"])
        started = None if one["started"] is None else START + timedelta(seconds=one["started"])
        rows.append({"scraped_at": at, "target": "t", "is_up": one["is_up"], "vantage": one["vantage"]})
        if not one["is_up"]:
            continue
        for rank, values in enumerate(one["ranks"]):
            head = {"scraped_at": at, "target": "t", "engine_rank": str(rank), "process_started_at": started}
            samples.append(head | {"engine": "vllm"} | values)
        if one["queue"] is not None:
            total, count = one["queue"]
            head = {"scraped_at": at, "target": "t", "engine_rank": "0", "metric": "queue_seconds"}
            histograms.append(head | {"sum_value": total, "count_value": count, "bounds_id": 1})
    return EngineWindow(
        target="t",
        start=START,
        end=at + timedelta(seconds=end_gap),
        source="live",
        scrapes=raw_tables()["raw_scrapes"].frame(rows),
        samples=raw_tables()["raw_engine_samples"].frame(samples),
        histograms=raw_tables()["raw_engine_histograms"].frame(histograms),
        bounds={1: (1.0, math.inf)},
    )


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(st.lists(scrape, max_size=8), st.floats(0, 60))
def test_any_input_ends_in_findings_and_reasons(scrapes: list[dict[str, Any]], end_gap: float) -> None:
    """NULLs, NaN, resets, gaps, dead scrapes: no error, and each kind is judged or has a reason, never both."""
    diagnosis = diagnose(made(scrapes, end_gap), VALUES)

    abstained = {one.kind for one in diagnosis.abstentions}
    assert not abstained & diagnosis.judged
    assert abstained | diagnosis.judged >= {*LOAD_KINDS, FindingKind.RESTARTED, FindingKind.STALE_OR_MISSING_DATA}
    assert all(one.reason for one in diagnosis.abstentions)
    for finding in diagnosis.findings:
        assert finding.evidence
        assert finding.since <= finding.last_seen_at
        assert any(signal.value is not None for signal in finding.evidence)


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(st.lists(scrape, min_size=1, max_size=6), st.sampled_from(["requests_waiting", "kv_cache_usage_ratio"]))
def test_a_column_that_is_never_told_decides_nothing(scrapes: list[dict[str, Any]], hidden: str) -> None:
    """Without KV usage there is no verdict on memory, without waiting requests none on queues."""
    for one in scrapes:
        one["ranks"] = [row | {hidden: None} for row in one["ranks"]]
        one["vantage"] = "engine"
    kind = FindingKind.QUEUE_BUILDUP if hidden == "requests_waiting" else FindingKind.MEMORY_PRESSURE

    diagnosis = diagnose(made(scrapes), VALUES)

    assert kind not in diagnosis.judged
    assert kind not in {one.kind for one in diagnosis.findings}


def steady(**gauges: float) -> dict[str, Any]:
    row: dict[str, float | None] = dict.fromkeys((*GAUGES, *COUNTERS, "max_running_requests"))
    row |= {"requests_running": 1.0, "requests_waiting": 0.0, "kv_cache_usage_ratio": 0.1}
    row |= gauges
    return {"gap": 5.0, "is_up": True, "started": -1000, "ranks": [row], "vantage": "engine", "queue": None}


def test_a_full_cache_that_nobody_waits_for_is_no_finding() -> None:
    """KV usage of 99 % without waiting or preemption is a well-used cache."""
    pages = [steady(kv_cache_usage_ratio=0.99, preemptions_total=3.0) for _ in range(12)]

    assert diagnose(made(pages), VALUES).findings == ()


def test_a_deep_queue_that_drains_in_a_blink_is_no_finding() -> None:
    """Ten requests waiting of 100 a second are a tenth of a second of work."""
    pages = [steady(requests_waiting=10.0, requests_finished_total=500.0 * n) for n in range(12)]

    assert diagnose(made(pages), VALUES).findings == ()


def test_one_waiting_request_of_a_slow_model_is_a_finding() -> None:
    """One waiting request where one finishes in 20 s is 20 s of work, though the gauge says 1."""
    pages = [steady(requests_waiting=1.0, requests_finished_total=float(n // 4)) for n in range(13)]

    [finding] = diagnose(made(pages), VALUES).findings

    assert finding.kind == FindingKind.QUEUE_BUILDUP
    assert finding.evidence[-1].value == pytest.approx(20.0)


def test_a_counter_that_falls_without_a_new_process_is_no_restart() -> None:
    """The start time is the word on restarts: two replicas behind one address make counters jump, not restart."""
    pages = [steady(generation_tokens_total=value) for value in (100.0, 200.0, 5.0, 300.0)]

    assert diagnose(made(pages), VALUES).findings == ()


def test_without_start_times_a_counter_that_falls_is_a_restart() -> None:
    """SGLang and llama.cpp tell no start time: decrease is the only sign."""
    pages = [steady(generation_tokens_total=value) | {"started": None} for value in (100.0, 200.0, 5.0, 9.0)]

    [finding] = diagnose(made(pages), VALUES).findings

    assert (finding.kind, finding.cause) == (FindingKind.RESTARTED, "counters_fell")


def test_two_restarts_in_one_window_are_a_crash_loop() -> None:
    """One restart is a deployment, two within five minutes are a crash loop."""
    pages = [steady() | {"started": started} for started in (-1000, -1000, 8, 8, 18, 18)]

    [finding] = diagnose(made(pages), VALUES).findings

    assert (finding.cause, finding.severity) == ("crash_loop", Severity.CRITICAL)


def test_a_target_that_cannot_be_read_says_why() -> None:
    """Dead scrapes up to now are a target that is down, with the collector's own word for it."""
    pages = [steady() for _ in range(3)] + [steady() | {"is_up": False} for _ in range(8)]
    window = made(pages)
    failed = window.scrapes.with_columns(
        pl.when(~pl.col("is_up")).then(pl.lit("connection_refused")).alias("error_kind")
    )

    [finding] = diagnose(EngineWindow(**{**vars_of(window), "scrapes": failed}), VALUES).findings

    assert finding.cause == "target_down"
    assert "connection_refused" in finding.summary


def vars_of(window: EngineWindow) -> dict[str, Any]:
    return {name: getattr(window, name) for name in EngineWindow.__dataclass_fields__}


TARGET = Subject(kind="target", name="t")


def claim(since: float, last: float, *, is_open: bool = True, kind: FindingKind = FindingKind.QUEUE_BUILDUP) -> Finding:
    began, seen = START + timedelta(seconds=since), START + timedelta(seconds=last)
    return Finding(
        id=finding_id(TARGET, kind, began),
        subject=TARGET,
        kind=kind,
        cause="c",
        severity=Severity.WARNING,
        since=began,
        until=None if is_open else seen,
        last_seen_at=seen,
        source="live",
        summary="s",
        evidence=(),
    )


def look(at: float, *found: Finding, judged: bool = True) -> Diagnosis:
    kinds = frozenset({FindingKind.QUEUE_BUILDUP}) if judged else frozenset()
    return Diagnosis(subject=TARGET, at=START + timedelta(seconds=at), judged=kinds, findings=found)


def test_a_flapping_signal_makes_one_finding() -> None:
    """Bad in every second minute of half an hour: one id, one beginning."""
    standing: tuple[Finding, ...] = ()
    ids = set()
    for minute in range(30):
        now = 60.0 * minute
        found = [claim(now - 10, now)] if minute % 2 == 0 else []
        standing = update_findings(standing, [look(now, *found)], START + timedelta(seconds=now), VALUES)
        ids |= {one.id for one in standing}

    assert len(ids) == 1
    assert [one.since for one in standing] == [START - timedelta(seconds=10)]


def test_a_finding_ends_when_it_was_last_seen_once_it_was_not_seen_for_a_while() -> None:
    """Two minutes of a clean bill close it, dated back to the last sight; one minute does not."""
    standing = update_findings([], [look(0, claim(-10, 0))], START, VALUES)
    soon = update_findings(standing, [look(60)], START + timedelta(seconds=60), VALUES)
    late = update_findings(soon, [look(130)], START + timedelta(seconds=130), VALUES)

    assert [one.until for one in soon] == [None]
    assert [one.until for one in late] == [START]


def test_nothing_ends_for_lack_of_data() -> None:
    """Where the kind could not be judged, an open finding stays open for as long as that lasts."""
    standing = update_findings([], [look(0, claim(-10, 0))], START, VALUES)
    for minute in range(1, 60):
        at = 60.0 * minute
        standing = update_findings(standing, [look(at, judged=False)], START + timedelta(seconds=at), VALUES)

    assert [one.until for one in standing] == [None]


def test_a_finding_ends_with_its_subject() -> None:
    """A target that left fleet.yaml is nobody's trouble any more."""
    standing = update_findings([], [look(0, claim(-10, 0))], START, VALUES)

    gone = update_findings(standing, [], START + timedelta(seconds=5), VALUES)

    assert [one.is_open for one in gone] == [False]


def test_the_same_trouble_after_hours_is_a_new_finding() -> None:
    """What comes back after the reopening time has another id."""
    first = update_findings([], [look(0, claim(-10, 0))], START, VALUES)
    calm = update_findings(first, [look(200)], START + timedelta(seconds=200), VALUES)
    again = update_findings(calm, [look(9000, claim(8990, 9000))], START + timedelta(seconds=9000), VALUES)

    assert {one.id for one in again}.isdisjoint({one.id for one in first})


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_updating_twice_with_the_same_look_changes_nothing(minutes: list[tuple[bool, bool]]) -> None:
    """At-least-once delivery: a refresh that ran twice stands as if it had run once."""
    standing: tuple[Finding, ...] = ()
    for minute, (is_bad, is_judged) in enumerate(minutes):
        at = 60.0 * minute
        now = START + timedelta(seconds=at)
        seen = look(at, *([claim(at - 10, at)] if is_bad else []), judged=is_judged or is_bad)
        standing = update_findings(standing, [seen], now, VALUES)

        assert update_findings(standing, [seen], now, VALUES) == standing
