"""Asks one Kubernetes API server through the official client: objects in and out as JSON, errors that name the remedy.

Every write carries what it was decided on (resourceVersion); 409 comes back as ConflictError and is never overwritten.
What is busy or away (429, 5xx, no connection) is asked again for some seconds. It decides nothing about rollouts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from optiinfra_pipelines.domain.rollout_targets import KubernetesSettings
from resources.rollouts.targets.base import TargetError

Json = dict[str, Any]
MANAGER = "optiinfra"
CONNECT_SECONDS, READ_SECONDS = 2.0, 5.0
# For one question with its repetitions. A look asks a few of them and must come back within the lease of 30 s.
PATIENCE_SECONDS = 6.0
FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS = 0.1, 2.0
_TRY_AGAIN = frozenset({429, 500, 502, 503, 504})
APPLY, MERGE = "application/apply-patch+yaml", "application/merge-patch+json"


class ConflictError(TargetError):
    """The object moved since it was read; read it again and decide anew."""


class GoneError(TargetError):
    """There is no such object."""


@dataclass(frozen=True)
class Resource:
    """One kind of object in one API group; the core group's name is empty."""

    kind: str
    plural: str
    group: str
    version: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def full_name(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


DEPLOYMENTS = Resource("Deployment", "deployments", "apps", "v1")
ROUTES = Resource("HTTPRoute", "httproutes", "gateway.networking.k8s.io", "v1")
SERVICES = Resource("Service", "services", "", "v1")
PODS = Resource("Pod", "pods", "", "v1")
EVENTS = Resource("Event", "events", "", "v1")
AUTOSCALERS = Resource("HorizontalPodAutoscaler", "horizontalpodautoscalers", "autoscaling", "v2")
POOLS = Resource("InferencePool", "inferencepools", "inference.networking.k8s.io", "v1")


class KubeApi:
    """Objects of one namespace. Nothing is connected before the first question; safe across threads."""

    def __init__(
        self, settings: KubernetesSettings, sleep: Callable[[float], None] = time.sleep, random: Random | None = None
    ) -> None:
        self.namespace = settings.namespace
        self._settings = settings
        self._sleep = sleep
        self._random = random or Random(MANAGER)
        self._client: Any = None

    def find(self, resource: Resource, name: str) -> Json | None:
        """An object by name; None when there is none."""
        try:
            return self._ask("get", "GET", resource, name)
        except GoneError:
            return None

    def get(self, resource: Resource, name: str, remedy: str) -> Json:
        """An object that must be there. TargetError with the remedy when it is not."""
        found = self.find(resource, name)
        if found is None:
            raise TargetError(f"{self.namespace} has no {resource.kind} {name}; {remedy}")
        return found

    def list(self, resource: Resource, selector: str = "") -> list[Json]:
        """All objects of a kind with these labels."""
        query = {"labelSelector": selector} if selector else {}
        answer = self._ask("list", "GET", resource, "", query=query)
        items: list[Json] = answer.get("items") or []
        return items

    def apply(self, resource: Resource, body: Json) -> Json:
        """Server-side apply as our field manager; with a resourceVersion in the metadata only onto that version."""
        name = str(body["metadata"]["name"])
        query = {"fieldManager": MANAGER, "force": "true"}
        return self._ask("patch", "PATCH", resource, name, body=body, query=query, content_type=APPLY)

    def merge(self, resource: Resource, name: str, body: Json) -> Json:
        """A merge patch as our field manager; with a resourceVersion in the metadata only onto that version."""
        query = {"fieldManager": MANAGER}
        return self._ask("patch", "PATCH", resource, name, body=body, query=query, content_type=MERGE)

    def create(self, resource: Resource, body: Json) -> Json:
        """A new object. ConflictError when one of its name is there."""
        return self._ask("create", "POST", resource, "", body=body, query={"fieldManager": MANAGER})

    def delete(self, resource: Resource, found: Mapping[str, Any]) -> None:
        """Delete the object that was read and no namesake, with what it owns; one that is gone is no error."""
        metadata = found["metadata"]
        body = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": "Background",
            # Not its version: the status of a Deployment moves all the time, and its end is wanted in any state.
            "preconditions": {"uid": metadata["uid"]},
        }
        try:
            self._ask("delete", "DELETE", resource, str(metadata["name"]), body=body)
        except GoneError:
            return

    def _ask(
        self,
        verb: str,
        method: str,
        resource: Resource,
        name: str,
        *,
        body: Json | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Json:
        what = f"{verb} {resource.kind} {self.namespace}/{name}".rstrip("/")
        until, wait = time.monotonic() + PATIENCE_SECONDS, FIRST_WAIT_SECONDS
        while True:
            status, answer, asked_wait = self._once(method, self._path(resource, name), body, query or {}, content_type)
            if 200 <= status < 300:
                return answer
            message = str(answer.get("message") or answer.get("text") or "no reason given")
            if status and status not in _TRY_AGAIN:
                raise self._refusal(status, message, what, verb, resource, name)
            pause = max(asked_wait, wait * self._random.uniform(0.5, 1.0))
            if time.monotonic() + pause > until:
                cause = f"status {status}: {message}" if status else message
                raise TargetError(f"the Kubernetes API did not {what} in {PATIENCE_SECONDS:.0f} s: {cause}")
            self._sleep(pause)
            wait = min(2 * wait, MAX_WAIT_SECONDS)

    def _once(
        self, method: str, path: str, body: Json | None, query: Mapping[str, str], content_type: str
    ) -> tuple[int, Json, float]:
        """Status, answer and the seconds the server asks to wait; status 0 when none answered."""
        import urllib3

        client = self._connected()
        headers = {"Accept": "application/json", "Content-Type": content_type}
        try:
            serialized = client.param_serialize(
                method, path, query_params=list(query.items()), header_params=headers, body=body,
                auth_settings=["BearerToken"],
            )  # fmt: skip
            reply = client.call_api(*serialized, _request_timeout=(CONNECT_SECONDS, READ_SECONDS))
            text = (reply.read() or b"").decode("utf-8", "replace")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            return 0, {"text": f"{type(error).__name__}: {str(error)[:200]}"}, 0.0
        except Exception as error:
            # The client's own ways to fail: a TLS error, a credential plugin that is missing or refuses.
            raise TargetError(f"the Kubernetes client fails: {type(error).__name__}: {str(error)[:200]}") from error
        try:
            answer = json.loads(text) if text else {}
        except ValueError:
            answer = {"text": text[:200]}
        after = reply.getheader("Retry-After") or ""
        seconds = min(float(after), PATIENCE_SECONDS) if after.isdigit() else 0.0
        return int(reply.status), answer if isinstance(answer, dict) else {}, seconds

    def _connected(self) -> Any:
        if self._client is None:
            try:
                import kubernetes
            except ImportError as error:
                raise TargetError(
                    "target kubernetes needs the package `kubernetes`; install optiinfra-pipelines[kubernetes]"
                ) from error
            configuration = kubernetes.client.Configuration()
            try:
                self._load(kubernetes.config, configuration)
            except Exception as error:
                # A file that is missing, is no YAML, or lacks what it should have: the client has a way for each.
                cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise TargetError(
                    f"no way into a Kubernetes cluster: {cause}; set kubeconfig and context of deployment "
                    f"{self._settings.deployment}, or KUBECONFIG, or run inside the cluster"
                ) from error
            # Repetitions are ours: the client's own would hide how long a server was away.
            configuration.retries = False
            self._client = kubernetes.client.ApiClient(configuration)
        return self._client

    def _load(self, config: Any, configuration: Any) -> None:
        settings = self._settings
        if settings.kubeconfig is None and settings.context is None:
            try:
                config.load_incluster_config(client_configuration=configuration)
            except config.ConfigException:
                pass
            else:
                return
        config.load_kube_config(settings.kubeconfig, settings.context, configuration, persist_config=False)

    def _path(self, resource: Resource, name: str) -> str:
        root = f"/apis/{resource.group}" if resource.group else "/api"
        path = f"{root}/{resource.version}/namespaces/{self.namespace}/{resource.plural}"
        return f"{path}/{name}" if name else path

    def _refusal(self, status: int, message: str, what: str, verb: str, resource: Resource, name: str) -> TargetError:
        if status == 404:
            return GoneError(f"{what}: {message}")
        if status == 409:
            return ConflictError(f"{what}: {message}")
        if status in (401, 403):
            return TargetError(
                f"not allowed to {what}: {message}; grant verb {verb!r} on {resource.full_name} in namespace "
                f"{self.namespace} (docs/kubernetes-rbac.yaml has all that is needed)"
            )
        return TargetError(f"the Kubernetes API refuses to {what}: status {status}: {message}")
