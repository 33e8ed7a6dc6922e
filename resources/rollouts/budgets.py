"""What rollouts ask the published copy of the warehouse, and what is left of error budgets by it.

Nothing here waits for the live file. What a budget allows is `optiinfra_pipelines.rollout.budget`; what the stable
replicas did before is `history`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import polars as pl
import structlog

from optiinfra_pipelines.rollout.budget import Budget
from resources.warehouse import Warehouse, WarehouseError

# None: nothing is stored yet, or it cannot be asked now.
Read = Callable[[str, Sequence[object]], pl.DataFrame | None]
_log = structlog.get_logger(__name__)

_BUDGETS = """
select objective, state, remaining_ratio, judged_at
from objective_status
where deployment = ? and not is_default
qualify judged_at = max(judged_at) over ()
order by objective
"""


def from_published(warehouse: Warehouse) -> Read:
    """Reads the published copy: an executor never waits for the live file, whose writers may outlast its lease."""

    def read(sql: str, params: Sequence[object]) -> pl.DataFrame | None:
        try:
            return warehouse.read_published(sql, params)
        except WarehouseError as error:
            _log.warning("rollout_history_not_read", cause=str(error), meanwhile="the minutes since the start count")
            return None

    return read


def read_budgets(read: Read, deployment: str) -> list[Budget] | None:
    """The newest judgement of each declared objective; None when none can be read."""
    frame = read(_BUDGETS, [deployment])
    if frame is None or frame.is_empty():
        return None
    return [Budget(**row) for row in frame.iter_rows(named=True)]
