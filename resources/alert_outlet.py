"""Tell people: one log line per alert, and a webhook that takes Slack-compatible JSON.

Here: wording and delivery. Not here: what an alert is (`optiinfra_pipelines.analysis.watch`) or when it is looked for
(`sensors.watch`). A delivery that fails is tried again by the caller in the next tick.
"""

from __future__ import annotations

import httpx
import structlog
from pydantic import SecretStr

from optiinfra_pipelines.domain.alerts import Alert

# A tick must not wait for a chat server; what fails now is tried again in 5 s.
DEADLINE_SECONDS = 2.5
_log = structlog.get_logger(__name__)


def headline(alert: Alert) -> str:
    """One line a person can act on; recorded and simulated targets are called so."""
    where = f"{alert.target}" + (f" ({alert.deployment})" if alert.deployment else "")
    source = "" if alert.source == "live" else f" [{alert.source}]"
    if alert.resolved_at is not None:
        lasted = (alert.resolved_at - alert.since).total_seconds()
        return f"resolved{source}: {alert.kind} of {where} after {lasted:.0f} s"
    return f"{alert.kind}{source}: {where}: {alert.detail}, since {alert.since:%H:%M:%S} UTC"


class AlertOutlet:
    """Where alerts go. `webhook`: URL, None for the log alone; it is never logged."""

    def __init__(self, webhook: SecretStr | None) -> None:
        self._webhook = webhook

    def log(self, alert: Alert) -> None:
        tell = _log.info if alert.resolved_at else _log.warning
        tell("alert", kind=alert.kind, target=alert.target, text=headline(alert))

    def post(self, alert: Alert) -> bool:
        """True when the webhook took it, or there is none; False when it must be tried again."""
        if self._webhook is None:
            return True
        try:
            answer = httpx.post(
                self._webhook.get_secret_value(),
                json={"text": headline(alert)},
                timeout=DEADLINE_SECONDS,
                trust_env=False,
                follow_redirects=False,
            )
        except httpx.HTTPError as error:
            _log.info("alert_not_delivered", target=alert.target, cause=type(error).__name__)
            return False
        if answer.is_success:
            return True
        _log.info("alert_not_delivered", target=alert.target, cause=f"status {answer.status_code}")
        # A refusal that will not change (a wrong URL) is not tried for ever; a busy server is.
        return answer.status_code < 500 and answer.status_code != 429
