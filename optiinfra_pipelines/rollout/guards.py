"""Absolute guards: what takes traffic off a candidate at once, without any statistics.

Pure. A guard compares the candidate with a fixed bound or a prediction; comparing it with the baseline is the judge's
work. A value that is not known trips nothing: silence is judged as missing data by `rollout.watch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

# Three probes at the 5 s look: one can be a lost packet, two a long step, three are 15 s without an answer.
MAX_FAILED_PROBES = 3
# The engine rounds its cache to blocks; more than 5 % under the arithmetic means that it did not start as planned.
KV_SHORTFALL_RATIO = 0.05
# Ten requests without one success are no coincidence at any error share worth serving.
MIN_REQUESTS_WITHOUT_SUCCESS = 10
# Waiting that grew in three windows of a minute each, from something to more, does not come down by itself.
GROWING_WINDOWS = 3
WINDOW_TICKS = 12
MIN_WAITING_REQUESTS = 8.0
# Twice the baseline's preemptions per request, where there are enough of them to divide.
PREEMPTION_FACTOR = 2.0
MIN_PREEMPTIONS = 20.0
_BASELINE = ""


@dataclass(frozen=True)
class Trip:
    """A guard that tripped: its name and the numbers."""

    guard: str
    reason: str


@dataclass(frozen=True)
class ReplicaHealth:
    """One candidate replica in one tick. None: not known.

    failed_probes: consecutive. waiting: requests queued. kv_capacity_tokens: as the engine reports it.
    """

    replica: str
    failed_probes: int = 0
    is_process_alive: bool | None = None
    started_at: datetime | None = None
    kv_capacity_tokens: float | None = None
    waiting: float | None = None
    gpu_fault: str | None = None


@dataclass(frozen=True)
class ArmTotals:
    """One arm since the step began."""

    requests: int = 0
    failed: int = 0
    preemptions: float | None = None


class Guards:
    """The guards of one rollout: remembers process starts and the waiting of the last minutes."""

    def __init__(self, expected_kv_tokens: float | None = None) -> None:
        self._expected_kv_tokens = expected_kv_tokens
        self._started: dict[str, datetime] = {}
        self._waiting: dict[str, list[float]] = {}
        self._means: dict[str, list[float]] = {}

    def check(
        self,
        candidates: Sequence[ReplicaHealth],
        candidate: ArmTotals,
        baseline: ArmTotals,
        baseline_waiting: float | None = None,
    ) -> tuple[Trip, ...]:
        """Every guard that trips in this tick; empty when none does.

        baseline_waiting: requests queued per baseline replica; growth that both arms share is load, not the candidate.
        """
        self._grown(_BASELINE, baseline_waiting)
        trips = [trip for replica in candidates for trip in self._replica(replica)]
        succeeded = candidate.requests - candidate.failed
        if candidate.requests >= MIN_REQUESTS_WITHOUT_SUCCESS and succeeded == 0:
            trips.append(Trip("no_success", f"all of {candidate.requests} candidate requests failed"))
        trips += _preemptions(candidate, baseline)
        return tuple(trips)

    def _replica(self, replica: ReplicaHealth) -> list[Trip]:
        trips = []
        name = replica.replica
        if replica.is_process_alive is False:
            trips.append(Trip("crash", f"{name}: its process is gone"))
        if replica.failed_probes >= MAX_FAILED_PROBES:
            trips.append(Trip("health", f"{name}: {replica.failed_probes} health probes failed in a row"))
        if replica.started_at is not None:
            first = self._started.setdefault(name, replica.started_at)
            if replica.started_at != first:
                trips.append(Trip("restart", f"{name}: restarted at {replica.started_at.isoformat()}"))
        if replica.gpu_fault:
            trips.append(Trip("gpu", f"{name}: {replica.gpu_fault}"))
        expected, actual = self._expected_kv_tokens, replica.kv_capacity_tokens
        if expected is not None and actual is not None and actual < expected * (1 - KV_SHORTFALL_RATIO):
            share = 1 - actual / expected
            trips.append(Trip("kv_size", f"{name}: KV cache of {actual:.0f} tokens, {share:.0%} under {expected:.0f}"))
        return trips + self._growing(replica)

    def _growing(self, replica: ReplicaHealth) -> list[Trip]:
        means, shared = self._grown(replica.replica, replica.waiting), self._means.get(_BASELINE, [])
        if not means or means[-1] < MIN_WAITING_REQUESTS:
            return []
        if shared and shared[-1] - shared[0] > (means[-1] - means[0]) / 2:
            return []
        steps = " -> ".join(f"{mean:.1f}" for mean in means)
        return [Trip("waiting", f"{replica.replica}: requests waiting grow minute by minute: {steps}")]

    def _grown(self, name: str, waiting: float | None) -> list[float]:
        """Means of the last windows where each is larger than the one before and the last twice the first."""
        self._means[name] = self._growth(name, waiting)
        return self._means[name]

    def _growth(self, name: str, waiting: float | None) -> list[float]:
        if waiting is None:
            self._waiting.pop(name, None)
            return []
        kept = self._waiting.setdefault(name, [])
        kept.append(waiting)
        del kept[: -(GROWING_WINDOWS + 1) * WINDOW_TICKS]
        if len(kept) < (GROWING_WINDOWS + 1) * WINDOW_TICKS:
            return []
        means = [sum(kept[start : start + WINDOW_TICKS]) / WINDOW_TICKS for start in range(0, len(kept), WINDOW_TICKS)]
        is_growing = all(before < after for before, after in pairwise(means))
        return means if is_growing and means[-1] >= 2 * means[0] else []


def _preemptions(candidate: ArmTotals, baseline: ArmTotals) -> list[Trip]:
    ours, theirs = candidate.preemptions, baseline.preemptions
    if ours is None or theirs is None or ours < MIN_PREEMPTIONS or not candidate.requests or not baseline.requests:
        return []
    share, usual = ours / candidate.requests, theirs / baseline.requests
    if share <= PREEMPTION_FACTOR * usual:
        return []
    return [Trip("preemptions", f"{share:.2f} preemptions per request, {usual:.2f} in the baseline")]
