"""A verdict fails a bad canary soon, passes nothing it has not seen, and says why with its numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.domain.verdicts import VerdictKind
from optiinfra_pipelines.rollout.judge import ArmTick, StepJudge, StepPlan
from optiinfra_pipelines.rollout.margins import JudgedEdge, StableHistogram, judged_edges

EDGES = (JudgedEdge(0.5, 0.37, 1.293), JudgedEdge(1.0, 0.09, 1.38))
PLAN = StepPlan(edges={"ttft": EDGES}, min_requests=100, max_ticks=400)


def arm(requests: int, slow: int, very_slow: int, failed: int = 0) -> ArmTick:
    return ArmTick({"ttft": requests}, {"ttft": {0.5: slow, 1.0: very_slow}}, requests, failed)


HEALTHY, BASELINE = arm(10, 4, 1), arm(90, 33, 8)


def judged(canary: ArmTick, ticks: int, baseline: ArmTick = BASELINE) -> StepJudge:
    judge = StepJudge(PLAN)
    for _ in range(ticks):
        judge.observe(canary, baseline)
    return judge


def test_a_canary_like_its_baseline_passes_when_the_time_is_over() -> None:
    judge = judged(HEALTHY, 60)

    assert judge.verdict(is_dwell_over=False).kind is VerdictKind.INCONCLUSIVE
    passed = judge.verdict(is_dwell_over=True)
    assert passed.kind is VerdictKind.PASS
    assert "600" in passed.reason


def test_twice_the_slow_requests_fail_and_the_reason_has_the_counts() -> None:
    failed = judged(arm(10, 8, 3), 30).verdict(is_dwell_over=False)

    assert failed.kind is VerdictKind.FAIL
    assert failed.reason.startswith("ttft: ")
    assert "canary requests over 0.5 s" in failed.reason


def test_errors_alone_fail_a_fast_canary() -> None:
    failed = judged(arm(10, 2, 0, failed=5), 3).verdict(is_dwell_over=False)

    assert failed.kind is VerdictKind.FAIL
    assert failed.reason.startswith("errors: 5 of 10 canary requests failed, 0 of 90")


def test_a_failure_is_not_taken_back_by_a_good_stretch() -> None:
    judge = judged(arm(10, 2, 0, failed=5), 3)
    for _ in range(300):
        judge.observe(HEALTHY, BASELINE)

    assert judge.verdict(is_dwell_over=True).kind is VerdictKind.FAIL


def test_silence_of_either_arm_is_no_data_and_never_a_pass() -> None:
    for canary, baseline in ((ArmTick(), BASELINE), (HEALTHY, ArmTick())):
        verdict = judged(canary, 300, baseline).verdict(is_dwell_over=True)

        assert verdict.kind is VerdictKind.NODATA


def test_too_few_requests_are_inconclusive_with_the_number_that_is_missing() -> None:
    verdict = judged(HEALTHY, 9).verdict(is_dwell_over=True)

    assert verdict.kind is VerdictKind.INCONCLUSIVE
    assert "90 of 100 requests" in verdict.reason


def test_fewer_tokens_at_equal_load_fail_and_equal_ones_only_share_the_error_rate() -> None:
    """Throughput is judged beside the counts: half the tokens fail in minutes, with equal latencies and no error."""
    random = np.random.default_rng(11)
    for factor, kind in ((0.5, VerdictKind.FAIL), (1.0, VerdictKind.PASS)):
        judge = StepJudge(StepPlan(edges={"ttft": EDGES}, min_requests=100, max_ticks=400, judge_throughput=True))
        for _ in range(120):
            tokens = float(random.lognormal(7, 0.2))
            judge.observe(
                replace(HEALTHY, tokens_per_replica=tokens * factor * float(random.lognormal(0, 0.1))),
                replace(BASELINE, tokens_per_replica=tokens),
            )
        verdict = judge.verdict(is_dwell_over=True)
        assert verdict.kind is kind
        assert math.exp(judge.plan.fail_at_log_e) == pytest.approx(300)
        assert ("generation_tokens_per_second" in verdict.reason) is (kind is VerdictKind.FAIL)


def test_signals_share_the_error_rate() -> None:
    """Two signals at alpha 1 %: each needs 200:1."""
    assert math.exp(PLAN.fail_at_log_e) == pytest.approx(200)


def test_a_step_without_anything_to_judge_by_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to judge by"):
        StepPlan(edges={"ttft": ()}, judge_errors=False)
    with pytest.raises(ValueError, match="alpha"):
        StepPlan(edges={"ttft": EDGES}, alpha=1.0)


def lognormal_histogram(bounds: list[float]) -> StableHistogram:
    from scipy.stats import lognorm

    return StableHistogram([*bounds, math.inf], [*(1e6 * lognorm(0.6, scale=0.42).cdf(np.array(bounds))), 1e6])


VLLM_TTFT = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0]


def test_the_margin_in_odds_is_near_the_truth_at_coarse_edges() -> None:
    """Interpolated inside vLLM's buckets, the odds ratio of a 10 % margin is within 12 % of the distribution's own."""
    from scipy.stats import lognorm

    truth = lognorm(0.6, scale=0.42)
    for edge in judged_edges([lognormal_histogram(VLLM_TTFT)]):
        tail, shifted = truth.sf(edge.bound_seconds), truth.sf(edge.bound_seconds / 1.1)
        exact = shifted / (1 - shifted) / (tail / (1 - tail))
        assert edge.null_odds == pytest.approx(exact, rel=0.12), edge


def test_edges_are_where_requests_are() -> None:
    bounds = [edge.bound_seconds for edge in judged_edges([lognormal_histogram(VLLM_TTFT)])]

    assert bounds == [0.5, 0.75, 1.0]


@settings(max_examples=200)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=12), st.floats(0, 1))
def test_any_histogram_gives_ascending_edges_and_odds_of_at_least_one(counts: list[int], margin: float) -> None:
    """A margin never makes the null stricter than equality; an empty histogram has no edge."""
    bounds = [0.1 * 2**i for i in range(len(counts) - 1)] + [math.inf]
    edges = judged_edges([StableHistogram(bounds, list(np.cumsum(counts).astype(float)))], margin)

    assert [edge.bound_seconds for edge in edges] == sorted({edge.bound_seconds for edge in edges})
    assert all(edge.null_odds >= 1 and math.isfinite(edge.null_odds) for edge in edges)
    assert edges == [] or sum(counts) > 0


def with_replicas(slow: list[int]) -> ArmTick:
    """A baseline of nine replicas of 50 requests, by name."""
    by_name = {f"r{index}": (50, over) for index, over in enumerate(slow)}
    return ArmTick({"ttft": 450}, {"ttft": {0.5: sum(slow)}}, 450, 0, None, {"ttft": {0.5: by_name}})


def test_a_step_among_replicas_that_differ_wildly_does_not_pass() -> None:
    """What the planner promised to find could not have been found: a person is asked."""
    plan = StepPlan(edges={"ttft": EDGES[:1]}, min_requests=100, judge_errors=False)
    calm, wild = StepJudge(plan), StepJudge(plan)
    for tick in range(120):
        canary = ArmTick({"ttft": 50}, {"ttft": {0.5: 18}}, 50)
        calm.observe(canary, with_replicas([18] * 9))
        wild.observe(canary, with_replicas([18 + (12 if (index + tick // 12) % 3 else -12) for index in range(9)]))

    assert calm.verdict(is_dwell_over=True).kind is VerdictKind.PASS
    asked = wild.verdict(is_dwell_over=True)
    assert asked.kind is VerdictKind.INCONCLUSIVE
    assert "differ among themselves so much" in asked.reason


def test_edges_that_only_one_arm_counts_at_are_left_out_and_named() -> None:
    """A candidate of another engine version may have other buckets: what both have is judged."""
    judge = StepJudge(PLAN)
    for _ in range(60):
        judge.observe(HEALTHY, ArmTick({"ttft": 90}, {"ttft": {1.0: 8}}, 90, 0))

    passed = judge.verdict(is_dwell_over=True)
    assert passed.kind is VerdictKind.PASS
    assert "not judged, as the arms' buckets differ: ttft at 0.5 s" in passed.reason
    assert passed.signals[0].bound == 1.0


def test_arms_without_a_common_edge_are_no_data() -> None:
    judge = StepJudge(PLAN)
    for _ in range(60):
        judge.observe(ArmTick({"ttft": 10}, {"ttft": {}}, 10, 0), BASELINE)

    assert judge.verdict(is_dwell_over=True).kind is VerdictKind.NODATA


def test_counts_of_billions_are_judged_as_fast() -> None:
    judge = StepJudge(PLAN)
    billion = 10**9
    for _ in range(5):
        judge.observe(arm(billion, billion // 2, billion // 5), arm(9 * billion, 9 * billion // 4, 9 * billion // 10))

    verdict = judge.verdict(is_dwell_over=False)
    assert verdict.kind is VerdictKind.FAIL
    assert all(math.isfinite(state.log_e) for state in verdict.signals)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**31), st.floats(0, 1))
def test_exchanged_arms_of_one_kind_never_both_fail(requests: int, seed: int, share: float) -> None:
    """If one arm is worse than the other throughout, the other is not worse than it; and equal arms fail neither."""
    plan = StepPlan(edges={"ttft": EDGES[:1]}, min_requests=1, judge_errors=False)
    random = np.random.default_rng(seed)
    worse, better = (int(share * requests), int(share * requests / 2))
    one, other, same = StepJudge(plan), StepJudge(plan), StepJudge(plan)
    for _ in range(int(random.integers(1, 80))):
        a, b = (ArmTick({"ttft": requests}, {"ttft": {0.5: over}}, requests) for over in (worse, better))
        one.observe(a, b)
        other.observe(b, a)
        same.observe(a, a)

    assert other.verdict(is_dwell_over=False).kind is not VerdictKind.FAIL
    assert same.verdict(is_dwell_over=False).kind is not VerdictKind.FAIL
    assert one.states()[0].log_e >= other.states()[0].log_e


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 90)), min_size=1, max_size=60))
def test_ticks_with_traffic_in_one_arm_only_tell_nothing(ticks: list[tuple[int, int]]) -> None:
    """However many: no evidence, and no pass."""
    judge = StepJudge(PLAN)
    for requests, slow in ticks:
        judge.observe(ArmTick(), arm(90, min(slow, 90), 0))
        judge.observe(arm(requests, requests, requests), ArmTick())

    assert max(state.log_e for state in judge.states()) <= 0
    assert judge.verdict(is_dwell_over=True).kind is not VerdictKind.PASS
