"""One Deployment `chat` behind one HTTPRoute on the tests' API server, and a target with a kubeconfig of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from optiinfra_pipelines.domain.rollout_targets import KubernetesSettings
from resources.rollouts.targets.kubernetes.api import KubeApi
from resources.rollouts.targets.kubernetes.target import KubernetesTarget
from tests.rollouts.kube_server import KubeServer

Json = dict[str, Any]


class Server(Protocol):
    """An API server of the tests. cluster: how a kubeconfig finds and trusts it."""

    url: str
    token: str

    @property
    def cluster(self) -> Json: ...


FLAGS: dict[str, str | None] = {"max_num_seqs": "128"}


def deployment(args: list[str] | None = None, replicas: int = 3) -> Json:
    container = {
        "name": "engine",
        "image": "vllm",
        "args": args or ["--model", "tiny", "--max-num-seqs", "64"],
        "ports": [{"containerPort": 8000}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "chat", "namespace": "llm"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "chat"}},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}},
            "template": {"metadata": {"labels": {"app": "chat", "team": "ml"}}, "spec": {"containers": [container]}},
        },
    }


def service() -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "chat", "namespace": "llm"},
        "spec": {"selector": {"app": "chat"}, "ports": [{"port": 80, "targetPort": 8000}], "clusterIP": "10.0.0.1"},
    }


def route(*rules: Json) -> Json:
    backend = {"group": "", "kind": "Service", "name": "chat", "port": 80}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "chat", "namespace": "llm"},
        "spec": {"parentRefs": [{"name": "gateway"}], "rules": list(rules) or [{"backendRefs": [backend]}]},
    }


def cluster() -> KubeServer:
    """A server with the deployment, its service and its route."""
    server = KubeServer()
    server.put("services", service())
    server.put("deployments", deployment())
    server.put("httproutes", route())
    server.requests.clear()
    return server


def settings(server: Server, folder: Path, **more: Any) -> KubernetesSettings:
    """With a kubeconfig file that points at the server."""
    file = folder / f"kubeconfig-{server.url.rsplit(':', 1)[1]}"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": server.cluster}],
        "users": [{"name": "test", "user": {"token": server.token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    }
    file.write_text(json.dumps(config))
    given = {"namespace": "llm", "deployment": "chat", "route": "chat", "backend": "chat", "kubeconfig": str(file)}
    return KubernetesSettings(**{**given, "drain_seconds": 20.0, **more})


def target(given: KubernetesSettings, **more: Any) -> KubernetesTarget:
    """A target whose pauses between repetitions take no time."""
    return KubernetesTarget(given, KubeApi(given, sleep=lambda _: None), **more)
