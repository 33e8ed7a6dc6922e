"""What a rollout can act on: the one protocol of all targets, and the fencing token that guards every write.

A target does what it is told and tells what is really so; it decides nothing. Every write carries the writer's token,
and one lower than the highest ever seen is refused: an executor that was paused for a minute cannot undo what the
watchdog did meanwhile.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class TargetError(Exception):
    """The target did not do, or does not show, what was asked. The text says what was asked and what came back."""


class StaleTokenError(TargetError):
    """Somebody with a higher token owns the target now."""


@dataclass(frozen=True)
class Actual:
    """What is really so at the target. None: the target cannot tell.

    percent: candidate's share of new traffic by the weights in force. candidates, stable: replicas that are ready.
    in_flight: requests at the candidate now.
    """

    percent: float
    candidates: int | None
    stable: int | None
    in_flight: int | None
    detail: Mapping[str, Any] = field(default_factory=dict)


# Of an engine's command line, without dashes: a value, "" for a flag without one, None for one that must not stand.
Flags = Mapping[str, str | None]


class Replica(Protocol):
    """One serving process as staging and the counts ask it. server: its name, unique within the deployment."""

    @property
    def server(self) -> str: ...
    @property
    def url(self) -> str:
        """Root of its API."""
        ...

    @property
    def metrics(self) -> str:
        """Its metrics page."""
        ...


@dataclass(frozen=True)
class Address:
    """A replica that a target found by itself."""

    server: str
    url: str
    metrics: str


@dataclass(frozen=True)
class Counted:
    """What a gateway counted for a replica or a whole arm since it started. failed: answers of 5xx and no answer."""

    requests: int
    failed: int


@dataclass(frozen=True)
class ArmCounts:
    """The gateway's counts of both arms, by whatever it counts by."""

    candidate: Mapping[str, Counted]
    stable: Mapping[str, Counted]


class RolloutTarget(Protocol):
    """One deployment's traffic and its candidate replicas. Every method may be repeated; all raise TargetError."""

    kind: str
    # True: nothing real is touched and all counts are simulated.
    is_simulated: bool
    # How long requests in flight at a failed candidate may take to end.
    drain_seconds: float

    def observe(self) -> Actual:
        """The state as the target itself reports it now."""
        ...

    def stable_replicas(self) -> int:
        """Replicas that serve the deployment before the rollout."""
        ...

    def candidate_slots(self) -> int:
        """Most candidate replicas that can run beside them."""
        ...

    def claim(self, rollout_id: str, token: int) -> None:
        """Record a token as the highest, and for a new rollout what must be restored: the way back comes first."""
        ...

    def start_candidates(self, count: int, flags: Flags, token: int) -> None:
        """Have `count` candidates run with these flags, without traffic as long as the share is 0."""
        ...

    def set_share(self, percent: float, token: int) -> None:
        """Give candidates a share of new traffic. 0 restores the stable replicas' weights exactly."""
        ...

    def drain(self, token: int) -> bool:
        """Keep new requests off the candidate; True once none is in flight."""
        ...

    def stop_candidates(self, token: int) -> None:
        """End the candidates; only after a drain."""
        ...

    def promote(self, rollout_id: str, token: int) -> bool:
        """Make the candidates the stable replicas, once for each rollout_id. False while the old ones still drain."""
        ...


class ServedTarget(RolloutTarget, Protocol):
    """A target with real replicas, which staging and the counts ask one by one."""

    # False: no gateway tells what clients saw, so that errors are judged only as far as engines count them.
    counts_errors: bool

    def started_arm(self) -> Sequence[Replica]:
        """The candidates that the rollout has started so far."""
        ...

    def not_started(self) -> str | None:
        """Why fewer candidates run than were started; None when all do, ready or not."""
        ...

    def stable_arm(self) -> Sequence[Replica]:
        """The replicas that serve beside them."""
        ...

    def arm_counts(self) -> ArmCounts | None:
        """The gateway's own counters: what clients saw, also of a replica that is gone. None: nobody counts."""
        ...

    def is_alive(self, server: str) -> bool | None:
        """Whether a candidate's process runs as it was started; None where that is not known here."""
        ...


class TokenFile:
    """A small JSON file under a lock: the highest token, and whatever the target must remember beside it."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @contextmanager
    def held(self, token: int) -> Iterator[dict[str, Any]]:
        """The content, to be read and changed while no other process can; written back when the block ends well.

        StaleTokenError when a higher token was seen. The lock is the kernel's and ends with the process.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self.read()
            seen = int(content.get("token", 0))
            if token < seen:
                raise StaleTokenError(f"token {token} is stale; {seen} owns the target now")
            content["token"] = token
            self._write(content)
            yield content
            self._write(content)

    def read(self) -> dict[str, Any]:
        """The content without the lock; empty when nothing was written yet."""
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return content

    def _write(self, content: Mapping[str, Any]) -> None:
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
