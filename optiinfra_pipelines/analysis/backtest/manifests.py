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

    def tokens(window: float) -> str:
        span = f"[{math.ceil(window)}s]"
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

    Headroom from past misses has no PromQL form without recording rules and is left out: set up_ratio lower instead.
    """
    window, horizon = policy.trend_window_seconds, cold_start_seconds + policy.sync_seconds
    level = tokens(policy.window_seconds)
    # A subquery keeps the evaluation at every step of the trend window.
    series = f"{tokens(policy.sync_seconds * 2)}[{math.ceil(window)}s:{math.ceil(policy.sync_seconds)}s]"
    line = (
        f"{policy.trend_damping_ratio:.6g} * predict_linear({series}, {math.ceil(horizon)}) "
        f"+ {1 - policy.trend_damping_ratio:.6g} * avg_over_time({series})"
    )
    queued = f"{waiting} * {tokens_per_request:.6g} * {policy.up_ratio:.6g} / {policy.queue_drain_seconds:.6g}"
    # `or` keeps one of two series with equal labels; telling them apart lets max see both.
    either = " or ".join(
        f'label_replace({value}, "term", "{term}", "", "")' for term, value in (("line", line), ("level", level))
    )
    query = f"max({either}) + {queued}"
    return dict(scaled_object(query, capacity * policy.up_ratio, policy.sync_seconds, policy.stabilization_seconds))


def _behavior(hold_seconds: float) -> Manifest:
    return {
        "scaleDown": {"stabilizationWindowSeconds": math.ceil(hold_seconds)},
        "scaleUp": {"stabilizationWindowSeconds": 0},
    }
