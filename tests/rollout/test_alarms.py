"""Who is called for a rollout, when, and when it is over."""

from datetime import timedelta

from optiinfra_pipelines.domain.rollouts import Position, RolloutState, Stage
from optiinfra_pipelines.rollout.alarms import STUCK_AFTER, changes, standing_alerts
from tests.rollout.conftest import NOW, rollout

FAILED = rollout().model_copy(update={"position": Position(state=RolloutState.FAILED), "updated_at": NOW})
RUNNING = rollout().model_copy(
    update={"position": Position(state=RolloutState.IN_PROGRESS, stage=Stage.CANARY, step=1), "updated_at": NOW}
)


def test_a_failed_rollout_has_two_minutes_to_come_back() -> None:
    """Then a person is called, with the reason that the watchdog has; the alert began with the verdict."""
    assert standing_alerts([FAILED], {}, NOW + STUCK_AFTER - timedelta(seconds=1)) == []

    [alert] = standing_alerts([FAILED], {FAILED.rollout_id: "the socket is gone"}, NOW + STUCK_AFTER)

    assert (alert.kind, alert.since) == ("ROLLBACK_STUCK", NOW)
    assert alert.detail == "failed and not rolled back: the socket is gone"


def test_traffic_that_cannot_be_taken_off_calls_at_once() -> None:
    assert standing_alerts([RUNNING], {}, NOW + timedelta(hours=1)) == []

    [alert] = standing_alerts([RUNNING], {RUNNING.rollout_id: "the socket is gone"}, NOW)

    assert alert.kind == "ROLLOUT_UNSAFE"


def test_an_alert_is_told_once_and_its_end_once() -> None:
    standing = standing_alerts([FAILED], {}, NOW + STUCK_AFTER)
    fired, resolved = changes(standing, {}, NOW + STUCK_AFTER)
    assert (fired, resolved) == (standing, [])

    known = {alert.key: alert for alert in fired}
    assert changes(standing_alerts([FAILED], {}, NOW + 2 * STUCK_AFTER), known, NOW) == ([], [])

    fired, resolved = changes([], known, NOW + 3 * STUCK_AFTER)
    assert fired == []
    assert [alert.resolved_at for alert in resolved] == [NOW + 3 * STUCK_AFTER]
