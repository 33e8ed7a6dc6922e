"""Targets of rollouts that somebody else's control plane runs: Kubernetes, and an orchestrator with a REST contract.

Nouns only. Secrets are not among them: Kubernetes credentials come from the kubeconfig or the pod's service account,
the orchestrator's token from the environment.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from optiinfra_pipelines.domain.base import Frozen, Name, Positive

# A name of an object in Kubernetes; shorter than its 63, because candidates get a suffix.
KubeName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9\-.]{0,50}[a-z0-9])?$")]
SUFFIX = "-candidate"


class GatewayPage(Frozen):
    """Request counters of the gateway in Prometheus text, by backend: what clients saw, which no engine knows.

    Istio: family istio_requests_total, backend_label destination_service_name, code_label response_code.
    Traefik: traefik_service_requests_total, service, code. Envoy: envoy_cluster_upstream_rq, envoy_cluster_name,
    envoy_response_code, where the gateway makes one cluster per backend.
    """

    url: str = Field(pattern=r"^https?://", description="Metrics page of the gateway's proxy.")
    family: str = "istio_requests_total"
    backend_label: str = "destination_service_name"
    code_label: str = "response_code"
    stable: str | None = Field(default=None, description="The label's value; the stable backend's name when absent.")
    candidate: str | None = Field(default=None, description="The candidate backend's name when absent.")


class KubernetesSettings(Frozen):
    """One Deployment behind one HTTPRoute. Where nothing else is said, the candidate is made from the stable one.

    backend: the stable backendRef's name. backend_kind InferencePool: its twin for candidates must exist, under
    candidate_backend, selecting pods by `optiinfra.io/arm: candidate`, with an endpoint picker of its own; a Service's
    twin is made. pod_url: how this machine reaches a pod; {ip}, {port}, {pod} and {namespace} are filled in. Inside
    the cluster the default works; outside, `kubectl proxy` does:
    http://127.0.0.1:8001/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy
    """

    namespace: KubeName
    deployment: KubeName
    route: KubeName
    backend: KubeName
    backend_kind: Literal["Service", "InferencePool"] = "Service"
    backend_group: str = Field(
        default="", description="inference.networking.k8s.io for an InferencePool; empty for a Service."
    )
    candidate_backend: KubeName | None = Field(default=None, description="backend with -candidate when absent.")
    container: str | None = Field(default=None, description="Container that runs the engine; needed beside sidecars.")
    port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        default=None, description="Port of the engine in the pod; the container's first one when absent."
    )
    metrics_path: str = "/metrics"
    pod_url: str = Field(default="http://{ip}:{port}", pattern=r"^https?://")
    kubeconfig: str | None = Field(
        default=None, description="File; the usual places and the pod's account when absent."
    )
    context: str | None = Field(default=None, description="Context of the kubeconfig; its current one when absent.")
    max_candidates: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Most candidate pods that fit beside the stable ones; as many as those when absent."
    )
    allow_autoscaler: bool = Field(
        default=False, description="Accept a HorizontalPodAutoscaler, which may scale idle stable replicas down."
    )
    gateway: GatewayPage | None = Field(default=None, description="None: errors that clients saw are not judged.")
    drain_seconds: Positive = 60.0

    @property
    def candidate(self) -> str:
        """Name of the candidate Deployment."""
        return self.deployment + SUFFIX

    @property
    def candidate_backend_name(self) -> str:
        return self.candidate_backend or self.backend + SUFFIX


class OrchestratorSettings(Frozen):
    """An orchestrator that speaks docs/orchestrator.openapi.yaml.

    token_variable: name of the environment variable with its bearer token; the token itself stands nowhere.
    """

    url: str = Field(pattern=r"^https?://", description="Root of its API, such as https://orchestrator.example.")
    agent: Name = Field(default="optiinfra", description="What this installation calls itself there.")
    deployment: Name | None = Field(default=None, description="Its name of the deployment; ours when absent.")
    token_variable: str = Field(default="OPTIINFRA_ORCHESTRATOR_TOKEN", pattern=r"^[A-Z][A-Z0-9_]*$")
    asks_approval: bool = Field(default=False, description="Its people approve and reject, beside the launchpad's.")
    drain_seconds: Positive = 60.0
