"""The `optiinfra` command line: parses it and calls `optiinfra_pipelines.commands`. Thin on purpose."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

import click

from optiinfra_pipelines.settings import Paths, SettingsError, find_paths
from resources.logs import configure_logging
from resources.traces.files import TraceFormat

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
@click.option("--live", is_flag=True, help="A small fleet with real HTTP traffic around SIMULATED engines instead.")
@click.option(
    "--script", is_flag=True, help="With --live: play a good and a bad rollout, tell how they went, and exit."
)
@click.option(
    "--gateway", type=click.Choice(["haproxy", "builtin"]), help="With --live. Default: HAProxy if installed."
)
@click.option(
    "--vllm",
    type=click.Path(path_type=Path),
    help="With --live: this `vllm` on the host's CPU in place of the simulated engine (docs/live-demo.md).",
)
@click.pass_obj
def demo(
    settings: tuple[Paths, dict[str, str]],
    host: str,
    port: int,
    once: bool,
    live: bool,
    script: bool,
    gateway: Literal["haproxy", "builtin"] | None,
    vllm: Path | None,
) -> None:
    """Replay recordings of real engines beside this host's live metrics, or run a live fleet."""
    if live and once:
        raise click.UsageError("--once is for the recordings; the live demo without a browser is --live --script")
    if live:
        from optiinfra_pipelines.commands import live_demo

        paths, environ = live_demo.settings_of_live_demo(*settings)
        live_demo.run(paths, host, port, environ, gateway=gateway, vllm=vllm, is_scripted=script)
        return
    if script or gateway or vllm:
        raise click.UsageError("--script, --gateway and --vllm belong to --live")
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


@main.command()
@click.option("--hours", default=24.0, show_default=True, help="How far back the report looks.")
@click.option("--out", type=click.Path(path_type=Path), help="HTML file to write. Default: the state folder's reports.")
@click.pass_obj
def report(settings: tuple[Paths, dict[str, str]], hours: float, out: Path | None) -> None:
    """Print what burns, findings, recommendations and cost; write the same as one HTML file."""
    from optiinfra_pipelines.commands import report as command

    command.run(*settings, hours=hours, out=out)


@main.command("import-trace")
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("into", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(get_args(TraceFormat)), required=True, help="Format of the trace.")
@click.option("--deployment", default="trace", show_default=True, help="Name of the deployment whose load it is.")
@click.option("--model", default="unknown", help="Its model, as fleet.yaml names it: cache sizes then come in bytes.")
@click.option("--keep-duplicates", is_flag=True, help="Lines wholly the same are requests that look alike.")
@click.option("--analyze", is_flag=True, help="Forecast, back-test and size caches on it, and print the tables.")
@click.pass_obj
def import_trace(
    settings: tuple[Paths, dict[str, str]],
    source: Path,
    into: Path,
    form: TraceFormat,
    deployment: str,
    model: str,
    keep_duplicates: bool,
    analyze: bool,
) -> None:
    """Read a public load trace, or an engine's log, into a state folder of its own, never the live one."""
    from optiinfra_pipelines.commands import replay_trace as command

    now = datetime.now(UTC)
    command.run(
        source,
        form,
        into,
        live_home=settings[0].home,
        now=now,
        deployment=deployment,
        model=model,
        keep_duplicates=keep_duplicates,
        analyze=analyze,
    )
