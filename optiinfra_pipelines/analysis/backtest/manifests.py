"""The Kubernetes manifest that sets a scaling policy: exact HPA and KEDA parameters as plain dicts.

Pure; nothing is applied here. Demand is measured in tokens per second from vLLM's own counters, so `capacity` must be
in tokens per second and replica, and waiting work in tokens is waiting requests times `tokens_per_request`. Whatever
Kubernetes or KEDA would otherwise fill in and the replay did not do is written out: the tolerance of 10 %, the limit of
double or four more per period, and a lost metric read as 0. What a manifest needs of the cluster is its annotation.
"""

from __future__ import annotations

import math
from typing import Any

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

Manifest = dict[str, Any]
PODS_METRIC = "optiinfra_tokens_per_second"
# Key of the annotation that tells what must be there before the manifest does what it says.
NEEDS = "optiinfra/needs"
# Set by the API; a longer hold cannot be expressed.
MAX_HOLD_SECONDS = 3600.0
# How often the cluster's autoscaler looks, unless its operator changed --horizontal-pod-autoscaler-sync-period.
CLUSTER_SYNC_SECONDS = 15
TOLERANCE = "Kubernetes 1.35 or later, where a tolerance may be set (1.33 with HPAConfigurableTolerance)"


def manifest(
    policy: Policy,
    *,
    deployment: str,
    namespace: str,
    capacity: float,
    cold_start_seconds: float,
    tokens_per_request: float,
    min_replicas: int,
    max_replicas: int,
    prometheus_url: str,
) -> Manifest | None:
    """What to apply so that the cluster does what the replay did; None for policies that no HPA or KEDA can express.

    So are a hold over an hour, another trend up than down, and none at all as the fewest replicas: with the last
    engine its counters go, and nothing would tell that it is wanted. The selector is job="<deployment>": change it
    where your scrape configuration names replicas otherwise. A Deployment holds its replicas alone: apply it on the
    server's side (`kubectl apply --server-side`), beside what is there.
    """
    if _is_beyond(policy, min_replicas):
        return None
    selector = f'{{job="{deployment}"}}'
    waiting = f"sum(vllm:num_requests_waiting{selector})"

    def tokens(window: float, ago: float = 0.0) -> str:
        span = f"[{math.ceil(window)}s]" + (f" offset {math.ceil(ago)}s" if ago else "")
        counters = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
        return "(" + " + ".join(f"sum(rate({counter}{selector}{span}))" for counter in counters) + ")"

    def scaled_object(query: str, threshold: float, sync: float, hold: float) -> Manifest:
        trigger: Manifest = {
            "type": "prometheus",
            "metricType": "AverageValue",
            "metadata": {
                "serverAddress": prometheus_url,
                "query": query,
                "threshold": _number(threshold),
                # KEDA's default takes an empty answer for a load of 0 and scales down; an error holds what is there.
                "ignoreNullValues": "false",
            },
        }
        spec: Manifest = {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment},
            "minReplicaCount": min_replicas,
            "maxReplicaCount": max_replicas,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior(hold, max_replicas)}},
            "triggers": [trigger],
        }
        if sync > CLUSTER_SYNC_SECONDS:  # else the cluster's own period rules, and KEDA's interval says nothing
            spec["pollingInterval"] = math.ceil(sync)
            trigger["useCachedMetrics"] = True
        needs = (
            f"KEDA 2.20 or later, its Prometheus at serverAddress scraping the engines as the query names; {TOLERANCE}"
        )
        return {
            "apiVersion": "keda.sh/v1alpha1",
            "kind": "ScaledObject",
            "metadata": {"name": deployment, "namespace": namespace, "annotations": {NEEDS: needs}},
            "spec": spec,
        }

    match policy:
        case StaticPolicy():
            return {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "metadata": {
                    "name": deployment,
                    "namespace": namespace,
                    "annotations": {NEEDS: "kubectl apply --server-side on a Deployment that no autoscaler scales"},
                },
                "spec": {"replicas": policy.replicas},
            }
        case HpaPolicy():
            by_pod = tokens(policy.window_seconds).replace("sum(", "sum by (namespace, pod) (")
            metric = {
                "type": "Pods",
                "pods": {
                    "metric": {"name": PODS_METRIC},
                    "target": {"type": "AverageValue", "averageValue": _number(capacity * policy.target_ratio)},
                },
            }
            return {
                "apiVersion": "autoscaling/v2",
                "kind": "HorizontalPodAutoscaler",
                "metadata": {
                    "name": deployment,
                    "namespace": namespace,
                    "annotations": {NEEDS: f"an adapter that serves {PODS_METRIC} of a pod as {by_pod}; {TOLERANCE}"},
                },
                "spec": {
                    "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment},
                    "minReplicas": min_replicas,
                    "maxReplicas": max_replicas,
                    "metrics": [metric],
                    "behavior": _behavior(policy.stabilization_seconds, None, policy.tolerance_ratio),
                },
            }
        case KedaWaitingPolicy():
            return scaled_object(waiting, policy.waiting_per_replica, policy.sync_seconds, policy.stabilization_seconds)
        case KedaLoadPolicy():
            queued = f"{waiting} * {_number(tokens_per_request)} / {_number(policy.queue_drain_seconds)}"
            query = f"{tokens(policy.window_seconds)} + {queued}"
            threshold = capacity * policy.target_ratio
            return scaled_object(query, threshold, policy.sync_seconds, policy.stabilization_seconds)
        case TrendPolicy():
            return _trend(policy, scaled_object, tokens, waiting, capacity, cold_start_seconds, tokens_per_request)
        case SloRatioPolicy() | PlannerPolicy() | ForesightPolicy():
            return None


def _trend(
    policy: TrendPolicy,
    scaled_object: Any,
    tokens: Any,
    waiting: str,
    capacity: float,
    cold_start_seconds: float,
    tokens_per_request: float,
) -> Manifest:
    """predict_linear is the same least-squares line; damping mixes it with the mean it was fitted through.

    Headroom asks, at every step of its window, what the line said then (its samples offset by the horizon; Prometheus
    predicts from the time of asking, so nothing is added) and how far the load exceeded it.
    """
    window, horizon = math.ceil(policy.trend_window_seconds), math.ceil(cold_start_seconds + policy.sync_seconds)
    sync = math.ceil(policy.sync_seconds)

    def expected(ago: int) -> str:
        # A subquery keeps the evaluation at every step of the trend window.
        series = f"({tokens(policy.sync_seconds * 2)})[{window}s:{sync}s]" + (f" offset {ago}s" if ago else "")
        line = (
            f"({policy.trend_damping_ratio:.6g} * predict_linear({series}, {horizon - ago}) "
            f"+ {1 - policy.trend_damping_ratio:.6g} * avg_over_time({series}))"
        )
        return _larger(line, tokens(policy.window_seconds, ago))

    level = tokens(policy.window_seconds)
    query = expected(0)
    if policy.miss_quantile_ratio > 0:
        missed = f"clamp_min(1 - {expected(horizon)} / {level}, 0)"
        lately = f"({missed})[{math.ceil(policy.miss_window_seconds)}s:{sync}s]"
        query = f"({query} * (1 + quantile_over_time({policy.miss_quantile_ratio:.6g}, {lately})))"
    if policy.reserve_ratio > 0:
        peak = f"max_over_time(({level})[{math.ceil(policy.reserve_window_seconds)}s:{sync}s])"
        query = _larger(query, f"({policy.reserve_ratio * policy.up_ratio:.6g} * {peak})")
    query += (
        f" + {waiting} * {_number(tokens_per_request)} * {policy.up_ratio:.6g} / {_number(policy.queue_drain_seconds)}"
    )
    return dict(scaled_object(query, capacity * policy.up_ratio, policy.sync_seconds, policy.stabilization_seconds))


def _larger(one: str, other: str) -> str:
    """Both are vectors of one sample without labels: `or` keeps the right one where the comparison left none."""
    return f"({one} >= {other} or {other})"


def _is_beyond(policy: Policy, min_replicas: int) -> bool:
    """Whether a hold, a difference of directions or a scale to nothing is asked for that no object can say."""
    if isinstance(policy, StaticPolicy):
        return False
    if isinstance(policy, TrendPolicy) and policy.down_ratio < policy.up_ratio:
        return True
    return min_replicas < 1 or getattr(policy, "stabilization_seconds", 0.0) > MAX_HOLD_SECONDS


def _behavior(hold_seconds: float, most_up: int | None, tolerance_ratio: float = 0.0) -> Manifest:
    """most_up: replicas that may come at once; None: Kubernetes' default of double or four more, as replayed."""
    period = {"periodSeconds": CLUSTER_SYNC_SECONDS}
    all_of_them = {"type": "Percent", "value": 100} | period
    up = [all_of_them, {"type": "Pods", "value": 4} | period]
    if most_up is not None:
        up = [{"type": "Pods", "value": most_up} | period]
    common = {"selectPolicy": "Max", "tolerance": _number(tolerance_ratio)}
    return {
        "scaleDown": {"stabilizationWindowSeconds": math.ceil(hold_seconds), "policies": [all_of_them]} | common,
        "scaleUp": {"stabilizationWindowSeconds": 0, "policies": up} | common,
    }


def _number(value: float) -> str:
    """Six digits that count, never an exponent: what Kubernetes and KEDA read, and a person too."""
    digits = f"{float(f'{value:.6g}'):f}"
    return digits.rstrip("0").rstrip(".")
