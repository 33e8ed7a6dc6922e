"""The asset `insights`: the current findings and recommendations in plain words, with who wrote them.

Names, dependencies and metadata only; writing is `resources.insights.writer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import dagster as dg

from optiinfra_pipelines.analysis.report.advice import insight_section
from optiinfra_pipelines.analysis.report.markdown import section_markdown
from optiinfra_pipelines.defs.automation import refresh_condition
from optiinfra_pipelines.defs.schema import Metadata
from optiinfra_pipelines.domain.insights import EvidencePack, Insight
from resources.insights.writer import InsightWriter


def insights_asset(
    writer: InsightWriter,
    evidence: Callable[[], EvidencePack],
    refresh_minutes: int,
    deps: Sequence[str] = ("findings", "recommendations"),
) -> dg.AssetsDefinition:
    """`evidence` makes the pack of now. No pool: while the service is asked, nothing holds the warehouse."""

    @dg.asset(
        name="insights",
        deps=list(deps),
        group_name="advised",
        kinds={"python", "groq"},
        owners=["team:platform"],
        automation_condition=refresh_condition(refresh_minutes),
        description="What is wrong, why, what to do first and what to watch, in plain words. Every number and name was "
        "found in the evidence that its sentence cites, else a template wrote it. One row per set of evidence.",
    )
    def insights() -> dg.MaterializeResult[None]:
        return dg.MaterializeResult(metadata=_metadata(writer.write(evidence())))

    return insights


def _metadata(insight: Insight) -> dict[str, Metadata]:
    metadata: dict[str, Metadata] = {
        "insight": dg.MetadataValue.md(section_markdown(insight_section(insight))),
        "writer": insight.writer,
        "reason": insight.reason,
        "written_at": insight.written_at.isoformat(timespec="seconds"),
        "evidence_items": len(insight.evidence.items),
        "calls": insight.calls,
    }
    if insight.tokens is not None:
        metadata["tokens"] = insight.tokens
    if insight.usd is not None:
        metadata["usd"] = insight.usd
    return metadata
