"""Hard failures are told within 15 s, once, and are over when they are over; healthy pages never alert."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.watch import LOOKS_TO_FIRE, Look, Watched, watch
from optiinfra_pipelines.domain.alerts import Alert
from optiinfra_pipelines.domain.fleet import Fleet, Target
from optiinfra_pipelines.domain.thresholds import threshold_values
from optiinfra_pipelines.engines import normalize, to_frames
from optiinfra_pipelines.exposition import Reader
from optiinfra_pipelines.sql.sources import raw_tables
from resources.scrape.recent import RecentScrapes

START = datetime(2026, 11, 20, 12, tzinfo=UTC)
STEP = timedelta(seconds=5)
THRESHOLDS = threshold_values({})
RECORDINGS = Path(__file__).parent.parent / "fixtures" / "recordings"


def told(looks: list[Look]) -> list[tuple[datetime, Alert]]:
    """Every alert that begins or ends while the looks come in one by one, with the look at which it did."""
    events: list[tuple[datetime, Alert]] = []
    open_alerts: dict[str, Alert] = {}
    for end in range(1, len(looks) + 1):
        seen = [Watched("engine", "chat", "live", looks[max(0, end - 13) : end])]
        fired, resolved = watch(seen, open_alerts, THRESHOLDS)
        for alert in fired:
            assert alert.key not in open_alerts
            open_alerts[alert.key] = alert
        for alert in resolved:
            del open_alerts[alert.key]
        events += [(looks[end - 1].at, alert) for alert in (*fired, *resolved)]
    return events


def up(second: float, **values: float) -> Look:
    return Look(at=START + timedelta(seconds=second), is_up=True, **values)  # type: ignore[arg-type]


def down(second: float) -> Look:
    return Look(at=START + timedelta(seconds=second), is_up=False, error="connect_refused")


def test_a_target_that_goes_down_is_told_at_the_second_look_and_over_at_the_third_good_one() -> None:
    looks = [up(0), up(5), down(10), down(15), down(20), up(25), up(30), up(35)]

    [(fired_at, fired), (resolved_at, resolved)] = told(looks)

    assert (fired.kind, fired.since, fired_at) == ("TARGET_DOWN", looks[2].at, looks[3].at)
    assert "connect_refused" in fired.detail
    assert resolved_at == resolved.resolved_at == looks[7].at


def test_one_missed_scrape_is_no_alert() -> None:
    assert told([up(0), down(5), up(10), down(15), up(20)]) == []


def test_a_fifth_of_requests_failing_is_an_alert_with_its_counts() -> None:
    looks = [up(5 * i, finished=80.0 * i, failed=20.0 * max(0, i - 2), running=1.0) for i in range(8)]

    [(at, alert)] = told(looks)

    assert alert.kind == "ERRORS"
    assert at - looks[3].at <= timedelta(seconds=15)
    assert "requests failed" in alert.detail


def test_failures_without_known_successes_are_unknown_not_an_alert() -> None:
    assert told([up(5 * i, failed=20.0 * i) for i in range(8)]) == []


def test_a_queue_that_doubles_past_four_batches_is_a_runaway() -> None:
    looks = [up(5 * i, running=16.0, waiting=4.0 * 2**i) for i in range(7)]

    assert [alert.kind for _, alert in told(looks)] == ["QUEUE_RUNAWAY"]


def test_a_queue_that_jumps_and_stays_is_a_load_and_no_runaway() -> None:
    """Forty clients that begin at once behind eight slots, as recorded: a finding, not an outage."""
    looks = [up(5 * i, running=8.0, waiting=0.0 if i < 3 else 32.0 + i // 8) for i in range(16)]

    assert told(looks) == []


def test_requests_that_run_without_a_token_are_a_stall_after_the_whole_window() -> None:
    looks = [up(5 * i, running=3.0, tokens=100.0, finished=7.0) for i in range(9)]

    [(at, alert)] = told(looks)

    assert alert.kind == "STALLED"
    assert at == looks[LOOKS_TO_FIRE + 3].at


@pytest.mark.parametrize("beat", [4.98, 5.0, 5.02])
def test_a_stall_after_good_work_is_told_at_the_second_look_past_its_length(beat: float) -> None:
    """The tokens made before it neither delay the alert nor, at a beat slightly off 5 s, keep it away."""
    looks = [up(beat * i, running=3.0, tokens=100.0 * min(i, 8), finished=7.0) for i in range(20)]

    [(at, alert)] = told(looks)

    since_last_token = (at - looks[8].at).total_seconds()
    assert alert.kind == "STALLED"
    assert THRESHOLDS["watch_stall_seconds"] < since_last_token <= THRESHOLDS["watch_stall_seconds"] + 2 * beat


def test_a_stall_is_not_seen_across_a_missed_scrape_that_it_would_begin_at() -> None:
    """Where the look far enough back got no page, what ran then is unknown: one look later it is told."""
    looks = [up(5 * i, running=3.0, tokens=100.0, finished=7.0) for i in range(9)]
    whole, [*_, (late, _)] = told(looks)[0][0], told([down(0), *looks[1:]])

    assert late - whole == STEP


def test_a_restart_is_no_failure() -> None:
    """Counters that fall, with or without a process start time, give unknown for the window they fall in."""
    before = [up(5 * i, finished=100.0 * i, failed=0.0, tokens=1000.0 * i, running=2.0) for i in range(5)]
    after = [up(25 + 5 * i, finished=50.0 * i, failed=0.0, tokens=10.0 * i, running=2.0) for i in range(5)]

    assert told(before + after) == []


def test_an_alert_of_a_target_that_left_the_fleet_is_over() -> None:
    alert = Alert(target="gone", deployment=None, source="live", kind="ERRORS", since=START, fired_at=START, detail="x")

    assert [done.target for done in watch([], {alert.key: alert}, THRESHOLDS)[1]] == ["gone"]


LOOKS = st.builds(
    Look,
    at=st.just(START),
    is_up=st.booleans(),
    running=st.none() | st.integers(0, 50).map(float),
    waiting=st.none() | st.integers(0, 500).map(float),
    finished=st.none() | st.integers(0, 500).map(float),
    failed=st.none() | st.integers(0, 500).map(float),
    tokens=st.none() | st.integers(0, 500).map(float),
)


@settings(max_examples=200)
@given(st.lists(LOOKS, max_size=30))
def test_alerts_begin_once_end_once_and_alternate(looks: list[Look]) -> None:
    """Whatever the pages say, contradictory or missing: of one key, begin and end take turns."""
    timed = [Look(**{**vars(look), "at": START + i * STEP}) for i, look in enumerate(looks)]

    by_key: dict[str, list[bool]] = {}
    for _, alert in told(timed):
        by_key.setdefault(alert.key, []).append(alert.resolved_at is None)
    for states in by_key.values():
        assert states[0] is True
        assert all(first != second for first, second in pairwise(states))


PHASES = sorted(
    {
        page.parent
        for engine in ("vllm/0.32.0", "llama.cpp", "dynamo")
        for page in (RECORDINGS / engine).rglob("*.prom")
        if page.stem.split("_")[0].isdigit()
    }
)


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: str(phase.relative_to(RECORDINGS)))
def test_no_recorded_phase_is_a_hard_failure(phase: Path) -> None:
    """Idle, load, KV pressure, overload, drain, restart: some are findings, none is an outage."""
    recent = RecentScrapes(Fleet(targets=(Target(name="engine", url="http://127.0.0.1:1/metrics"),)))
    reader, looks = Reader(), []
    for page in sorted(phase.glob("*.prom")):
        at = datetime.fromtimestamp(int(page.stem.split("_")[0]) / 1000, UTC)
        normalized = normalize(reader.read(page.read_bytes(), key="engine"), target="engine", scraped_at=at)
        scrape = {
            "scraped_at": at,
            "target": "engine",
            "is_up": True,
            "process_started_at": normalized.process_started_at,
        }
        recent.remember({"raw_scrapes": raw_tables()["raw_scrapes"].frame([scrape]), **to_frames([normalized])})
        looks.append(recent.watched()[0].looks[-1])

    assert looks
    assert told(looks) == []
