"""When derived assets are refreshed: one condition at one cadence, evaluated by one sensor that runs from the start."""

from __future__ import annotations

from typing import Any

import dagster as dg

from resources.dagster_home.prune import REFRESH_TAG

# Evaluating thirty assets costs about a tenth of a CPU second; the first refresh may wait this long.
EVALUATE_SECONDS = 20


def refresh_condition(minutes: int) -> dg.AutomationCondition[dg.AssetKey]:
    """Every `minutes` (divisors of the hour keep the clock's steps), at once when never made, never two at a time.

    Deliberately without a word about dependencies: every evaluation is stored with all its parts, and one part per
    dependency made 20 kB of each. A refresh finds what is new by itself.
    """
    never_made = dg.AutomationCondition.missing() & ~dg.AutomationCondition.execution_failed()
    due = dg.AutomationCondition.cron_tick_passed(cron(minutes))
    return ((never_made | due) & ~dg.AutomationCondition.in_progress()).with_label(f"every {minutes} min")


def rebuild_condition() -> dg.AutomationCondition[dg.AssetKey]:
    """Views: when never made or when their SQL changed."""
    needed = dg.AutomationCondition.missing() | dg.AutomationCondition.code_version_changed()
    return (needed & ~dg.AutomationCondition.execution_failed() & ~dg.AutomationCondition.in_progress()).with_label(
        "when its SQL changed"
    )


def hourly_condition() -> dg.AutomationCondition[Any]:
    """Data tests: once an hour, when the hour's first minutes are in."""
    return dg.AutomationCondition.cron_tick_passed("12 * * * *").with_label("hourly")


def cron(minutes: int) -> str:
    """The cron line nearest to a step of minutes: steps under an hour, then whole hours."""
    if minutes < 60:
        return f"*/{minutes} * * * *"
    hours = minutes // 60
    return "0 * * * *" if hours == 1 else f"0 */{min(hours, 24)} * * *" if hours < 24 else "0 0 * * *"


def automation_sensor() -> dg.AutomationConditionSensorDefinition:
    """Evaluates every condition; its runs are marked so that their history may be pruned."""
    return dg.AutomationConditionSensorDefinition(
        "refresh_assets",
        target=dg.AssetSelection.all() | dg.AssetSelection.all_asset_checks(),
        minimum_interval_seconds=EVALUATE_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        run_tags=REFRESH_TAG,
        description="Starts the refresh of derived assets at fleet.yaml's cadence.refresh_minutes.",
    )
