"""Scraping over real loopback HTTP, well and badly behaved; and the circuit breaker as a pure machine."""

from __future__ import annotations

import contextlib
import gzip
import resource
import shutil
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from optiinfra_pipelines.domain.fleet import Target
from resources.scrape.breaker import MAX_SPREAD, Breaker, Policy, spread_of
from resources.scrape.metrics_endpoint import MetricsEndpoints, ScrapeResult
from resources.scrape.transport import LeanTransport
from tests.scrape.loopback import (
    Exchange,
    Handler,
    Loopback,
    answer,
    chunked,
    drip,
    endless,
    gzipped,
    once_then_close,
    page,
    raw,
    redirect,
    silent,
    status,
)

NOW = datetime(2026, 11, 20, 16, 0, tzinfo=UTC)
PAGE = "# TYPE up gauge\nup 1\n"
MEGABYTE = 1 << 20


@pytest.fixture
def endpoints() -> Iterator[MetricsEndpoints]:
    with MetricsEndpoints(deadline_seconds=0.5, max_page_bytes=MEGABYTE) as client:
        yield client


def scrape_one(endpoints: MetricsEndpoints, url: str, at: datetime = NOW) -> ScrapeResult:
    (result,) = endpoints.scrape([Target(name="t", url=url)], at)
    return result


def misbehaving(handler: Handler) -> Loopback:
    return Loopback({"/metrics": handler, "/good": page(PAGE)})


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


WHOLE = {
    "plain": page(PAGE),
    "gzip": gzipped(PAGE.encode()),
    "gzip of two members": page(
        gzip.compress(b"# TYPE up gauge\n") + gzip.compress(b"up 1\n"), "Content-Encoding: gzip"
    ),
    "gzip padded with zeros": page(gzip.compress(PAGE.encode()) + b"\0" * 9, "Content-Encoding: x-gzip"),
    "deflate": page(zlib.compress(PAGE.encode()), "Content-Encoding: deflate"),
    "deflate without its wrapper": page(raw_deflate(PAGE.encode()), "Content-Encoding: deflate"),
    "chunked": chunked([PAGE[:3].encode(), PAGE[3:].encode()]),
    "chunked gzip": chunked([bytes([b]) for b in gzip.compress(PAGE.encode())], "Content-Encoding: gzip"),
    "until close": raw(b"HTTP/1.0 200 OK\r\n\r\n" + PAGE.encode()),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_page_arrives_whole_in_every_framing_and_coding(endpoints: MetricsEndpoints, name: str) -> None:
    """Exporters differ in how they send; the text is the same."""
    with misbehaving(WHOLE[name]) as server:
        result = scrape_one(endpoints, server.url("/metrics"))

    assert (result.text, result.error_kind, result.http_status) == (PAGE, None, 200)
    assert result.page_bytes == len(PAGE)
    assert result.duration_seconds is not None
    assert 0 < result.duration_seconds < 0.5


BOMB = gzip.compress(b"\n" * (64 * MEGABYTE), 9)
FAULTS = {
    "server error": (status(500), "http_status", "HTTP 500"),
    "no permission": (status(401), "http_status", "headers in fleet.yaml"),
    "wrong path": (status(404), "http_status", "is the path right"),
    "no content": (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "http_status", "HTTP 204"),
    "html": (page("<!DOCTYPE html><html><title>Log in</title></html>"), "html", "Log in"),
    "empty": (page(""), "empty", "no content"),
    "blank": (page("\n \n"), "empty", "no content"),
    "truncated gzip": (gzipped(PAGE.encode() * 100, keep=40), "bad_encoding", "ends in its middle"),
    "corrupt gzip": (
        page(b"\x1f\x8b\x08\x00garbage....", "Content-Encoding: gzip"),
        "bad_encoding",
        "cannot be unpacked",
    ),
    "unasked coding": (page(b"x", "Content-Encoding: br"), "bad_encoding", "'br'"),
    "endless body": (endless, "too_large", "larger than 1048576 bytes"),
    "decompression bomb": (page(BOMB, "Content-Encoding: gzip"), "too_large", "larger than 1048576 bytes"),
    "slow drip": (drip, "deadline", "not complete within 0.5 s"),
    "silence": (silent, "deadline", "no answer within 0.5 s"),
    "redirect elsewhere": (redirect("http://localhost:9/metrics"), "redirect_refused", "http://localhost:9"),
    "redirect to another port": (redirect("http://127.0.0.1:9/metrics"), "redirect_refused", "127.0.0.1:9"),
    "redirect loop": (redirect("/metrics"), "redirect_refused", "more than 3"),
    "redirect to nonsense": (redirect("http://[::1"), "not_http", ""),
    "not utf-8": (page(b'up 1\nname{a="\xff"} 1\n'), "not_utf8", "line 2"),
    "shorter than it says": (raw(answer(b"up 1\n", length=50)), "closed_early", "45 bytes before the end"),
    "closed at once": (raw(b""), "closed_early", "before an answer"),
    "another protocol": (raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "not_http", "SSH-2.0"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_the_neighbor_is_complete(endpoints: MetricsEndpoints, name: str) -> None:
    """One bad target is one result with its cause; the good one beside it, on the same server, has its page."""
    handler, kind, words = FAULTS[name]
    with misbehaving(handler) as server:
        targets = [Target(name="bad", url=server.url("/metrics")), Target(name="good", url=server.url("/good"))]
        bad, good = endpoints.scrape(targets, NOW)

    assert bad.error_kind == kind
    assert bad.text is None
    assert words in str(bad.error_detail)
    assert len(str(bad.error_detail)) <= 300
    assert good.text == PAGE


def test_what_cannot_be_connected_says_why(endpoints: MetricsEndpoints) -> None:
    """A closed port, an unknown name and a server that speaks no TLS are three different repairs."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with misbehaving(page(PAGE)) as server:
        targets = [
            Target(name="refused", url=f"http://127.0.0.1:{port}/metrics"),
            Target(name="refused-twice", url=f"http://localhost:{port}/metrics"),
            Target(name="nameless", url="http://no-such-host.invalid/metrics"),
            Target(name="plain", url=f"https://127.0.0.1:{server.port}/metrics"),
        ]
        kinds = [result.error_kind for result in endpoints.scrape(targets, NOW)]

    assert kinds == ["connect_refused", "connect_refused", "dns", "tls"]


def test_a_host_that_swallows_packets_is_a_connect_timeout(endpoints: MetricsEndpoints) -> None:
    """A full accept queue drops the handshake, as a firewall does: nothing connects, nothing is refused."""
    listener = socket.socket()
    fillers = []
    try:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            fillers.append(filler)
        result = scrape_one(endpoints, f"http://127.0.0.1:{listener.getsockname()[1]}/metrics")
    finally:
        for sock in [listener, *fillers]:
            sock.close()

    assert result.error_kind == "connect_timeout"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_page_over_tls_needs_a_certificate_that_is_trusted(tmp_path: Path) -> None:
    """An unknown authority is refused and named; SSL_CERT_FILE (here: the context) makes it known."""
    import ssl

    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
    ]
    subprocess.run([*command, *files, *subject], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    big = "".join(f'x_total{{n="{i}"}} {i}\n' for i in range(20_000))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    plain, _ = listener.accept()
                    with context.wrap_socket(plain, server_side=True) as connection:
                        connection.recv(65_536)
                        connection.sendall(answer(big.encode(), "Connection: close"))
                except ssl.SSLError:
                    continue
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        url = f"https://localhost:{listener.getsockname()[1]}/metrics"
        with MetricsEndpoints() as distrusting:
            refused = scrape_one(distrusting, url)
        trusted = ssl.create_default_context(cafile=certificate)
        with MetricsEndpoints(transport=lambda: LeanTransport(ssl_context=lambda: trusted)) as trusting:
            read = scrape_one(trusting, url)
        listener.shutdown(socket.SHUT_RDWR)

    assert refused.error_kind == "tls"
    assert "SSL_CERT_FILE" in str(refused.error_detail)
    assert read.text == big


def test_a_redirect_on_the_same_origin_is_followed(endpoints: MetricsEndpoints) -> None:
    """/metrics -> /metrics/ is what mounted applications answer; credentials may go there too."""
    with Loopback({"/metrics": redirect("/metrics/", 307), "/metrics/": page(PAGE)}) as server:
        target = Target(name="t", url=server.url("/metrics"), headers={"X-Api-Key": SecretStr("s3cret")})
        (result,) = endpoints.scrape([target], NOW)

        assert result.text == PAGE
        assert server.requests == ["/metrics", "/metrics/"]
        assert [headers["x-api-key"] for headers in server.seen_headers] == ["s3cret", "s3cret"]


def test_a_refused_redirect_takes_no_credentials_anywhere(endpoints: MetricsEndpoints) -> None:
    """Whoever can answer for a target must not be able to send its token to another server."""
    with Loopback({"/steal": page(PAGE)}) as thief, misbehaving(redirect(thief.url("/steal"))) as server:
        target = Target(name="t", url=server.url("/metrics"), headers={"Authorization": SecretStr("Bearer s3cret")})
        (result,) = endpoints.scrape([target], NOW)

        assert result.error_kind == "redirect_refused"
        assert thief.requests == []
        assert "s3cret" not in repr(result)


def test_the_request_asks_for_text_and_gzip(endpoints: MetricsEndpoints) -> None:
    """The Accept header that Prometheus' format wants; nothing from the environment's proxies."""
    with misbehaving(page(PAGE)) as server:
        scrape_one(endpoints, server.url("/metrics"))

        (headers,) = server.seen_headers
        assert headers["accept"] == "text/plain;version=0.0.4;q=1, */*;q=0.1"
        assert headers["accept-encoding"] == "gzip"
        assert headers["host"] == f"127.0.0.1:{server.port}"


def test_a_connection_survives_from_tick_to_tick_and_from_thread_to_thread(endpoints: MetricsEndpoints) -> None:
    """Sensors call from any thread; the one loop behind them keeps the socket."""
    with misbehaving(page(PAGE)) as server:
        results: list[ScrapeResult] = []
        for tick in range(5):
            at = NOW + timedelta(seconds=5 * tick)
            thread = threading.Thread(
                target=lambda at=at: results.append(scrape_one(endpoints, server.url("/metrics"), at))
            )
            thread.start()
            thread.join()

        assert [result.error_kind for result in results] == [None] * 5
        assert server.connections == 1


def test_a_full_pool_keeps_what_it_has() -> None:
    """Beyond the descriptor limit some targets stay warm and the rest reconnect; throwing out would chill them all."""
    with misbehaving(page(PAGE)) as first, misbehaving(page(PAGE)) as second:
        targets = [Target(name=f"t{server.port}", url=server.url("/metrics")) for server in (first, second)]
        with MetricsEndpoints(concurrency=1, transport=lambda: LeanTransport(max_idle=1)) as endpoints:
            for tick in range(4):
                results = endpoints.scrape(targets, NOW + timedelta(seconds=5 * tick))
                assert [result.text for result in results] == [PAGE, PAGE]

        assert (first.connections, second.connections) == (1, 4)


def test_no_descriptors_left_is_the_collectors_own_trouble() -> None:
    """The target is not to blame, is not waited for, and the row says what to raise."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with misbehaving(page(PAGE)) as server, MetricsEndpoints() as endpoints:
        endpoints.scrape([], NOW)  # the loop has its own descriptors before they run out
        held = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
            with contextlib.suppress(OSError):
                while True:
                    held.append(socket.socket())
            results = [scrape_one(endpoints, server.url("/metrics"), NOW + timedelta(seconds=5 * i)) for i in range(5)]
        finally:
            for sock in held:
                sock.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        recovered = scrape_one(endpoints, server.url("/metrics"), NOW + timedelta(seconds=30))

    assert {result.error_kind for result in results} == {"internal"}
    assert "ulimit -n" in str(results[0].error_detail)
    assert recovered.text == PAGE


def test_a_server_that_drops_idle_connections_costs_no_scrape(endpoints: MetricsEndpoints) -> None:
    """uvicorn closes after 5 s idle, our very cadence: the request that crosses the close is asked again."""
    with misbehaving(once_then_close(PAGE.encode())) as server:
        results = [scrape_one(endpoints, server.url("/metrics"), NOW + timedelta(seconds=5 * i)) for i in range(20)]

        assert [result.error_kind for result in results] == [None] * 20
        assert server.connections == 20


def test_an_idle_connection_that_receives_bytes_nobody_asked_for_is_not_used_again(endpoints: MetricsEndpoints) -> None:
    """The next page would be somebody else's: late bytes of another answer."""
    sent = threading.Event()

    def talkative(exchange: Exchange) -> None:
        exchange.send(answer(f"up {exchange.ordinal}\n".encode()))
        if exchange.ordinal == 0:
            time.sleep(0.02)  # part of the misbehavior: the surplus must come after the answer was taken
            exchange.send(answer(b"up 99\n"))
            sent.set()

    with misbehaving(talkative) as server:
        first = scrape_one(endpoints, server.url("/metrics"))
        assert sent.wait(2)
        scrape_one(endpoints, server.url("/good"))  # a turn of the loop in which the surplus arrives
        second = scrape_one(endpoints, server.url("/metrics"), NOW + timedelta(seconds=5))

    assert (first.text, second.text) == ("up 0\n", "up 1\n")


def test_the_deadline_holds_for_all_targets_at_once(endpoints: MetricsEndpoints) -> None:
    """Forty silent targets cost one deadline, not forty, and at most `concurrency` are asked at the same moment."""
    with Loopback({f"/{i}": silent for i in range(40)}) as server:
        start = time.monotonic()
        results = endpoints.scrape([Target(name=f"t{i}", url=server.url(f"/{i}")) for i in range(40)], NOW)
        seconds = time.monotonic() - start

    assert {result.error_kind for result in results} == {"deadline"}
    assert seconds < 2.0


def test_no_more_targets_are_asked_at_once_than_allowed() -> None:
    """The limit is on what is under way; later targets carry the later time at which they were really asked."""
    lock, under_way, most = threading.Lock(), 0, 0
    release = threading.Barrier(3)

    def counted(exchange: Exchange) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        release.wait(5)
        with lock:
            under_way -= 1
        exchange.send(answer(b"up 1\n"))

    with Loopback({f"/{i}": counted for i in range(9)}) as server, MetricsEndpoints(concurrency=3) as endpoints:
        results = endpoints.scrape([Target(name=f"t{i}", url=server.url(f"/{i}")) for i in range(9)], NOW)

    assert {result.error_kind for result in results} == {None}
    assert most == 3
    assert results[0].scraped_at < results[8].scraped_at < NOW + timedelta(seconds=5)
    assert [result.target.name for result in results] == [f"t{i}" for i in range(9)]


def test_clock_skew_is_read_from_the_date_header(endpoints: MetricsEndpoints) -> None:
    """Whole seconds, positive when the target's clock is ahead; nothing when it sends no usable date."""
    routes = {
        "/ahead": page(PAGE, "Date: Fri, 20 Nov 2026 16:02:00 GMT"),
        "/exact": page(PAGE, "Date: Fri, 20 Nov 2026 16:00:00 GMT"),
        "/none": page(PAGE),
        "/odd": page(PAGE, "Date: yesterday"),
    }
    with Loopback(routes) as server:
        targets = [Target(name=path[1:], url=server.url(path)) for path in routes]
        skews = [result.clock_skew_seconds for result in endpoints.scrape(targets, NOW)]

    assert skews == [120.0, 0.0, None, None]


def test_a_failing_target_is_asked_less_and_less_and_found_again() -> None:
    """Three failures open the breaker: a row every tick, a request only now and then, and one success closes it."""
    is_broken = True

    def moody(exchange: Exchange) -> None:
        (status(503) if is_broken else page(PAGE))(exchange)

    with misbehaving(moody) as server, MetricsEndpoints() as endpoints:
        ticks = [NOW + timedelta(seconds=5 * i) for i in range(60)]
        results = [scrape_one(endpoints, server.url("/metrics"), at) for at in ticks]
        asked = len(server.requests)
        is_broken = False
        recovered = next(
            (at, result)
            for at in (ticks[-1] + timedelta(seconds=5 * i) for i in range(1, 60))
            if (result := scrape_one(endpoints, server.url("/metrics"), at)).error_kind is None
        )
        after = scrape_one(endpoints, server.url("/metrics"), recovered[0] + timedelta(seconds=5))

    kinds = [result.error_kind for result in results]
    assert kinds[:4] == ["http_status"] * 3 + ["breaker_open"]
    assert len(results) == 60
    assert asked < 15
    waiting = results[3]
    assert "HTTP 503" in str(waiting.error_detail)
    assert waiting.retry_at is not None
    assert f"{waiting.retry_at:%H:%M:%S}" in str(waiting.error_detail)
    assert [result.attempt for result in results[:4]] == [0, 1, 2, 3]
    assert recovered[0] - ticks[-1] <= timedelta(seconds=60 * MAX_SPREAD + 5)
    assert recovered[1].breaker_state == "half_open"
    assert (after.breaker_state, after.attempt, after.error_kind) == ("closed", 0, None)


def test_a_page_that_is_wrong_does_not_open_the_breaker(endpoints: MetricsEndpoints) -> None:
    """The endpoint answers in time: when its page is mended, the very next tick should see it."""
    with misbehaving(page("<html>")) as server:
        kinds = {
            scrape_one(endpoints, server.url("/metrics"), NOW + timedelta(seconds=5 * i)).error_kind for i in range(9)
        }

    assert kinds == {"html"}


def test_a_bug_of_ours_is_told_apart_and_logged() -> None:
    """An exception that no target can cause is 'internal' with its type; its traceback goes to the log, once."""

    class Broken(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            raise ZeroDivisionError("ours")

    with structlog.testing.capture_logs() as lines, MetricsEndpoints(transport=Broken) as endpoints:
        result = scrape_one(endpoints, "http://127.0.0.1:9/metrics")
        scrape_one(endpoints, "http://127.0.0.1:9/metrics")

    assert result.error_kind == "internal"
    assert "ZeroDivisionError" in str(result.error_detail)
    assert [(line["event"], line["target"]) for line in lines] == [("scrape_failed_internally", "t")]


@pytest.mark.parametrize("host", ["256.1.1.1", "xn--", "x..y", "a" * 300])
def test_a_name_that_no_host_can_have_is_the_targets_fault(endpoints: MetricsEndpoints, host: str) -> None:
    """It is named like one that cannot be resolved, with the remedy, and no traceback fills the log."""
    with structlog.testing.capture_logs() as lines:
        result = scrape_one(endpoints, f"http://{host}/metrics")

    assert (result.error_kind, lines) == ("dns", [])
    assert "fleet.yaml" in str(result.error_detail)


def test_a_time_without_a_zone_is_refused(endpoints: MetricsEndpoints) -> None:
    """A naive clock would shift every row by the zone of the machine."""
    with pytest.raises(ValueError, match="no time zone"):
        endpoints.scrape([], datetime(2026, 1, 1))  # noqa: DTZ001


def test_nothing_is_left_running_after_close() -> None:
    """Threads and sockets end with the client; a closed client may be used again."""
    before = set(threading.enumerate())
    with misbehaving(page(PAGE)) as server:
        endpoints = MetricsEndpoints()
        assert scrape_one(endpoints, server.url("/metrics")).text == PAGE
        endpoints.close()
        mine = [thread for thread in set(threading.enumerate()) - before if "endpoints" in thread.name]
        assert mine == []
        assert scrape_one(endpoints, server.url("/metrics")).text == PAGE
        endpoints.close()


POLICY = Policy()
Step = tuple[float, bool]


@given(steps=st.lists(st.tuples(st.floats(0.1, 120), st.booleans()), max_size=60), name=st.text(max_size=10))
def test_a_breaker_never_forgets_a_target_and_never_hammers_it(steps: list[Step], name: str) -> None:
    """Whatever happens: refused only while open and before retry_at; never silent for longer than the cap."""
    breaker, at, failures, last_ask = Breaker(), 0.0, 0, 0.0
    longest = POLICY.max_backoff_seconds * MAX_SPREAD
    for gap, is_good in steps:
        at += gap
        before = breaker
        breaker, may_ask = breaker.ask(at, POLICY)
        assert breaker.failures == failures
        if not may_ask:
            assert before.state == "open"
            assert failures >= POLICY.failures_to_open
            assert at < before.retry_at <= last_ask + longest
            continue
        last_ask = at
        assert breaker.state == ("closed" if failures < POLICY.failures_to_open else "half_open")
        _, again = breaker.ask(at, POLICY)
        assert again == (breaker.state == "closed"), "one probe at a time"
        failures = 0 if is_good else failures + 1
        breaker = breaker.succeeded() if is_good else breaker.failed(at, "cause", POLICY, spread_of(name))
        if failures >= POLICY.failures_to_open:
            assert POLICY.first_backoff_seconds * 0.9 <= breaker.retry_at - at <= longest


@given(openings=st.integers(1, 10_000))
def test_backoff_grows_to_its_cap_and_stays_there(openings: int) -> None:
    """Doubling from 10 s: 10, 20, 40, 60, 60, ..."""
    assert POLICY.backoff_seconds(openings) == min(10.0 * 2 ** min(openings - 1, 10), 60.0)


def test_a_lost_probe_and_a_clock_set_back_do_not_silence_a_target() -> None:
    """A probe that never reported is given up; a retry in the far future is not believed."""
    opened = Breaker()
    for _ in range(3):
        opened = opened.failed(1_000.0, "x", POLICY)
    probing, _ = opened.ask(1_010.0, POLICY)

    assert probing.ask(1_020.0, POLICY)[1] is False
    assert probing.ask(1_010.0 + 66.1, POLICY)[1] is True
    assert opened.ask(500.0, POLICY)[1] is True
