"""What a candidate's Deployment and Service look like, made from the stable ones; and what a Deployment's status says.

Pure: objects in, objects out, as the API has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from optiinfra_pipelines.domain.rollout_targets import SUFFIX, KubernetesSettings
from resources.rollouts.targets.base import Flags, TargetError
from resources.rollouts.targets.kubernetes.command import refuse_shell, with_flags

Json = dict[str, Any]
ARM, OF, ROLLOUT, TOKEN = (f"optiinfra.io/{name}" for name in ("arm", "deployment", "rollout", "token"))
PROMOTED = "optiinfra.io/promoted"
# One label is enough to leave a selector, and these say best that it is another instance of the same thing.
_LABELS_TO_CHANGE = ("app.kubernetes.io/instance", "app", "app.kubernetes.io/name")
MAX_LABEL = 63


def engine_container(deployment: Mapping[str, Any], settings: KubernetesSettings) -> Json:
    """The container that runs the engine. TargetError when it cannot be told, or a shell script starts it."""
    containers: list[Json] = deployment["spec"]["template"]["spec"]["containers"]
    names = [one["name"] for one in containers]
    where = f"Deployment {settings.namespace}/{settings.deployment}"
    wanted = settings.container or (names[0] if len(names) == 1 else None)
    if wanted is None:
        raise TargetError(f"{where} has containers {', '.join(names)}; name the engine's in `container`")
    for container in containers:
        if container["name"] == wanted:
            refuse_shell([*container.get("command", []), *container.get("args", [])], f"{where}, container {wanted},")
            return container
    raise TargetError(f"{where} has no container {wanted}; these are: {', '.join(names)}")


def engine_port(deployment: Mapping[str, Any], settings: KubernetesSettings) -> int:
    """The port that serves API and metrics."""
    ports = engine_container(deployment, settings).get("ports") or []
    if settings.port is None and not ports:
        raise TargetError(f"Deployment {settings.namespace}/{settings.deployment} names no port; set `port`")
    return settings.port or int(ports[0]["containerPort"])


def words_with_flags(container: Mapping[str, Any], flags: Flags) -> tuple[str, list[str]]:
    """Which of `command` and `args` the flags belong in, and its words with them."""
    field = "args" if container.get("args") or not container.get("command") else "command"
    return field, with_flags(container.get(field) or [], flags)


def candidate_labels(deployment: Mapping[str, Any], *selectors: Mapping[str, str]) -> dict[str, str]:
    """The pod labels of a candidate, which no selector of the stable pods matches any more.

    selectors: matchLabels of the stable Deployment and of its backend. TargetError for one without labels.
    """
    labels = dict(deployment["spec"]["template"]["metadata"].get("labels") or {})
    for selector in selectors:
        if not selector:
            raise TargetError(
                f"a selector of Deployment {deployment['metadata']['name']} or its backend names no labels, so it "
                "would choose the candidate's pods too; give both matchLabels"
            )
        if any(labels.get(key) != value for key, value in selector.items()):
            continue
        key = next((one for one in _LABELS_TO_CHANGE if one in selector), sorted(selector)[0])
        labels[key] = labels[key][: MAX_LABEL - len(SUFFIX)] + SUFFIX
    return {**labels, ARM: "candidate", OF: deployment["metadata"]["name"]}


def candidate_deployment(
    stable: Mapping[str, Any],
    settings: KubernetesSettings,
    labels: Mapping[str, str],
    count: int,
    flags: Flags,
) -> Json:
    """A Deployment as the stable one, with its own name and labels, `count` replicas and changed flags."""
    spec = deepcopy(dict(stable["spec"]))
    own = {key: labels[key] for key in (*stable["spec"]["selector"].get("matchLabels", {}), ARM, OF)}
    spec.update(replicas=count, selector={"matchLabels": own})
    spec["template"]["metadata"] = {**spec["template"].get("metadata", {}), "labels": dict(labels)}
    spec["template"]["metadata"].pop("creationTimestamp", None)
    made = {"metadata": {"name": settings.candidate}, "spec": spec}
    container = engine_container(made, settings)
    field, words = words_with_flags(container, flags)
    container[field] = words
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": settings.candidate, "namespace": settings.namespace, "labels": {ARM: "candidate"}},
        "spec": spec,
    }


def candidate_service(stable: Mapping[str, Any], settings: KubernetesSettings, labels: Mapping[str, str]) -> Json:
    """A Service as the stable one, which chooses the candidate's pods."""
    spec = stable["spec"]
    ports = [{key: value for key, value in port.items() if key != "nodePort"} for port in spec["ports"]]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": settings.candidate_backend_name,
            "namespace": settings.namespace,
            "labels": {ARM: "candidate"},
        },
        "spec": {"type": "ClusterIP", "ports": ports, "selector": {ARM: "candidate", OF: labels[OF]}},
    }


def owner_of(candidate: Mapping[str, Any]) -> str | None:
    """The rollout that made a candidate Deployment; None for one that nobody signed."""
    owner: str | None = (candidate["metadata"].get("annotations") or {}).get(ROLLOUT)
    return owner


def rollout_of(deployment: Mapping[str, Any], replicas: int) -> bool:
    """Whether a rolling update is through: every replica is of the newest template and available.

    TargetError when it is stuck, or an autoscaler took replicas away meanwhile.
    """
    name = f"Deployment {deployment['metadata'].get('namespace')}/{deployment['metadata']['name']}"
    spec, status = deployment["spec"], deployment.get("status") or {}
    wanted = int(spec.get("replicas", 1))
    if wanted < replicas:
        raise TargetError(
            f"{name} was scaled to {wanted}, it had {replicas} replicas; scale it back and pause its scaler"
        )
    for condition in status.get("conditions") or []:
        if condition["type"] == "Progressing" and condition.get("reason") == "ProgressDeadlineExceeded":
            raise TargetError(f"{name} does not become ready with the new flags: {condition.get('message')}")
    counts = [int(status.get(key) or 0) for key in ("replicas", "updatedReplicas", "availableReplicas")]
    is_observed = int(status.get("observedGeneration") or 0) >= int(deployment["metadata"].get("generation") or 0)
    return is_observed and counts == [wanted] * 3


def selector_text(deployment: Mapping[str, Any]) -> str:
    """A Deployment's selector as the API's query wants it."""
    selector = deployment["spec"]["selector"]
    parts = [f"{key}={value}" for key, value in (selector.get("matchLabels") or {}).items()]
    for one in selector.get("matchExpressions") or []:
        values = f" ({','.join(one.get('values') or [])})"
        text = {
            "In": f"{one['key']} in{values}",
            "NotIn": f"{one['key']} notin{values}",
            "Exists": one["key"],
            "DoesNotExist": f"!{one['key']}",
        }
        parts.append(text[one["operator"]])
    return ",".join(parts)
