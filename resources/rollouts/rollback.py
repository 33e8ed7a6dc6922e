"""The way back: weight 0, drain, stop, verify; every look tries again from where reality stands.

Needs neither metrics nor approval, and may be repeated by anybody who holds the highest token. ROLLED_BACK is written
only when the target itself shows the stable state. Deciding that a rollout failed is not done here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optiinfra_pipelines.domain.rollouts import Rollout
from optiinfra_pipelines.rollout.machine import Input
from resources.rollouts.clock import Moment
from resources.rollouts.targets import StaleTokenError, TargetError

if TYPE_CHECKING:
    from resources.rollouts.executor import Executor

# An alert for a way back that does not work is repeated so often.
ALERT_SECONDS = 60.0


class RollBack:
    """Brings one target back to its stable state."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._alerted_at = float("-inf")
        self._is_off = False
        self._draining_since: float | None = None

    def _is_patience_over(self, now: Moment) -> bool:
        """A stream that never ends must not keep a failed candidate for ever."""
        self._draining_since = now.seconds if self._draining_since is None else self._draining_since
        return now.seconds - self._draining_since > self._executor.target.drain_seconds

    def look(self, row: Rollout, now: Moment) -> str:
        """One attempt; returns what it came to. TargetErrors end in an alert and the next look."""
        executor, target = self._executor, self._executor.target
        try:
            if not self._is_off or target.observe().percent > 0:
                # Also at 0 already: the stable replicas' own weights are restored by it.
                executor.set_share(0.0)
                self._is_off = True
            if not target.drain(executor.token) and not self._is_patience_over(now):
                return "weight 0; the candidate drains"
            actual = target.observe()
            if actual.candidates:
                executor.act("stop the candidate", lambda: target.stop_candidates(executor.token))
                actual = target.observe()
            if actual.percent > 0 or actual.candidates:
                return f"the target still shows {actual.percent:g} % and {actual.candidates} candidates"
            if actual.stable is not None and actual.stable < 1:
                raise TargetError("no stable replica is ready")
            evidence = {"percent": actual.percent, "stable": actual.stable, **actual.detail}
            executor.move(row, Input.ROLLED_BACK, "the target shows the stable state", evidence=evidence)
            return "rolled back; the target shows the stable state"
        except StaleTokenError:
            raise
        except TargetError as error:
            if now.seconds - self._alerted_at >= ALERT_SECONDS:
                self._alerted_at = now.seconds
                executor.note("alert", f"a failed rollout cannot be rolled back: {error}")
            return f"not rolled back yet: {error}"
