"""An alert: something hard that is happening now to one target, from when on, and when it was over."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from optiinfra_pipelines.domain.base import Frozen, Source

# What the live watch sees of a target, and what the watch of rollouts sees of one.
WatchKind = Literal["TARGET_DOWN", "ERRORS", "QUEUE_RUNAWAY", "STALLED"]
AlertKind = WatchKind | Literal["ROLLBACK_STUCK", "ROLLOUT_UNSAFE"]


class Alert(Frozen):
    """One alert of one target, or of one rollout by its id.

    `detail` has the numbers and their window; `resolved_at` is None while it lasts.
    """

    target: str
    deployment: str | None
    source: Source
    kind: AlertKind
    since: datetime = Field(description="First scrape that showed it.")
    fired_at: datetime = Field(description="Scrape at which it was certain enough to say.")
    detail: str
    resolved_at: datetime | None = None

    @property
    def key(self) -> str:
        """Two alerts of one key are the same alert."""
        return f"{self.kind}:{self.target}"
