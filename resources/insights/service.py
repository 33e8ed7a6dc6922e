"""One question to Groq through its SDK, bounded in time and bytes; what went wrong comes back as a value.

Here: the client, the deadline over the whole exchange, what each failure means. Not here: what is asked, how often,
and whether the answer may be used (`writer`).
"""

from __future__ import annotations

import json
import queue
import re
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import httpx

if TYPE_CHECKING:
    import groq

MODEL = "openai/gpt-oss-20b"
# A narrative is some 600 tokens, and the model's own reasoning at low effort a few hundred; the rest is for long names.
MAX_REPLY_TOKENS = 2_500
# A reply of that many tokens is about 15 kB.
MAX_BODY_BYTES = 1_048_576
_CODE = re.compile(r"[a-z][a-z0-9_]{0,60}")

Meaning = Literal["refused", "busy", "failed", "unusable"]


@dataclass(frozen=True)
class Reply:
    """The text of the answer. tokens: prompt and completion as billed; None when the service did not say."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True)
class Failure:
    """No answer. `meaning`: refused (asking again is of no use), busy (later: `retry_after_seconds`), failed (the
    service or the way to it), unusable (an answer that is none). is_unbilled: the service certainly charged nothing.
    """

    meaning: Meaning
    reason: str
    retry_after_seconds: float | None = None
    is_unbilled: bool = False


class GroqService:
    """Asks one model. The key lives in the client alone and appears in no reason."""

    def __init__(self, api_key: str, base_url: str) -> None:
        self._api_key = api_key
        self._base_url = base_url

    def ask(
        self, messages: list[dict[str, str]], schema: dict[str, object], deadline_seconds: float
    ) -> Reply | Failure:
        """One request, no retries of the SDK's own; an answer that is not whole by the deadline is a failure.

        The SDK bounds each read of the socket, not their sum: a server that sends a byte now and then would hold the
        caller for ever. So the request runs in a thread that is left behind, its connection closed, at the deadline.
        """
        begun = time.monotonic()
        import groq  # a second of CPU to import: only when there is something to ask

        results: queue.SimpleQueue[Reply | Failure] = queue.SimpleQueue()
        client = groq.Groq(
            api_key=self._api_key,
            base_url=self._base_url,
            max_retries=0,
            # An answer of a few kB needs no compression, and without it the cap on bytes is one on memory.
            default_headers={"Accept-Encoding": "identity"},
            http_client=httpx.Client(
                transport=_CappedTransport(verify=_tls()),
                timeout=deadline_seconds,
                follow_redirects=False,
            ),
            timeout=deadline_seconds,
        )
        thread = threading.Thread(target=lambda: results.put(_ask(client, messages, schema)), daemon=True)
        thread.start()
        try:
            return results.get(timeout=max(0.0, deadline_seconds - (time.monotonic() - begun)))
        except queue.Empty:
            return Failure("failed", f"no whole answer within {deadline_seconds:.0f} s")
        finally:
            client.close()


@cache
def _tls() -> ssl.SSLContext:
    """Reading the list of authorities takes longer than a request on loopback; once a process will do."""
    return httpx.create_ssl_context()


def _ask(client: groq.Groq, messages: list[dict[str, str]], schema: dict[str, object]) -> Reply | Failure:
    import groq

    body: dict[str, Any] = {
        "model": MODEL,
        "messages": messages,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "narrative", "schema": schema, "strict": True},
        },
        "temperature": 0.0,
        "seed": 7,
        "max_completion_tokens": MAX_REPLY_TOKENS,
        "reasoning_effort": "low",
        "include_reasoning": False,
    }
    try:
        completion = client.chat.completions.create(**body)
        return _reply(completion)
    except groq.APITimeoutError:
        return Failure("failed", "the service did not answer in time")
    except groq.APIStatusError as error:
        return _status_failure(error)
    except groq.APIConnectionError as error:
        return Failure("failed", f"no connection to the service ({_kind(error.__cause__)})")
    # A body that is not what the protocol says surfaces as whatever its reader raises.
    except (groq.GroqError, httpx.HTTPError, json.JSONDecodeError, ValueError, TypeError, AttributeError) as error:
        return Failure("unusable", f"the answer does not follow the protocol ({_kind(error)})")


def _reply(completion: object) -> Reply | Failure:
    """The SDK hands through what it was given, types unchecked: check what is used."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices:
        return Failure("unusable", "the answer does not follow the protocol (no choices)")
    if getattr(choices[0], "finish_reason", None) == "length":
        return Failure("unusable", f"the reply was cut off at {MAX_REPLY_TOKENS} tokens")
    content = getattr(getattr(choices[0], "message", None), "content", None)
    if not isinstance(content, str) or not content.strip():
        return Failure("unusable", "the reply has no text")
    usage = getattr(completion, "usage", None)
    return Reply(content, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


def _count(usage: object, name: str) -> int | None:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _status_failure(error: groq.APIStatusError) -> Failure:
    status, code = error.status_code, _error_code(error.body)
    told = f"HTTP {status}" + (f" {code}" if code else "")
    if status in (401, 403):
        return Failure("refused", f"the service refused the key ({told}); check GROQ_API_KEY", is_unbilled=True)
    if status in (429, 498, 503):
        after = _retry_after(error.response.headers)
        return Failure("busy", f"the service is busy or its limit is reached ({told})", after, is_unbilled=True)
    if code == "json_validate_failed":
        return Failure("unusable", "the model's reply did not fit the schema (HTTP 400 json_validate_failed)")
    if 400 <= status < 500 and status not in (408, 409):
        return Failure("refused", f"the service refused the request ({told})", is_unbilled=True)
    return Failure("failed", f"the service failed ({told})")


def _error_code(body: object) -> str | None:
    """The error's code word; its message is text of others and is not repeated."""
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) and _CODE.fullmatch(code) else None


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds; a date or nonsense is no answer."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < 10 * 86_400 else None


def _kind(error: BaseException | None) -> str:
    return type(error).__name__ if error is not None else "unknown"


class _CappedTransport(httpx.HTTPTransport):
    """Stops a body past the cap, and one that is compressed although that was not asked for."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if response.headers.get("content-encoding", "identity").lower() not in ("identity", ""):
            response.close()
            raise httpx.DecodingError("the answer is compressed, which was not asked for", request=request)
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _CappedStream(response.stream, request)
        return response


class _CappedStream(httpx.SyncByteStream):
    def __init__(self, inner: httpx.SyncByteStream, request: httpx.Request) -> None:
        self._inner = inner
        self._request = request

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for chunk in self._inner:
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                raise httpx.ReadError(f"the answer is larger than {MAX_BODY_BYTES} bytes", request=self._request)
            yield chunk

    def close(self) -> None:
        self._inner.close()
