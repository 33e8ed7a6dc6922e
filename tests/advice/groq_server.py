"""A server on 127.0.0.1 that speaks the Groq chat-completions protocol, and can fail in each way that it can.

It checks a request as the service does (key, model, messages, a schema that strict decoding takes) and answers from a
script: one behavior per request, the last one for all further requests.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Body = dict[str, Any]
Behavior = Callable[["Handler", Body], None]
KEY = "gsk_loopback_0123456789"


@dataclass
class GroqServer:
    """Serves until the `with` block ends. `requests`: bodies in order; `seen_keys`: what Authorization held."""

    script: Sequence[Behavior]
    requests: list[Body] = field(default_factory=list)
    seen_keys: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.script_of = self  # type: ignore[attr-defined]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environ(self) -> dict[str, str]:
        return {"GROQ_API_KEY": KEY, "GROQ_BASE_URL": self.url}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Quiet: a test's output is its own."""

    @property
    def owner(self) -> GroqServer:
        owner: GroqServer = self.server.script_of  # type: ignore[attr-defined]
        return owner

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner = self.owner
        owner.requests.append(body)
        owner.seen_keys.append(self.headers.get("Authorization", ""))
        fault = request_fault(self.path, self.headers, body)
        try:
            if fault is not None:
                self.fail(fault[0], fault[1], fault[2])
            else:
                owner.script[min(len(owner.requests), len(owner.script)) - 1](self, body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client hung up, which is what some tests are about

    def send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def fail(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        error = {"error": {"message": message, "type": "invalid_request_error", "code": code}}
        self.send(status, json.dumps(error).encode(), headers)


def request_fault(path: str, headers: Any, body: Body) -> tuple[int, str, str] | None:
    """Why the real service would refuse this request: status, code, message."""
    if path != "/openai/v1/chat/completions":
        return 404, "unknown_url", f"Unknown request URL: POST {path}"
    if headers.get("Authorization") != f"Bearer {KEY}":
        return 401, "invalid_api_key", "Invalid API Key"
    if body.get("model") != "openai/gpt-oss-20b":
        return 404, "model_not_found", "The model does not exist or you do not have access to it."
    messages = body.get("messages")
    if not messages or any(set(message) != {"role", "content"} for message in messages):
        return 400, "invalid_request_error", "messages: each needs a role and content"
    shape = body.get("response_format", {}).get("json_schema", {})
    if shape.get("strict") is not True or not _is_strict(shape.get("schema")):
        return 400, "invalid_request_error", "invalid JSON schema for response_format"
    if body.get("stream"):
        return 400, "invalid_request_error", "this server does not stream"
    return None


def _is_strict(node: object) -> bool:
    """Closed objects whose keys are all required, as constrained decoding wants them."""
    if isinstance(node, list):
        return all(map(_is_strict, node))
    if not isinstance(node, dict):
        return True
    if node.get("type") == "object" and (
        node.get("additionalProperties") is not False or set(node.get("required", [])) != set(node["properties"])
    ):
        return False
    return all(map(_is_strict, node.values()))


def completion(content: str | None, *, finish: str = "stop", usage: bool = True) -> Body:
    """A chat.completion object as the service sends it."""
    answer: Body = {
        "id": "chatcmpl-2f8d",
        "object": "chat.completion",
        "created": 1795192920,
        "model": "openai/gpt-oss-20b",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content},
                "logprobs": None,
                "finish_reason": finish,
            }
        ],
        "system_fingerprint": "fp_1",
        "x_groq": {"id": "req_1"},
        "service_tier": "on_demand",
    }
    if usage:
        answer["usage"] = {
            "queue_time": 0.01,
            "prompt_tokens": 4000,
            "prompt_time": 0.1,
            "completion_tokens": 500,
            "completion_time": 0.5,
            "total_tokens": 4500,
            "total_time": 0.6,
            "completion_tokens_details": {"reasoning_tokens": 120},
        }
    return answer


def says(content: str | Body | None, *, finish: str = "stop", usage: bool = True) -> Behavior:
    """A well-formed answer with this content; a dict is sent as its JSON text."""
    text = json.dumps(content) if isinstance(content, dict) else content
    return lambda handler, _: handler.send(200, json.dumps(completion(text, finish=finish, usage=usage)).encode())


def busy(retry_after: str | None) -> Behavior:
    """429 as the service words it, with a Retry-After where one is given."""
    headers = {"retry-after": retry_after} if retry_after is not None else {}
    return lambda handler, _: handler.fail(429, "rate_limit_exceeded", "Rate limit reached for model", headers)


def fails(status: int, code: str = "internal_server_error") -> Behavior:
    return lambda handler, _: handler.fail(status, code, "it failed <script>alert(1)</script>")


def sends(data: bytes, status: int = 200, **headers: str) -> Behavior:
    """Exactly this body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: handler.send(status, data, named)


def truncated(content: Body) -> Behavior:
    """Half of a good answer under the length of the whole, then the connection closes."""

    def behave(handler: Handler, _: Body) -> None:
        data = json.dumps(completion(json.dumps(content))).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2])
        handler.close_connection = True

    return behave


def silent(handler: Handler, _: Body) -> None:
    """Takes the request and never answers."""
    handler.owner.stopped.wait(60)
    handler.close_connection = True


def drip(handler: Handler, _: Body) -> None:
    """A byte now and then, so that no single read ever times out."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while not handler.owner.stopped.wait(0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def drip_headers(handler: Handler, _: Body) -> None:
    """An answer whose header never ends."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not handler.owner.stopped.wait(0.02):
        handler.wfile.write(b"x")
        handler.wfile.flush()


def endless(handler: Handler, _: Body) -> None:
    """A body without an end, as fast as the socket takes it."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Connection", "close")
    handler.end_headers()
    while not handler.owner.stopped.is_set():
        handler.wfile.write(b" " * 65_536)
    handler.close_connection = True
