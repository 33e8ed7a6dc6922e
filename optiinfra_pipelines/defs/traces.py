"""The job `import_trace`: a public trace into a warehouse of its own.

Launchpad config only; the import is `resources.traces.importer`.
"""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import dagster as dg
from pydantic import Field

from optiinfra_pipelines.analysis.traces import TraceError
from resources.traces.files import TraceFormat
from resources.traces.importer import ImportRefusedError, import_trace


class TraceConfig(dg.Config):
    """Which trace, and where to."""

    source: str = Field(description="The trace's file; for ServeGen the folder of one fleet.")
    format: TraceFormat = Field(description="mooncake, azure, burstgpt, lmcache or servegen.")
    into: str = Field(description="A new folder for the trace's own state; never the live one.")
    deployment: str = Field("trace", description="Name to give the deployment whose load it is.")


def trace_jobs(live_home: Path, clock: Callable[[], datetime]) -> list[dg.JobDefinition]:
    """`import_trace`; `live_home`: the state folder that no trace may enter."""

    @dg.op(description="Read the trace, store it as if scraped, and bring the models over it up to date.")
    def read_trace(context: dg.OpExecutionContext, config: TraceConfig) -> None:
        try:
            imported = import_trace(
                Path(config.source),
                config.format,
                Path(config.into),
                live_home=live_home,
                ends_at=clock(),
                deployment=config.deployment,
            )
        except (ImportRefusedError, TraceError) as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        context.add_output_metadata(
            {
                "requests": imported.requests,
                "accesses": imported.accesses,
                "clients": imported.clients,
                "minutes": (imported.last_at - imported.first_at).total_seconds() / 60,
                "ask": f'optiinfra --home {config.into} sql "select * from int_load_minutes"',
            }
        )

    @dg.job(name="import_trace", description="Import a public trace beside the live fleet, to try the advice on it.")
    def import_trace_job() -> None:
        read_trace()

    return [import_trace_job]
