"""When a rollout needs a person at once: traffic that cannot be taken off, or a way back that does not end.

Pure. Looking after rollouts is `resources.rollouts.watchdog`, telling people `resources.alert_outlet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from optiinfra_pipelines.domain.alerts import Alert
from optiinfra_pipelines.domain.rollouts import Rollout, RolloutState

# The old state is to be verified at the target within two minutes of the verdict.
STUCK_AFTER = timedelta(minutes=2)


def standing_alerts(rows: Sequence[Rollout], helpless: Mapping[str, str], now: datetime) -> list[Alert]:
    """The alerts of this moment. helpless: by rollout, why the watchdog could not make it safe."""
    found = []
    for row in rows:
        if row.position.state is RolloutState.FAILED and now - row.updated_at >= STUCK_AFTER:
            why = helpless.get(row.rollout_id, "its target does not show the stable state yet")
            found.append(_alert(row, "ROLLBACK_STUCK", row.updated_at, now, f"failed and not rolled back: {why}"))
        elif row.position.state is RolloutState.IN_PROGRESS and row.rollout_id in helpless:
            detail = f"nobody executes it and it could not be made safe: {helpless[row.rollout_id]}"
            found.append(_alert(row, "ROLLOUT_UNSAFE", now, now, detail))
    return found


def changes(standing: Sequence[Alert], known: Mapping[str, Alert], now: datetime) -> tuple[list[Alert], list[Alert]]:
    """What began and what is over against the alerts that were open, by key."""
    keys = {alert.key for alert in standing}
    fired = [alert for alert in standing if alert.key not in known]
    return fired, [alert.model_copy(update={"resolved_at": now}) for key, alert in known.items() if key not in keys]


def _alert(row: Rollout, kind: str, since: datetime, now: datetime, detail: str) -> Alert:
    return Alert.model_validate(
        {
            "target": row.rollout_id,
            "deployment": row.deployment,
            "source": "simulated" if row.proposal.target == "dry_run" else "live",
            "kind": kind,
            "since": since,
            "fired_at": now,
            "detail": detail,
        }
    )
