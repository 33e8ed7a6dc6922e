"""The tables of `store` and its append-only log: every line is hashed together with the one before it.

The database refuses to change or delete a line; whoever edits the file past it breaks the chain and shows.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import dataclass
from typing import Any

from optiinfra_pipelines.domain.rollouts import HOLDING, EventKind, Position, Rollout
from resources.rollouts.clock import Moment

NO_HASH = "0" * 64
SCHEMA = f"""
create table if not exists rollouts (
    rollout_id text primary key,
    deployment text not null,
    state text not null,
    row text not null,
    version integer not null,
    token integer not null,
    owner text,
    boot_id text,
    renewed_at real
) strict;
create unique index if not exists one_rollout_holds_a_deployment on rollouts (deployment)
    where state in ({", ".join(f"'{state}'" for state in sorted(HOLDING))});
create table if not exists rollout_events (
    seq integer primary key,
    rollout_id text not null references rollouts (rollout_id),
    line text not null,
    hash text not null
) strict;
create index if not exists events_of_a_rollout on rollout_events (rollout_id, seq);
create trigger if not exists events_are_never_changed before update on rollout_events
    begin select raise(abort, 'rollout_events is append-only'); end;
create trigger if not exists events_are_never_deleted before delete on rollout_events
    begin select raise(abort, 'rollout_events is append-only'); end;
"""


@dataclass
class Line:
    """What one line of the log says."""

    actor: str
    kind: EventKind
    reason: str
    evidence: dict[str, Any] | None = None
    run_id: str | None = None


def append(
    connection: sqlite3.Connection,
    rollout: Rollout,
    now: Moment,
    event: Line,
    *,
    from_position: Position | None = None,
    to_position: Position | None = None,
) -> None:
    line = json.dumps(
        {
            "rollout_id": rollout.rollout_id,
            "at": now.at.isoformat(),
            "actor": event.actor,
            "kind": event.kind,
            "from_position": str(from_position) if from_position else None,
            "to_position": str(to_position) if to_position else None,
            "reason": event.reason,
            "evidence": event.evidence or {},
            "run_id": event.run_id,
            "token": rollout.token,
        },
        sort_keys=True,
        default=str,
    )
    last = connection.execute("select hash from rollout_events order by seq desc limit 1").fetchone()
    connection.execute(
        "insert into rollout_events (rollout_id, line, hash) values (?, ?, ?)",
        [rollout.rollout_id, line, chain(last[0] if last else NO_HASH, line)],
    )


def chain(before: str, line: str) -> str:
    return hashlib.sha256(f"{before}\n{line}".encode()).hexdigest()
