"""Runs of steps that share a condition: from when to when, and what was counted over them.

Pure. Here: finding and joining such runs. Not here: which conditions matter (`bottlenecks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from optiinfra_pipelines.analysis.findings.window import Step


@dataclass(frozen=True)
class Stretch:
    """Steps in a row that share a condition. since: the first scrape that showed it, or the start of the step whose
    counters did. until: the first scrape without it, None when the window ends with it. after: the step that follows,
    in which requests finish that were there at the last of these scrapes.
    """

    steps: tuple[Step, ...]
    since: datetime
    until: datetime | None
    last_at: datetime
    after: Step | None

    @property
    def counted_from(self) -> datetime:
        """The scrape from which on the counters of these steps grow."""
        return self.steps[0].start_at

    @property
    def shown_seconds(self) -> float:
        """Between the first and the last scrape that showed it."""
        return (self.last_at - self.steps[0].end_at).total_seconds()

    @property
    def through(self) -> tuple[Step, ...]:
        """Its steps and the one after."""
        return (*self.steps, self.after) if self.after else self.steps

    def grown(self, counter: str) -> float | None:
        known = [growth for step in self.steps if (growth := step.grew(counter)) is not None]
        return sum(known) if known else None

    def observed(self, histogram: str) -> tuple[float, float]:
        """Sum and count of what a histogram observed; (0, 0) when nothing."""
        return observed(self.steps, histogram)

    def mean(self, gauge: str) -> float | None:
        known = [value for step in self.steps if (value := step.gauge(gauge)) is not None]
        return sum(known) / len(known) if known else None

    def most(self, gauge: str) -> float | None:
        return max((value for step in self.steps if (value := step.gauge(gauge)) is not None), default=None)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


def observed(steps: Sequence[Step], histogram: str) -> tuple[float, float]:
    """Sum and count of what a histogram observed over some steps; (0, 0) when nothing."""
    made = [step.observed.get(histogram, (0.0, 0.0)) for step in steps]
    return sum(total for total, _ in made), sum(count for _, count in made)


def stretches(steps: Sequence[Step], holds: Callable[[Step], bool], longest_gap_seconds: float) -> list[Stretch]:
    """Runs of steps that hold; one step in between that does not is bridged, time that nobody looked at is not."""
    runs: list[list[int]] = []
    for place, step in enumerate(steps):
        if not holds(step):
            continue
        if runs and place - runs[-1][-1] <= 2 and _unseen(steps[runs[-1][-1] + 1 : place + 1]) <= longest_gap_seconds:
            runs[-1].append(place)
        else:
            runs.append([place])
    return [_stretch(steps, run[0], run[-1]) for run in runs]


def _unseen(steps: Sequence[Step]) -> float:
    return max((step.seconds for step in steps), default=0.0)


def _stretch(steps: Sequence[Step], first: int, last: int) -> Stretch:
    held = tuple(steps[first : last + 1])
    after = steps[last + 1] if last + 1 < len(steps) else None
    return Stretch(held, held[0].end_at, after.end_at if after else None, held[-1].end_at, after)


def joined(steps: Sequence[Step], found: Sequence[Stretch]) -> Stretch | None:
    """One stretch from the first to the last: a signal that flaps within a window is one finding."""
    if not found:
        return None
    places = {step.end_at: place for place, step in enumerate(steps)}
    return _stretch(steps, places[found[0].steps[0].end_at], places[found[-1].steps[-1].end_at])
