"""The same walk on a real cluster: a candidate gets traffic, goes back, comes again and becomes the Deployment's own.

    export OPTIINFRA_KUBE_CONTEXT=kind OPTIINFRA_KUBE_GATEWAY=infra/gateway
    pytest -m engine tests/rollouts/test_kubernetes_real.py

Needs Gateway API v1 with a Gateway that takes routes of the namespace (OPTIINFRA_KUBE_NAMESPACE, `default` if unset),
and the rights of docs/kubernetes-rbac.yaml plus create and delete of httproutes. Pods run OPTIINFRA_KUBE_IMAGE
(python:3-alpine) and only sleep. Everything made is deleted at the end.
"""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from optiinfra_pipelines.domain.rollout_targets import KubernetesSettings
from resources.rollouts.targets import StaleTokenError
from resources.rollouts.targets.kubernetes.api import DEPLOYMENTS, ROUTES, SERVICES, KubeApi
from resources.rollouts.targets.kubernetes.target import KubernetesTarget

NAME = "optiinfra-test"
NAMESPACE = os.environ.get("OPTIINFRA_KUBE_NAMESPACE", "default")
GATEWAY = os.environ.get("OPTIINFRA_KUBE_GATEWAY")
HAS_CLUSTER = os.environ.get("OPTIINFRA_KUBE_CONTEXT") or os.environ.get("KUBECONFIG")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not (HAS_CLUSTER and GATEWAY), reason="set OPTIINFRA_KUBE_CONTEXT and OPTIINFRA_KUBE_GATEWAY"),
]
SETTINGS = KubernetesSettings(
    namespace=NAMESPACE, deployment=NAME, route=NAME, backend=NAME, context=os.environ.get("OPTIINFRA_KUBE_CONTEXT")
)


def objects() -> list[tuple[Any, dict[str, Any]]]:
    labels, metadata = {"app": NAME}, {"name": NAME, "namespace": NAMESPACE}
    gateway_namespace, gateway = str(GATEWAY).split("/")
    container = {
        "name": "engine",
        "image": os.environ.get("OPTIINFRA_KUBE_IMAGE", "python:3-alpine"),
        "command": ["python"],
        "args": ["-c", "import time; time.sleep(1e6)", "--max-num-seqs", "64"],
        "ports": [{"containerPort": 8000}],
    }
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container], "terminationGracePeriodSeconds": 1}}
    spec = {"replicas": 2, "selector": {"matchLabels": labels}, "template": template}
    rules = [{"backendRefs": [{"name": NAME, "port": 80}]}]
    parents = [{"name": gateway, "namespace": gateway_namespace}]
    return [
        (SERVICES, {"metadata": metadata, "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8000}]}}),
        (DEPLOYMENTS, {"metadata": metadata, "spec": spec}),
        (ROUTES, {"metadata": metadata, "spec": {"parentRefs": parents, "rules": rules}}),
    ]


def until(is_so: Callable[[], object], seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.5)


@pytest.fixture
def api() -> Iterator[KubeApi]:
    made = KubeApi(SETTINGS)
    for resource, body in objects():
        made.create(resource, {"apiVersion": resource.api_version, "kind": resource.kind, **body})
    yield made
    for resource, _ in reversed(objects()):
        for name in (NAME, f"{NAME}-candidate"):
            found = made.find(resource, name)
            if found is not None:
                made.delete(resource, found)


def ready(api: KubeApi, name: str) -> int:
    return int(((api.find(DEPLOYMENTS, name) or {}).get("status") or {}).get("readyReplicas") or 0)


def weights(api: KubeApi) -> dict[str, int | None]:
    [rule] = api.get(ROUTES, NAME, "it was made")["spec"]["rules"]
    return {one["name"]: one.get("weight") for one in rule["backendRefs"]}


def test_a_candidate_goes_there_and_back_and_then_stays(api: KubeApi) -> None:
    until(lambda: ready(api, NAME) == 2)
    until(lambda: (api.get(ROUTES, NAME, "").get("status") or {}).get("parents"))
    target = KubernetesTarget(SETTINGS, api, in_flight=lambda _: 0)
    before = weights(api)
    target.claim("r-1", 1)
    target.start_candidates(1, {"max_num_seqs": "128"}, 1)
    until(lambda: ready(api, f"{NAME}-candidate") == 1)
    for percent in (10.0, 50.0):
        target.set_share(percent, 1)
        assert target.observe().percent == percent
    KubernetesTarget(SETTINGS, api).claim("r-1", 2)
    with pytest.raises(StaleTokenError):
        target.set_share(100.0, 1)
    target.set_share(0.0, 2)
    until(lambda: target.drain(2))
    target.stop_candidates(2)
    until(lambda: target.observe().candidates == 0)
    assert weights(api) == before
    target.claim("r-2", 3)
    target.start_candidates(2, {"max_num_seqs": "256"}, 3)
    until(lambda: ready(api, f"{NAME}-candidate") == 2)
    target.set_share(100.0, 3)
    until(lambda: target.promote("r-2", 3))

    assert weights(api) == before
    [container] = api.get(DEPLOYMENTS, NAME, "")["spec"]["template"]["spec"]["containers"]
    assert container["args"][-1] == "--max-num-seqs=256"
    assert api.find(DEPLOYMENTS, f"{NAME}-candidate") is None
