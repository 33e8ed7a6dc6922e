"""`optiinfra demo`: recordings of real engines over loopback HTTP beside this host's own live metrics.

With the UI the replay runs at its true pace for as long as the recordings last and then holds their last page.
`--once` steps through the same pages without waiting: each page is read over HTTP at the moment of the recording's
own clock, set so that the recording ends now.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import click
import dagster as dg
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from optiinfra_pipelines.commands import up
from optiinfra_pipelines.commands.console import console, print_table
from optiinfra_pipelines.commands.summary import SUMMARY
from optiinfra_pipelines.definitions import assemble
from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.settings import Paths, find_paths, load_fleet
from resources.collectors import Collectors
from resources.dagster_stack import prepare_home
from resources.demo import SHOWN, demo_recordings, write_demo_fleet
from resources.replay import Recording, ReplayServer
from resources.warehouse import Warehouse, WarehouseError

STEP = timedelta(seconds=5)


def run(paths: Paths, host: str, port: int, environ: Mapping[str, str]) -> None:
    """Replay at true pace under the Dagster UI until told to stop."""
    started = time.monotonic()
    recordings = demo_recordings()
    with ReplayServer(recordings, lambda: time.monotonic() - started) as server:
        write_demo_fleet(paths.fleet_file, server, recordings)
        up.run(paths, host, port, environ, banner=_banner(recordings))


def run_once(paths: Paths, environ: Mapping[str, str]) -> None:
    """Collect, build every asset, print the result, and be done."""
    recordings = demo_recordings()
    length = timedelta(seconds=max(recording.duration_seconds for recording in recordings))
    start = datetime.now(UTC) - length
    console.print(_banner(recordings))
    at = [start]
    with ReplayServer(recordings, lambda: (at[0] - start).total_seconds()) as server:
        write_demo_fleet(paths.fleet_file, server, recordings)
        fleet = load_fleet(paths.fleet_file, environ)
        warehouse = Warehouse(paths.warehouse_dir, clock=lambda: datetime.now(UTC))
        try:
            _collect(fleet, warehouse, at, start + length)
            _build(fleet, paths)
        except WarehouseError as error:
            raise click.ClickException(str(error)) from error
    for title, query in SUMMARY.items():
        print_table(warehouse.read(query), title=title, empty="nothing to show")
    console.print(f'\nkept in {paths.home}; ask more: optiinfra --home {paths.home} sql "select * from dim_replicas"')


def _collect(fleet: Fleet, warehouse: Warehouse, at: list[datetime], end: datetime) -> None:
    """Step the recordings' clock to their end; this host is read live, at the end and a second time after it."""
    warehouse.sweep()
    collectors = Collectors(fleet, lambda: at[0])
    begun = at[0]
    with _progress() as progress:
        task = progress.add_task("reading the recordings over HTTP, page by page", total=1.0)
        while at[0] <= end:
            warehouse.append(f"engines-{at[0]:%Y%m%dT%H%M%S.%fZ}", collectors.scrape_engines(at[0]))
            at[0] += STEP
            progress.update(task, completed=(at[0] - begun) / (end - begun))
    for _ in range(2):
        now = datetime.now(UTC)
        warehouse.append(f"gpus-{now:%Y%m%dT%H%M%S.%fZ}", collectors.sample_gpus(now))
        warehouse.append(f"hosts-{now:%Y%m%dT%H%M%S.%fZ}", collectors.sample_hosts(now))
        time.sleep(1)  # two readings a second apart: rates of this host need an interval
    collectors.close()


def _build(fleet: Fleet, paths: Paths) -> None:
    """Every asset and check through Dagster, in this process, on the same instance the UI would show."""
    prepare_home(paths.dagster_home)
    definitions = assemble(fleet, paths)
    with _progress() as progress:
        progress.add_task("building every asset")
        with dg.DagsterInstance.from_config(str(paths.dagster_home)) as instance:
            job = definitions.resolve_implicit_global_asset_job_def()
            result = job.execute_in_process(instance=instance, raise_on_error=False)
    materialized = len(result.get_asset_materialization_events())
    checks = result.get_asset_check_evaluations()
    failed = [check for check in checks if not check.passed]
    console.print(f"built {materialized} assets; {len(checks) - len(failed)} of {len(checks)} data checks pass")
    for check in failed:
        console.print(f"  failed: {check.asset_key.to_user_string()} {check.check_name}")
    if not result.success:
        raise click.ClickException("a step of the build failed; the log above names it")


def _banner(recordings: Sequence[Recording]) -> str:
    """What is shown and what each target really is; on the screen every time."""
    timed = {recording.name: recording.is_timed for recording in recordings}
    lines = ["OptiInfra demo: these targets are RECORDINGS, replayed over loopback HTTP; this host is live."]
    for shown in SHOWN:
        pace = "" if timed[shown.target] else " (shown a page every 30 s)"
        lines.append(f"  {shown.target:<26} {shown.truth}{pace}")
    return "\n".join(lines)


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    )


def settings_of_demo(paths: Paths, environ: dict[str, str]) -> tuple[Paths, dict[str, str]]:
    """The demo keeps a state and a fleet.yaml of its own: recordings never mix with a real fleet's history."""
    home = paths.home / "demo"
    own = environ | {"OPTIINFRA_HOME": str(home), "OPTIINFRA_FLEET": str(home / "fleet.yaml")}
    return find_paths(own), own
