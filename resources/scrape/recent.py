"""The last minute of scrapes, in memory, for whoever must not wait for the warehouse.

Filled by the scraping sensor and read by the watching one, in the same process. After a restart it is empty and a
minute later it is whole: what matters for longer is in the warehouse.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

import polars as pl

from optiinfra_pipelines.analysis.watch import Look, Watched
from optiinfra_pipelines.domain.fleet import Fleet

# A minute at the 5 s cadence: twice the window that the rules look at.
LOOKS = 13


class RecentScrapes:
    """Looks per target, oldest first. Thread-safe."""

    def __init__(self, fleet: Fleet) -> None:
        self._targets = fleet.targets
        self._looks: dict[str, deque[Look]] = {target.name: deque(maxlen=LOOKS) for target in fleet.targets}
        self._lock = threading.Lock()

    def remember(self, frames: Mapping[str, pl.DataFrame]) -> None:
        """Take in one tick's raw_scrapes and raw_engine_samples."""
        samples: dict[str, list[dict[str, Any]]] = {}
        for sample in frames["raw_engine_samples"].iter_rows(named=True):
            samples.setdefault(sample["target"], []).append(sample)
        with self._lock:
            for scrape in frames["raw_scrapes"].iter_rows(named=True):
                looks = self._looks.get(scrape["target"])
                if looks is not None:
                    looks.append(_look(scrape, samples.get(scrape["target"], [])))

    def watched(self) -> list[Watched]:
        """Every target of the fleet with what is remembered of it."""
        with self._lock:
            return [
                Watched(target.name, target.deployment, target.source, tuple(self._looks[target.name]))
                for target in self._targets
            ]


def _look(scrape: Mapping[str, Any], ranks: list[dict[str, Any]]) -> Look:
    """One scrape with its ranks added up; a sum with an unknown part is unknown."""

    def total(*columns: str) -> float | None:
        """Of the first of these columns that every rank has."""
        for column in columns:
            values = [rank[column] for rank in ranks]
            if values and all(value is not None for value in values):
                return float(sum(values))
        return None

    failed, server_errors = total("requests_failed_total"), total("http_5xx_total")
    kind, detail = scrape["error_kind"], scrape["error_detail"]
    return Look(
        at=scrape["scraped_at"],
        is_up=scrape["is_up"],
        is_idle=kind == "idle_slot",
        error=": ".join(part for part in (kind, detail) if part) or None,
        running=total("requests_running"),
        waiting=total("requests_waiting"),
        finished=total("requests_finished_total"),
        # Both may count the same failure: the larger one, never the sum.
        failed=max((value for value in (failed, server_errors) if value is not None), default=None),
        tokens=total("realtime_tokens_total", "generation_tokens_total"),
        process_started_at=scrape["process_started_at"],
    )
