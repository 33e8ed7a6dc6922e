"""Recommendations, their ledger and how right they were; waste, costs and trends: as assets.

Names, dependencies and what the UI shows only. Deriving and storing are `resources.ledger.store` and
`resources.findings.waste`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import dagster as dg

from optiinfra_pipelines.analysis.consolidation import NoPlan
from optiinfra_pipelines.defs.automation import refresh_condition
from optiinfra_pipelines.defs.models import WAREHOUSE_POOL
from optiinfra_pipelines.defs.schema import preview
from optiinfra_pipelines.domain.recommendations import Accuracy, LedgerEntry, LedgerState, RuleAbstention
from optiinfra_pipelines.domain.rollouts import Rollout
from resources.findings.waste import WasteStore
from resources.ledger.store import LedgerStore

_ADVICE_FROM = (
    "stg_engine_samples",
    "stg_engine_histograms",
    "stg_engine_configs",
    "int_config_changes",
    "int_gpu_minutes",
    "fct_replica_load_5m",
    "fct_latency_5m",
    "findings",
    "kv_cache_recommendations",
)
_WASTE_FROM = (
    "fct_gpu_utilization_5m",
    "fct_replica_load_5m",
    "fct_latency_5m",
    "fct_utilization_trends",
    "dim_targets",
)
_ADVICE = {
    "recommendations": "What to change: one knob group at a time per deployment, with the exact flags, the expected "
    "effect as an interval and how it was obtained, risk, how to verify and to undo. One row per recommendation, kept "
    "through its life.",
    "recommendation_ledger": "What happened to each recommendation, one row per event: seen, superseded, expired, "
    "proposed, applied, measured.",
    "fct_recommendation_accuracy": "How right recommendations have been, one row per kind and rule: share with the "
    "right sign, coverage of the stated intervals, realized dollars, n. Nothing is called accurate below minimum_n.",
}
_WASTE = {
    "fct_gpu_waste": "GPU-hours and dollars by UTC day, GPU and state: idle_free, idle_held, active, unknown. "
    "Dollars are NULL where the price is not known.",
    "fct_deployment_costs": "What a million tokens and a joule bought, per deployment over the last 7 days; NULL where "
    "price or energy is not known.",
    "fct_signal_trends": "Theil-Sen slope per day with interval, when the signal is full, and its season where one "
    "predicts better than none; one row per subject, name and signal.",
    "consolidation_plan": "The fewest whole GPUs that would hold all replicas, with N+1 and interference limits kept; "
    "or the reason why none is saved.",
}


def recommendation_assets(
    store: LedgerStore,
    waste: WasteStore,
    refresh_minutes: int,
    rollouts: Callable[[], Iterable[Rollout]] | None = None,
) -> list[dg.AssetsDefinition]:
    """The assets of advice and of waste. rollouts: those whose outcome the ledger takes over; None where there are
    none.
    """
    return [_recommendations(store, refresh_minutes, rollouts), _waste(waste, refresh_minutes)]


def _recommendations(
    store: LedgerStore, refresh_minutes: int, rollouts: Callable[[], Iterable[Rollout]] | None
) -> dg.AssetsDefinition:
    @dg.multi_asset(
        name="derive_recommendations", specs=_specs(_ADVICE, _ADVICE_FROM, refresh_minutes), pool=WAREHOUSE_POOL
    )
    def derive_recommendations() -> Iterator[dg.MaterializeResult[None]]:
        derived = store.refresh(list(rollouts()) if rollouts is not None else ())
        standing = [entry for entry in derived.standing if entry.state is LedgerState.OPEN]
        yield dg.MaterializeResult(
            asset_key="recommendations",
            metadata={
                "windows": derived.windows,
                "open": len(standing),
                "abstentions": len(derived.abstentions),
                "recommendations": dg.MetadataValue.md(_advice_lines(standing)),
                "declined": dg.MetadataValue.md(_abstention_lines(derived.abstentions)),
            },
        )
        yield dg.MaterializeResult(
            asset_key="recommendation_ledger",
            metadata={"alive": len(derived.standing), "events_from_rollouts": derived.from_rollouts},
        )
        yield dg.MaterializeResult(
            asset_key="fct_recommendation_accuracy",
            metadata={"accuracy": dg.MetadataValue.md(_accuracy_lines(store.accuracy()))},
        )

    return derive_recommendations


def _waste(store: WasteStore, refresh_minutes: int) -> dg.AssetsDefinition:
    @dg.multi_asset(name="derive_waste", specs=_specs(_WASTE, _WASTE_FROM, refresh_minutes), pool=WAREHOUSE_POOL)
    def derive_waste() -> Iterator[dg.MaterializeResult[None]]:
        found = store.refresh()
        plan = found.plan
        yield dg.MaterializeResult(asset_key="fct_gpu_waste", metadata=preview(found.hours))
        yield dg.MaterializeResult(asset_key="fct_deployment_costs", metadata=preview(found.costs))
        yield dg.MaterializeResult(asset_key="fct_signal_trends", metadata=preview(found.trends))
        yield dg.MaterializeResult(
            asset_key="consolidation_plan",
            metadata={"declined": plan.reason} if isinstance(plan, NoPlan) else {"saved_gpus": plan.saved_gpus},
        )

    return derive_waste


def _specs(described: dict[str, str], sources: Sequence[str], refresh_minutes: int) -> list[dg.AssetSpec]:
    return [
        dg.AssetSpec(
            key=name,
            deps=list(sources),
            group_name="advised",
            kinds={"python", "duckdb"},
            owners=["team:platform"],
            description=description,
            automation_condition=refresh_condition(refresh_minutes),
        )
        for name, description in described.items()
    ]


def _advice_lines(entries: Sequence[LedgerEntry]) -> str:
    if not entries:
        return "Nothing to change."
    rows = ["| subject | change | expected effect | obtained by | risk |", "| --- | --- | --- | --- | --- |"]
    for entry in entries:
        one, effect = entry.recommendation, entry.recommendation.effects[0]
        expected = f"{effect.signal} {effect.change_low:+.3g} to {effect.change_high:+.3g} {effect.unit}"
        rows.append(f"| {one.subject} | `{one.change_text}` | {expected} | {effect.basis} | {one.risk} |")
    return "\n".join(rows)


def _abstention_lines(abstentions: Sequence[RuleAbstention]) -> str:
    if not abstentions:
        return "No rule declined."
    rows = [f"| {one.subject} | {one.rule} | {one.reason} |" for one in abstentions]
    return "\n".join(["| subject | rule | why nothing is proposed |", "| --- | --- | --- |", *rows])


def _accuracy_lines(rows: Sequence[Accuracy]) -> str:
    lines = [f"| {one.kind} | {one.rule} | {one.n} | {one.says} |" for one in rows]
    return "\n".join(["| kind | rule | n | how right |", "| --- | --- | --- | --- |", *lines])
