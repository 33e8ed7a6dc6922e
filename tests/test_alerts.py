"""An alert reaches the log, the UI and a webhook, once, also when the webhook is away for a while."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import dagster as dg
import pytest
from pydantic import SecretStr

from optiinfra_pipelines.domain.fleet import Fleet, Target
from optiinfra_pipelines.domain.thresholds import threshold_values
from optiinfra_pipelines.sql.sources import raw_tables
from resources.alert_outlet import AlertOutlet
from resources.scrape.recent import RecentScrapes
from sensors.watch import watch_sensor

START = datetime(2026, 11, 20, 12, tzinfo=UTC)


class Webhook:
    """A real HTTP server that takes messages with the statuses it is given, 200 when it has none left."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.statuses: list[int] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = outer.statuses.pop(0) if outer.statuses else 200
                if status == 200:
                    outer.messages.append(body["text"])
                self.send_response(status)
                self.end_headers()

            def log_message(self, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/secret-path"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    made = Webhook()
    yield made
    made.server.shutdown()
    made.server.server_close()


class Watch:
    """The real sensor over scrapes that the test hands it, ticking by hand."""

    def __init__(self, webhook: Webhook) -> None:
        fleet = Fleet(targets=(Target(name="chat-0", url="http://127.0.0.1:1/metrics", deployment="chat"),))
        self.recent = RecentScrapes(fleet)
        self.sensor = watch_sensor(self.recent, AlertOutlet(SecretStr(webhook.url)), threshold_values({}), 5)
        self.cursor: str | None = None
        self.at = START

    def tick(self, is_up: bool) -> list[dg.AssetObservation]:
        row = {"scraped_at": self.at, "target": "chat-0", "is_up": is_up, "error_kind": None if is_up else "deadline"}
        tables = raw_tables()
        self.recent.remember(
            {
                "raw_scrapes": tables["raw_scrapes"].frame([row]),
                "raw_engine_samples": tables["raw_engine_samples"].empty(),
            }
        )
        self.at += timedelta(seconds=5)
        with dg.DagsterInstance.ephemeral() as instance:
            result = self.sensor.evaluate_tick(dg.build_sensor_context(instance=instance, cursor=self.cursor))
        self.cursor = result.cursor or self.cursor
        return list(result.asset_events)


def test_an_outage_is_told_once_and_its_end_once(webhook: Webhook) -> None:
    watch = Watch(webhook)

    events = [event for is_up in (True, False, False, False, True, True, True, True) for event in watch.tick(is_up)]

    assert [event.metadata["state"].value for event in events] == ["firing", "resolved"]
    assert events[0].metadata["seconds_to_tell"].value <= 15
    assert webhook.messages[0].startswith("TARGET_DOWN: chat-0 (chat): no metrics page: deadline")
    assert webhook.messages[1] == "resolved: TARGET_DOWN of chat-0 (chat) after 25 s"
    assert len(webhook.messages) == 2


def test_a_message_the_webhook_did_not_take_is_tried_again_and_delivered_once(webhook: Webhook) -> None:
    watch = Watch(webhook)
    webhook.statuses = [503, 429]

    for _ in range(6):
        watch.tick(False)

    assert len(webhook.messages) == 1


def test_the_end_of_an_alert_is_not_delivered_before_its_beginning(webhook: Webhook) -> None:
    """The webhook is away until the tick in which the outage ends, and takes every other message from then on."""
    watch = Watch(webhook)
    webhook.statuses = [503, 503, 503, 503]

    for is_up in (True, False, False, True, True, True, True, True):
        watch.tick(is_up)

    assert [message.split(":")[0] for message in webhook.messages] == ["TARGET_DOWN", "resolved"]
    assert json.loads(watch.cursor or "{}")["undelivered"] == []


def test_a_wrong_url_is_not_tried_for_ever(webhook: Webhook) -> None:
    watch = Watch(webhook)
    webhook.statuses = [404]

    for _ in range(6):
        watch.tick(False)

    assert webhook.messages == []
    assert json.loads(watch.cursor or "{}")["undelivered"] == []


def test_a_restart_neither_repeats_nor_forgets_an_alert(webhook: Webhook) -> None:
    """The cursor carries what is open; the scrapes in memory are gone."""
    first = Watch(webhook)
    for is_up in (False, False, False):
        first.tick(is_up)
    second = Watch(webhook)
    second.cursor, second.at = first.cursor, first.at

    events = [event for is_up in (False, False, True, True, True) for event in second.tick(is_up)]

    assert [event.metadata["state"].value for event in events] == ["resolved"]
    assert len(webhook.messages) == 2


def test_the_webhook_is_in_no_log_line(webhook: Webhook, capsys: pytest.CaptureFixture[str]) -> None:
    webhook.statuses = [503] * 10
    watch = Watch(webhook)
    for _ in range(4):
        watch.tick(False)

    told = capsys.readouterr()
    assert "alert" in told.out + told.err
    assert "secret-path" not in told.out + told.err
