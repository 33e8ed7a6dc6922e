"""Ask metrics endpoints for their page: all targets at once, under a deadline, a cap and a breaker each.

One httpx client on one background event loop, so that sensors may call from any thread and connections stay open
between ticks. A target's fault never raises: it becomes an ErrorKind. Here only the fetch; reading the page is
`engine_scraper` (engines) and the host collectors (exporters). Proxies of the environment are not used:
a metrics endpoint is asked where fleet.yaml says it is.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import lru_cache
from types import TracebackType

import httpx
import structlog

from optiinfra_pipelines.domain.fleet import Fleet, Target
from optiinfra_pipelines.domain.thresholds import threshold_values
from resources.scrape.breaker import Breaker, BreakerState, Policy, spread_of
from resources.scrape.errors import (
    NO_REASON_TO_WAIT,
    ErrorKind,
    FetchError,
    classify,
    impossible_host,
    one_line,
    same_origin,
    status_detail,
)
from resources.scrape.page_body import PageBody, PageError
from resources.scrape.transport import LeanTransport

__all__ = ["ErrorKind", "MetricsEndpoints", "ScrapeResult"]

DEADLINE_SECONDS = 2.5  # half the 5 s cadence: a tick that waits it out still ends before the next one
MAX_PAGE_BYTES = 16 * 1024 * 1024  # 270 vLLM pages of 62 kB; the largest engine page known is under 1 MB
MAX_REDIRECTS = 3  # /metrics -> /metrics/ is one; more than a few is a loop
# getaddrinfo blocks a thread and cannot be cancelled; a few dead resolvers must not stop the other lookups.
_RESOLVER_THREADS = 16
_HEADERS = {
    "Accept": "text/plain;version=0.0.4;q=1, */*;q=0.1",
    "Accept-Encoding": "gzip",
    "User-Agent": "optiinfra",
}
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ScrapeResult:
    """What came of asking one target once.

    Exactly one of `text` (the page) and `error_kind` is set. `scraped_at`: start of the request, the tick's clock
    plus the time the target waited for its turn. `duration_seconds`: to the last byte; None when not asked.
    `page_bytes`: after decompression, also of a page that was cut off. `attempt`: failed asks in a row before this one.
    `retry_at`: when an open breaker asks again.
    """

    target: Target
    scraped_at: datetime
    text: str | None = field(default=None, repr=False)
    error_kind: ErrorKind | None = None
    error_detail: str | None = None
    http_status: int | None = None
    duration_seconds: float | None = None
    page_bytes: int | None = None
    attempt: int = 0
    breaker_state: BreakerState = "closed"
    clock_skew_seconds: float | None = None
    retry_at: datetime | None = None

    def refused(self, kind: ErrorKind, detail: str) -> ScrapeResult:
        """The same answer, found wrong by whoever read its page."""
        return replace(self, text=None, error_kind=kind, error_detail=one_line(detail))


class _Known:
    """What is remembered about one target between ticks."""

    def __init__(self, target: Target, request: httpx.Request) -> None:
        self.target = target
        self.request = request
        self.breaker = Breaker()
        self.spread = spread_of(target.name)
        self.turn = asyncio.Lock()


class _Answer:
    """What is known of an answer while it arrives, so that a deadline can say how far it got."""

    def __init__(self) -> None:
        self.is_connected = False
        self.status: int | None = None
        self.clock_skew_seconds: float | None = None
        self.body: PageBody | None = None

    def connected(self) -> None:
        self.is_connected = True


class MetricsEndpoints:
    """All metrics endpoints of a fleet behind one client. Thread-safe; close it, or use it as a context manager.

    deadline_seconds: for a whole answer, connecting and the last byte included.
    concurrency: targets asked at the same moment.
    transport: what httpx sends through; for measuring another one against ours.
    """

    def __init__(
        self,
        *,
        deadline_seconds: float = DEADLINE_SECONDS,
        concurrency: int = 100,
        max_page_bytes: int = MAX_PAGE_BYTES,
        policy: Policy | None = None,
        transport: Callable[[], httpx.AsyncBaseTransport] = LeanTransport,
    ) -> None:
        self._deadline_seconds = deadline_seconds
        self._concurrency = concurrency
        self._max_page_bytes = max_page_bytes
        self._policy = policy or Policy()
        self._make_transport = transport
        self._known: dict[tuple[str, str], _Known] = {}
        self._told_internal: set[tuple[str, str]] = set()
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: httpx.AsyncClient | None = None
        # httpx logs every request at INFO: a line per target and tick.
        logging.getLogger("httpx").setLevel(logging.WARNING)

    @classmethod
    def of_fleet(cls, fleet: Fleet) -> MetricsEndpoints:
        """With the deadline, concurrency and patience that fleet.yaml sets."""
        thresholds = threshold_values(fleet.thresholds)
        return cls(
            deadline_seconds=fleet.cadence.scrape_deadline_seconds,
            concurrency=fleet.cadence.scrape_concurrency,
            policy=Policy(
                failures_to_open=int(thresholds["breaker_failures_to_open"]),
                first_backoff_seconds=thresholds["breaker_first_backoff_seconds"],
                max_backoff_seconds=thresholds["breaker_max_backoff_seconds"],
            ),
        )

    def scrape(self, targets: Sequence[Target], now: datetime) -> list[ScrapeResult]:
        """Ask every target once, at most `concurrency` at a time; one result each, in the order of `targets`.

        now: the tick's clock (UTC), which also drives backoff. Blocks until the last answer or deadline.
        """
        if now.tzinfo is None:
            raise ValueError("now has no time zone; pass datetime.now(timezone.utc)")
        return asyncio.run_coroutine_threadsafe(self._scrape(targets, now), self._running_loop()).result()

    def close(self) -> None:
        with self._starting:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
            if loop is None or thread is None:
                return
            asyncio.run_coroutine_threadsafe(self._aclose(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
            self._known.clear()

    def __enter__(self) -> MetricsEndpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._loop.set_default_executor(ThreadPoolExecutor(_RESOLVER_THREADS, "resolver"))
                self._thread = threading.Thread(target=self._loop.run_forever, name="metrics-endpoints", daemon=True)
                self._thread.start()
            return self._loop

    async def _aclose(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _scrape(self, targets: Sequence[Target], now: datetime) -> list[ScrapeResult]:
        if self._client is None:
            self._client = httpx.AsyncClient(transport=self._make_transport(), headers=_HEADERS, trust_env=False)
        client = self._client
        start = time.monotonic()
        queue = iter(enumerate(targets))
        results: list[ScrapeResult | None] = [None] * len(targets)

        async def work() -> None:
            for index, target in queue:
                at = now + timedelta(seconds=time.monotonic() - start)
                results[index] = await self._scrape_one(client, target, at)

        await asyncio.gather(*(work() for _ in range(min(self._concurrency, len(targets)))))
        return [result for result in results if result is not None]

    def _remember(self, client: httpx.AsyncClient, target: Target) -> _Known:
        key = (target.name, target.url)
        known = self._known.get(key)
        if known is None or (known.target is not target and known.target.headers != target.headers):
            headers = {name: value.get_secret_value() for name, value in target.headers.items()}
            known = self._known[key] = _Known(target, client.build_request("GET", target.url, headers=headers))
        return known

    async def _scrape_one(self, client: httpx.AsyncClient, target: Target, at: datetime) -> ScrapeResult:
        try:
            known = self._remember(client, target)
            async with known.turn:
                return await self._ask(client, known, target, at)
        except (httpx.InvalidURL, UnicodeError) as error:  # of the URL; a page that is no text is a PageError
            return ScrapeResult(target, at, error_kind="dns", error_detail=one_line(impossible_host(error)))
        except Exception as error:
            return self._internal(target, at, error)

    async def _ask(self, client: httpx.AsyncClient, known: _Known, target: Target, at: datetime) -> ScrapeResult:
        seconds = at.timestamp()
        known.breaker, may_ask = known.breaker.ask(seconds, self._policy)
        breaker = known.breaker
        asked = ScrapeResult(target, at, attempt=breaker.failures, breaker_state=breaker.state)
        if not may_ask:
            retry_at = at + timedelta(seconds=breaker.retry_at - seconds)
            detail = (
                f"not asked until {retry_at:%H:%M:%S} UTC after {breaker.failures} failures, the last: {breaker.cause}"
            )
            return replace(asked, error_kind="breaker_open", error_detail=one_line(detail), retry_at=retry_at)
        result = await self._fetch(client, known, asked)
        if result.error_kind is None or result.error_kind in NO_REASON_TO_WAIT:
            known.breaker = breaker.succeeded()
        else:
            cause = f"{result.error_kind}: {result.error_detail}"
            known.breaker = breaker.failed(seconds, cause, self._policy, known.spread)
        return result

    async def _fetch(self, client: httpx.AsyncClient, known: _Known, asked: ScrapeResult) -> ScrapeResult:
        answer = _Answer()
        start = time.monotonic()
        text: str | None = None
        kind: ErrorKind | None = None
        detail: str | None = None
        try:
            async with asyncio.timeout(self._deadline_seconds):
                text = await self._page(client, known.request, answer, asked.scraped_at)
        except TimeoutError:
            kind, detail = self._late(answer)
        except (PageError, FetchError) as error:
            kind, detail = error.kind, str(error)
        except httpx.HTTPError as error:
            kind, detail = classify(error)
        except UnicodeError as error:
            kind, detail = "dns", impossible_host(error)
        except Exception as error:
            return self._internal(asked.target, asked.scraped_at, error)
        return replace(
            asked,
            text=text,
            error_kind=kind,
            error_detail=one_line(detail) if detail is not None else None,
            http_status=answer.status,
            duration_seconds=time.monotonic() - start,
            page_bytes=answer.body.size if answer.body is not None else None,
            clock_skew_seconds=answer.clock_skew_seconds,
        )

    async def _page(self, client: httpx.AsyncClient, request: httpx.Request, answer: _Answer, at: datetime) -> str:
        start = time.monotonic()
        for _ in range(MAX_REDIRECTS + 1):
            request.extensions["on_connected"] = answer.connected
            response = await client.send(request, stream=True)
            try:
                answer.status = response.status_code
                answer.clock_skew_seconds = _skew_seconds(
                    response.headers.get("date"), at + timedelta(seconds=time.monotonic() - start)
                )
                if response.next_request is not None:
                    request = same_origin(response.next_request, request)
                    continue
                if response.status_code != 200:
                    raise FetchError("http_status", status_detail(response))
                body = answer.body = PageBody(response.headers.get("content-encoding", ""), self._max_page_bytes)
                async for piece in response.aiter_raw():
                    body.add(piece)
                return body.text()
            finally:
                await response.aclose()
        raise FetchError("redirect_refused", f"more than {MAX_REDIRECTS} redirects")

    def _late(self, answer: _Answer) -> tuple[ErrorKind, str]:
        limit = f"{self._deadline_seconds:g} s"
        if not answer.is_connected:
            return "connect_timeout", f"no connection within {limit}; is the host up and the port open?"
        if answer.status is None:
            return "deadline", f"connected, but no answer within {limit}"
        size = answer.body.size if answer.body is not None else 0
        return "deadline", f"the answer was not complete within {limit}: {size} bytes of page came"

    def _internal(self, target: Target, at: datetime, error: Exception) -> ScrapeResult:
        """A bug of ours, or of the machine (no file descriptors left): told apart from the target's faults."""
        name = type(error).__name__
        if (target.name, name) not in self._told_internal:
            # Its traceback once, not at every tick: the row of each tick names it too.
            self._told_internal.add((target.name, name))
            _log.error("scrape_failed_internally", target=target.name, error=name, exc_info=error)
        detail = f"{name} inside the collector; its log has the traceback"
        return ScrapeResult(target, at, error_kind="internal", error_detail=detail)


@lru_cache(maxsize=64)  # a fleet's answers of one tick carry a handful of different Date headers
def _parse_date(text: str) -> datetime | None:
    try:
        return email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None


def _skew_seconds(date: str | None, now: datetime) -> float | None:
    """Date header minus our clock, in whole seconds as the header counts; None when absent or unreadable."""
    at = _parse_date(date) if date else None
    if at is None or at.tzinfo is None:
        return None
    return float(int((at - now.replace(microsecond=0)).total_seconds()))
