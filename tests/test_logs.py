"""What reaches the log: one line per change, in the form asked for, and never a secret."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from resources.logs import ChangeLog, configure_logging

NOW = datetime(2026, 11, 20, 16, 0, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _own_configuration() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def json_lines(out: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_change_is_said_once_and_not_once_per_tick() -> None:
    """Down, down for another reason, back: three lines for a hundred ticks, with how long it was down."""
    out = io.StringIO()
    configure_logging({"OPTIINFRA_LOG_FORMAT": "json"}, out)
    log = ChangeLog("target")
    causes = [None] * 20 + ["connect_refused"] * 30 + ["deadline"] * 30 + [None] * 20

    changes = [log.saw("chat-0", cause, NOW + timedelta(seconds=5 * i), "words") for i, cause in enumerate(causes)]

    assert [change for change in changes if change] == ["up", "down", "down_otherwise", "back"]
    lines = json_lines(out)
    assert [line["event"] for line in lines] == ["target_down", "target_down_otherwise", "target_back"]
    assert {line["target"] for line in lines} == {"chat-0"}
    assert (lines[0]["cause"], lines[0]["detail"], lines[0]["level"]) == ("connect_refused", "words", "warning")
    assert (lines[2]["down_seconds"], lines[2]["last_cause"]) == (300.0, "deadline")


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([None, "x", "y"])), max_size=40))
def test_lines_are_exactly_the_changes(seen: list[tuple[str, str | None]]) -> None:
    """Per thing, a line appears when and only when its cause differs from the last one."""
    log = ChangeLog("host")
    last: dict[str, str | None] = {}
    with structlog.testing.capture_logs() as lines:
        for name, cause in seen:
            before = len(lines)
            log.saw(name, cause, NOW)
            assert (len(lines) > before) == (name not in last or last[name] != cause)
            last[name] = cause


def test_a_thing_no_longer_watched_is_forgotten() -> None:
    """When it comes back into fleet.yaml it is new, not 'back after three days'."""
    log = ChangeLog("target")
    log.saw("a", "dns", NOW)
    log.forget(keep=set())

    assert log.saw("a", None, NOW + timedelta(days=3)) == "up"


@pytest.mark.parametrize("form", ["readable", "json"])
def test_no_secret_reaches_the_log(form: str) -> None:
    """Secret types, credentials in URLs and headers, keys that name one, and locals of a traceback."""
    out = io.StringIO()
    configure_logging({"OPTIINFRA_LOG_FORMAT": form}, out)
    log = structlog.get_logger()
    password = "hunter2-hunter2"

    def failing() -> None:
        local_copy = {"Authorization": f"Bearer {password}"}
        raise ValueError(f"cannot ask http://u:{local_copy['Authorization'][7:]}@h/metrics with Bearer {password}")

    try:
        failing()
    except ValueError as error:
        log.error("failed", exc_info=error, header=SecretStr(password), authorization=password)
    log.info("asked", url=f"http://user:{password}@h/m", detail=f"Bearer {password}", api_key=password)

    assert "failing" in out.getvalue()
    assert "h/metrics" in out.getvalue()
    assert password not in out.getvalue()


def test_readable_lines_are_for_people_and_json_for_machines() -> None:
    """One setting; a wrong one is named with what it may be."""
    readable = io.StringIO()
    configure_logging({}, readable)
    structlog.get_logger().warning("target_down", target="chat-0", cause="dns")
    assert "target_down" in readable.getvalue()
    assert "target=chat-0" in readable.getvalue()
    assert "\x1b" not in readable.getvalue()

    machine = io.StringIO()
    configure_logging({"OPTIINFRA_LOG_FORMAT": "json"}, machine)
    structlog.get_logger().warning("target_down", target="chat-0", at_time=NOW)
    (line,) = json_lines(machine)
    assert (line["event"], line["target"], line["level"]) == ("target_down", "chat-0", "warning")
    assert str(line["at"]).endswith("Z")

    with pytest.raises(ValueError, match="OPTIINFRA_LOG_FORMAT is 'xml'; set it to 'readable' or 'json'"):
        configure_logging({"OPTIINFRA_LOG_FORMAT": "xml"}, machine)
