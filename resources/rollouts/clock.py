"""The two clocks of rollouts: the wall clock for people, the host's boot clock for ages.

A lease or a gap measured by the wall clock ends too soon or never when somebody sets the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class Moment:
    """A moment on both clocks. at: wall clock, UTC, for people. seconds: since boot of host `boot_id`, for ages."""

    at: datetime
    seconds: float
    boot_id: str = "test"


Clock = Callable[[], Moment]


def now_here() -> Moment:
    """The present moment of this host. The boot clock also counts while the host sleeps."""
    return _moment(datetime.now(UTC))


def beside(clock: Callable[[], datetime]) -> Clock:
    """Moments whose wall clock is `clock` and whose ages are this host's."""
    return lambda: _moment(clock())


def _moment(at: datetime) -> Moment:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return Moment(at, time.clock_gettime(time.CLOCK_BOOTTIME), boot_id)
