"""`optiinfra up`: run the fleet of fleet.yaml until Ctrl-C or SIGTERM.

Prepares the state folder, starts Dagster's processes, restarts what dies, and takes up a changed fleet.yaml.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import click

from optiinfra_pipelines.commands.console import console
from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.settings import Paths, SettingsError, load_fleet
from resources.dagster_home.stack import PortTakenError, children, claim_port, prepare_home
from resources.dagster_home.supervisor import ChildFailedError, Supervisor
from resources.warehouse import Warehouse, WarehouseError

LOOK_SECONDS = 0.5


Beside = Callable[[Callable[[], bool]], None]


def run(
    paths: Paths,
    host: str,
    port: int,
    environ: Mapping[str, str],
    *,
    banner: str = "",
    beside: Beside | None = None,
) -> None:
    """Run until told to stop. Raises click.ClickException naming what is wrong and the remedy.

    beside: what else is done once all runs, in a thread of its own; it is handed a question that turns true when this
    is to stop. Its end is the end of the run, and its error is raised here.
    """
    fleet = _load(paths.fleet_file, environ)
    with _sole_owner(paths.home), _stop_signals() as stopped:
        try:
            claim_port(host, port)
            Warehouse(paths.warehouse_dir, clock=lambda: datetime.now(UTC)).sweep()
        except (PortTakenError, WarehouseError) as error:
            raise click.ClickException(str(error)) from error
        prepare_home(paths.dagster_home)
        supervisor = Supervisor(
            environ={**environ, **_child_environ(paths)}, cwd=paths.dagster_home, on_event=console.print
        )
        console.print(banner or _what_is_watched(fleet, paths))
        try:
            _start(supervisor, paths, host, port, stopped)
            with _doing(beside, stopped):
                _watch(supervisor, paths.fleet_file, environ, stopped)
        finally:
            console.print("stopping …")
            supervisor.stop()
            console.print("stopped; nothing is left running")


@contextmanager
def _doing(beside: Beside | None, stopped: list[int]) -> Iterator[None]:
    """Do something in a thread meanwhile; it and the block end each other."""
    if beside is None:
        yield
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="beside") as pool:
        done = pool.submit(beside, lambda: bool(stopped))
        done.add_done_callback(lambda _: stopped.append(signal.SIGTERM))
        try:
            yield
        finally:
            stopped.append(signal.SIGTERM)
    done.result()


def _start(supervisor: Supervisor, paths: Paths, host: str, port: int, stopped: list[int]) -> None:
    started = time.monotonic()
    with console.status("starting Dagster (code server, web server, daemon) …"):
        try:
            supervisor.start(children(paths.dagster_home, host, port), should_stop=lambda: bool(stopped))
        except ChildFailedError as error:
            raise click.ClickException(str(error)) from error
    if stopped:
        return
    console.print(f"started in {time.monotonic() - started:.0f} s; the first numbers are there within a minute")
    console.print(f"  UI      http://{host}:{port}")
    console.print(f"  state   {paths.home}")
    console.print(f"  logs    {paths.dagster_home / 'process_logs'}")
    console.print(f'  ask     optiinfra --home {paths.home} sql "select * from fct_scrape_health"')
    console.print("  stop    Ctrl-C")


def _watch(supervisor: Supervisor, fleet_file: Path, environ: Mapping[str, str], stopped: list[int]) -> None:
    """Look after the children; a changed and valid fleet.yaml restarts the code server, an invalid one is told."""
    seen = _modified_at(fleet_file)
    while not stopped:
        supervisor.poll()
        time.sleep(LOOK_SECONDS)
        modified = _modified_at(fleet_file)
        if modified == seen:
            continue
        seen = modified
        try:
            load_fleet(fleet_file, environ)
        except SettingsError as error:
            console.print(f"{fleet_file} changed but is not taken up:\n{error}")
        else:
            console.print(f"{fleet_file} changed; the code server restarts with it")
            supervisor.restart("code server")


def _load(fleet_file: Path, environ: Mapping[str, str]) -> Fleet:
    try:
        return load_fleet(fleet_file, environ)
    except SettingsError as error:
        raise click.ClickException(str(error)) from error


def _child_environ(paths: Paths) -> dict[str, str]:
    return {
        "DAGSTER_HOME": str(paths.dagster_home),
        "OPTIINFRA_HOME": str(paths.home),
        "OPTIINFRA_FLEET": str(paths.fleet_file),
        # The daemon gives up on a run that the code server has not started by then: 60 s were too few under load.
        "DAGSTER_GRPC_TIMEOUT_SECONDS": "240",
        "PYTHONSAFEPATH": "1",  # a stray module in the working folder must not shadow an installed one
    }


def _what_is_watched(fleet: Fleet, paths: Paths) -> str:
    hosts = ", ".join(host.name for host in fleet.hosts) or "no host"
    return f"OptiInfra watches {len(fleet.targets)} targets and {hosts}, as {paths.fleet_file} says"


def _modified_at(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


@contextmanager
def _sole_owner(home: Path) -> Iterator[None]:
    """Two daemons on one state folder would do everything twice: the second is refused."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "optiinfra.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise click.ClickException(
                f"another optiinfra (pid {lock.read().strip() or 'unknown'}) runs on {home}; stop it, "
                "or choose another state folder with OPTIINFRA_HOME"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM; a non-empty list means: stop."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda received_number, _: received.append(received_number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
