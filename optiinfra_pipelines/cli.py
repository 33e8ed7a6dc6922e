"""The `optiinfra` command line: parses it and calls `optiinfra_pipelines.commands`. Thin on purpose."""

from __future__ import annotations

import os
from pathlib import Path

import click

from optiinfra_pipelines.settings import Paths, SettingsError, find_paths
from resources.logs import configure_logging

_HOST = click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address of the UI. Dagster has no users: mind who reaches it.",
)
_PORT = click.option("--port", default=3000, show_default=True, help="Port of the UI.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--home", type=click.Path(path_type=Path), help="State folder. Default: OPTIINFRA_HOME, else ./state.")
@click.option("--fleet", type=click.Path(path_type=Path), help="Fleet file. Default: OPTIINFRA_FLEET, else fleet.yaml.")
@click.pass_context
def main(context: click.Context, home: Path | None, fleet: Path | None) -> None:
    """Watch, explain, advise and safely change a fleet of LLM inference engines."""
    environ = dict(os.environ)
    if home is not None:
        environ["OPTIINFRA_HOME"] = str(home.absolute())
    if fleet is not None:
        environ["OPTIINFRA_FLEET"] = str(fleet.absolute())
    try:
        configure_logging(environ)
        context.obj = (find_paths(environ), environ)
    except (SettingsError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
@_HOST
@_PORT
@click.pass_obj
def up(settings: tuple[Paths, dict[str, str]], host: str, port: int) -> None:
    """Run the fleet of fleet.yaml: collection, models, UI. Ctrl-C stops it."""
    from optiinfra_pipelines.commands import up as command

    command.run(settings[0], host, port, settings[1])


@main.command()
@_HOST
@_PORT
@click.option("--once", is_flag=True, help="Collect, build every asset, print the result and exit; no browser needed.")
@click.pass_obj
def demo(settings: tuple[Paths, dict[str, str]], host: str, port: int, once: bool) -> None:
    """Replay recordings of real engines beside this host's live metrics."""
    from optiinfra_pipelines.commands import demo as command

    paths, environ = command.settings_of_demo(*settings)
    if once:
        command.run_once(paths, environ)
    else:
        command.run(paths, host, port, environ)


@main.command()
@click.pass_obj
def check(settings: tuple[Paths, dict[str, str]]) -> None:
    """Validate fleet.yaml, try every target and host, and say what was found and what is missing."""
    from optiinfra_pipelines.commands import check as command

    command.run(*settings)


@main.command()
@click.argument("query")
@click.option("--csv", "form", flag_value="csv", help="Print CSV.")
@click.option("--json", "form", flag_value="json", help="Print a JSON array.")
@click.pass_obj
def sql(settings: tuple[Paths, dict[str, str]], query: str, form: str | None) -> None:
    """Ask the read copy of the warehouse one SQL question."""
    from optiinfra_pipelines.commands import sql as command

    command.run(settings[0].warehouse_dir / "read.duckdb", query, form or "table")
