"""The live watch: every 5 s over the last minute of scrapes, independent of any model.

Asks `analysis.watch` what is wrong, records it as an observation of the `alerts` asset, and tells the outlet. Which
alerts are open, and which deliveries failed, is kept in the sensor's cursor: a restart neither repeats nor forgets one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import dagster as dg

from optiinfra_pipelines.analysis.watch import watch
from optiinfra_pipelines.domain.alerts import Alert
from resources.alert_outlet import AlertOutlet, headline
from resources.scrape.recent import RecentScrapes

ALERTS = "alerts"
# Deliveries kept for another try; older ones give way, they are in the log and in the UI all the same.
MAX_UNDELIVERED = 50


def alerts_asset() -> dg.AssetSpec:
    """The external asset whose observations are the alerts."""
    return dg.AssetSpec(
        ALERTS,
        group_name="watch",
        deps=["raw_scrapes", "raw_engine_samples"],
        owners=["team:sre"],
        kinds={"alert"},
        description="Hard failures seen by the live watch: a target down, errors, a queue that runs away, requests "
        "without tokens. One observation when an alert begins and one when it is over.",
    )


def watch_sensor(
    recent: RecentScrapes, outlet: AlertOutlet, thresholds: Mapping[str, float], collect_seconds: int
) -> dg.SensorDefinition:
    """`watch_fleet`, running from the first start."""

    def evaluate(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        known = json.loads(context.cursor) if context.cursor else {"open": [], "undelivered": []}
        open_alerts = {alert.key: alert for alert in map(Alert.model_validate, known["open"])}
        fired, resolved = watch(recent.watched(), open_alerts, thresholds)
        undelivered = [alert for alert in map(Alert.model_validate, known["undelivered"]) if not outlet.post(alert)]
        for alert in (*fired, *resolved):
            outlet.log(alert)
            if not outlet.post(alert):
                undelivered.append(alert)
        still_open = {key: alert for key, alert in open_alerts.items() if key not in {done.key for done in resolved}}
        still_open |= {alert.key: alert for alert in fired}
        said = f"{len(still_open)} open" + "".join(f"; {headline(alert)}" for alert in still_open.values())
        if not fired and not resolved and len(undelivered) == len(known["undelivered"]):
            return dg.SkipReason(said)
        cursor = {
            "open": [alert.model_dump(mode="json") for alert in still_open.values()],
            "undelivered": [alert.model_dump(mode="json") for alert in undelivered[-MAX_UNDELIVERED:]],
        }
        return dg.SensorResult(
            asset_events=[_observation(alert) for alert in (*fired, *resolved)],
            cursor=json.dumps(cursor),
            skip_reason=dg.SkipReason(said),
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
