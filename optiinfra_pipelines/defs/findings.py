"""Findings and objectives as assets: names, dependencies, automation and what the UI shows of them.

Deriving and storing are `resources.findings.store` and `resources.findings.objectives`.
"""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

from optiinfra_pipelines.defs.automation import refresh_condition
from optiinfra_pipelines.defs.models import WAREHOUSE_POOL
from optiinfra_pipelines.domain.findings import Finding
from optiinfra_pipelines.domain.objectives import ObjectiveStatus
from resources.findings.objectives import ObjectiveStore
from resources.findings.store import FindingsStore

_FINDINGS_FROM = (
    "stg_scrapes",
    "stg_engine_samples",
    "stg_engine_histograms",
    "stg_engine_configs",
    "int_scrape_minutes",
    "int_gpu_minutes",
    "int_host_minutes",
    "int_host_process_minutes",
    "fct_replica_load_5m",
    "kv_reuse_curve",
)
_OBJECTIVES_FROM = (
    "int_latency_minutes",
    "int_engine_minutes",
    "fct_latency_1h",
    "fct_replica_load_1h",
    "dim_targets",
)


def finding_assets(
    findings: FindingsStore, objectives: ObjectiveStore, refresh_minutes: int
) -> list[dg.AssetsDefinition]:
    """The two assets of judgment: what is wrong, and which promises are kept."""
    return [_findings(findings, refresh_minutes), _objectives(objectives, refresh_minutes)]


def _findings(store: FindingsStore, refresh_minutes: int) -> dg.AssetsDefinition:
    @dg.asset(
        name="findings",
        deps=list(_FINDINGS_FROM),
        group_name="judged",
        kinds={"python", "duckdb"},
        owners=["team:platform"],
        pool=WAREHOUSE_POOL,
        automation_condition=refresh_condition(refresh_minutes),
        description="What is wrong with which target, deployment, GPU or host, with the evidence for it; and what "
        "could not be judged, with the reason. One row per finding, kept through its life.",
    )
    def findings() -> dg.MaterializeResult[None]:
        refreshed = store.refresh()
        standing = [one for one in refreshed.findings if one.is_open]
        return dg.MaterializeResult(
            metadata={
                "open": len(standing),
                "abstentions": len(refreshed.abstentions),
                "subjects": refreshed.subject_count,
                "findings": dg.MetadataValue.md(_finding_lines(standing)),
            }
        )

    return findings


def _objectives(store: ObjectiveStore, refresh_minutes: int) -> dg.AssetsDefinition:
    @dg.asset(
        name="objectives",
        deps=list(_OBJECTIVES_FROM),
        group_name="judged",
        kinds={"python", "duckdb"},
        owners=["team:platform"],
        pool=WAREHOUSE_POOL,
        automation_condition=refresh_condition(refresh_minutes),
        description="The objectives of each deployment: share of good requests at a bucket edge, what is left of the "
        "error budget, how fast it burns. One row per refresh, deployment and objective.",
    )
    def objectives() -> dg.MaterializeResult[None]:
        judged = store.refresh()
        return dg.MaterializeResult(
            metadata={
                "objectives": len(judged.statuses),
                "burning": sum(one.state in ("burning", "exhausted") for one in judged.statuses),
                "states": dg.MetadataValue.md(_objective_lines(judged.statuses)),
                "sources": dict(judged.sources),
            }
        )

    return objectives


def _finding_lines(standing: Sequence[Finding]) -> str:
    if not standing:
        return "No open finding."
    lines = [f"| {one.severity} | {one.subject} | {one.kind} ({one.cause}) | {one.summary} |" for one in standing]
    return "\n".join(["| severity | subject | finding | what |", "| --- | --- | --- | --- |", *lines])


def _objective_lines(statuses: Sequence[ObjectiveStatus]) -> str:
    if not statuses:
        return "No objective: fleet.yaml names none and no model's class is known."
    lines = [f"| {one.deployment} | {one.key} | {one.state} | {'; '.join(one.notes)} |" for one in statuses]
    return "\n".join(["| deployment | objective | state | notes |", "| --- | --- | --- | --- |", *lines])
