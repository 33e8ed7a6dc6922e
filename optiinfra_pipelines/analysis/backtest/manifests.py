"""The Kubernetes manifest that sets a scaling policy: exact HPA and KEDA parameters as plain dicts.

Pure; nothing is applied here. Demand is measured in tokens per second from vLLM's own counters, so `capacity` must be
in tokens per second and replica, and waiting work in tokens is waiting requests times `tokens_per_request`.
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

    The selector is job="<deployment>": change it where your scrape configuration names replicas otherwise.
    """
    selector = f'{{job="{deployment}"}}'
    waiting = f"sum(vllm:num_requests_waiting{selector})"

    def tokens(window: float, ago: float = 0.0) -> str:
        span = f"[{math.ceil(window)}s]" + (f" offset {math.ceil(ago)}s" if ago else "")
        counters = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
        return "(" + " + ".join(f"sum(rate({counter}{selector}{span}))" for counter in counters) + ")"

    def scaled_object(query: str, threshold: float, sync: float, hold: float) -> Manifest:
        return {
            "apiVersion": "keda.sh/v1alpha1",
            "kind": "ScaledObject",
            "metadata": {"name": deployment, "namespace": namespace},
            "spec": {
                "scaleTargetRef": {"name": deployment},
                "minReplicaCount": min_replicas,
                "maxReplicaCount": max_replicas,
                "pollingInterval": math.ceil(sync),
                "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior(hold)}},
                "triggers": [
                    {
                        "type": "prometheus",
                        "metricType": "AverageValue",
                        "metadata": {"serverAddress": prometheus_url, "query": query, "threshold": f"{threshold:.6g}"},
                    }
                ],
            },
        }

    match policy:
        case StaticPolicy():
            return {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "metadata": {"name": deployment, "namespace": namespace},
                "spec": {"replicas": policy.replicas},
            }
        case HpaPolicy():
            metric = {
                "type": "Pods",
                "pods": {
                    "metric": {"name": "optiinfra_tokens_per_second"},
                    "target": {"type": "AverageValue", "averageValue": f"{capacity * policy.target_ratio:.6g}"},
                },
            }
            return {
                "apiVersion": "autoscaling/v2",
                "kind": "HorizontalPodAutoscaler",
                "metadata": {"name": deployment, "namespace": namespace},
                "spec": {
                    "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment},
                    "minReplicas": min_replicas,
                    "maxReplicas": max_replicas,
                    "metrics": [metric],
                    "behavior": _behavior(policy.stabilization_seconds),
                },
            }
        case KedaWaitingPolicy():
            return scaled_object(waiting, policy.waiting_per_replica, policy.sync_seconds, policy.stabilization_seconds)
        case KedaLoadPolicy():
            queued = f"{waiting} * {tokens_per_request:.6g} / {policy.queue_drain_seconds:.6g}"
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
    query += f" + {waiting} * {tokens_per_request:.6g} * {policy.up_ratio:.6g} / {policy.queue_drain_seconds:.6g}"
    return dict(scaled_object(query, capacity * policy.up_ratio, policy.sync_seconds, policy.stabilization_seconds))


def _larger(one: str, other: str) -> str:
    """Both are vectors of one sample without labels: `or` keeps the right one where the comparison left none."""
    return f"({one} >= {other} or {other})"


def _behavior(hold_seconds: float) -> Manifest:
    return {
        "scaleDown": {"stabilizationWindowSeconds": math.ceil(hold_seconds)},
        "scaleUp": {"stabilizationWindowSeconds": 0},
    }
