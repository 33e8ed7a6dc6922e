"""A small orchestrator for tests: real HTTP, and every request and answer is held against the OpenAPI document.

It keeps one deployment, `chat`, in memory; its replicas run nothing. What breaks the contract, on either side, is put
into `broken` with its reason, and a test ends by asserting that it is empty.
"""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

Json = dict[str, Any]
CONTRACT = Path(__file__).parents[2] / "docs" / "orchestrator.openapi.yaml"


class Contract:
    """The document, and what of it a request or an answer breaks."""

    def __init__(self) -> None:
        self.document = yaml.safe_load(CONTRACT.read_text())
        resource = Resource(contents=self.document, specification=DRAFT202012)
        self._registry: Registry[Any] = Registry().with_resource("urn:contract", resource)
        self._checkers: dict[str, Draft202012Validator] = {}
        self._paths = {
            path: re.compile("^" + re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path) + "$")
            for path in self.document["paths"]
        }

    def operation(self, method: str, path: str) -> tuple[Json, dict[str, str]] | None:
        """The operation and its path parameters."""
        for template, pattern in self._paths.items():
            match = pattern.match(path)
            item = self.document["paths"][template]
            if match is not None and method.lower() in item:
                shared = item.get("parameters", [])
                own = item[method.lower()]
                return {**own, "parameters": [*shared, *own.get("parameters", [])]}, match.groupdict()
        return None

    def request_faults(self, operation: Json, values: dict[str, str], headers: Any, body: Json | None) -> list[str]:
        found = []
        for reference in operation["parameters"]:
            one = self._resolved(reference)
            value = values.get(one["name"]) if one["in"] == "path" else headers.get(one["name"])
            if value is None:
                found.append(f"{operation['operationId']}: {one['in']} parameter {one['name']} is missing")
            else:
                found += self._faults(one["schema"], value, f"{operation['operationId']} {one['name']}")
        schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
        if schema is None and body is not None:
            found.append(f"{operation['operationId']}: a body where none is wanted")
        elif schema is not None:
            found += self._faults(schema, body, f"{operation['operationId']} body")
        return found

    def answer_faults(self, operation: Json, status: int, body: Json, etag: str | None) -> list[str]:
        name = operation["operationId"]
        answer = self._resolved(operation["responses"].get(str(status), operation["responses"]["default"]))
        kind = next(iter(answer["content"]))
        found = self._faults(answer["content"][kind]["schema"], body, f"{name} answer {status}")
        if "ETag" in answer.get("headers", {}) and etag is None:
            found.append(f"{name} answer {status}: no ETag")
        return found

    def _resolved(self, node: Json) -> Json:
        if "$ref" not in node:
            return node
        found = self.document
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return found

    def _faults(self, schema: Json, value: object, where: str) -> list[str]:
        schema = {"$ref": f"urn:contract{schema['$ref']}"} if "$ref" in schema else schema
        key = json.dumps(schema)
        if key not in self._checkers:
            self._checkers[key] = Draft202012Validator(schema, registry=self._registry)
        checker = self._checkers[key]
        return [f"{where}: {error.json_path}: {error.message}" for error in checker.iter_errors(value)]


@cache
def contract() -> Contract:
    """Read once."""
    return Contract()


class Refusal(Exception):  # noqa: N818
    def __init__(self, status: int, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose path ends so. `is_done`: acted on, not answered."""

    method: str
    end: str
    status: int = 0
    times: int = 1
    is_done: bool = False
    hang_seconds: float = 0.0
    retry_after: int | None = None


@dataclass
class OrchestratorServer:
    token: str = "secret-of-the-test"
    stable: int = 3
    drains_at_once: bool = True
    faults: list[Fault] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    done: list[tuple[str, str]] = field(default_factory=list)
    decisions: dict[str, Json] = field(default_factory=dict)
    demands: list[Json] = field(default_factory=list)
    heartbeats: list[Json] = field(default_factory=list)
    before_change: Any = None

    def __post_init__(self) -> None:
        self.contract = contract()
        self.lock = threading.RLock()
        self.version = 1
        self.keys: dict[str, tuple[str, int, Json, str | None]] = {}
        self.flags: dict[str, str | None] = {}
        self.deployment: Json = {
            "deployment": "chat",
            "rollout_id": None,
            "promoted": None,
            "fencing_token": 0,
            "percent": 0.0,
            "stable_replicas": self.stable,
            "stable_ready": self.stable,
            "candidates": 0,
            "candidates_wanted": 0,
            "candidate_slots": self.stable,
            "candidates_in_flight": 0,
            "counters": {"stable": {"requests": 0, "failed": 0}, "candidate": {"requests": 0, "failed": 0}},
        }
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def answer(self) -> None:
                outer.serve(self)

            do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                return

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def move(self) -> None:
        """Something changed at the deployment: its ETag is another one."""
        with self.lock:
            self.version += 1

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        method, path = handler.command, handler.path
        with self.lock:
            self.asked.append((method, path))
            fault = next(
                (one for one in self.faults if one.times and one.method == method and path.endswith(one.end)), None
            )
            if fault is not None:
                fault.times -= 1
        if fault is not None and not fault.is_done:
            time.sleep(fault.hang_seconds)
            if fault.status == 0:
                handler.close_connection = True
                handler.connection.close()
                return
            self._send(
                handler, fault.status, {"type": "made", "title": "made to fail", "status": fault.status}, None, fault
            )
            return
        if self.before_change is not None and method != "GET":
            self.before_change(method, path)
        found = self.contract.operation(method, path)
        given = json.loads(raw) if raw else None
        if found is None:
            self.broken.append(f"{method} {path} is not in the contract")
            self._send(handler, 404, {"type": "unknown", "title": "unknown", "status": 404}, None, None)
            return
        operation, values = found
        status, answer, etag = 200, {}, None
        try:
            if handler.headers.get("Authorization") != f"Bearer {self.token}":
                raise Refusal(401, "unauthorized", "the token is not known")
            self.broken += self.contract.request_faults(operation, values, handler.headers, given)
            with self.lock:
                status, answer, etag = self._act(operation["operationId"], values, handler.headers, given)
        except Refusal as refusal:
            status = refusal.status
            answer = {"type": refusal.kind, "title": refusal.kind, "status": status, "detail": refusal.detail}
        self.broken += self.contract.answer_faults(operation, status, answer, etag)
        if fault is not None:
            handler.close_connection = True
            handler.connection.close()
            return
        self._send(handler, status, answer, etag, None)

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, status: int, body: Json, etag: str | None, fault: Fault | None) -> None:
        text = json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json" if status < 300 else "application/problem+json")
        handler.send_header("Content-Length", str(len(text)))
        if etag is not None:
            handler.send_header("ETag", etag)
        if fault is not None and fault.retry_after is not None:
            handler.send_header("Retry-After", str(fault.retry_after))
        handler.end_headers()
        handler.wfile.write(text)

    def _act(self, name: str, values: dict[str, str], headers: Any, body: Json | None) -> tuple[int, Json, str | None]:
        if name == "registerAgent":
            return 200, {"agent": values["agent"], "heartbeat_seconds": 15}, None
        if name == "heartbeat":
            assert body is not None
            self.heartbeats.append(body)
            return 200, {"rollbacks": self.demands}, None
        if name in ("requestApproval", "readDecision"):
            return self._decision(values["rollout_id"], body)
        if values["deployment"] != "chat":
            raise Refusal(404, "unknown", f"no deployment {values['deployment']}")
        if name == "readDeployment":
            return 200, self._deployment(), self._etag()
        key, text = headers["Idempotency-Key"], f"{name} {json.dumps(body)}"
        if key in self.keys:
            known, status, answer, etag = self.keys[key]
            if known != text:
                raise Refusal(422, "key-reused", "another body under the same key")
            return status, answer, etag
        token = int(headers["Fencing-Token"])
        if token < self.deployment["fencing_token"]:
            raise Refusal(409, "stale-token", f"token {token} is stale; {self.deployment['fencing_token']} owns it")
        if name != "rollBack" and headers["If-Match"] != self._etag():
            raise Refusal(412, "moved", "the deployment changed since it was read")
        self._change(name, body or {})
        self.deployment["fencing_token"] = token
        self.done.append((name, json.dumps(body)))
        self.version += 1
        answered = 200, self._deployment(), self._etag()
        self.keys[key] = (text, *answered)
        return answered

    def _decision(self, rollout_id: str, body: Json | None) -> tuple[int, Json, None]:
        status = 200
        if body is not None and rollout_id not in self.decisions:
            given = {"rollout_id": rollout_id, "proposal_hash": body["proposal_hash"], "state": "pending"}
            self.decisions[rollout_id], status = given, 201
        return status, self.decisions[rollout_id], None

    def _change(self, name: str, body: Json) -> None:
        now = self.deployment
        if name == "claim":
            if now["rollout_id"] != body["rollout_id"] and now["candidates"]:
                raise Refusal(409, "in-use", f"rollout {now['rollout_id']} has candidates")
            now["rollout_id"] = body["rollout_id"]
        elif name == "startCandidates":
            now["candidates"] = now["candidates_wanted"] = body["count"]
            self.flags = body["flags"]
        elif name == "stopCandidates":
            if now["percent"]:
                raise Refusal(409, "in-use", "candidates have traffic")
            now["candidates"] = now["candidates_wanted"] = 0
        elif name == "setShare":
            if not now["candidates"]:
                raise Refusal(409, "no-ready-candidate", "no candidate is ready")
            now["percent"] = body["percent"]
        elif name == "rollBack":
            now["percent"] = 0.0
        elif self.drains_at_once:
            now.update(promoted=body["rollout_id"], percent=0.0, candidates=0, candidates_wanted=0)

    def _deployment(self) -> Json:
        names = [("stable", index) for index in range(self.stable)]
        names += [("candidate", index) for index in range(self.deployment["candidates"])]
        url = "http://127.0.0.1:9"
        replicas = [
            {"name": f"{arm}-{index}", "arm": arm, "url": url, "metrics_url": f"{url}/metrics", "is_alive": True}
            for arm, index in names
        ]
        return {**self.deployment, "replicas": replicas}

    def _etag(self) -> str:
        return f'"v{self.version}"'
