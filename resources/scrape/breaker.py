"""When to ask a target that keeps failing: a circuit breaker as a pure state machine.

closed: ask in every tick. open: do not ask until `retry_at`. half_open: one probe is under way; its outcome closes
the breaker or opens it for longer. Pure: time comes in as seconds, nothing is kept here. Who asks is
`metrics_endpoint`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

BreakerState = Literal["closed", "open", "half_open"]


class Policy(NamedTuple):
    """How patient a breaker is. Units: failures, seconds; reasons in `optiinfra_pipelines.domain.thresholds`."""

    failures_to_open: int = 3
    first_backoff_seconds: float = 10.0
    max_backoff_seconds: float = 60.0

    def backoff_seconds(self, openings: int, spread: float = 1.0) -> float:
        """Wait after the breaker opened `openings` times in a row (from 1): doubling up to the cap, times spread."""
        doubled = self.first_backoff_seconds * 2.0 ** min(openings - 1, 32)
        return min(doubled, self.max_backoff_seconds) * spread


@dataclass(frozen=True, slots=True)
class Breaker:
    """State of one target.

    failures: in a row. openings: in a row, which the backoff grows with. retry_at: seconds, when not closed.
    cause: of the last failure, in words.
    """

    state: BreakerState = "closed"
    failures: int = 0
    openings: int = 0
    retry_at: float = 0.0
    cause: str = ""

    def ask(self, at: float, policy: Policy) -> tuple[Breaker, bool]:
        """The breaker after asking for leave at `at`, and whether to go ahead.

        A probe that never reports back is given up after the longest backoff, and a clock set back (retry_at
        further away than any backoff reaches) does not silence a target.
        """
        if self.state == "closed":
            return self, True
        longest = policy.max_backoff_seconds * MAX_SPREAD
        if self.retry_at <= at or self.retry_at - at > longest + _ROUNDING_SECONDS:
            return replace(self, state="half_open", retry_at=at + longest), True
        return self, False

    def succeeded(self) -> Breaker:
        return Breaker()

    def failed(self, at: float, cause: str, policy: Policy, spread: float = 1.0) -> Breaker:
        """One more failure, at `at`; opens at the policy's count, and again whenever a probe fails."""
        failures = self.failures + 1
        if self.state == "closed" and failures < policy.failures_to_open:
            return replace(self, failures=failures, cause=cause)
        openings = self.openings + 1
        return Breaker("open", failures, openings, at + policy.backoff_seconds(openings, spread), cause)


# Probes of a rack that failed together come back spread over a fifth of the backoff, not in one tick.
MIN_SPREAD, MAX_SPREAD = 0.9, 1.1
# Seconds since 1970 as a float carry 0.2 microseconds of rounding.
_ROUNDING_SECONDS = 0.001


def spread_of(name: str) -> float:
    """A factor between 0.9 and 1.1 that is always the same for a name: jitter without randomness."""
    return MIN_SPREAD + (MAX_SPREAD - MIN_SPREAD) * (zlib.crc32(name.encode()) % 1_000) / 999
