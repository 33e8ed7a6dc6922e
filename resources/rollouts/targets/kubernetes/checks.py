"""What must hold before the first change of a rollout on Kubernetes; each refusal with its remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optiinfra_pipelines.domain.rollout_targets import KubernetesSettings
from resources.rollouts.targets.base import TargetError
from resources.rollouts.targets.kubernetes import objects, route
from resources.rollouts.targets.kubernetes.api import AUTOSCALERS, POOLS, SERVICES, KubeApi

Json = dict[str, Any]


def backend_selector(api: KubeApi, settings: KubernetesSettings) -> dict[str, str]:
    """Labels by which the stable backend chooses its pods. TargetError when it is not there."""
    if settings.backend_kind == "Service":
        service = api.get(SERVICES, settings.backend, f"HTTPRoute {settings.route} names it: check `backend`")
        return dict(service["spec"].get("selector") or {})
    pool = api.get(POOLS, settings.backend, f"HTTPRoute {settings.route} names it: check `backend`")
    return dict(pool["spec"]["selector"].get("matchLabels") or {})


def refuse_unfit(
    api: KubeApi,
    settings: KubernetesSettings,
    found: Json,
    stable: Json,
    candidate: Json | None,
    rollout_id: str,
) -> None:
    """TargetError with everything that keeps a rollout from beginning here."""
    rules = found["spec"].get("rules") or []
    where = f"HTTPRoute {settings.namespace}/{settings.route}"
    faults = []
    if not route.stable_rules(rules, settings):
        kind = f"{settings.backend_kind} {settings.backend}"
        faults.append(f"{where} sends nothing to {kind}: check `backend`, `backend_kind` and `backend_group`")
    elif not any(
        _weighs(weights.get(settings.backend)) for weights in route.original_weights(rules, settings).values()
    ):
        faults.append(f"{where} gives {settings.backend} weight 0; give it its weight first")
    percent = route.percent_of(rules, settings)
    if percent > 0:
        faults.append(f"{settings.candidate_backend_name} has {percent:g} % of {where} already; set its weight to 0")
    untaken = route.unaccepted(found)
    if untaken is not None:
        faults.append(f"{where}: {untaken}")
    if candidate is not None:
        owner = objects.owner_of(candidate) or "nobody known"
        if owner != rollout_id:
            faults.append(
                f"Deployment {settings.namespace}/{settings.candidate} is there already, of {owner}; delete it"
            )
    if not int((stable.get("status") or {}).get("readyReplicas") or 0):
        faults.append(f"Deployment {settings.namespace}/{settings.deployment} has no ready pod")
    objects.engine_port(stable, settings)
    objects.candidate_labels(
        stable, stable["spec"]["selector"].get("matchLabels") or {}, backend_selector(api, settings)
    )
    if settings.backend_kind == "InferencePool":
        faults += _pool_faults(api, settings)
    if not settings.allow_autoscaler:
        faults += _autoscaler_faults(api, settings)
    if faults:
        raise TargetError("; ".join(faults))


def _weighs(weight: int | None) -> bool:
    return weight is None or weight > 0


def _pool_faults(api: KubeApi, settings: KubernetesSettings) -> list[str]:
    name = settings.candidate_backend_name
    pool = api.find(POOLS, name)
    if pool is None:
        remedy = f"selector {objects.ARM}: candidate and an endpoint picker of its own"
        return [
            f"{settings.namespace} has no InferencePool {name}; make it, as {settings.backend} is but with {remedy}"
        ]
    selector: Mapping[str, str] = pool["spec"]["selector"].get("matchLabels") or {}
    if selector.get(objects.ARM) != "candidate":
        return [f"InferencePool {name} does not choose pods by {objects.ARM}: candidate; add it to its selector"]
    return []


def _autoscaler_faults(api: KubeApi, settings: KubernetesSettings) -> list[str]:
    found = [
        str(one["metadata"]["name"])
        for one in api.list(AUTOSCALERS)
        if (one["spec"].get("scaleTargetRef") or {}).get("kind") == "Deployment"
        and one["spec"]["scaleTargetRef"].get("name") == settings.deployment
    ]
    return [
        f"HorizontalPodAutoscaler {name} scales Deployment {settings.deployment} and would take pods away while the "
        "candidate has their traffic; pause it for the rollout (KEDA: annotation autoscaling.keda.sh/paused-replicas) "
        "or set allow_autoscaler with a fitting minReplicas"
        for name in found
    ]
