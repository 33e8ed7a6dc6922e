"""Open-loop traffic on an OpenAI-compatible API, bounded in count, time and requests in flight.

Requests come at their own times (Poisson), whether or not earlier ones have been answered: a slow server does not slow
its own load. At the bound of requests in flight new ones are held back and counted as such. Runs in a thread of its
own. What the load means for the fleet is not here.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import httpx

# Longest a request may take before it counts as lost; a demo's takes seconds.
REQUEST_SECONDS = 60.0
_SEED = 20_261_126


@dataclass(frozen=True)
class Load:
    """What is sent. max_*: the bounds; none is ever passed.

    prompt_bytes, output_tokens: least and most of a request, evenly between (the demo's tokenizer makes a token of
    each byte).
    """

    model: str
    requests_per_second: float
    max_in_flight: int = 32
    max_requests: int = 100_000
    max_seconds: float = 4 * 3600.0
    prompt_bytes: tuple[int, int] = (100, 400)
    output_tokens: tuple[int, int] = (16, 64)
    is_streamed: bool = False


@dataclass
class Counts:
    """What became of the requests so far. lost: by reason; a status other than 200 is one."""

    sent: int = 0
    answered: int = 0
    held_back: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return sum(self.lost.values())


class Traffic:
    """Sends a Load to one URL from start to stop. Use as a context manager."""

    def __init__(self, url: str, load: Load) -> None:
        self._url = f"{url.rstrip('/')}/v1/completions"
        self._load = load
        self._lock = threading.Lock()
        self._counts = Counts()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="traffic", daemon=True)
        self._random = random.Random(_SEED)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """No new requests; those in flight are waited for."""
        self._stopped.set()
        self._thread.join(REQUEST_SECONDS + 5)

    def counts(self) -> Counts:
        """A copy of the counts so far; `seconds` are those of the answered requests, in order of their ends."""
        with self._lock:
            now = self._counts
            return Counts(now.sent, now.answered, now.held_back, Counter(now.lost), list(now.seconds))

    def set_rate(self, requests_per_second: float) -> None:
        """Change the rate from the next request on."""
        with self._lock:
            self._load = Load(**{**vars(self._load), "requests_per_second": requests_per_second})

    async def _run(self) -> None:
        began = due = time.monotonic()
        in_flight: set[asyncio.Task[None]] = set()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=REQUEST_SECONDS, trust_env=False, limits=limits) as client:
            while not self._is_over(began):
                due += self._random.expovariate(self._load.requests_per_second)
                while (wait := due - time.monotonic()) > 0 and not self._stopped.is_set():
                    await asyncio.sleep(min(wait, 0.2))
                if self._stopped.is_set():
                    break
                if len(in_flight) >= self._load.max_in_flight:
                    with self._lock:
                        self._counts.held_back += 1
                    continue
                with self._lock:
                    self._counts.sent += 1
                task = asyncio.create_task(self._ask(client, self._body(self._counts.sent)))
                in_flight.add(task)
                task.add_done_callback(in_flight.discard)
            await asyncio.gather(*in_flight)

    def _is_over(self, began: float) -> bool:
        is_spent = self._counts.sent >= self._load.max_requests or time.monotonic() - began >= self._load.max_seconds
        return is_spent or self._stopped.is_set()

    def _body(self, number: int) -> dict[str, object]:
        load, random_ = self._load, self._random
        prompt = f"Request {number} of {random_.random():.9f}: ".ljust(random_.randint(*load.prompt_bytes), "x")
        body: dict[str, object] = {"model": load.model, "prompt": prompt, "temperature": 0}
        body["max_tokens"] = random_.randint(*load.output_tokens)
        return {**body, "stream": True} if load.is_streamed else body

    async def _ask(self, client: httpx.AsyncClient, body: Mapping[str, object]) -> None:
        began, reason = time.monotonic(), None
        try:
            async with client.stream("POST", self._url, json=body) as reply:
                last = b""
                async for chunk in reply.aiter_raw():
                    last = chunk or last
                if reply.status_code != 200:
                    reason = f"status {reply.status_code}"
                elif self._load.is_streamed and b"[DONE]" not in last:
                    reason = "stream without its end"
        except httpx.HTTPError as error:
            reason = type(error).__name__
        with self._lock:
            if reason is None:
                self._counts.answered += 1
                self._counts.seconds.append(time.monotonic() - began)
            else:
                self._counts.lost[reason] += 1
