"""When a recommendation is in the hands of a rollout: what is seen at the replicas then is the rollout's own doing.

Pure. A canary shows the advised flags at some replicas and more work than the ceiling let; neither says that the
change was applied, and the rollout may well take it back. Only its end does (`life.from_rollout`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from optiinfra_pipelines.domain.rollouts import Rollout


@dataclass(frozen=True)
class Span:
    """A stretch of time; until None: it lasts."""

    since: datetime
    until: datetime | None

    def overlaps(self, start: datetime, end: datetime) -> bool:
        """Whether any moment of [start, end] lies in it."""
        return self.since <= end and (self.until is None or start <= self.until)


def held_spans(rollouts: Iterable[Rollout]) -> dict[str, list[Span]]:
    """By recommendation, when real rollouts of it were open; a rehearsal touches nothing.

    One that is over held it from its start only: before that, and where it never started, what changed was somebody
    else's doing. One that is open holds it from its proposal on: nobody knows yet what it will have done.
    """
    found: dict[str, list[Span]] = {}
    for one in rollouts:
        recommendation = one.proposal.recommendation_id
        if recommendation is None or one.proposal.target == "dry_run":
            continue
        if not one.position.is_terminal:
            found.setdefault(recommendation, []).append(Span(one.proposal.created_at, None))
        elif one.started_at is not None:
            found.setdefault(recommendation, []).append(Span(one.started_at, one.updated_at))
    return found


def is_held(
    held: Mapping[str, Sequence[Span]], recommendation_id: str, start: datetime, end: datetime | None = None
) -> bool:
    """Whether a rollout of it was open at a moment, or in any of a stretch."""
    return any(span.overlaps(start, end or start) for span in held.get(recommendation_id, ()))
