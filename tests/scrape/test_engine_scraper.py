"""From loopback targets to frames of the raw tables: recorded pages of real engines, whole and spoiled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import polars as pl
import pytest
import structlog

from optiinfra_pipelines.domain.fleet import Cadence, Deployment, Fleet, Target
from optiinfra_pipelines.engines import TABLES
from optiinfra_pipelines.exposition import Page, Reader
from optiinfra_pipelines.sql.sources import raw_tables
from resources.logs import configure_logging
from resources.scrape.engine_scraper import REPEAT_AFTER, EngineScraper
from resources.scrape.metrics_endpoint import MetricsEndpoints
from tests.scrape.loopback import Handler, Loopback, drip, endless, gzipped, page, raw, redirect, silent, status

NOW = datetime(2026, 11, 20, 16, 0, tzinfo=UTC)
PAGES = Path(__file__).parents[1] / "fixtures" / "exposition"
VLLM = (PAGES / "vllm_0.32.0_loaded_1.prom").read_text()
VLLM_LATER = (PAGES / "vllm_0.32.0_loaded_2.prom").read_text()
SGLANG = (PAGES / "sglang_0.5.23_light.prom").read_text()
TTFT = "vllm:time_to_first_token_seconds"


@pytest.fixture
def endpoints() -> Iterator[MetricsEndpoints]:
    with MetricsEndpoints(deadline_seconds=2.0) as client:
        yield client


def fleet_of(server: Loopback, *names: str, **more: object) -> Fleet:
    targets = tuple(Target(name=name, url=server.url(f"/{name}"), **more) for name in names)  # type: ignore[arg-type]
    return Fleet(targets=targets)


def row(frames: dict[str, pl.DataFrame], target: str) -> dict[str, object]:
    (found,) = frames["raw_scrapes"].filter(pl.col("target") == target).to_dicts()
    return found


def spoiled(pattern: str, replacement: str) -> str:
    """The recorded page with one thing changed; fails when it changes nothing."""
    text, count = re.subn(pattern, replacement, VLLM, count=1, flags=re.MULTILINE)
    assert count == 1
    return text


NOT_MONOTONE = spoiled(rf"^({TTFT}_bucket{{.*le=\"0.001\".*}}) \S+$", r"\1 99999999.0")
DUPLICATE = spoiled(r"^(vllm:num_requests_running{.*}) (\S+)$", r"\1 \2\n\1 12345.0")
OLD_TIMES = spoiled(r"^(vllm:num_requests_running{.*}) (\S+)$", r"\1 \2 86400000")
FUTURE_TIMES = spoiled(r"^(vllm:num_requests_running{.*}) (\S+)$", rf"\1 \2 {int(NOW.timestamp() * 1000) + 7_200_000}")
MALFORMED = spoiled(r"^(vllm:num_requests_waiting{.*}) \S+$", r"\1 many")

DOWN: dict[str, tuple[Handler, str]] = {
    "error-500": (status(500), "http_status"),
    "html": (page("<html><body>Bad gateway</body></html>"), "html"),
    "empty": (page(""), "empty"),
    "truncated-gzip": (gzipped(VLLM.encode(), keep=2_000), "bad_encoding"),
    "endless": (endless, "too_large deadline"),
    "drip": (drip, "deadline"),
    "silent": (silent, "deadline"),
    "redirect": (redirect("http://example.invalid/metrics"), "redirect_refused"),
    "malformed": (page(MALFORMED), "malformed"),
    "not-utf8": (page(VLLM.encode() + b'x{a="\xff"} 1\n'), "not_utf8"),
    "another-exporter": (page("# TYPE http_requests_total counter\nhttp_requests_total 1\n"), "unknown_engine"),
    "cut": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + VLLM.encode()[:5_000]), "closed_early"),
}
UP: dict[str, tuple[Handler, str | None]] = {
    "vllm": (page(VLLM), None),
    "sglang": (gzipped(SGLANG.encode()), None),
    "duplicate": (page(DUPLICATE), "1 duplicate series, the first kept: vllm:num_requests_running"),
    "not-monotone": (page(NOT_MONOTONE), f"histogram {TTFT} (rank 0) dropped: bucket counts that fall"),
    "old-times": (page(OLD_TIMES), "1 samples carry a time, up to"),
    "future-times": (page(FUTURE_TIMES), "up to 7200 s in the future; rows carry the scrape's"),
    "skewed": (page(VLLM, "Date: Fri, 20 Nov 2026 17:00:00 GMT"), None),
}


def test_every_hostile_page_is_one_row_with_its_cause_and_the_others_are_complete(endpoints: MetricsEndpoints) -> None:
    """One tick over all of them at once: nobody's fault costs anybody else a row."""
    with Loopback({f"/{name}": handler for name, (handler, _) in (DOWN | UP).items()}) as server:
        frames = EngineScraper(fleet_of(server, *DOWN, *UP), endpoints).collect(NOW)

    assert frames["raw_scrapes"].height == len(DOWN) + len(UP)
    for name, (_, kinds) in DOWN.items():
        found = row(frames, name)
        assert (found["is_up"], found["error_kind"] in kinds.split()) == (False, True), found
        assert found["error_detail"]
        assert frames["raw_engine_samples"].filter(pl.col("target") == name).is_empty()
    for name, (_, note) in UP.items():
        found = row(frames, name)
        assert (found["is_up"], found["error_kind"]) == (True, None), found
        assert found["error_detail"] is None if note is None else note in str(found["error_detail"])
        assert frames["raw_engine_samples"].filter(pl.col("target") == name).height >= 1
    assert "line" in str(row(frames, "malformed")["error_detail"])
    assert row(frames, "skewed")["clock_skew_seconds"] == 3600.0


def test_a_spoiled_histogram_is_left_out_alone(endpoints: MetricsEndpoints) -> None:
    """Buckets that fall cannot be trusted; every other histogram and every scalar of the page can."""
    with Loopback({"/good": page(VLLM), "/bad": page(NOT_MONOTONE)}) as server:
        frames = EngineScraper(fleet_of(server, "good", "bad"), endpoints).collect(NOW)
    histograms = frames["raw_engine_histograms"]
    kept = {
        name: set(histograms.filter(pl.col("target") == name)["source_metric"].to_list()) for name in ("good", "bad")
    }

    assert kept["good"] - kept["bad"] == {TTFT}
    samples = frames["raw_engine_samples"].drop("target", "scraped_at")
    assert samples.row(0) == samples.row(1)


def test_of_a_duplicate_series_the_first_counts(endpoints: MetricsEndpoints) -> None:
    """As in Prometheus: the second value is neither taken nor added."""
    with Loopback({"/good": page(VLLM), "/twice": page(DUPLICATE)}) as server:
        samples = EngineScraper(fleet_of(server, "good", "twice"), endpoints).collect(NOW)["raw_engine_samples"]

    assert samples["requests_running"].n_unique() == 1


def test_a_counter_reset_is_nothing_wrong(endpoints: MetricsEndpoints) -> None:
    """An engine that restarted is up; its counters are stored as scraped, lower than before."""
    pages = iter([VLLM_LATER, VLLM])
    with Loopback({"/a": lambda exchange: page(next(pages))(exchange)}) as server:
        scraper = EngineScraper(fleet_of(server, "a"), endpoints)
        ticks = [scraper.collect(NOW + timedelta(seconds=5 * i)) for i in range(2)]

    assert [row(frames, "a")["error_detail"] for frames in ticks] == [None, None]
    before, after = (frames["raw_engine_samples"]["generation_tokens_total"][0] for frames in ticks)
    assert after < before


def test_frames_have_exactly_the_columns_of_the_raw_tables(endpoints: MetricsEndpoints) -> None:
    """All tables in every tick, typed, also when nothing answered or nothing is watched."""
    with Loopback({"/a": page(VLLM), "/b": status(500)}) as server:
        for names in ((), ("b",), ("a", "b")):
            frames = EngineScraper(fleet_of(server, *names), endpoints).collect(NOW)
            assert set(frames) == {"raw_scrapes", *TABLES}
            for name, frame in frames.items():
                assert frame.schema == raw_tables()[name].polars_schema


def test_a_row_says_what_was_scraped(endpoints: MetricsEndpoints) -> None:
    """Names from fleet.yaml, the engine from the page, sizes and times of the answer."""
    with Loopback({"/a": gzipped(VLLM.encode())}) as server:
        target = Target(name="a", url=server.url("/a"), deployment="chat", source="recorded", keep=("python_gc_*",))
        fleet = Fleet(targets=(target,), deployments=(Deployment(name="chat", model="m"),), keep=("process_open_fds",))
        frames = EngineScraper(fleet, endpoints).collect(NOW)
    found = row(frames, "a")

    assert (found["deployment"], found["source"], found["engine"], found["vantage"]) == (
        "chat",
        "recorded",
        "vllm",
        "engine",
    )
    assert found["page_bytes"] == len(VLLM)
    assert found["sample_count"] == sum(1 for line in VLLM.splitlines() if line and not line.startswith("#"))
    assert found["http_status"] == 200
    assert NOW <= found["scraped_at"] < NOW + timedelta(seconds=1)  # type: ignore[operator]
    assert found["process_started_at"] is not None
    kept = set(frames["raw_kept_samples"]["name"].to_list())
    assert "process_open_fds" in kept
    assert any(name.startswith("python_gc_") for name in kept)


def test_an_unchanged_configuration_is_handed_out_seldom(endpoints: MetricsEndpoints) -> None:
    """At first sight, after ten minutes (a refused batch is made good), and at once when it changes."""
    changed = VLLM.replace('block_size="32"', 'block_size="16"')
    assert changed != VLLM
    serve = [VLLM]
    with Loopback({"/a": lambda exchange: page(serve[0])(exchange)}) as server:
        scraper = EngineScraper(fleet_of(server, "a"), endpoints)

        def handed_out(at: datetime) -> tuple[int, bool]:
            frames = scraper.collect(at)
            return frames["raw_engine_configs"].height, frames["raw_histogram_bounds"].height > 0

        assert handed_out(NOW) == (1, True)
        assert handed_out(NOW + timedelta(seconds=5)) == (0, False)
        serve[0] = changed
        assert handed_out(NOW + timedelta(seconds=10)) == (1, False)
        assert handed_out(NOW + timedelta(seconds=20) + REPEAT_AFTER) == (1, True)


def test_failures_in_a_row_are_counted_whatever_their_kind(endpoints: MetricsEndpoints) -> None:
    """A malformed page is a failure too, although it opens no breaker; one good page starts the count anew."""
    handlers = [page("<html>"), page(MALFORMED), page("nonsense 1\n"), page(VLLM), page(VLLM)]
    with Loopback({"/a": lambda exchange: handlers[exchange.ordinal](exchange)}) as server:
        scraper = EngineScraper(fleet_of(server, "a"), endpoints)
        rows = [row(scraper.collect(NOW + timedelta(seconds=5 * i)), "a") for i in range(5)]

    assert [found["attempt"] for found in rows] == [0, 1, 2, 3, 0]
    assert [found["error_kind"] for found in rows] == ["html", "malformed", "unknown_engine", None, None]


def test_a_dead_target_writes_a_row_every_tick_and_a_line_per_change(endpoints: MetricsEndpoints) -> None:
    """Silence would look like health: the open breaker's rows name the cause, the log does not repeat it."""
    out = StringIO()
    configure_logging({"OPTIINFRA_LOG_FORMAT": "json"}, out)
    is_up = False

    def handler(exchange: object) -> None:
        (page(VLLM) if is_up else status(503))(exchange)  # type: ignore[arg-type]

    try:
        with Loopback({"/a": handler}) as server:
            scraper = EngineScraper(fleet_of(server, "a"), endpoints)
            rows = [row(scraper.collect(NOW + timedelta(seconds=5 * i)), "a") for i in range(40)]
            is_up = True
            rows += [row(scraper.collect(NOW + timedelta(seconds=5 * i)), "a") for i in range(40, 60)]
    finally:
        structlog.reset_defaults()

    assert len(rows) == 60
    assert {found["error_kind"] for found in rows[:40]} == {"http_status", "breaker_open"}
    assert all("503" in str(found["error_detail"]) for found in rows[:40])
    assert rows[-1]["is_up"] is True
    events = [json.loads(line)["event"] for line in out.getvalue().splitlines()]
    assert events == ["target_down", "target_back"]


def test_a_bug_while_reading_costs_one_row_and_is_logged(endpoints: MetricsEndpoints) -> None:
    """Whatever our own code raises for one page, the other targets' rows are written."""

    class Faulty(Reader):
        def read(self, text: str | bytes, key: object = None) -> Page:  # type: ignore[override]
            if key == "a":
                raise RuntimeError("ours")
            return super().read(text, key)  # type: ignore[arg-type]

    with Loopback({"/a": page(VLLM), "/b": page(VLLM)}) as server, structlog.testing.capture_logs() as lines:
        frames = EngineScraper(fleet_of(server, "a", "b"), endpoints, Faulty()).collect(NOW)

    assert row(frames, "a")["error_kind"] == "internal"
    assert row(frames, "b")["is_up"] is True
    assert ("page_not_read", "a") in [(line["event"], line.get("target")) for line in lines]


def test_the_settings_of_the_fleet_reach_the_requests() -> None:
    """Deadline, concurrency and the breaker's patience come from fleet.yaml."""
    fleet = Fleet(
        cadence=Cadence(scrape_deadline_seconds=0.2, scrape_concurrency=7), thresholds={"breaker_failures_to_open": 1.0}
    )
    with Loopback({"/a": silent}) as server, MetricsEndpoints.of_fleet(fleet) as endpoints:
        target = Target(name="a", url=server.url("/a"))
        (first,) = endpoints.scrape([target], NOW)
        (second,) = endpoints.scrape([target], NOW + timedelta(seconds=5))

    assert "within 0.2 s" in str(first.error_detail)
    assert second.error_kind == "breaker_open"
