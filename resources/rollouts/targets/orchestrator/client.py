"""Asks one orchestrator by its REST contract, docs/orchestrator.openapi.yaml: repetitions, conditions, clear errors.

The token comes from the environment and is sent, never logged. What was done and not answered is asked for again with
the same idempotency key, so that it is done once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any
from uuid import uuid4

import httpx

from optiinfra_pipelines.domain.rollout_targets import OrchestratorSettings
from resources.rollouts.targets.base import StaleTokenError, TargetError

Json = dict[str, Any]
TIMEOUT_SECONDS = 3.0
# For one question with its repetitions; a look asks a few and must come back within the lease of 30 s.
PATIENCE_SECONDS = 6.0
FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS = 0.1, 2.0
MAX_ANSWER_BYTES = 8 * 2**20
_TRY_AGAIN = frozenset({429, 500, 502, 503, 504})


class MovedError(TargetError):
    """The deployment changed since it was read; read it again and decide anew."""


@dataclass(frozen=True)
class Answer:
    """A body, and its ETag where it has one."""

    body: Json
    etag: str | None


class OrchestratorClient:
    """One orchestrator, as one agent. Safe across threads."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        environ: Mapping[str, str],
        sleep: Callable[[float], None] = time.sleep,
        random: Random | None = None,
    ) -> None:
        self._settings = settings
        self._environ = environ
        self._sleep = sleep
        self._random = random or Random(settings.agent)
        self._client = httpx.Client(base_url=settings.url.rstrip("/"), timeout=TIMEOUT_SECONDS, trust_env=False)

    def get(self, path: str) -> Answer:
        """Read. TargetError when it is not there or does not answer."""
        return self._ask("GET", path, {}, None)

    def put(self, path: str, body: Json) -> Answer:
        """Write what has no fencing: registration, heartbeat, approval request."""
        return self._ask("PUT", path, {}, body)

    def change(self, method: str, path: str, body: Json | None, token: int, etag: str | None) -> Answer:
        """Change a deployment. etag: of what was read; None for a rollback. MovedError, StaleTokenError."""
        headers = {"Fencing-Token": str(token), "Idempotency-Key": uuid4().hex}
        if etag is not None:
            headers["If-Match"] = etag
        return self._ask(method, path, headers, body)

    def _ask(self, method: str, path: str, headers: Mapping[str, str], body: Json | None) -> Answer:
        what = f"{method} {path}"
        until, wait = time.monotonic() + PATIENCE_SECONDS, FIRST_WAIT_SECONDS
        while True:
            reply, cause = self._once(method, path, headers, body)
            asked_wait = 0.0
            if reply is not None:
                if reply.is_success:
                    return Answer(_json(reply, what), reply.headers.get("ETag"))
                cause = f"status {reply.status_code}: {_detail(reply)}"
                if reply.status_code not in _TRY_AGAIN:
                    raise self._refusal(reply, what)
                after = reply.headers.get("Retry-After", "")
                asked_wait = min(float(after), PATIENCE_SECONDS) if after.isdigit() else 0.0
            pause = max(asked_wait, wait * self._random.uniform(0.5, 1.0))
            if time.monotonic() + pause > until:
                raise TargetError(
                    f"the orchestrator {self._settings.url} did not answer {what} in {PATIENCE_SECONDS:.0f} s: {cause}"
                )
            self._sleep(pause)
            wait = min(2 * wait, MAX_WAIT_SECONDS)

    def _once(
        self, method: str, path: str, headers: Mapping[str, str], body: Json | None
    ) -> tuple[httpx.Response | None, str]:
        token = self._environ.get(self._settings.token_variable)
        if not token:
            raise TargetError(
                f"no token for the orchestrator {self._settings.url}: set {self._settings.token_variable} in the "
                "environment of everything that executes rollouts"
            )
        try:
            sent = {**headers, "Authorization": f"Bearer {token}", "Accept": "application/json"}
            reply = self._client.request(method, path, headers=sent, json=body)
        except httpx.HTTPError as error:
            return None, f"{type(error).__name__}: {error}"
        if len(reply.content) > MAX_ANSWER_BYTES:
            raise TargetError(f"the orchestrator's answer to {method} {path} is larger than {MAX_ANSWER_BYTES} bytes")
        return reply, ""

    def _refusal(self, reply: httpx.Response, what: str) -> TargetError:
        detail = _detail(reply)
        if reply.status_code == 412:
            return MovedError(f"{what}: {detail}")
        if reply.status_code == 409 and _problem(reply).get("type") == "stale-token":
            return StaleTokenError(f"{what}: {detail}")
        if reply.status_code in (401, 403):
            return TargetError(
                f"the orchestrator {self._settings.url} does not allow {what} ({detail}); check the token in "
                f"{self._settings.token_variable}"
            )
        if reply.status_code == 404:
            return TargetError(
                f"the orchestrator {self._settings.url} knows no {what.split(' ', 1)[1]} ({detail}); check `deployment`"
                " and `url` of its settings"
            )
        return TargetError(f"the orchestrator refuses {what}: status {reply.status_code}: {detail}")


def _json(reply: httpx.Response, what: str) -> Json:
    try:
        body = reply.json()
    except ValueError as error:
        raise TargetError(f"the orchestrator answers {what} with no JSON") from error
    if not isinstance(body, dict):
        raise TargetError(f"the orchestrator answers {what} with no JSON object")
    return body


def _problem(reply: httpx.Response) -> Json:
    try:
        body = reply.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _detail(reply: httpx.Response) -> str:
    problem = _problem(reply)
    return str(problem.get("detail") or problem.get("title") or reply.text[:200] or reply.reason_phrase)
