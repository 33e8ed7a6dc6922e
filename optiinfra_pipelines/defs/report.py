"""The asset `fleet_report`: the whole state of the fleet as one HTML file, and its short form in the UI.

Names, dependencies and metadata only; the document is `analysis.report.sections`, its data `resources.report.reader`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import dagster as dg

from optiinfra_pipelines.analysis.report.data import ReportData
from optiinfra_pipelines.analysis.report.html import to_html
from optiinfra_pipelines.analysis.report.markdown import to_markdown
from optiinfra_pipelines.analysis.report.plots import load_png
from optiinfra_pipelines.analysis.report.sections import make_document
from optiinfra_pipelines.defs.automation import refresh_condition
from optiinfra_pipelines.defs.models import WAREHOUSE_POOL
from optiinfra_pipelines.defs.schema import Metadata
from resources.report.files import write_report

REPORT_WINDOW = timedelta(hours=24)
# A report takes two seconds of CPU, mostly plots; a person opens it now and then.
REPORT_MINUTES = 15


def fleet_report_asset(
    read: Callable[[datetime, datetime], ReportData],
    reports_dir: Path,
    clock: Callable[[], datetime],
    deps: Sequence[str] = ("findings", "objectives", "recommendations", "insights"),
) -> dg.AssetsDefinition:
    """`read` gives the data from one moment to another."""

    @dg.asset(
        name="fleet_report",
        deps=list(deps),
        group_name="published",
        kinds={"python", "html"},
        owners=["team:platform"],
        pool=WAREHOUSE_POOL,
        automation_condition=refresh_condition(REPORT_MINUTES),
        description="What burns, findings, recommendations with intervals, how right past advice was, waste and cost, "
        "and the fleet, over the last 24 h; one self-contained HTML file, replaced each time.",
    )
    def fleet_report() -> dg.MaterializeResult[None]:
        now = clock()
        data = read(now - REPORT_WINDOW, now)
        document = make_document(data)
        written = write_report(reports_dir, to_html(document))
        metadata: dict[str, Metadata] = {
            "report": dg.MetadataValue.md(to_markdown(document)),
            "file": dg.MetadataValue.path(written.path),
            "bytes": written.size_bytes,
        }
        load = data.frames.get("load")
        if load is not None and not load.is_empty():
            picture = base64.b64encode(load_png(load)).decode()
            metadata["load"] = dg.MetadataValue.md(f"![KV cache and queue](data:image/png;base64,{picture})")
        return dg.MaterializeResult(metadata=metadata)

    return fleet_report
