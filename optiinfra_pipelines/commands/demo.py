"""`optiinfra demo`: recordings of real engines over loopback HTTP beside this host's own live metrics.

With the UI the replay runs at its true pace for as long as the recordings last and then holds their last page.
`--once` steps through the same pages without waiting: each page is read over HTTP at the moment of the recording's
own clock, set so that the recording ended a minute ago.
"""

from __future__ import annotations

import logging
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
from optiinfra_pipelines.defs.models import OPENS, READ_COPY
from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.settings import Paths, find_paths, load_fleet
from optiinfra_pipelines.sql.loader import load_models
from optiinfra_pipelines.sql.models import Layer
from resources.collectors import Collectors
from resources.dagster_home.stack import prepare_home
from resources.demo.fleet import SHORT_WINDOWS, SHOWN, demo_recordings, write_demo_fleet
from resources.demo.replay import Recording, ReplayServer
from resources.findings.store import FindingsStore
from resources.model_runner import ModelRunner
from resources.warehouse import Warehouse, WarehouseError

STEP = timedelta(seconds=5)
# The last pages are held so long: advice looks at closed windows whose late rows have had half a minute to land.
HOLD = timedelta(seconds=60)
# How often the stepped replay is judged: its phases last a minute or two, and a finding needs two looks.
JUDGE_EVERY = 6
# What findings on engines read; the build afterwards makes every model.
JUDGED_FROM = (
    "int_scrape_minutes",
    "int_engine_minutes",
    "int_gpu_minutes",
    "int_host_minutes",
    "int_host_process_minutes",
    "fct_replica_load_5m",
)


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
    length = timedelta(seconds=max(recording.duration_seconds for recording in recordings)) + HOLD
    console.print(_banner(recordings))
    at = [datetime.now(UTC)]
    with ReplayServer(recordings, lambda: (at[0] - start).total_seconds()) as server:
        write_demo_fleet(paths.fleet_file, server, recordings)
        fleet = load_fleet(paths.fleet_file, environ)
        warehouse = Warehouse(paths.warehouse_dir, clock=lambda: at[0])
        runner = ModelRunner(load_models(), warehouse, lambda: at[0])
        try:
            warehouse.sweep()
            at[0] = _read_this_host(fleet, warehouse)
            start = at[0] - length
            _step_through(fleet, warehouse, runner, at, start)
            _build(fleet, paths, at[0])
        except WarehouseError as error:
            raise click.ClickException(str(error)) from error
        _test(runner)
    for title, query in SUMMARY.items():
        print_table(warehouse.read(query), title=title, empty="nothing to show")
    console.print(f'\nkept in {paths.home}; ask more: optiinfra --home {paths.home} sql "select * from dim_replicas"')


def _read_this_host(fleet: Fleet, warehouse: Warehouse) -> datetime:
    """Read this host live, twice, a second apart: rates need an interval. Returns the moment of the second reading."""
    collectors = Collectors(fleet, lambda: datetime.now(UTC))
    for is_last in (False, True):
        now = datetime.now(UTC)
        warehouse.append(f"gpus-{now:%Y%m%dT%H%M%S.%fZ}", collectors.sample_gpus(now))
        warehouse.append(f"hosts-{now:%Y%m%dT%H%M%S.%fZ}", collectors.sample_hosts(now))
        if not is_last:
            time.sleep(1)
    collectors.close()
    return now


def _step_through(fleet: Fleet, warehouse: Warehouse, runner: ModelRunner, at: list[datetime], start: datetime) -> None:
    """Step the recordings' clock from `start` to now, judging what was read on the way."""
    end, at[0], steps = at[0], start, 0
    collectors = Collectors(fleet, lambda: at[0])
    # This host is not recorded: over the recordings' past there is nothing to say of it.
    findings = FindingsStore(fleet.model_copy(update={"hosts": ()}), warehouse, lambda: at[0])
    needed = [m for m in runner.models.values() if m.layer is Layer.STAGING or m.name in JUDGED_FROM]
    with _progress() as progress:
        task = progress.add_task("reading the recordings over HTTP, page by page, and judging them", total=1.0)
        while at[0] < end:
            warehouse.append(f"engines-{at[0]:%Y%m%dT%H%M%S.%fZ}", collectors.scrape_engines(at[0]))
            steps += 1
            if steps % JUDGE_EVERY == 0:
                for model in needed if steps == JUDGE_EVERY else (model for model in needed if model.is_stored):
                    runner.refresh(model)
                findings.refresh()
            at[0] = min(at[0] + STEP, end)
            progress.update(task, completed=(at[0] - start) / (end - start))
    warehouse.append(f"engines-{end:%Y%m%dT%H%M%S.%fZ}", collectors.scrape_engines(end))
    collectors.close()


def _build(fleet: Fleet, paths: Paths, now: datetime) -> None:
    """Every asset through Dagster, in this process, on the same instance the UI would show, as of the last reading."""
    prepare_home(paths.dagster_home)
    definitions = assemble(fleet, paths, lambda: now)
    logging.getLogger("dagster").setLevel(logging.WARNING)
    with _progress() as progress:
        progress.add_task("building every asset")
        with dg.DagsterInstance.from_config(str(paths.dagster_home)) as instance:
            everything = definitions.resolve_implicit_global_asset_job_def()
            keys = set(definitions.resolve_asset_graph().materializable_asset_keys)
            # The models' tests run below, without Dagster's record of each.
            opens = dg.AssetCheckKey(dg.AssetKey(READ_COPY), OPENS)
            job = everything.get_subset(asset_selection=keys, asset_check_selection={opens})
            result = job.execute_in_process(instance=instance, raise_on_error=False)
    console.print(f"built {len(result.get_asset_materialization_events())} assets")
    if not result.success:
        steps = [str(event.step_key) for event in result.all_events if event.is_step_failure]
        raise click.ClickException(f"not built: {', '.join(steps)}; the log is in {paths.dagster_home}")


def _test(runner: ModelRunner) -> None:
    """Every data test of every model, on the rows just made."""
    results = [result for model in runner.models.values() for result in runner.test(model)]
    failed = [result for result in results if not result.passed]
    console.print(f"{len(results) - len(failed)} of {len(results)} data tests pass")
    for result in failed:
        console.print(f"  failed: {result.model} {result.name}: {result.failing_rows} rows")


def _banner(recordings: Sequence[Recording]) -> str:
    """What is shown and what each target really is; on the screen every time."""
    timed = {recording.name: recording.is_timed for recording in recordings}
    lines = ["OptiInfra demo: these targets are RECORDINGS, replayed over loopback HTTP; this host is live."]
    for shown in SHOWN:
        pace = "" if timed[shown.target] else " (shown a page every 30 s)"
        lines.append(f"  {shown.target:<26} {shown.truth}{pace}")
    lines.append(
        f"Their trouble lasts a minute, so here one window of {SHORT_WINDOWS['advice_window_seconds']} s may advise a "
        "change; as shipped it takes two of 300 s in a row."
    )
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
