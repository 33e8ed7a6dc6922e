"""What the insight writer remembers in the warehouse: insights by their evidence, tokens of a day, a pause.

Here: three small tables and the day's budget. Not here: asking the service (`writer`). No key, no prompt and
no reply that was refused is ever stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import duckdb

from optiinfra_pipelines.domain.insights import Insight
from resources.warehouse import Warehouse

# Long enough to read what was said before an incident review; a row is some 20 kB.
KEEP = timedelta(days=30)

_TABLES = """
create table if not exists insights (
    written_at timestamptz, evidence_hash varchar, subjects_hash varchar, writer varchar, reason varchar,
    model varchar, tokens bigint, usd double, insight varchar);
create table if not exists insight_calls (
    called_at timestamptz, call_id varchar, tokens bigint, usd double, is_settled boolean);
create table if not exists insight_pauses (until_at timestamptz, reason varchar);
"""


@dataclass(frozen=True)
class Budget:
    """What one UTC day may cost. usd: counts only where a price is known."""

    tokens: int = 200_000
    usd: float = 1.0


@dataclass(frozen=True)
class Spent:
    """What a UTC day has cost so far; a call whose cost is not known counts with what it could have cost."""

    tokens: int
    usd: float


@dataclass(frozen=True)
class Recalled:
    """A model's earlier insight that still serves, and until when the service asked to be left alone."""

    insight: Insight | None
    paused_until: datetime | None


class InsightStore:
    """Every method opens the warehouse for a moment; nothing is held while the service is asked."""

    def __init__(self, warehouse: Warehouse) -> None:
        self._warehouse = warehouse

    def recall(self, evidence_hash: str, subjects_hash: str, alike_after: datetime, now: datetime) -> Recalled:
        """What is known before the service is asked.

        The insight is what a model wrote on exactly this evidence, else the newest since `alike_after` on the same
        claims.
        """
        with self._warehouse.connect() as connection:
            connection.execute(_TABLES)
            row = connection.execute(
                "select insight from insights where writer = 'model' "
                "and (evidence_hash = $exact or (subjects_hash = $alike and written_at > $after)) "
                "order by evidence_hash = $exact desc, written_at desc limit 1",
                {"exact": evidence_hash, "alike": subjects_hash, "after": alike_after},
            ).fetchone()
            paused = connection.execute("select max(until_at) from insight_pauses where until_at > ?", [now]).fetchone()
        return Recalled(Insight.model_validate_json(row[0]) if row else None, paused[0] if paused else None)

    def keep(self, insight: Insight) -> None:
        """Store one. What is older than KEEP goes; of the template's, made anew at each refresh, the last stays."""
        with self._warehouse.connect() as connection:
            connection.execute(_TABLES)
            connection.execute("delete from insights where written_at < ?", [insight.written_at - KEEP])
            connection.execute("delete from insights where writer = 'template'")
            connection.execute("delete from insight_calls where called_at < ?", [insight.written_at - KEEP])
            connection.execute(
                "insert into insights values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    insight.written_at,
                    insight.evidence_hash,
                    insight.subjects_hash,
                    insight.writer,
                    insight.reason,
                    insight.model,
                    insight.tokens,
                    insight.usd,
                    insight.model_dump_json(),
                ],
            )

    def latest(self) -> Insight | None:
        """The newest of any writer."""
        with self._warehouse.connect() as connection:
            connection.execute(_TABLES)
            row = connection.execute("select insight from insights order by written_at desc limit 1").fetchone()
        return Insight.model_validate_json(row[0]) if row else None

    def spent(self, now: datetime) -> Spent:
        """What the UTC day of `now` has cost."""
        with self._warehouse.connect() as connection:
            connection.execute(_TABLES)
            return _spent(connection, now)

    def reserve(self, call_id: str, now: datetime, tokens: int, usd: float, budget: Budget) -> bool:
        """Take what a call may cost at most out of the day's budget; False when it does not fit.

        A killed process leaves its reservation: the service may have billed it.
        """
        with self._warehouse.connect() as connection:
            connection.execute(_TABLES)
            spent = _spent(connection, now)
            if spent.tokens + tokens > budget.tokens or spent.usd + usd > budget.usd:
                return False
            connection.execute("insert into insight_calls values (?, ?, ?, ?, false)", [now, call_id, tokens, usd])
            return True

    def settle(self, call_id: str, tokens: int, usd: float) -> None:
        """What a reserved call did cost, in place of what it could have."""
        with self._warehouse.connect() as connection:
            connection.execute(
                "update insight_calls set tokens = ?, usd = ?, is_settled = true where call_id = ?",
                [tokens, usd, call_id],
            )

    def pause(self, until: datetime, reason: str) -> None:
        """Do not call before `until`; earlier pauses that are over go."""
        with self._warehouse.connect() as connection:
            connection.execute(_TABLES)
            connection.execute("delete from insight_pauses")
            connection.execute("insert into insight_pauses values (?, ?)", [until, reason])


def _spent(connection: duckdb.DuckDBPyConnection, now: datetime) -> Spent:
    day = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    [(tokens, usd)] = connection.execute(
        "select coalesce(sum(tokens), 0), coalesce(sum(usd), 0) from insight_calls where called_at >= ? "
        "and called_at < ?",
        [day, day + timedelta(days=1)],
    ).fetchall()
    return Spent(int(tokens), float(usd))
