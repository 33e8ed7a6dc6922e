"""Ask an LMCache controller: are an instance's workers well, where do tokens lie, clear a cache.

Here: the three HTTP calls of `lmcache_controller` (LMCache 0.5) and what its answers mean. Not here: LMCache's metrics
(`optiinfra_pipelines.engines.lmcache`), lookup logs (`optiinfra_pipelines.analysis.traces`), when anything is called:
no sensor and no asset calls `clear`, which empties a live cache. Token ids are user text: never stored, never logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Annotated, Any, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

# The controller asks the instance's workers in turn before it answers.
DEADLINE_SECONDS = 10.0


class LmcacheError(RuntimeError):
    """A call that got no usable answer; the message names the call, the controller and what to look at."""


class _Answer(BaseModel):
    """Unknown keys are left alone: newer controllers may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    event_id: str


_Kind = TypeVar("_Kind", bound="_Answer")


class WorkerHealth(_Answer):
    """Error code of every worker of an instance; 0 is well."""

    error_codes: dict[int, int]

    @property
    def is_healthy(self) -> bool | None:
        """None when the instance has no worker: nothing is known, which is not well."""
        return all(code == 0 for code in self.error_codes.values()) if self.error_codes else None


class Layout(_Answer):
    """Instance -> where its cache holds a prefix of the tokens, and how many of them."""

    layout_info: dict[str, tuple[str, Annotated[int, Field(ge=0)]]]


class Cleared(_Answer):
    """How many tokens' KV was thrown away."""

    num_tokens: NonNegativeInt


class LmcacheController:
    """One controller at `url`, such as http://127.0.0.1:9000. Use as a context manager, or close it."""

    def __init__(self, url: str, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self.url = url.rstrip("/")
        self._client = httpx.Client(timeout=deadline_seconds, trust_env=False, follow_redirects=False)

    def __enter__(self) -> LmcacheController:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def health(self, instance_id: str) -> WorkerHealth:
        """The workers of an instance; without any for one that the controller does not know: it does not say which."""
        return self._call(WorkerHealth, "health", {"instance_id": instance_id})

    def lookup(self, tokens: Sequence[int]) -> Layout:
        """Where a prefix of `tokens` is cached; an empty layout when nowhere."""
        return self._call(Layout, "lookup", {"tokens": list(tokens)})

    def clear(self, instance_id: str, location: str) -> Cleared:
        """Throw away what an instance holds at a location such as LocalCPUBackend."""
        return self._call(Cleared, "clear", {"instance_id": instance_id, "location": location})

    def _call(self, kind: type[_Kind], name: str, body: dict[str, Any]) -> _Kind:
        try:
            answer = self._client.post(f"{self.url}/{name}", json=body)
        except httpx.HTTPError as error:
            raise LmcacheError(
                f"LMCache controller {self.url} did not answer {name} ({type(error).__name__}): "
                "does lmcache_controller run there, and is the port its --port?"
            ) from error
        if not answer.is_success:
            raise LmcacheError(
                f"LMCache controller {self.url} refused {name} with status {answer.status_code}: {_detail(answer)}; "
                "is enable_controller set in LMCache's configuration and the instance registered?"
            )
        try:
            return kind.model_validate_json(answer.content)
        except ValidationError as error:
            raise LmcacheError(
                f"what answers {name} at {self.url} is no LMCache controller of 0.5: "
                f"{error.error_count()} fields differ from {', '.join(kind.model_fields)}"
            ) from error


def _detail(answer: httpx.Response) -> str:
    """FastAPI's reason, cut short; nothing for a body that is none. What was sent is left out: it may be token ids."""
    try:
        told = answer.json()["detail"]
        if isinstance(told, list):  # of a body that it did not accept: each with the place, the reason and the input
            told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in told)
    except (ValueError, KeyError, TypeError):
        return "no reason told"
    return str(told)[:200] or "no reason told"
