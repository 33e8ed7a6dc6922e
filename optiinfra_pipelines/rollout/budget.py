"""May a rollout start, given what is left of its deployment's error budgets?

Pure. Counting budgets is `optiinfra_pipelines.analysis.objectives`; reading them is the caller's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from optiinfra_pipelines.domain.objectives import State
from optiinfra_pipelines.domain.rollouts import Proposal

# Objectives are judged with every refresh, at most once an hour: an older judgement is of another load.
MAX_AGE = timedelta(hours=2)


@dataclass(frozen=True)
class Budget:
    """One declared objective as it was judged last. remaining_ratio: of its error budget; below 0 when overspent."""

    objective: str
    state: State
    remaining_ratio: float | None
    judged_at: datetime


def budget_refusal(proposal: Proposal, budgets: Sequence[Budget] | None, now: datetime) -> str | None:
    """Why a rollout may not start; None when it may.

    budgets: of the deployment's declared objectives; empty when it declares none, None when they cannot be read. A fix,
    a rollout that takes another back and a rehearsal start whatever is left.
    """
    if proposal.is_fix or proposal.undoes is not None or proposal.target == "dry_run" or budgets == []:
        return None
    remedy = "mark the proposal as a fix (is_fix) if it is one"
    if budgets is None:
        return f"the error budgets cannot be read; wait for a refresh, or {remedy}"
    used_up = [one for one in budgets if one.state == "exhausted"]
    if used_up:
        listed = ", ".join(f"{one.objective} ({_left(one)} left)" for one in used_up)
        return f"the error budget is used up: {listed}; wait, or {remedy}"
    if not any(one.state in ("met", "burning") and now - one.judged_at <= MAX_AGE for one in budgets):
        newest = max(budgets, key=lambda one: one.judged_at)
        return (
            f"no error budget is known: {newest.objective} is {newest.state} since its judgement of "
            f"{newest.judged_at:%Y-%m-%d %H:%M} UTC; wait for data, or {remedy}"
        )
    return None


def _left(one: Budget) -> str:
    return "an unknown share" if one.remaining_ratio is None else f"{one.remaining_ratio:.0%}"
