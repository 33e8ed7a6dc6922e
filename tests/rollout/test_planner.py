"""Steps are as long as the judge needs for the traffic; stakes are as bold as the replicas' own differences allow."""

import math

import numpy as np
import pytest
from scipy.stats import lognorm

from optiinfra_pipelines.domain.rollouts import RolloutPlan, Stage
from optiinfra_pipelines.rollout.calibration import calibrate, windows
from optiinfra_pipelines.rollout.eprocess import EdgeProcess, TickCounts, combined_log_e, first_crossing
from optiinfra_pipelines.rollout.margins import StableHistogram
from optiinfra_pipelines.rollout.planner import PlanRefusal, Traffic, detection_seconds, plan_steps, stages
from optiinfra_pipelines.rollout.tempering import DEFAULT_STAKE, latency_rule

BOUNDS = (0.1, 0.25, 0.5, 0.75, 1.0, 2.5, math.inf)


def traffic(requests_per_second: float, replicas: int = 9) -> Traffic:
    counts = [float(round(1000 * share)) for share in lognorm(0.6, scale=0.42).cdf(np.array(BOUNDS))]
    return Traffic(requests_per_second, replicas, {"ttft": [StableHistogram(BOUNDS, counts)] * 60})


def test_the_default_plan_begins_small_and_validates_at_equal_load() -> None:
    steps = plan_steps(RolloutPlan(), traffic(20.0), stake=0.5, seed=1)

    assert isinstance(steps, tuple)
    found = [(step.stage, step.percent) for step in steps]
    assert found == [
        (Stage.STAGING, 0),
        (Stage.CANARY, 1),
        (Stage.CANARY, 5),
        (Stage.VALIDATION, 10),
        (Stage.GRADUAL, 25),
        (Stage.GRADUAL, 50),
        (Stage.GRADUAL, 100),
        (Stage.BAKE, 100),
    ]
    assert steps[1].dwell_seconds >= 300 / 0.2  # 300 requests at 0.2 requests/s
    assert steps == plan_steps(RolloutPlan(), traffic(20.0), stake=0.5, seed=1)


@pytest.mark.parametrize(
    ("percents", "stable", "validated"), [((1, 5, 100), 1, 50.0), ((50, 100), 1, 50.0), ((10, 100), 9, 10.0)]
)
def test_validation_stands_where_a_candidate_carries_what_a_stable_replica_does(
    percents: tuple[float, ...], stable: int, validated: float
) -> None:
    found = stages(percents, stable, 1)

    assert [percent for stage, percent in found if stage is Stage.VALIDATION] == [validated]
    assert found[-1] == (Stage.GRADUAL, 100.0)
    assert [percent for _, percent in found] == sorted({percent for _, percent in found})


def test_a_step_too_short_is_refused_with_what_would_suffice() -> None:
    refused = plan_steps(RolloutPlan(step_minutes=2), traffic(20.0), stake=0.5, seed=1)

    assert isinstance(refused, PlanRefusal)
    assert "needed after each warm-up: 1 %: 27" in refused.reason
    assert not isinstance(plan_steps(RolloutPlan(step_minutes=30), traffic(20.0), stake=0.5, seed=1), PlanRefusal)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_deployment_with_hardly_any_traffic_is_refused(rate: float) -> None:
    refused = plan_steps(RolloutPlan(), traffic(rate), stake=0.5, seed=1)

    assert isinstance(refused, PlanRefusal)


def test_more_traffic_and_larger_regressions_are_found_sooner() -> None:
    times = {
        (rate, ratio): detection_seconds(
            RolloutPlan(detect_ratio=ratio), traffic(10 * rate), rate, 9 * rate, stake=0.5, seed=2
        )
        for rate in (0.5, 2.0, 10.0)
        for ratio in (0.5, 1.0)
    }

    # Beside the measured 90th percentiles with replica noise: 980, 300, 90 s and 280, 85, 20 s.
    limits = {(0.5, 0.5): 980, (2.0, 0.5): 300, (10.0, 0.5): 90, (0.5, 1.0): 280, (2.0, 1.0): 85, (10.0, 1.0): 20}
    assert all((times[key] or math.inf) <= limit for key, limit in limits.items()), times
    assert times[0.5, 1.0] > times[2.0, 1.0] > times[10.0, 1.0]  # type: ignore[operator]
    assert times[2.0, 0.5] > times[2.0, 1.0]  # type: ignore[operator]


def test_without_a_latency_histogram_errors_decide_the_time() -> None:
    blind = Traffic(20.0, 9, {})

    assert detection_seconds(RolloutPlan(), blind, 2.0, 18.0, stake=0.5, seed=1) == pytest.approx(60, abs=120)


def test_the_replay_is_the_judge_itself() -> None:
    """`first_crossing` over a step and `EdgeProcess` tick by tick cross at the same tick."""
    random = np.random.default_rng(5)
    nulls, ratios = np.array([1.3, 1.4]), np.log(np.array([1.15, 1.3, 1.6, 2.2, 3.5, 6.0, 15.0]))
    totals = random.poisson([10, 90], (200, 2)).astype(np.int64)
    overs = random.binomial(totals[:, None, :], np.array([[[0.6, 0.37], [0.2, 0.1]]])).astype(np.int64)
    edges = [EdgeProcess(null, max_ticks=200, rule=latency_rule(0.5)) for null in nulls.tolist()]
    crossed = 0
    for tick in range(200):
        for index, edge in enumerate(edges):
            (ours, theirs), (our_total, their_total) = overs[tick, index].tolist(), totals[tick].tolist()
            edge.observe(TickCounts(our_total, ours, their_total, theirs))
        if not crossed and combined_log_e(edges, 0.15) >= math.log(100):
            crossed = tick + 1

    assert crossed > 1
    found = first_crossing(
        totals, overs, np.log(nulls), ratios, latency_rule(0.5), np.zeros((0, 0)), 0.15, 200, math.log(100)
    )
    assert found == crossed


def replicas(count: int, ticks: int, drift: float, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Replicas whose share over one edge drifts by itself, at 40 requests a tick."""
    random = np.random.default_rng(seed)
    found = {}
    for index in range(count):
        state, odds = 0.0, []
        for _ in range(ticks):
            state = 0.9 * state + math.sqrt(1 - 0.81) * random.normal(0, drift)
            odds.append(0.4 * math.exp(state))
        shares = np.array(odds) / (1 + np.array(odds))
        totals = random.poisson(40, ticks)
        found[f"r{index}"] = (totals.astype(np.int64), random.binomial(totals, shares)[:, None].astype(np.int64))
    return found


def test_replicas_that_drift_are_judged_with_a_smaller_stake() -> None:
    calm = calibrate(windows(replicas(10, 3600, 0.05, 1), 60), [1.3], alpha=0.01)
    wild = calibrate(windows(replicas(10, 3600, 0.6, 2), 60), [1.3], alpha=0.01)

    assert calm.windows == wild.windows == 600
    assert calm.stake == 1.0
    assert wild.stake < DEFAULT_STAKE
    assert wild.failed_ratio is not None


def test_few_windows_leave_the_default_and_one_replica_has_no_peer() -> None:
    few = calibrate(windows(replicas(4, 240, 0.05, 3), 60), [1.3], alpha=0.01)

    assert (few.stake, few.failed_ratio, few.windows) == (DEFAULT_STAKE, None, 16)
    assert windows(replicas(1, 240, 0.05, 3), 60) == []


def test_stakes_that_cannot_help_say_what_would() -> None:
    hopeless = calibrate(windows(replicas(10, 1200, 2.5, 4), 60), [1.1], alpha=0.01)

    assert "widen margin_ratio" in hopeless.reason
