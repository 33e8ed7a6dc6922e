"""`optiinfra report`: the fleet's state in the terminal, and the same with plots as one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import duckdb
from rich.box import SIMPLE
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from optiinfra_pipelines.analysis.report.data import ReportData
from optiinfra_pipelines.analysis.report.document import Card, Document, Grid, Part, Picture, Tone, Words
from optiinfra_pipelines.analysis.report.html import to_html
from optiinfra_pipelines.analysis.report.sections import make_document
from optiinfra_pipelines.commands.console import console
from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.settings import Paths, SettingsError, load_fleet
from resources.report.files import write_report
from resources.report.reader import read_published_report
from resources.warehouse import Warehouse

Reader = Callable[[Path, Fleet, datetime, datetime], ReportData]
_STYLES: dict[Tone, str] = {
    "critical": "bold red",
    "warning": "yellow",
    "info": "cyan",
    "good": "green",
    "quiet": "dim",
}


def run(
    paths: Paths,
    environ: Mapping[str, str],
    *,
    hours: float = 24.0,
    out: Path | None = None,
    read: Reader = read_published_report,
) -> None:
    """Print the report of the last `hours` and write its HTML to `out` (default: reports/fleet_report.html).

    Raises click.ClickException with a remedy when there is nothing to read yet or nowhere to write.
    """
    try:
        fleet = load_fleet(paths.fleet_file, environ)
    except SettingsError as error:
        raise click.ClickException(str(error)) from error
    read_copy = Warehouse(paths.warehouse_dir, clock=lambda: datetime.now(UTC)).read_path
    if not read_copy.exists():
        raise click.ClickException(
            f"{read_copy} does not exist yet; start `optiinfra up` (or `optiinfra demo --once`) and ask again "
            "after the first refresh, about a minute later"
        )
    now = datetime.now(UTC)
    try:
        document = make_document(read(read_copy, fleet, now - timedelta(hours=hours), now))
    except duckdb.Error as error:
        raise click.ClickException(f"{read_copy} cannot be read: {error}") from error
    show(document, console)
    try:
        written = write_report(out or paths.reports_dir, to_html(document))
    except OSError as error:
        raise click.ClickException(f"the report cannot be written: {error}; name another place with --out") from error
    console.print(Text(f"\nwith plots and all evidence: {written.path}"))


def show(document: Document, into: Console) -> None:
    """The document as text. Nothing in it is read as markup."""
    into.print(Text(document.title, style="bold"))
    into.print(Text(document.subtitle, style="dim"))
    for tile in document.tiles:
        note = f" ({tile.note})" if tile.note else ""
        into.print(Text.assemble((f"  {tile.number}", _STYLES[tile.tone]), f" {tile.label}{note}"))
    for section in document.sections:
        into.print()
        into.print(Rule(Text(section.title, style="bold"), align="left", style="dim"))
        for part in section.parts:
            _print_part(part, into)


def _print_part(part: Part, into: Console) -> None:
    match part:
        case Words():
            into.print(Text(part.text, style="dim" if part.tone == "quiet" else ""))
        case Grid():
            _print_grid(part, into)
        case Card():
            _print_card(part, into)
        case Picture():
            pass  # the HTML file has it


def _print_card(card: Card, into: Console) -> None:
    title = card.title or card.text
    into.print(Text.assemble((card.label, _STYLES[card.tone]), "  ", (title, "bold" if card.title else "")))
    if card.title and card.text:
        into.print(Text(f"    {card.text}"))
    for name, text in card.facts:
        into.print(Text.assemble((f"    {name}: ", "dim"), text))
    for grid in card.grids:
        if grid.is_brief:
            _print_grid(grid, into)


def _print_grid(grid: Grid, into: Console) -> None:
    if not grid.rows:
        into.print(Text(f"{grid.title}: {grid.empty}" if grid.title else grid.empty))
        return
    table = Table(title=Text(grid.title) if grid.title else None, title_justify="left", header_style="bold", box=SIMPLE)
    for index, heading in enumerate(grid.headings):
        table.add_column(Text(heading), justify="right" if index in grid.numeric else "left", overflow="fold")
    for row in grid.rows:
        table.add_row(*map(Text, row))
    into.print(table)
    if grid.note:
        into.print(Text(grid.note, style="dim"))
