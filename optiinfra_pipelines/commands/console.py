"""What every command prints with: one console, plain when it is not a terminal, and tables from frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

import polars as pl
from rich.console import Console
from rich.table import Table

# Into a file or a pipe there is no width to fit: tables stay whole.
WIDTH_WITHOUT_TERMINAL = 160
console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = WIDTH_WITHOUT_TERMINAL


def print_table(frame: pl.DataFrame, *, title: str | None = None, empty: str = "no rows") -> None:
    """A frame as a table a person can read. NULL is shown as a dash, never as zero."""
    if frame.is_empty():
        console.print(f"{title}: {empty}" if title else empty)
        return
    table = Table(title=title, title_justify="left", header_style="bold")
    for name, dtype in frame.schema.items():
        table.add_column(name, justify="right" if dtype.is_numeric() else "left", overflow="fold")
    for row in frame.iter_rows():
        table.add_row(*[format_cell(value) for value in row])
    console.print(table)


def format_cell(value: object) -> str:
    """One value: numbers to four significant digits, times to the second, lists shortened."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return _number(value)
        case datetime():
            return value.strftime("%Y-%m-%d %H:%M:%S")
        case str():
            return value
        case _ if isinstance(value, Sequence):
            shown = ", ".join(format_cell(item) for item in value[:6])
            return f"[{shown}{', …' if len(value) > 6 else ''}]"
        case _:
            return str(value)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
