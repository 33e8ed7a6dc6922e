"""A small Kubernetes API server for tests: real HTTP, objects in memory, and the controllers that rollouts wait for.

As the real one, as far as it goes: resourceVersion and 409, generation, server-side apply with field managers and
conflicts, merge patch, preconditions of a delete, label selectors, Status answers. What it has not: watch, dry-run,
admission, defaults, schemas, OpenAPI, rights. Pods are made by it and run nothing, unless `run_pod` is given. A test
makes it refuse, hang or break by `faults`.
"""

from __future__ import annotations

import copy
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]
_PATH = re.compile(
    r"^/(?:api|apis/(?P<group>[^/]+))/(?P<version>[^/]+)/namespaces/(?P<ns>[^/]+)/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?$"
)
# Lists that server-side apply merges by a key; all others belong to one manager as a whole.
_KEYED = {"containers": "name"}


class StatusError(Exception):
    """An answer of the API other than success."""

    def __init__(self, code: int, reason: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.retry_after = code, reason, message, retry_after


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match. code 0: the connection is cut."""

    method: str
    path: str
    code: int
    times: int = 1
    retry_after: int | None = None
    hang_seconds: float = 0.0
    reason: str = "Test"


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    content_type: str


@dataclass
class KubeServer:
    """Start it, put objects in, point a kubeconfig at `url`. pods_ready: whether new pods become ready."""

    token: str = "test-token"
    pods_ready: bool = True
    takes_up_routes: bool = True
    run_pod: Callable[[Json], str] | None = None
    end_pod: Callable[[Json], None] | None = None
    objects: dict[tuple[str, str, str], Json] = field(default_factory=dict)
    managed: dict[tuple[str, str, str], dict[tuple[str, ...], set[str]]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    before_write: Callable[[str, str], None] | None = None
    is_down: bool = False

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.version = 100
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Headers and body are two writes; without this each answer waits 40 ms for an ACK.
            disable_nagle_algorithm = True

            def answer(self) -> None:
                outer.serve(self)

            do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                return

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def cluster(self) -> Json:
        """As a kubeconfig names it."""
        return {"server": self.url}

    def close(self) -> None:
        if self.end_pod is not None:
            for pod in self.all("pods"):
                self.end_pod(pod)
        self.server.shutdown()
        self.server.server_close()

    # --- for tests ---------------------------------------------------------------------------------------

    def put(self, plural: str, body: Json, namespace: str = "llm") -> Json:
        """Store an object as kubectl would, and let controllers act on it."""
        with self.lock:
            return self._store(plural, namespace, body["metadata"]["name"], body)

    def get(self, plural: str, name: str, namespace: str = "llm") -> Json | None:
        with self.lock:
            return copy.deepcopy(self.objects.get((plural, namespace, name)))

    def all(self, plural: str) -> list[Json]:
        with self.lock:
            return [copy.deepcopy(one) for key, one in self.objects.items() if key[0] == plural]

    def edit(self, plural: str, name: str, change: Callable[[Json], None]) -> None:
        """Somebody else changes an object."""
        with self.lock:
            body = copy.deepcopy(self.objects[plural, "llm", name])
            change(body)
            self._store(plural, "llm", name, body)

    def weights(self, name: str = "chat") -> list[dict[str, int | None]]:
        found = self.get("httproutes", name)
        assert found is not None
        return [{ref["name"]: ref.get("weight") for ref in rule["backendRefs"]} for rule in found["spec"]["rules"]]

    # --- HTTP ----------------------------------------------------------------------------------------------

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        raw = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        kind = (handler.headers.get("Content-Type") or "").split(";")[0]
        method = handler.command
        with self.lock:
            self.requests.append(Request(method, url.path, query, kind))
            fault = self._fault(method, url.path)
        if self.is_down or (fault is not None and fault.code == 0):
            if fault is not None:
                time.sleep(fault.hang_seconds)
            handler.close_connection = True
            handler.connection.close()
            return
        try:
            if fault is not None:
                raise StatusError(fault.code, fault.reason, f"made to fail: {fault.reason}", fault.retry_after)
            if handler.headers.get("Authorization") != f"Bearer {self.token}":
                raise StatusError(401, "Unauthorized", "Unauthorized")
            match = _PATH.match(url.path)
            if match is None:
                raise StatusError(404, "NotFound", "the server could not find the requested resource")
            if method != "GET" and self.before_write is not None:
                self.before_write(method, url.path)
            body = json.loads(raw) if raw else {}
            with self.lock:
                code, answer = self._act(method, match["plural"], match["ns"], match["name"], body, query, kind)
        except StatusError as error:
            code = error.code
            answer = {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "message": error.message,
                "reason": error.reason,
                "code": code,
            }
            fault = fault or Fault("", "", code, retry_after=error.retry_after)
        text = json.dumps(answer).encode()
        handler.send_response(code)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(text)))
        if fault is not None and fault.retry_after is not None:
            handler.send_header("Retry-After", str(fault.retry_after))
        handler.end_headers()
        handler.wfile.write(text)

    def _fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method in ("", method) and fault.path in path:
                fault.times -= 1
                return fault
        return None

    # --- objects -------------------------------------------------------------------------------------------

    def _act(
        self, method: str, plural: str, ns: str, name: str | None, body: Json, query: dict[str, str], kind: str
    ) -> tuple[int, Json]:
        if method == "GET" and name is None:
            wanted = query.get("labelSelector", "")
            items = [one for key, one in self.objects.items() if key[:2] == (plural, ns) and _selected(one, wanted)]
            return 200, {"kind": "List", "metadata": {"resourceVersion": str(self.version)}, "items": items}
        if method == "POST":
            key = (plural, ns, body["metadata"]["name"])
            if key in self.objects:
                raise StatusError(409, "AlreadyExists", f'{plural} "{key[2]}" already exists')
            return 201, self._store(plural, ns, key[2], body)
        assert name is not None
        found = self.objects.get((plural, ns, name))
        if method == "PATCH" and kind == "application/apply-patch+yaml":
            return 200, self._apply(plural, ns, name, body, query, found)
        if found is None:
            raise StatusError(404, "NotFound", f'{plural} "{name}" not found')
        if method == "GET":
            return 200, found
        if method == "DELETE":
            for key, value in (body.get("preconditions") or {}).items():
                if found["metadata"].get(key) != value:
                    raise StatusError(409, "Conflict", f"Precondition failed: {key} in precondition: {value}")
            self._remove(plural, ns, name)
            return 200, {"kind": "Status", "status": "Success"}
        if method == "PATCH" and kind == "application/merge-patch+json":
            self._check_version(found, body)
            merged = _merged(copy.deepcopy(found), body)
            for path in _leaves(body):
                self.managed.setdefault((plural, ns, name), {})[path] = {query.get("fieldManager", "unknown")}
            return 200, self._store(plural, ns, name, merged)
        raise StatusError(415, "UnsupportedMediaType", f"{method} with {kind}")

    def _check_version(self, found: Json, body: Json) -> None:
        wanted = body.get("metadata", {}).get("resourceVersion")
        if wanted is not None and wanted != found["metadata"]["resourceVersion"]:
            name = found["metadata"]["name"]
            raise StatusError(409, "Conflict", f'"{name}": the object has been modified; please apply your changes')

    def _apply(self, plural: str, ns: str, name: str, body: Json, query: dict[str, str], found: Json | None) -> Json:
        manager = query.get("fieldManager")
        if not manager:
            raise StatusError(400, "BadRequest", "PatchOptions.meta.k8s.io is invalid: fieldManager: Required value")
        if found is not None:
            self._check_version(found, body)
        elif body["metadata"].get("resourceVersion"):
            raise StatusError(409, "Conflict", f'{plural} "{name}" does not exist at this resourceVersion')
        managed = {path: set(who) for path, who in self.managed.get((plural, ns, name), {}).items()}
        applied = {path: value for path, value in _leaves(body).items() if path[0] not in ("apiVersion", "kind")}
        present = _leaves(found or {})
        theirs = sorted(
            path
            for path, value in applied.items()
            if managed.get(path, set()) - {manager} and present.get(path) != value and path[-1] != "resourceVersion"
        )
        if theirs and query.get("force") != "true":
            listed = ", ".join(".".join(path) for path in theirs)
            raise StatusError(409, "Conflict", f"Apply failed with conflicts: {listed}")
        merged = copy.deepcopy(found) if found is not None else {}
        for path, who in list(managed.items()):
            if path in applied or manager not in who:
                continue
            who.discard(manager)
            if not who:
                _take_away(merged, path)
                del managed[path]
        merged = _merged(merged, body, keyed=True)
        for path in applied:
            managed[path] = {manager} if path in theirs else managed.get(path, set()) | {manager}
        self.managed[plural, ns, name] = managed
        return self._store(plural, ns, name, merged)

    def _store(self, plural: str, ns: str, name: str, body: Json) -> Json:
        body = copy.deepcopy(body)
        old = self.objects.get((plural, ns, name))
        metadata = body["metadata"]
        metadata.setdefault("namespace", ns)
        metadata.setdefault("uid", f"uid-{self.version}")
        self.version += 1
        metadata["resourceVersion"] = str(self.version)
        same_spec = old is not None and old.get("spec") == body.get("spec")
        metadata["generation"] = (old["metadata"]["generation"] + (not same_spec)) if old is not None else 1
        self.objects[plural, ns, name] = body
        self._control(plural, body)
        return copy.deepcopy(self.objects.get((plural, ns, name), body))

    def _remove(self, plural: str, ns: str, name: str) -> None:
        self.objects.pop((plural, ns, name))
        self.managed.pop((plural, ns, name), None)
        self.version += 1
        if plural == "deployments":
            for pod in self._pods_of(name):
                self._end(pod)

    # --- controllers -----------------------------------------------------------------------------------------

    def _control(self, plural: str, body: Json) -> None:
        if plural == "deployments":
            self._control_deployment(body)
        if plural == "httproutes" and self.takes_up_routes:
            self.take_up(body)

    def take_up(self, body: Json) -> None:
        """A gateway's controller has seen this generation; a backend that is not there is not resolved."""
        refs = [ref for rule in body["spec"]["rules"] for ref in rule.get("backendRefs") or []]
        services = {key[2] for key in self.objects if key[0] in ("services", "inferencepools")}
        missing = [ref["name"] for ref in refs if ref["name"] not in services]
        generation = body["metadata"]["generation"]
        conditions = [
            {"type": "Accepted", "status": "True", "reason": "Accepted", "observedGeneration": generation},
            {
                "type": "ResolvedRefs",
                "status": "False" if missing else "True",
                "reason": "BackendNotFound" if missing else "ResolvedRefs",
                "message": f"service {', '.join(missing)} not found" if missing else "",
                "observedGeneration": generation,
            },
        ]
        body["status"] = {"parents": [{"parentRef": {"name": "gateway"}, "conditions": conditions}]}

    def _pods_of(self, deployment: str) -> list[Json]:
        return [one for key, one in self.objects.items() if key[0] == "pods" and one["of"] == deployment]

    def _control_deployment(self, body: Json) -> None:
        name, spec = body["metadata"]["name"], body["spec"]
        template = json.dumps(spec["template"], sort_keys=True)
        pods = self._pods_of(name)
        for pod in [one for one in pods if one["template"] != template]:
            self._end(pod)
        pods = [one for one in pods if one["template"] == template]
        for pod in pods[spec["replicas"] :]:
            self._end(pod)
        for _ in range(spec["replicas"] - len(pods)):
            self._begin(name, spec, template)
        self.count(name)

    def count(self, name: str) -> None:
        """The Deployment's status, from its pods."""
        body = self.objects["deployments", "llm", name]
        pods = self._pods_of(name)
        ready = sum(1 for pod in pods if pod["status"]["conditions"][0]["status"] == "True")
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        body["status"] = {
            "observedGeneration": body["metadata"]["generation"],
            "replicas": len(pods),
            "updatedReplicas": len(pods),
            "readyReplicas": ready,
            "availableReplicas": ready,
        }

    def _begin(self, deployment: str, spec: Json, template: str) -> None:
        self.version += 1
        name = f"{deployment}-{self.version}"
        pod: Json = {
            "apiVersion": "v1",
            "kind": "Pod",
            "of": deployment,
            "template": template,
            "metadata": {"name": name, "namespace": "llm", "labels": spec["template"]["metadata"]["labels"]},
            "spec": spec["template"]["spec"],
            "status": {
                "phase": "Running",
                "podIP": "127.0.0.1",
                "conditions": [{"type": "Ready", "status": "True" if self.pods_ready else "False"}],
                "containerStatuses": [
                    {"name": one["name"], "restartCount": 0, "state": {"running": {}}}
                    for one in spec["template"]["spec"]["containers"]
                ],
            },
        }
        if self.run_pod is not None:
            pod["status"]["podIP"] = self.run_pod(pod)
        self.objects["pods", "llm", name] = pod

    def _end(self, pod: Json) -> None:
        self.objects.pop(("pods", "llm", pod["metadata"]["name"]))
        if self.end_pod is not None:
            self.end_pod(pod)


def _selected(body: Json, selector: str) -> bool:
    labels = body["metadata"].get("labels") or {}
    return all(labels.get(part.split("=")[0]) == part.split("=")[1] for part in selector.split(",") if part)


def _leaves(body: Json, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Fields as server-side apply owns them: keyed lists by element, other lists whole."""
    found: dict[tuple[str, ...], Any] = {}
    for key, value in body.items():
        here = (*path, key)
        if isinstance(value, dict) and value:
            found.update(_leaves(value, here))
        elif key in _KEYED and isinstance(value, list):
            for item in value:
                found.update(_leaves(item, (*here, item[_KEYED[key]])))
        else:
            found[here] = value
    return found


def _merged(into: Json, patch: Json, *, keyed: bool = False) -> Json:
    for key, value in patch.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict):
            into[key] = _merged(into.get(key) if isinstance(into.get(key), dict) else {}, value, keyed=keyed)
        elif keyed and key in _KEYED and isinstance(into.get(key), list):
            by = {item[_KEYED[key]]: item for item in into[key]}
            for item in value:
                by[item[_KEYED[key]]] = _merged(by.get(item[_KEYED[key]], {}), item, keyed=True)
            into[key] = list(by.values())
        else:
            into[key] = copy.deepcopy(value)
    return into


def _take_away(body: Json, path: tuple[str, ...]) -> None:
    for part in path[:-1]:
        nested = body.get(part)
        if not isinstance(nested, dict):
            return
        body = nested
    body.pop(path[-1], None)
