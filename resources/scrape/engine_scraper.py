"""Collect the engines: ask every target, read its page, normalize it, and hand out frames of the raw tables.

One row of raw_scrapes per target and tick, whatever happened; a fault of one target never touches another's rows.
Asking is `metrics_endpoint`, reading `optiinfra_pipelines.exposition`, meaning `optiinfra_pipelines.engines`,
storing `resources.warehouse`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

import polars as pl
import structlog

from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.thresholds import threshold_values
from optiinfra_pipelines.engines import Normalized, UnknownEngineError, normalize, to_frames
from optiinfra_pipelines.exposition import ExpositionError, Page, Reader
from optiinfra_pipelines.sql.sources import raw_tables
from resources.logs import ChangeLog
from resources.scrape.errors import one_line
from resources.scrape.metrics_endpoint import MetricsEndpoints, ScrapeResult

# Configurations and bucket bounds are the same page after page: they are handed out at first sight and then this
# seldom, so that a batch the warehouse had to refuse (a full disk) is made good; it keeps one row per grain.
REPEAT_AFTER = timedelta(minutes=10)
# Far above the configurations of a fleet; a page that invents one per scrape must not fill memory.
MAX_HANDED_OUT = 65_536
_log = structlog.get_logger(__name__)


class EngineScraper:
    """Reads the engines of one fleet, tick after tick. One caller at a time; closing `endpoints` is the caller's.

    idle_slots: names of targets that need not answer now; one that does not is no failure.
    """

    def __init__(
        self,
        fleet: Fleet,
        endpoints: MetricsEndpoints,
        reader: Reader | None = None,
        idle_slots: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self._targets = fleet.targets
        self._keep = {target.name: (*fleet.keep, *target.keep) for target in fleet.targets}
        self._max_skew = timedelta(seconds=threshold_values(fleet.thresholds)["clock_skew_seconds"])
        self._endpoints = endpoints
        self._reader = reader or Reader()
        self._idle_slots = idle_slots
        self._failures: dict[str, int] = {}
        self._told_internal: set[tuple[str, str]] = set()
        self._handed_out: dict[object, datetime] = {}
        self._changes = ChangeLog("target")

    def collect(self, now: datetime) -> dict[str, pl.DataFrame]:
        """One tick: every target once. Frames of raw_scrapes and of each table in `engines.TABLES`, empty ones too.

        now: the tick's clock, UTC. Blocks for at most a few deadlines; never raises for a target's fault.
        """
        results = self._endpoints.scrape(self._targets, now)
        try:
            idle = self._idle_slots()
        except (OSError, ValueError) as error:
            # Not known is not idle: what does not answer is told as a failure.
            _log.error("idle_slots_unknown", cause=str(error))
            idle = frozenset()
        return self.frames_of([_as_idle(one) if one.target.name in idle else one for one in results])

    def frames_of(self, results: Sequence[ScrapeResult]) -> dict[str, pl.DataFrame]:
        """The frames for answers already fetched."""
        scrapes: list[dict[str, object]] = []
        pages: list[Normalized] = []
        for result in results:
            outcome, page, normalized = self._read(result)
            if normalized is not None:
                pages.append(self._only_news(normalized))
            scrapes.append(self._scrape_row(outcome, page, normalized))
        return {"raw_scrapes": raw_tables()["raw_scrapes"].frame(scrapes), **to_frames(pages)}

    def _read(self, result: ScrapeResult) -> tuple[ScrapeResult, Page | None, Normalized | None]:
        """The page and its rows; or the result with the cause why there are none."""
        if result.text is None:
            return result, None, None
        target = result.target
        try:
            page = self._reader.read(result.text, key=target.name)
            normalized = normalize(
                page,
                target=target.name,
                scraped_at=result.scraped_at,
                keep=self._keep.get(target.name, ()),
                engine=target.engine,
            )
        except ExpositionError as error:
            return result.refused("malformed", str(error)), None, None
        except UnknownEngineError as error:
            return result.refused("unknown_engine", str(error)), None, None
        except Exception as error:
            # A bug of ours must cost one target one row, and be seen: its traceback once, not at every tick.
            name = type(error).__name__
            if (target.name, name) not in self._told_internal:
                self._told_internal.add((target.name, name))
                _log.exception("page_not_read", target=target.name)
            return result.refused("internal", f"{name} while reading the page"), None, None
        return result, page, normalized

    def _scrape_row(self, result: ScrapeResult, page: Page | None, normalized: Normalized | None) -> dict[str, object]:
        target = result.target
        identity = normalized.identity if normalized is not None else None
        is_up = result.error_kind is None
        failures = self._failures.get(target.name, 0)
        # An open breaker asks nothing, and of an idle slot nothing is expected: neither a new failure nor a new cause.
        if result.error_kind not in ("breaker_open", "idle_slot"):
            self._failures[target.name] = 0 if is_up else failures + 1
            self._changes.saw(target.name, _cause(result), result.scraped_at, result.error_detail)
        left_out = _left_out(page, normalized, result.scraped_at, self._max_skew)
        return {
            "scraped_at": result.scraped_at,
            "target": target.name,
            "deployment": target.deployment,
            "source": target.source,
            "is_up": is_up,
            "error_kind": result.error_kind,
            "error_detail": left_out if is_up else result.error_detail,
            "engine": identity.engine if identity else target.engine,
            "engine_version": identity.version if identity else None,
            "vantage": identity.vantage if identity else None,
            "http_status": result.http_status,
            "duration_seconds": result.duration_seconds,
            "page_bytes": result.page_bytes,
            "sample_count": len(page.values) if page is not None else None,
            "unknown_family_count": len(normalized.unknown_families) if normalized is not None else None,
            "attempt": failures,
            "breaker_state": result.breaker_state,
            "clock_skew_seconds": result.clock_skew_seconds,
            "process_started_at": normalized.process_started_at if normalized is not None else None,
        }

    def _only_news(self, page: Normalized) -> Normalized:
        """The page's rows without configurations and bounds handed out lately."""
        at = page.scraped_at
        configs = [row for row in page.rows["raw_engine_configs"] if self._is_news(row[1:4], at)]
        bounds = [row for row in page.rows["raw_histogram_bounds"] if self._is_news(row[0], at)]
        return replace(page, rows={**page.rows, "raw_engine_configs": configs, "raw_histogram_bounds": bounds})

    def _is_news(self, key: object, at: datetime) -> bool:
        last = self._handed_out.get(key)
        if last is not None and timedelta(0) <= at - last < REPEAT_AFTER:
            # Targets of one tick share bounds; those of the tick that handed them out need no second copy either.
            return False
        if len(self._handed_out) >= MAX_HANDED_OUT:
            self._handed_out.clear()
        self._handed_out[key] = at
        return True


def _as_idle(result: ScrapeResult) -> ScrapeResult:
    """An idle slot that answers is what it says; one that does not is as it should be."""
    if result.text is not None:
        return result
    return result.refused("idle_slot", "a place for candidates of rollouts: nothing runs here, or it is being started")


def _cause(result: ScrapeResult) -> str | None:
    """What the change log tells apart: the kind, and the status where that is the kind."""
    return f"http_status {result.http_status}" if result.error_kind == "http_status" else result.error_kind


def _left_out(page: Page | None, normalized: Normalized | None, at: datetime, max_skew: timedelta) -> str | None:
    """What a page that is up had and its rows have not, in words; None when nothing was left out."""
    if page is None or normalized is None:
        return None
    notes = [
        f"histogram {defect.source_metric} (rank {defect.engine_rank}) dropped: {defect.reason}"
        for defect in normalized.defects
    ]
    layout = page.layout
    if layout.duplicates:
        first = layout.duplicates[0]
        labels = ",".join(f'{name}="{value}"' for name, value in layout.labels[first])
        notes.append(f"{len(layout.duplicates)} duplicate series, the first kept: {layout.names[first]}{{{labels}}}")
    if page.timestamps_ms:
        now_ms = at.timestamp() * 1_000
        furthest = max(page.timestamps_ms.values(), key=lambda stamp: abs(stamp - now_ms))
        seconds = (furthest - now_ms) / 1_000
        if abs(seconds) > max_skew.total_seconds():
            when = f"{abs(seconds):.0f} s in the {'future' if seconds > 0 else 'past'}"
            notes.append(f"{len(page.timestamps_ms)} samples carry a time, up to {when}; rows carry the scrape's")
    return one_line("; ".join(notes)) if notes else None
