"""Deltas are whole numbers of one process and one configuration, or nothing, with the reason."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.domain.rollouts import Stage, Step
from optiinfra_pipelines.engines import normalize
from optiinfra_pipelines.engines.plan import ENGINE_COLUMNS
from optiinfra_pipelines.exposition import Reader
from optiinfra_pipelines.rollout.counts import Buckets, CountTracker, ProcessPage, arm_tick
from optiinfra_pipelines.rollout.judge import StepPlan
from optiinfra_pipelines.rollout.margins import JudgedEdge
from optiinfra_pipelines.rollout.watch import Decision, Look, StepWatch

BOUNDS = (0.5, 1.0, math.inf)
STARTED = datetime(2026, 11, 18, tzinfo=UTC)


def page(counts: tuple[float, ...], process: str = "a", **changed: object) -> ProcessPage:
    made = ProcessPage(process, STARTED, "hash-1", {"ttft": Buckets(BOUNDS, counts)}, None, 0.0)
    return replace(made, **changed)  # type: ignore[arg-type]


def test_a_delta_is_the_difference_of_two_neighboring_ticks() -> None:
    tracker = CountTracker()
    assert tracker.observe([page((1, 2, 3))])[1][0].reason == "first look: nothing to subtract"

    deltas, cuts = tracker.observe([page((4, 6, 10))])

    assert cuts == ()
    assert deltas["a"].histograms["ttft"].cumulative == (3, 4, 7)
    tick = arm_tick(deltas.values(), {"ttft": [0.5, 1.0]})
    assert tick is not None
    assert tick.observed == {"ttft": 7}
    assert tick.over == {"ttft": {0.5: 4, 1.0: 3}}


def test_a_restart_counts_what_the_new_process_did() -> None:
    """Whether its start time shows it or only the fallen counters."""
    for changed in ({"started_at": STARTED + timedelta(hours=1)}, {}):
        tracker = CountTracker()
        tracker.observe([page((50, 60, 70))])
        deltas, _ = tracker.observe([page((1, 2, 5), **changed)])
        assert deltas["a"].histograms["ttft"].cumulative == (1, 2, 5)


def test_a_restart_that_outgrew_its_old_counters_is_seen_by_its_start() -> None:
    tracker = CountTracker()
    tracker.observe([page((1, 1, 1))])
    deltas, _ = tracker.observe([page((2, 2, 9), started_at=STARTED + timedelta(hours=1))])

    assert deltas["a"].histograms["ttft"].cumulative == (2, 2, 9)


def test_a_change_of_configuration_cuts_the_series() -> None:
    tracker = CountTracker()
    tracker.observe([page((1, 2, 3))])
    deltas, [cut] = tracker.observe([page((2, 3, 4), config_hash="hash-2")])

    assert deltas == {}
    assert "hash-1 to hash-2" in cut.reason


def test_a_process_that_missed_a_tick_is_cut_until_it_has_two_again() -> None:
    """Its delta would span two ticks, and the other arm's only one."""
    tracker = CountTracker()
    tracker.observe([page((1, 2, 3)), page((1, 2, 3), "b")])
    deltas, [missing] = tracker.observe([page((2, 3, 4))])
    assert list(deltas) == ["a"]
    assert missing.reason == "no page in this tick"
    deltas, [cut] = tracker.observe([page((3, 4, 5)), page((9, 9, 9), "b")])
    assert list(deltas) == ["a"]
    assert cut.reason == "no page in the tick before"
    assert set(tracker.observe([page((3, 4, 5)), page((9, 9, 9), "b")])[0]) == {"a", "b"}


def test_what_cannot_be_counts_is_cut() -> None:
    for bad in ((1.5, 2, 3), (5, 3, 4), (math.nan, 2, 3)):
        tracker = CountTracker()
        tracker.observe([page((0, 0, 0))])
        deltas, [cut] = tracker.observe([page(bad)])
        assert deltas == {}
        assert "whole, rising" in cut.reason
    tracker = CountTracker()
    tracker.observe([page((0, 0, 0), requests=0.0)])
    _, [cut] = tracker.observe([page((1, 1, 1), requests=1.0, failed=2.0)])
    assert cut.reason == "2 failures of 1 requests"


def test_other_bounds_are_another_histogram() -> None:
    tracker = CountTracker()
    tracker.observe([page((1, 2, 3))])
    other = page((1, 2, 3), histograms={"ttft": Buckets((0.25, 1.0, math.inf), (1, 2, 3))})

    assert "bounds of ttft changed" in tracker.observe([other])[1][0].reason


def test_an_arm_without_a_judged_bound_or_without_processes_is_no_data() -> None:
    tracker = CountTracker()
    tracker.observe([page((1, 2, 3))])
    deltas, _ = tracker.observe([page((2, 3, 4))])

    assert arm_tick(deltas.values(), {"ttft": [0.75]}) is None
    assert arm_tick(deltas.values(), {"tpot": [0.5]}) is None
    assert arm_tick([], {}) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=30))
def test_deltas_add_up_to_what_was_served(ticks: list[tuple[int, int, int, bool]]) -> None:
    """Whatever restarts in between: the sum of deltas is the requests of every tick but the first."""
    tracker, total, counted = CountTracker(), 0, 0
    low = middle = high = 0
    started = STARTED
    tracker.observe([page((0, 0, 0))])
    for under, between, above, is_restarted in ticks:
        if is_restarted:
            low = middle = high = 0
            started += timedelta(seconds=1)
        low, middle, high = low + under, middle + under + between, high + under + between + above
        total += under + between + above
        deltas, _ = tracker.observe([page((low, middle, high), started_at=started)])
        counted += int(deltas["a"].histograms["ttft"].cumulative[-1])
    assert counted == total


def test_a_scrape_that_comes_again_beside_new_ones_counts_as_missed() -> None:
    tracker, later = CountTracker(), STARTED + timedelta(seconds=5)
    tracker.observe([page((1, 2, 3), scraped_at=STARTED), page((1, 2, 3), "b", scraped_at=STARTED)])

    deltas, _ = tracker.observe([page((2, 3, 4), scraped_at=later), page((1, 2, 3), "b", scraped_at=STARTED)])

    assert list(deltas) == ["a"]


def arms(tick: int, slow: int) -> list[ProcessPage]:
    """Ten requests a tick at the candidate, of which `slow` in all took longer than the judged bound; 90 beside it."""
    at = STARTED + timedelta(seconds=5 * tick)
    ours, theirs = (10 * tick - slow, 10 * tick, 10 * tick), (57 * tick, 90 * tick, 90 * tick)
    counts = {"scraped_at": at, "failed": 0.0, "cache_queries": 100.0 * tick, "cache_hits": 40.0 * tick}
    return [
        page(ours, "candidate", requests=10.0 * tick, **counts),
        page(theirs, "stable", requests=90.0 * tick, **counts),
    ]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(1, 3)), min_size=1, max_size=60))
def test_a_tick_delivered_twice_changes_no_verdict_and_no_evidence(ticks: list[tuple[int, int]]) -> None:
    """Each tick has so many slow requests and is delivered once to three times: to the watch of a step all are one."""
    step = Step(stage=Stage.CANARY, percent=10, dwell_seconds=60, max_seconds=90, warm_up_seconds=20)
    plan = StepPlan(edges={"ttft": (JudgedEdge(0.5, 0.37, 1.293),)}, min_requests=100, max_ticks=20)
    found: list[list[Decision]] = []
    for is_repeating in (False, True):
        tracker, watch = CountTracker(), StepWatch(step, plan, started=0.0, min_requests=100)
        decisions, slow = [], 0
        for tick, (more, times) in enumerate(ticks):
            slow += more if tick else 0
            for _ in range(times if is_repeating else 1):
                deltas, _ = tracker.observe(arms(tick, slow))
                canary, stable = (
                    arm_tick([deltas[name] for name in (name,) if name in deltas], {"ttft": [0.5]})
                    for name in ("candidate", "stable")
                )
                watch.observe(Look(5.0 * tick, canary, stable))
            decisions.append(watch.decide(5.0 * tick))
        found.append(decisions)

    assert found[0] == found[1]
    assert all(one.verdict is not None for one in found[0])


def test_recorded_engine_pages_give_the_requests_that_finished_between_them() -> None:
    """vLLM under load, pages of one phase: every histogram's count moves with the others, in whole requests."""
    folder = Path(__file__).parents[1] / "fixtures/recordings/vllm/0.32.0/small_llama_kv8k/03_loaded_shared_prefix_c8"
    tracker, reader, total, looked_up, known = CountTracker(), Reader(), 0, 0, 0
    for path in sorted(folder.glob("*.prom")):
        found = normalize(reader.read(path.read_text(), key="t"), target="t", scraped_at=STARTED)
        bounds = {row[0]: tuple(row[1]) for row in found.rows["raw_histogram_bounds"]}
        names = ["scraped_at", "target", "engine_rank", "metric", "vantage", "source_metric", "is_proxy", "bounds_id"]
        index = {name: position for position, name in enumerate([*names, "bucket_counts"])}
        histograms = {
            row[index["metric"]]: Buckets(bounds[row[index["bounds_id"]]], tuple(row[index["bucket_counts"]]))
            for row in found.rows["raw_engine_histograms"]
            if row[index["metric"]] in ("time_to_first_token_seconds", "request_duration_seconds")
        }
        assert len(histograms) == 2
        columns = dict(zip(ENGINE_COLUMNS, found.rows["raw_engine_samples"][0], strict=True))
        cached = {name: columns[f"prefix_{name}_total"] for name in ("cache_queries", "cache_hits")}
        deltas, cuts = tracker.observe([ProcessPage("t", found.process_started_at, "h", histograms, **cached)])
        for delta in deltas.values():
            total += int(delta.histograms["request_duration_seconds"].cumulative[-1])
            assert delta.cache is not None
            looked_up, known = looked_up + delta.cache.queries, known + delta.cache.hits
        assert len(cuts) == (0 if deltas else 1)
    assert total > 50
    # Prompts of this phase begin alike.
    assert 0.3 < known / looked_up < 1
