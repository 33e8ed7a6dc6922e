"""How long a deployment's replica takes from scale-up to ready, measured from its own scrape history.

Pure: events of replicas in, one number with its standing out. What the time is used for is `forecast` and `scaling`.
Time before a replica can be seen (scheduling, pulling an image on a node that did not run it) leaves no scrape: what
is measured is a lower bound of what an operator waits.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal

import polars as pl
from pydantic import NonNegativeInt

from optiinfra_pipelines.domain.base import Frozen, Positive

# vLLM replicas are reported to need 1 to 2 minutes warm and 2 to 7 typically; the public back-tests use this too.
DEFAULT_COLD_START_SECONDS = 180.0
# A P95 of fewer is the largest of a handful; from 5 on it is told as measured, under that only as a lower bound.
MIN_STARTS = 5
# A target that is tried this long before its process starts waits in fleet.yaml for a machine, not for a start; and a
# process this much older than its first page was running before anybody looked.
MAX_ATTEMPT_SECONDS = 600.0
# Past this a replica waited for its first request and not for its weights.
MAX_START_SECONDS = 3600.0

_COLUMNS: dict[str, pl.DataType | type[pl.DataType]] = {
    "deployment": pl.String,
    "target": pl.String,
    "first_seen_at": pl.Datetime("us", "UTC"),
    "ready_at": pl.Datetime("us", "UTC"),
    "cold_start_seconds": pl.Float64,
    "ready_by": pl.String,  # completion, or page where no other replica was serving meanwhile
}
STARTS_SCHEMA = pl.Schema(_COLUMNS)
_ORDER = ("first_attempt", "first_page", "first_completion", "already_serving")
_EVENT_COLUMNS = ("deployment", "target", "event", "happened_at", "process_started_at")


class ColdStart(Frozen):
    """Seconds from order to ready that plans should count with."""

    deployment: str
    seconds: Positive
    origin: Literal["measured", "default"]
    starts: NonNegativeInt
    reason: str


def replica_starts(events: pl.DataFrame, load: pl.DataFrame) -> pl.DataFrame:
    """Every start that was seen from its beginning (STARTS_SCHEMA).

    events: rows of int_replica_starts (deployment, target, event, happened_at, process_started_at). load: rows of
    int_load_minutes (deployment, minute_at, requests_per_second). A start begins with the first attempt to read the
    target, or with its process where that is told and the attempt lies long before; it ends with the first completed
    request if the deployment served others meanwhile, else with the first page (nobody asked it for anything).
    A process that was already serving when first read, and one not yet ready, are no starts.
    """
    missing = [name for name in _EVENT_COLUMNS if name not in events.columns]
    if missing:
        raise ValueError(f"events lack {missing}; they are rows of int_replica_starts")
    rows: list[dict[str, object]] = []
    for (deployment, target), own in events.drop_nulls("deployment").group_by(
        ["deployment", "target"], maintain_order=True
    ):
        busy = load.filter((pl.col("deployment") == deployment) & (pl.col("requests_per_second") > 0))["minute_at"]
        for found in _starts_of(_in_order(own), busy):
            rows.append({"deployment": deployment, "target": target, **found})
    return pl.DataFrame(rows, schema=STARTS_SCHEMA)


def _in_order(events: pl.DataFrame) -> pl.DataFrame:
    """By time; of one scrape, in the order in which things happen."""
    rank = pl.col("event").replace_strict(list(_ORDER), list(range(len(_ORDER))), default=len(_ORDER))
    return events.sort("happened_at", rank)


def _starts_of(events: pl.DataFrame, busy: pl.Series) -> list[dict[str, object]]:
    out: list[dict[str, object]] = []
    attempt: datetime | None = None
    seen: datetime | None = None
    page: datetime | None = None
    for row in events.iter_rows(named=True):
        at: datetime = row["happened_at"]
        match row["event"]:
            case "first_attempt":
                attempt = at
            case "already_serving":
                attempt = seen = page = None
            case "first_page":
                seen, page, attempt = _first_seen(attempt, row["process_started_at"], at), at, None
            case "first_completion" if seen is not None and page is not None:
                until = at.replace(second=0, microsecond=0)
                asked = busy.filter((busy >= page.replace(second=0, microsecond=0)) & (busy < until))
                served = at - page < timedelta(minutes=1) or not asked.is_empty()
                ready = at if served else page
                seconds = (ready - seen).total_seconds()
                if 0 < seconds <= MAX_START_SECONDS:
                    ready_by = "completion" if served else "page"
                    out.append(
                        {
                            "first_seen_at": seen,
                            "ready_at": ready,
                            "cold_start_seconds": seconds,
                            "ready_by": ready_by,
                        }
                    )
                seen = page = None
            case _:  # a completion of a process whose start was not seen
                pass
    return out


def _first_seen(attempt: datetime | None, process: datetime | None, page: datetime) -> datetime | None:
    """When the start began; None when it began before anybody looked."""
    if attempt is None:  # a restart between two pages
        return page if process is None else process
    if process is None:
        return attempt if attempt < page else None
    if 0 <= (process - attempt).total_seconds() <= MAX_ATTEMPT_SECONDS:
        return attempt
    return process if (page - process).total_seconds() <= MAX_ATTEMPT_SECONDS or process > attempt else None


def cold_start(starts: pl.DataFrame, deployment: str) -> ColdStart:
    """The P95 of a deployment's starts (STARTS_SCHEMA), or the default with the reason why.

    The quantile is the next larger start seen. Fewer than MIN_STARTS: the longest, where it exceeds the default.
    """
    seconds = starts.filter(pl.col("deployment") == deployment)["cold_start_seconds"]
    if len(seconds) >= MIN_STARTS:
        p95 = float(seconds.quantile(0.95, "higher") or 0.0)
        return ColdStart(
            deployment=deployment,
            seconds=p95,
            origin="measured",
            starts=len(seconds),
            reason=f"P95 of {len(seconds)} starts from first sight to first completion",
        )
    longest = max(seconds.to_list(), default=0.0)
    reason = f"{len(seconds)} of {MIN_STARTS} starts seen from their beginning: the default stands in"
    if longest > DEFAULT_COLD_START_SECONDS:
        reason = f"{len(seconds)} of {MIN_STARTS} starts seen; the longest exceeds the default"
    return ColdStart(
        deployment=deployment,
        seconds=max(longest, DEFAULT_COLD_START_SECONDS),
        origin="measured" if longest > DEFAULT_COLD_START_SECONDS else "default",
        starts=len(seconds),
        reason=reason,
    )
