"""The live watch: every 5 s over the last minute of scrapes, independent of any model.

Asks `analysis.watch` what is wrong, records it as an observation of the `alerts` asset, and tells the outlet. Which
alerts are open, and which deliveries failed, is kept in the sensor's cursor: a restart neither repeats nor forgets one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import dagster as dg

from optiinfra_pipelines.analysis.watch import watch
from optiinfra_pipelines.domain.alerts import Alert
from resources.alert_outlet import AlertOutlet, headline
from resources.scrape.recent import RecentScrapes

ALERTS = "alerts"
# Deliveries kept for another try; older ones give way, they are in the log and in the UI all the same.
MAX_UNDELIVERED = 50


@dataclass(frozen=True)
class Known:
    """What a sensor's cursor keeps: alerts that are open, by key, and those whose delivery is to be tried again."""

    open: Mapping[str, Alert]
    undelivered: Sequence[Alert]

    @property
    def cursor(self) -> str:
        return json.dumps(
            {
                "open": [alert.model_dump(mode="json") for alert in self.open.values()],
                "undelivered": [alert.model_dump(mode="json") for alert in self.undelivered[-MAX_UNDELIVERED:]],
            }
        )

    @property
    def said(self) -> str:
        """All of it in one line."""
        return f"{len(self.open)} open" + "".join(f"; {headline(alert)}" for alert in self.open.values())


@dataclass(frozen=True)
class Told:
    """One round of telling. is_news: there is something to report or to keep."""

    known: Known
    events: list[dg.AssetObservation]
    is_news: bool


def read_known(cursor: str | None) -> Known:
    """What the last round kept."""
    kept = json.loads(cursor) if cursor else {"open": [], "undelivered": []}
    return Known(
        {alert.key: alert for alert in map(Alert.model_validate, kept["open"])},
        [Alert.model_validate(alert) for alert in kept["undelivered"]],
    )


def tell(outlet: AlertOutlet, known: Known, fired: Sequence[Alert], resolved: Sequence[Alert]) -> Told:
    """Log and deliver what began and what is over, and try again what could not be delivered."""
    for alert in (*fired, *resolved):
        outlet.log(alert)
    undelivered: list[Alert] = []
    for alert in (*known.undelivered, *fired, *resolved):
        # The end of an alert waits for its beginning: the last message about it must be the one that holds.
        is_held = any(alert.key == earlier.key for earlier in undelivered)
        if is_held or not outlet.post(alert):
            undelivered.append(alert)
    over = {alert.key for alert in resolved}
    still_open = {key: alert for key, alert in known.open.items() if key not in over}
    still_open |= {alert.key: alert for alert in fired}
    is_news = bool(fired or resolved) or len(undelivered) != len(known.undelivered)
    return Told(Known(still_open, undelivered), [_observation(alert) for alert in (*fired, *resolved)], is_news)


def alerts_asset() -> dg.AssetSpec:
    """The external asset whose observations are the alerts."""
    return dg.AssetSpec(
        ALERTS,
        group_name="watch",
        deps=["raw_scrapes", "raw_engine_samples"],
        owners=["team:sre"],
        kinds={"alert"},
        description="Hard failures seen by the live watch: a target down, errors, a queue that runs away, requests "
        "without tokens; and a rollout that cannot be made safe. One observation when an alert begins and one when it "
        "is over.",
    )


def watch_sensor(
    recent: RecentScrapes, outlet: AlertOutlet, thresholds: Mapping[str, float], collect_seconds: int
) -> dg.SensorDefinition:
    """`watch_fleet`, running from the first start."""

    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        known = read_known(context.cursor)
        fired, resolved = watch(recent.watched(), known.open, thresholds)
        told = tell(outlet, known, fired, resolved)
        if not told.is_news:
            return dg.SkipReason(told.known.said)
        return dg.SensorResult(
            asset_events=told.events, cursor=told.known.cursor, skip_reason=dg.SkipReason(told.known.said)
        )

    return dg.SensorDefinition(
        name="watch_fleet",
        evaluation_fn=evaluate,
        description="Looks for hard failures in the last minute of scrapes and tells within 15 s.",
        minimum_interval_seconds=collect_seconds - 1,
        default_status=dg.DefaultSensorStatus.RUNNING,
    )


def _observation(alert: Alert) -> dg.AssetObservation:
    return dg.AssetObservation(
        ALERTS,
        description=headline(alert),
        metadata={
            "kind": alert.kind,
            "target": alert.target,
            "source": alert.source,
            "since": alert.since.isoformat(),
            "state": "resolved" if alert.resolved_at else "firing",
            "seconds_to_tell": round((alert.fired_at - alert.since).total_seconds(), 1),
        },
    )
