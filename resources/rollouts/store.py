"""Where rollouts are kept: one row each, moved by compare-and-set, and an append-only, hash-chained log beside it.

A SQLite file of its own, not the DuckDB warehouse: the warehouse admits one process at a time and collection holds it
for seconds, while a rollback must be written at once, by whichever of the run, the daemon's watchdog and a person's
job comes first. SQLite takes writers of several processes in milliseconds, a transaction is whole or absent after a
kill -9, and with synchronous=FULL it also outlives a power cut. It must lie on a local disk (WAL needs shared memory).

Leases count by the host's boot clock, never by the wall clock: a clock that is set forward or back neither ends nor
prolongs one. Not here: what may follow what (`optiinfra_pipelines.rollout.machine`), who may do it (`rollout.gate`).
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optiinfra_pipelines.domain.rollouts import (
    Approval,
    EventKind,
    PauseReason,
    Proposal,
    Rollout,
    RolloutEvent,
    Step,
)
from optiinfra_pipelines.rollout.machine import PENDING, Input, Refusal, transition
from optiinfra_pipelines.rollout.proposal import proposal_hash
from resources.rollouts.clock import Moment
from resources.rollouts.log import NO_HASH, SCHEMA, Line, append, chain

# A writer waits so long for another one; writes take milliseconds, so more than this is a stuck disk.
BUSY_SECONDS = 10.0
# The owner that keeps a rollout safe between two executors.
WATCHDOG = "watchdog"


class RolloutError(Exception):
    """What was asked of a rollout is refused. The text says why and what to do."""


class ConflictError(RolloutError):
    """The row moved since it was read; read it again and decide anew."""


class LeaseLostError(RolloutError):
    """Another owner holds the rollout now; whoever gets this must not touch the target again."""


class RolloutStore:
    """Rows and log of one state directory; safe across threads and processes."""

    def __init__(self, path: Path, lease_seconds: float = 30.0) -> None:
        self.path = Path(path)
        self.lease_seconds = lease_seconds
        self._local = threading.local()

    # --- reading ---------------------------------------------------------------------------------

    def get(self, rollout_id: str) -> Rollout:
        """The row as it is now. RolloutError when there is none."""
        with self._connect() as connection:
            return _row(connection, rollout_id)

    def all(self) -> list[Rollout]:
        """Every rollout, oldest first."""
        with self._connect() as connection:
            rows = connection.execute("select row from rollouts order by rowid").fetchall()
        return [Rollout.model_validate_json(row) for (row,) in rows]

    def events(self, rollout_id: str) -> list[RolloutEvent]:
        """The log of one rollout, oldest first."""
        with self._connect() as connection:
            found = connection.execute(
                "select seq, line, hash from rollout_events where rollout_id = ? order by seq", [rollout_id]
            ).fetchall()
        return [RolloutEvent(seq=seq, hash=digest, **json.loads(line)) for seq, line, digest in found]

    def broken_link(self) -> int | None:
        """seq of the first event that does not follow from the one before it; None when the log is whole."""
        with self._connect() as connection:
            before = NO_HASH
            for seq, line, digest in connection.execute("select seq, line, hash from rollout_events order by seq"):
                if digest != chain(before, line):
                    return int(seq)
                before = digest
        return None

    # --- people's moves ----------------------------------------------------------------------------

    def propose(self, proposal: Proposal, now: Moment, run_id: str | None = None) -> Rollout:
        """Enter a proposal. The same id with the same content is the same proposal; with another, RolloutError."""
        rollout = Rollout(
            proposal=proposal,
            proposal_hash=proposal_hash(proposal),
            position=PENDING,
            version=0,
            updated_at=now.at,
        )
        with self._transaction() as connection:
            known = connection.execute(
                "select row from rollouts where rollout_id = ?", [proposal.rollout_id]
            ).fetchone()
            if known is not None:
                stored = Rollout.model_validate_json(known[0])
                if stored.proposal_hash == rollout.proposal_hash:
                    return stored
                raise RolloutError(
                    f"rollout {proposal.rollout_id} exists with other content; choose another rollout_id"
                )
            connection.execute(
                "insert into rollouts (rollout_id, deployment, state, row, version, token) values (?, ?, ?, ?, 0, 0)",
                [rollout.rollout_id, rollout.deployment, rollout.position.state, rollout.model_dump_json()],
            )
            event = Line(proposal.requester, "transition", proposal.reason, run_id=run_id)
            event.evidence = {"proposal_hash": rollout.proposal_hash, "proposal": proposal.model_dump(mode="json")}
            append(connection, rollout, now, event, to_position=PENDING)
        return rollout

    def move(
        self,
        rollout: Rollout,
        given: Input,
        *,
        actor: str,
        reason: str,
        now: Moment,
        pause: PauseReason | None = None,
        approval: Approval | None = None,
        steps: tuple[Step, ...] | None = None,
        latency_stake: float | None = None,
        evidence: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        token: int | None = None,
    ) -> Rollout:
        """Move a row that was read as `rollout` by one input, and log it, in one transaction.

        token: the caller's, when it acts as the owner. Raises ConflictError when the row moved meanwhile,
        LeaseLostError when the token is no longer the row's, RolloutError when the machine refuses the input.
        """
        with self._transaction() as connection:
            present = _row(connection, rollout.rollout_id)
            _require(present, rollout.version, token)
            known_steps = steps if steps is not None else present.steps
            after = transition(present.position, given, steps=known_steps, pause=pause)
            if isinstance(after, Refusal):
                raise RolloutError(f"rollout {rollout.rollout_id}: {after.reason}")
            moved = present.model_copy(
                update={
                    "position": after,
                    "version": present.version + 1,
                    "approval": approval or present.approval,
                    "steps": known_steps,
                    "latency_stake": latency_stake or present.latency_stake,
                    "started_at": now.at if given is Input.START else present.started_at,
                    "updated_at": now.at,
                }
            )
            _save(connection, moved)
            event = Line(actor, "transition", reason, dict(evidence or {}), run_id)
            append(connection, moved, now, event, from_position=present.position, to_position=after)
        return moved

    def note(
        self,
        rollout_id: str,
        kind: EventKind,
        reason: str,
        *,
        actor: str,
        now: Moment,
        evidence: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        token: int | None = None,
    ) -> None:
        """Log something that moves nothing: an intent, its result, a verdict, a refusal, an alert.

        With a token this is the write-ahead step before an outside action: LeaseLostError when it is not the row's.
        """
        with self._transaction() as connection:
            present = _row(connection, rollout_id)
            _require(present, present.version, token)
            append(connection, present, now, Line(actor, kind, reason, dict(evidence or {}), run_id))

    # --- the lease -----------------------------------------------------------------------------------

    def acquire(self, rollout_id: str, owner: str, now: Moment, *, run_id: str | None = None) -> Rollout:
        """Take the lease with a higher token. RolloutError while another owner's lease is alive.

        The same owner asking again keeps its token: the ops of one run are one owner. The watchdog holds a rollout only
        until a new executor comes.
        """
        with self._transaction() as connection:
            present = _row(connection, rollout_id)
            age = _lease_age(connection, rollout_id, now)
            if present.owner == owner and age is not None:
                connection.execute(
                    "update rollouts set renewed_at = ?, boot_id = ? where rollout_id = ?",
                    [now.seconds, now.boot_id, rollout_id],
                )
                return present
            is_alive = present.owner is not None and age is not None and age <= self.lease_seconds
            if is_alive and present.owner != WATCHDOG:
                raise RolloutError(
                    f"rollout {rollout_id} is executed by {present.owner}, seen {age or 0:.0f} s ago; "
                    "two may not act on it"
                )
            reason = f"{owner} took the lease" + (f" from {present.owner}" if present.owner else "")
            return self._hand_over(connection, present, owner, now, reason, run_id)

    def renew(self, rollout_id: str, token: int, now: Moment) -> Rollout:
        """Keep the lease. LeaseLostError when somebody fenced the owner off."""
        with self._transaction() as connection:
            present = _row(connection, rollout_id)
            _require(present, present.version, token)
            connection.execute(
                "update rollouts set renewed_at = ?, boot_id = ? where rollout_id = ?",
                [now.seconds, now.boot_id, rollout_id],
            )
            return present

    def fence(self, rollout_id: str, actor: str, now: Moment, reason: str) -> Rollout:
        """Take the rollout from its owner, alive or not, so that its later actions are refused. For safety only."""
        with self._transaction() as connection:
            return self._hand_over(connection, _row(connection, rollout_id), actor, now, reason, None)

    def release(self, rollout_id: str, token: int, now: Moment) -> None:
        """Give the lease up at the end of a run; a no-op when it was taken away before."""
        with self._transaction() as connection:
            present = _row(connection, rollout_id)
            if present.token == token and present.owner is not None:
                released = present.model_copy(update={"owner": None, "run_id": None, "version": present.version + 1})
                _save(connection, released)
                connection.execute("update rollouts set renewed_at = null where rollout_id = ?", [rollout_id])
                append(connection, released, now, Line(present.owner, "lease", "released", run_id=present.run_id))

    def settle(self, rollout_id: str, token: int, now: Moment, *, actor: str) -> None:
        """Record that a completed rollout's candidates are the stable replicas now."""
        with self._transaction() as connection:
            present = _row(connection, rollout_id)
            _require(present, present.version, token)
            settled = present.model_copy(update={"is_settled": True, "version": present.version + 1})
            _save(connection, settled)
            append(connection, settled, now, Line(actor, "result", "the candidates are the stable replicas"))

    def count_attempt(self, rollout: Rollout) -> Rollout:
        """One more executor was lost."""
        with self._transaction() as connection:
            present = _row(connection, rollout.rollout_id)
            counted = present.model_copy(update={"attempts": present.attempts + 1, "version": present.version + 1})
            _save(connection, counted)
        return counted

    def lease_age(self, rollout_id: str, now: Moment) -> float | None:
        """Seconds since the owner was last seen; infinite when that was before a reboot, None when nobody owns it."""
        with self._connect() as connection:
            return _lease_age(connection, rollout_id, now)

    def _hand_over(
        self, connection: sqlite3.Connection, present: Rollout, owner: str, now: Moment, reason: str, run_id: str | None
    ) -> Rollout:
        # One count for all rollouts: a target outlives a rollout, and the next one's tokens must be higher still.
        (highest,) = connection.execute("select max(token) from rollouts").fetchone()
        taken = present.model_copy(
            update={"owner": owner, "run_id": run_id, "token": int(highest) + 1, "version": present.version + 1}
        )
        _save(connection, taken)
        connection.execute(
            "update rollouts set owner = ?, renewed_at = ?, boot_id = ? where rollout_id = ?",
            [owner, now.seconds, now.boot_id, present.rollout_id],
        )
        append(connection, taken, now, Line(owner, "lease", reason, run_id=run_id))
        return taken

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One writing transaction: taken at its beginning, whole or absent at its end."""
        with self._connect() as connection:
            connection.execute("begin immediate")
            try:
                yield connection
            except BaseException:
                connection.execute("rollback")
                raise
            connection.execute("commit")

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection. It stays open: closing the last one costs a checkpoint every time."""
        known: tuple[int, sqlite3.Connection] | None = getattr(self._local, "opened", None)
        # A connection must not be carried into a forked child, and one to a file that is gone sees nothing.
        if known is None or known[0] != os.getpid() or not self.path.exists():
            known = (os.getpid(), self._open())
            self._local.opened = known
        yield known[1]

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        connection.execute("pragma synchronous = full")
        connection.execute("pragma foreign_keys = on")
        if not connection.execute("select 1 from sqlite_master where name = 'rollout_events'").fetchone():
            connection.execute("pragma journal_mode = wal")
            connection.executescript(f"begin immediate; {SCHEMA} commit;")
        return connection


def _row(connection: sqlite3.Connection, rollout_id: str) -> Rollout:
    found = connection.execute("select row from rollouts where rollout_id = ?", [rollout_id]).fetchone()
    if found is None:
        raise RolloutError(f"there is no rollout {rollout_id!r}; propose_rollout prints the id it gives")
    return Rollout.model_validate_json(found[0])


def _require(present: Rollout, version: int, token: int | None) -> None:
    if token is not None and present.token != token:
        raise LeaseLostError(f"rollout {present.rollout_id}: {present.owner} holds it now (token {present.token})")
    if present.version != version:
        raise ConflictError(
            f"rollout {present.rollout_id} moved meanwhile: it is {present.position} (version {present.version}, "
            f"read as {version})"
        )


def _save(connection: sqlite3.Connection, rollout: Rollout) -> None:
    try:
        connection.execute(
            "update rollouts set row = ?, state = ?, version = ?, token = ?, owner = ? where rollout_id = ?",
            [
                rollout.model_dump_json(),
                rollout.position.state,
                rollout.version,
                rollout.token,
                rollout.owner,
                rollout.rollout_id,
            ],
        )
    except sqlite3.IntegrityError as error:
        raise RolloutError(
            f"deployment {rollout.deployment} is held by another rollout; one at a time, so an effect has one cause"
        ) from error


def _lease_age(connection: sqlite3.Connection, rollout_id: str, now: Moment) -> float | None:
    owner, boot_id, renewed = connection.execute(
        "select owner, boot_id, renewed_at from rollouts where rollout_id = ?", [rollout_id]
    ).fetchone() or (None, None, None)
    if owner is None or renewed is None:
        return None
    return float("inf") if boot_id != now.boot_id else max(0.0, now.seconds - float(renewed))
