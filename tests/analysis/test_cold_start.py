"""The cold start is measured from a replica's own events, and is the default with a reason until it can be."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.scaling.cold_start import (
    DEFAULT_COLD_START_SECONDS,
    MIN_STARTS,
    STARTS_SCHEMA,
    cold_start,
    replica_starts,
)

START = datetime(2026, 11, 20, 12, 0, 5, tzinfo=UTC)
Event = tuple[str, str, float, float | None]  # target, event, seconds after START, process start in the same


def events(*rows: Event) -> pl.DataFrame:
    schema: dict[str, pl.DataType | type[pl.DataType]] = {
        "deployment": pl.String,
        "target": pl.String,
        "event": pl.String,
        "happened_at": pl.Datetime("us", "UTC"),
        "process_started_at": pl.Datetime("us", "UTC"),
    }
    return pl.DataFrame(
        [
            {
                "deployment": "chat",
                "target": target,
                "event": event,
                "happened_at": START + timedelta(seconds=at),
                "process_started_at": None if process is None else START + timedelta(seconds=process),
            }
            for target, event, at, process in rows
        ],
        schema=schema,
    )


def load(rate: float, minutes: int = 120) -> pl.DataFrame:
    first = START.replace(second=0) - timedelta(minutes=30)
    return pl.DataFrame(
        {
            "deployment": ["chat"] * minutes,
            "minute_at": [first + timedelta(minutes=minute) for minute in range(minutes)],
            "requests_per_second": [rate] * minutes,
        }
    )


def seconds(frame: pl.DataFrame, rate: float = 1.0) -> list[float]:
    return replica_starts(frame, load(rate))["cold_start_seconds"].to_list()


def test_a_start_lasts_from_first_sight_to_first_completion() -> None:
    """Tried at 0 s while it loads, read at 95 s, done with its first request at 160 s."""
    seen = events(("a", "first_attempt", 0, None), ("a", "first_page", 95, 20), ("a", "first_completion", 160, 20))

    assert seconds(seen) == [160.0]
    assert replica_starts(seen, load(1.0))["ready_by"].to_list() == ["completion"]


def test_a_replica_that_nobody_asked_is_ready_with_its_first_page() -> None:
    """Without any load the wait for a first request is not a wait for weights."""
    seen = events(("a", "first_attempt", 0, None), ("a", "first_page", 95, 20), ("a", "first_completion", 1500, 20))

    assert seconds(seen, rate=0.0) == [95.0]
    assert seconds(seen, rate=1.0) == [1500.0]


def test_a_restart_counts_from_its_process() -> None:
    """Nobody tries a target anew when its process dies: the new process tells when it began."""
    seen = events(
        ("a", "first_attempt", 0, None),
        ("a", "first_page", 60, 1),
        ("a", "first_completion", 100, 1),
        ("a", "first_page", 700, 630),
        ("a", "first_completion", 740, 630),
    )

    assert seconds(seen) == [100.0, 110.0]


def test_what_ran_before_anybody_looked_is_no_start() -> None:
    """Collection begins beside replicas that serve, idle ones of unknown age, and ones that are hours old."""
    serving = events(("a", "first_attempt", 0, None), ("a", "first_page", 0, -9000), ("a", "already_serving", 0, -9000))
    idle = events(("b", "first_attempt", 0, None), ("b", "first_page", 0, None), ("b", "first_completion", 400, None))
    old = events(("c", "first_attempt", 0, None), ("c", "first_page", 0, -9000), ("c", "first_completion", 40, -9000))

    assert seconds(pl.concat([serving, idle, old])) == []


def test_a_target_listed_days_before_its_machine_is_not_a_start_of_days() -> None:
    """fleet.yaml may name a replica long before it exists: then its process began the start."""
    seen = events(
        ("a", "first_attempt", 0, None), ("a", "first_page", 7_290, 7_200), ("a", "first_completion", 7_320, 7_200)
    )

    assert replica_starts(seen, load(1.0, minutes=300))["cold_start_seconds"].to_list() == [120.0]


def test_events_of_one_scrape_are_told_apart() -> None:
    """A restart whose first page counts a request already: page before completion, whatever the order of rows."""
    seen = events(("a", "first_completion", 500, 430), ("a", "first_page", 500, 430))

    assert seconds(seen) == [70.0]


def test_the_default_stands_in_with_a_reason_until_five_starts_are_seen() -> None:
    """Unknown is not zero: 180 s, unless a start that was seen took longer."""
    none = cold_start(pl.DataFrame(schema=STARTS_SCHEMA), "chat")
    assert (none.seconds, none.origin, none.starts) == (DEFAULT_COLD_START_SECONDS, "default", 0)
    assert "0 of 5 starts" in none.reason

    long = events(("a", "first_attempt", 0, None), ("a", "first_page", 290, 20), ("a", "first_completion", 300, 20))
    one = cold_start(replica_starts(long, load(1.0)), "chat")
    assert (one.seconds, one.origin, one.starts) == (300.0, "measured", 1)


@given(st.lists(st.floats(1, 3000), min_size=1, max_size=40))
def test_the_p95_is_a_start_that_was_seen_and_at_most_a_twentieth_took_longer(times: list[float]) -> None:
    """Whatever the order of rows and deployments around it."""
    starts = pl.DataFrame(
        {
            "deployment": ["chat"] * len(times) + ["other"],
            "target": [f"t{place}" for place in range(len(times))] + ["o"],
            "first_seen_at": [START] * (len(times) + 1),
            "ready_at": [START] * (len(times) + 1),
            "cold_start_seconds": [*times, 1e6],
            "ready_by": ["completion"] * (len(times) + 1),
        },
        schema=STARTS_SCHEMA,
    ).sample(fraction=1, shuffle=True, seed=len(times))
    found = cold_start(starts, "chat")

    if len(times) >= MIN_STARTS:
        assert found.seconds in times
        assert sum(time > found.seconds for time in times) <= 0.05 * len(times)
    else:
        assert found.seconds == max(DEFAULT_COLD_START_SECONDS, *times)


def test_rows_of_another_table_are_named() -> None:
    """A frame without the events' columns is an error that says whose rows are wanted."""
    with pytest.raises(ValueError, match="int_replica_starts"):
        replica_starts(pl.DataFrame({"target": ["a"]}), load(1.0))
