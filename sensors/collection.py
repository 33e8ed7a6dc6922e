"""The three sensors that collect: every 5 s, inside the tick, without a run.

Each asks its collector for frames, stores them, and once a minute reports what it stored as materializations of the
raw tables. Not here: how anything is read (`resources`) or what it means (`optiinfra_pipelines.engines`).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

import dagster as dg
import polars as pl

from optiinfra_pipelines.defs.raw import REPORTED_BY
from optiinfra_pipelines.defs.schema import Metadata
from resources.collectors import Collectors
from resources.warehouse import Warehouse, WarehouseError

Collect = Callable[[datetime], Mapping[str, pl.DataFrame]]

# Dagster's daemon looks every 5 s and skips a sensor whose interval is not over: an interval one second short of the
# wanted one gives exactly that, an equal one gives every other look.
_INTERVAL_MARGIN_SECONDS = 1


@dataclass
class _SinceReport:
    """What was stored since the last report; kept in the code server's memory, lost with it, never in a cursor."""

    rows: Counter[str] = field(default_factory=Counter)
    ticks: int = 0
    spooled: int = 0
    slowest_seconds: float = 0.0
    longest_gap_seconds: float = 0.0
    last_started: float | None = None

    def begin(self, started: float) -> None:
        """A tick begins; started: seconds of a clock that is never set."""
        if self.last_started is not None:
            self.longest_gap_seconds = max(self.longest_gap_seconds, started - self.last_started)
        self.last_started = started

    def clear(self) -> None:
        """What was reported counts no more."""
        self.rows.clear()
        self.ticks, self.spooled, self.slowest_seconds, self.longest_gap_seconds = 0, 0, 0.0, 0.0


def collection_sensors(collectors: Collectors, warehouse: Warehouse, collect_seconds: int) -> list[dg.SensorDefinition]:
    """`scrape_engines`, `sample_gpus` and `sample_hosts`, running from the first start."""
    collect: dict[str, Collect] = {
        "scrape_engines": collectors.scrape_engines,
        "sample_gpus": collectors.sample_gpus,
        "sample_hosts": collectors.sample_hosts,
    }
    descriptions = {
        "scrape_engines": "Reads every target's metrics page and stores its normalized rows.",
        "sample_gpus": "Reads every GPU of every host: this one by NVML, others by their exporter.",
        "sample_hosts": "Reads CPU, memory, disks, network and engine processes of every host.",
    }
    return [
        _sensor(name, descriptions[name], collect[name], collectors.clock, warehouse, collect_seconds)
        for name in REPORTED_BY
    ]


def _sensor(
    name: str,
    description: str,
    collect: Collect,
    clock: Callable[[], datetime],
    warehouse: Warehouse,
    collect_seconds: int,
) -> dg.SensorDefinition:
    since = _SinceReport()

    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        now = clock()
        started = time.perf_counter()
        since.begin(started)
        frames = collect(now)
        try:
            stored = warehouse.append(f"{name}-{now:%Y%m%dT%H%M%S.%fZ}", frames)
        except WarehouseError as error:
            # Not raised: a failed tick is kept for a week, twice a second's worth of disk each. Freshness turns red.
            return dg.SkipReason(str(error))
        seconds = time.perf_counter() - started
        since.rows.update({table: frame.height for table, frame in frames.items()})
        since.ticks += 1
        since.spooled += stored.status == "spooled"
        since.slowest_seconds = max(since.slowest_seconds, seconds)
        minute = now.replace(second=0, microsecond=0).isoformat()
        done = f"{sum(frame.height for frame in frames.values())} rows {stored.status} in {seconds * 1000:.0f} ms"
        if context.cursor and json.loads(context.cursor)["reported_minute"] == minute:
            return dg.SkipReason(done)
        events = _materializations(name, frames, since, is_first=context.cursor is None)
        since.clear()
        return dg.SensorResult(
            asset_events=events, cursor=json.dumps({"reported_minute": minute}), skip_reason=dg.SkipReason(done)
        )

    return dg.SensorDefinition(
        name=name,
        evaluation_fn=evaluate,
        description=description,
        minimum_interval_seconds=collect_seconds - _INTERVAL_MARGIN_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
    )


def _materializations(
    name: str, frames: Mapping[str, pl.DataFrame], since: _SinceReport, *, is_first: bool
) -> list[dg.AssetMaterialization]:
    """One event for the sensor's first table always, for the others when they got rows since the last report.

    The very first report is of all: a table without rows yet must not look like one that was never watched.
    """
    first, *others = REPORTED_BY[name]
    tick: dict[str, Metadata] = {
        "ticks": since.ticks,
        "slowest_tick_seconds": round(since.slowest_seconds, 4),
        "longest_gap_seconds": round(since.longest_gap_seconds, 2),
        "spooled_ticks": since.spooled,
        **_health(name, frames),
    }
    events = [dg.AssetMaterialization(first, metadata={"rows": since.rows[first], **tick})]
    events += [
        dg.AssetMaterialization(table, metadata={"rows": since.rows[table]})
        for table in others
        if since.rows[table] or is_first
    ]
    return events


def _health(name: str, frames: Mapping[str, pl.DataFrame]) -> dict[str, Metadata]:
    """The numbers a person looks for first, from the tick that reports."""
    if name == "scrape_engines":
        scrapes = frames["raw_scrapes"]
        is_idle = pl.col("error_kind").eq_missing("idle_slot")
        down = scrapes.filter(~pl.col("is_up"), ~is_idle)
        idle = scrapes.filter(is_idle)
        reasons = [f"{row['target']}: {row['error_kind']}" for row in down.iter_rows(named=True)]
        return {
            "targets_up": scrapes.height - down.height - idle.height,
            "targets_down": down.height,
            "idle_slots": idle.height,
            "down": ", ".join(sorted(reasons)) or "none",
        }
    if name == "sample_gpus":
        states = frames["raw_gpu_collections"]
        return {
            "gpus": int(states["gpu_count"].fill_null(0).sum()),
            "status": ", ".join(f"{row['host']}: {row['status']}" for row in states.iter_rows(named=True)) or "no host",
        }
    states = frames["raw_host_collections"]
    return {
        "hosts_read": int((states["status"] == "ok").sum()),
        "status": ", ".join(f"{row['host']}: {row['status']}" for row in states.iter_rows(named=True)) or "no host",
    }
