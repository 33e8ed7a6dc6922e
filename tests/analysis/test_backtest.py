"""The replay conserves work, pays for cold starts, and its oracle is a true lower bound."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from optiinfra_pipelines.analysis.backtest import replay as module
from optiinfra_pipelines.analysis.backtest.manifests import manifest
from optiinfra_pipelines.analysis.backtest.policies import line_fit, trend_level, window_mean
from optiinfra_pipelines.analysis.backtest.replay import backtest, compare_policies, oracle_replica_hours, replay
from optiinfra_pipelines.analysis.backtest.tuning import choose_policy, keda_candidates, trend_candidates
from optiinfra_pipelines.domain.scaling import (
    ForesightPolicy,
    HpaPolicy,
    KedaLoadPolicy,
    KedaWaitingPolicy,
    PlannerPolicy,
    Policy,
    SloRatioPolicy,
    StaticPolicy,
    TrendPolicy,
)

POLICIES: tuple[Policy, ...] = (
    StaticPolicy(replicas=4),
    HpaPolicy(target_ratio=0.7),
    KedaWaitingPolicy(),
    KedaLoadPolicy(target_ratio=0.9),
    SloRatioPolicy(),
    PlannerPolicy(),
    TrendPolicy(),
    ForesightPolicy(),
)
loads = st.lists(st.floats(0, 120), min_size=1, max_size=60).map(np.array)
policies = st.sampled_from(POLICIES)


@settings(deadline=None)  # the first call imports
@given(loads, policies, st.integers(0, 5), st.integers(0, 4))
def test_what_arrives_is_served_or_still_queued(load: np.ndarray, policy: Policy, cold: int, drain: int) -> None:
    """No work is lost or made, whatever the policy does; nothing is served that had not arrived."""
    result = backtest(load, policy, 1.0, cold * 10.0, drain_seconds=drain * 10.0)
    assert result.served + result.queued_at_end == pytest.approx(result.arrived, abs=1e-6)
    timeline, _ = replay(load, policy, capacity=1.0, cold_start_seconds=cold * 10.0, drain_seconds=drain * 10.0)
    assert (timeline["served"].cum_sum() <= timeline["arrived"].cum_sum() + 1e-6).all()
    assert (timeline["served"] <= timeline["ready_replicas"] * 10.0 + 1e-6).all()
    assert (timeline["paid_replicas"] >= timeline["ready_replicas"]).all()


@settings(deadline=None)  # the first call imports
@given(loads, policies, st.integers(0, 5))
def test_no_policy_that_never_waits_is_cheaper_than_the_oracle(load: np.ndarray, policy: Policy, cold: int) -> None:
    """Where nothing ever queued, the replay cost at least what the offline optimum costs."""
    result = backtest(load, policy, 1.0, cold * 10.0, oracle_window_seconds=10.0, min_replicas=0)
    if result.longest_wait_seconds == 0 and result.queued_at_end == 0:
        assert result.replica_hours >= result.oracle_replica_hours - 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=7), st.integers(0, 3))
def test_the_oracle_is_the_cheapest_of_all_schedules(needed: list[int], cold: int) -> None:
    """Every schedule of ready replicas that covers the need, each start paid its cold start: none is cheaper."""
    least = float("inf")
    for ready in itertools.product(range(3), repeat=len(needed)):
        if any(have < need for have, need in zip(ready, needed, strict=True)):
            continue
        # A replica started for step t was paid from max(0, t - cold); those ready at step 0 were running already.
        starts = sum(max(ready[t] - ready[t - 1], 0) * min(cold, t) for t in range(1, len(ready)))
        least = min(least, sum(ready) + starts)
    load = np.array(needed, dtype=float) * 10
    hours = oracle_replica_hours(load, capacity=1.0, cold_start_seconds=cold * 10.0, window_seconds=10.0)
    assert hours * 360 == pytest.approx(least)


@settings(deadline=None)  # the first call compiles
@given(loads, policies, st.integers(0, 5))
def test_compiled_and_interpreted_replays_agree(load: np.ndarray, policy: Policy, cold: int) -> None:
    """Long replays are compiled, short ones interpreted; the answer does not depend on which."""
    short = backtest(load, policy, 1.0, cold * 10.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COMPILED_FROM_STEPS", 0)
        assert backtest(load, policy, 1.0, cold * 10.0) == short


def test_a_replica_is_paid_from_its_order_and_serves_after_its_cold_start() -> None:
    """Load doubles in step 2; the second replica is ordered at its end, paid from step 3 and ready at step 6."""
    load = np.array([10.0, 10, 20, 20, 20, 20, 20, 20])
    policy = KedaLoadPolicy(target_ratio=1, window_seconds=10, sync_seconds=10, queue_drain_seconds=1e12)
    timeline, changes = replay(load, policy, capacity=1.0, cold_start_seconds=30, initial_replicas=1)

    assert timeline["paid_replicas"].to_list() == [1, 1, 1, 2, 2, 2, 2, 2]
    assert timeline["ready_replicas"].to_list() == [1, 1, 1, 1, 1, 1, 2, 2]
    assert timeline["wait_seconds"].to_list() == [0, 0, 10, 20, 30, 40, 20, 20]
    assert changes == (1, 0)


def test_a_removed_replica_is_paid_until_it_has_drained() -> None:
    """Load halves; the second replica stops serving at once and costs two more steps."""
    load = np.array([20.0, 10, 10, 10, 10])
    policy = KedaLoadPolicy(target_ratio=1, window_seconds=10, sync_seconds=10, stabilization_seconds=0)
    timeline, _ = replay(load, policy, capacity=1.0, cold_start_seconds=30, drain_seconds=20, initial_replicas=2)

    assert timeline["ready_replicas"].to_list() == [2, 2, 1, 1, 1]
    assert timeline["paid_replicas"].to_list() == [2, 2, 2, 2, 1]


def test_replicas_that_are_still_starting_are_cancelled_first() -> None:
    """A one-step burst orders two replicas; both are called off before they ever serve."""
    load = np.array([10.0, 30, 10, 10, 10, 10, 10])
    policy = KedaLoadPolicy(
        target_ratio=1, window_seconds=10, sync_seconds=10, stabilization_seconds=0, queue_drain_seconds=1e12
    )
    timeline, _ = replay(load, policy, capacity=1.0, cold_start_seconds=60, initial_replicas=1)

    assert timeline["ready_replicas"].to_list() == [1] * 7
    assert timeline["paid_replicas"].to_list() == [1, 1, 3, 1, 1, 1, 1]


def test_hpa_does_nothing_inside_its_tolerance() -> None:
    """At 7 % over target Kubernetes holds; at 25 % over it scales."""
    for load, expected in ((75.0, 10), (88.0, 13)):
        policy = HpaPolicy(target_ratio=0.7, sync_seconds=10)
        timeline, _ = replay(np.full(60, load), policy, capacity=1.0, cold_start_seconds=0, initial_replicas=10)
        assert timeline["ready_replicas"][-1] == expected


def test_a_policy_on_waiting_alone_falls_to_its_minimum_when_nothing_waits() -> None:
    """No queue, no replicas wanted: a fleet at work is scaled to its minimum and overloads again."""
    timeline, _ = replay(
        np.full(360, 50.0), KedaWaitingPolicy(), capacity=1.0, cold_start_seconds=60, initial_replicas=10
    )
    assert timeline["ready_replicas"].to_numpy().min() == 1
    assert timeline["wait_seconds"].to_numpy().max() > 60


def test_the_trend_is_the_least_squares_line() -> None:
    """Mean and slope of every trailing window are those of numpy's own fit."""
    rate = np.random.default_rng(7).gamma(9, 1, 50)
    mean, slope = line_fit(rate, 80, 10)
    for end in (8, 20, 49):
        window = rate[end - 7 : end + 1]
        fitted_slope, _ = np.polyfit(np.arange(8), window, 1)
        assert (mean[end], slope[end]) == (pytest.approx(window.mean()), pytest.approx(fitted_slope))
    np.testing.assert_allclose(window_mean(rate, 30, 10)[2:], np.convolve(rate, np.ones(3) / 3, "valid"))


def test_nothing_is_given_up_before_a_reserve_window_has_been_seen() -> None:
    """What the recent peak was is not known at the start; later the fleet falls to the reserve over it, not under."""
    policy = TrendPolicy(reserve_ratio=1.5, reserve_window_seconds=300, sync_seconds=10)
    timeline, _ = replay(np.full(120, 50.0), policy, capacity=1.0, cold_start_seconds=60, initial_replicas=20)
    ready = timeline["ready_replicas"].to_numpy()
    assert (ready[:30] == 20).all()
    assert ready[-1] == 8  # 5 a second, 1.5 times over


def test_what_the_line_missed_lately_is_headroom_until_the_window_has_passed() -> None:
    """A jump that the line did not see raises what is provisioned; an hour later it is forgotten."""
    rate = np.concatenate([np.full(100, 10.0), np.full(500, 20.0)])
    plain = TrendPolicy(miss_quantile_ratio=0.0)
    careful = TrendPolicy(miss_quantile_ratio=0.95, miss_window_seconds=3600)
    extra = trend_level(rate, careful, 200, 10) / trend_level(rate, plain, 200, 10)
    assert extra[90] == 1.0
    assert extra[200] == pytest.approx(1.5)  # half of the load was missed
    assert extra[-1] == 1.0


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy.kind != "foresight"])
def test_a_policy_never_knows_the_future(policy: Policy) -> None:
    """Changing the load from step 200 on changes nothing of what was decided before."""
    rng = np.random.default_rng(3)
    load = rng.gamma(5, 10, 300)
    other = np.concatenate([load[:200], rng.gamma(5, 30, 100)])
    before = replay(load, policy, capacity=1.0, cold_start_seconds=60)[0]
    after = replay(other, policy, capacity=1.0, cold_start_seconds=60)[0]
    assert before[:200].equals(after[:200])


def test_replicas_stay_within_their_limits() -> None:
    """Neither a flood nor silence moves a fleet past its maximum or under its minimum."""
    load = np.concatenate([np.zeros(100), np.full(100, 1e4), np.zeros(200)])
    for policy in POLICIES:
        timeline, _ = replay(load, policy, capacity=1.0, cold_start_seconds=30, min_replicas=2, max_replicas=9)
        assert timeline["ready_replicas"].to_numpy().min() >= 2
        assert timeline["paid_replicas"].to_numpy().max() <= 9


def test_no_demand_has_no_attainment() -> None:
    """Nothing arrived, so nothing was kept or broken: None, not 100 %."""
    assert backtest(np.zeros(10), StaticPolicy(replicas=1), 1.0, 0).attainment_ratio is None


def test_demand_without_a_replica_has_no_finite_wait() -> None:
    """Zero replicas serve nobody: attainment 0, the longest wait unknown."""
    result = backtest(np.full(5, 10.0), StaticPolicy(replicas=0), 1.0, 0, min_replicas=0)
    assert (result.attainment_ratio, result.longest_wait_seconds) == (0.0, None)


def test_gaps_and_impossible_numbers_are_refused() -> None:
    """A NaN would spread through the queue unseen: the caller must say what a gap means."""
    for load, capacity in ((np.array([1.0, np.nan]), 1.0), (np.array([-1.0]), 1.0), (np.array([]), 1.0)):
        with pytest.raises(ValueError, match="load"):
            backtest(load, StaticPolicy(replicas=1), capacity, 0)
    with pytest.raises(ValueError, match="capacity 0"):
        backtest(np.array([1.0]), StaticPolicy(replicas=1), 0, 0)
    with pytest.raises(ValueError, match="column arrived"):
        backtest(pl.DataFrame({"load": [1.0]}), StaticPolicy(replicas=1), 1.0, 0)


def test_the_pareto_marks_what_nothing_beats() -> None:
    """Two static fleets too large for their load: only the smaller is worth having."""
    load = np.full(60, 20.0)
    frame = compare_policies(load, [StaticPolicy(replicas=n) for n in (1, 2, 3)], 1.0, 0)
    assert frame["is_pareto"].to_list() == [True, True, False]
    assert frame["attainment_ratio"].to_list() == [pytest.approx(1 / 60), 1.0, 1.0]


def test_parameters_are_chosen_on_the_history_alone() -> None:
    """The cheapest that keeps the objective there; the best kept where none does."""
    rng = np.random.default_rng(5)
    days = [50 + 30 * np.sin(np.arange(360) / 40) + rng.normal(0, 2, 360) for _ in range(2)]
    chosen = choose_policy(days, keda_candidates(), 1.0, 60, attainment_ratio=0.99)
    kept = [backtest(day, chosen, 1.0, 60).attainment_ratio or 0 for day in days]
    assert sum(kept) / 2 >= 0.985
    impossible = choose_policy(days, [StaticPolicy(replicas=1), StaticPolicy(replicas=3)], 1.0, 60, attainment_ratio=1)
    assert impossible == StaticPolicy(replicas=3)
    assert len(set(trend_candidates())) == len(trend_candidates())


def test_policies_are_data() -> None:
    """A policy survives JSON, and an unknown key is an error."""
    adapter: TypeAdapter[Policy] = TypeAdapter(Policy)
    for policy in POLICIES:
        assert adapter.validate_json(policy.model_dump_json()) == policy
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "hpa", "target_ratio": 0.7, "cool_down": 5})


def test_the_manifest_sets_what_was_replayed() -> None:
    """Thresholds are capacity times target, holds are stabilization windows; what KEDA cannot say is None."""
    common = {"deployment": "chat", "namespace": "llm", "capacity": 2000.0, "cold_start_seconds": 180.0}
    limits = {"tokens_per_request": 800.0, "min_replicas": 2, "max_replicas": 40, "prometheus_url": "http://prom:9090"}
    made = {policy.kind: manifest(policy, **common, **limits) for policy in POLICIES}  # type: ignore[arg-type]
    assert [kind for kind, found in made.items() if found is None] == ["slo_ratio", "planner", "foresight"]

    hpa, keda, trend = made["hpa"], made["keda_load"], made["trend"]
    assert hpa is not None
    assert keda is not None
    assert trend is not None
    assert hpa["spec"]["metrics"][0]["pods"]["target"]["averageValue"] == "1400"
    assert hpa["spec"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 300
    trigger = keda["spec"]["triggers"][0]["metadata"]
    assert trigger["threshold"] == "1800"
    assert "vllm:num_requests_waiting" in trigger["query"]
    assert "* 800 / 60" in trigger["query"]
    assert (keda["spec"]["minReplicaCount"], keda["spec"]["maxReplicaCount"]) == (2, 40)
    query = trend["spec"]["triggers"][0]["metadata"]["query"]
    assert "predict_linear" in query
    assert "quantile_over_time(0.9, " in query
    assert "[30s] offset" not in query  # the line's own samples are moved as a whole
    assert "[180s:15s] offset 195s, 0)" in query
    assert "1.1875 * max_over_time(" in query  # a reserve of 1.25 at full capacity, in units of the target of 0.95
    for found in made.values():
        json.dumps(found)
        query = "" if found is None else json.dumps(found)
        assert query.count("(") == query.count(")")


LIMITS: dict[str, Any] = {
    "deployment": "chat", "namespace": "llm", "capacity": 2_000_000.0, "cold_start_seconds": 180.0,
    "tokens_per_request": 812.3456789, "min_replicas": 2, "max_replicas": 40, "prometheus_url": "http://prom:9090",
}  # fmt: skip


def test_every_field_of_an_autoscaler_is_one_that_kubernetes_knows() -> None:
    """Read by Kubernetes' own client and written again, nothing is lost: no field is misspelled or mistyped."""
    client = pytest.importorskip("kubernetes.client")
    written = client.ApiClient().sanitize_for_serialization
    hpa = manifest(HpaPolicy(target_ratio=0.7), **LIMITS)
    assert hpa is not None
    assert written(client.V2HorizontalPodAutoscaler.from_dict(hpa)) == hpa
    assert hpa["spec"]["metrics"][0]["pods"]["target"]["averageValue"] == "1400000"  # no exponent
    for policy in (KedaWaitingPolicy(), KedaLoadPolicy(target_ratio=0.9), TrendPolicy()):
        found = manifest(policy, **LIMITS)
        assert found is not None
        behavior = found["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        assert written(client.V2HorizontalPodAutoscalerBehavior.from_dict(behavior)) == behavior


# KEDA 2.20's ScaledObject, as its definition names the fields: of the specification, and of a Prometheus trigger.
SCALED_OBJECT = {"advanced", "cooldownPeriod", "fallback", "idleReplicaCount", "initialCooldownPeriod",
                 "maxReplicaCount", "minReplicaCount", "pollingInterval", "scaleTargetRef", "triggers"}  # fmt: skip
TRIGGER = {"type", "metricType", "metadata", "name", "useCachedMetrics", "authenticationRef"}
PROMETHEUS = {"serverAddress", "query", "threshold", "activationThreshold", "ignoreNullValues", "namespace",
              "customHeaders", "queryParameters", "unsafeSsl", "timeout"}  # fmt: skip


def test_every_field_of_a_scaled_object_is_one_that_keda_knows() -> None:
    """Metadata of a trigger are strings; a poll only where the cluster's own period is shorter."""
    for policy in (KedaWaitingPolicy(), KedaLoadPolicy(target_ratio=0.9), TrendPolicy(sync_seconds=60.0)):
        found = manifest(policy, **LIMITS)
        assert found is not None
        assert set(found["spec"]) <= SCALED_OBJECT
        [trigger] = found["spec"]["triggers"]
        assert set(trigger) <= TRIGGER
        assert set(trigger["metadata"]) <= PROMETHEUS
        assert all(isinstance(value, str) for value in trigger["metadata"].values())
        assert "e+" not in trigger["metadata"]["threshold"]
        is_slow = policy.sync_seconds > 15
        assert found["spec"].get("pollingInterval") == (60 if is_slow else None)
        assert trigger.get("useCachedMetrics") is (True if is_slow else None)


def test_what_would_be_filled_in_otherwise_is_written_out() -> None:
    """No tolerance and no limit upwards but for the HPA's own, as replayed; and a lost metric is no load of nothing."""
    keda, hpa = manifest(KedaLoadPolicy(target_ratio=0.9), **LIMITS), manifest(HpaPolicy(target_ratio=0.7), **LIMITS)
    assert keda is not None
    assert hpa is not None
    behavior = keda["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleUp"]["policies"] == [{"type": "Pods", "value": 40, "periodSeconds": 15}]
    assert behavior["scaleUp"]["tolerance"] == behavior["scaleDown"]["tolerance"] == "0"
    assert hpa["spec"]["behavior"]["scaleUp"]["tolerance"] == "0.1"
    assert [one["value"] for one in hpa["spec"]["behavior"]["scaleUp"]["policies"]] == [100, 4]
    assert keda["spec"]["triggers"][0]["metadata"]["ignoreNullValues"] == "false"
    assert "sum by (namespace, pod) (rate(" in hpa["metadata"]["annotations"]["optiinfra/needs"]


@pytest.mark.parametrize(
    ("policy", "fewest"),
    [(KedaLoadPolicy(target_ratio=0.9), 0), (HpaPolicy(target_ratio=0.7, stabilization_seconds=7200), 1),
     (TrendPolicy(down_ratio=0.7), 1)],
)  # fmt: skip
def test_what_no_autoscaler_can_do_has_no_manifest(policy: Policy, fewest: int) -> None:
    """Scaling to nothing by the counters of what is gone, a hold over an hour, another target down than up."""
    assert manifest(policy, **LIMITS | {"min_replicas": fewest}) is None
