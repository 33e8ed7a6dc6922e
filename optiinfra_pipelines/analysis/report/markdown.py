"""A report as short markdown for the Dagster UI: the numbers on top, the first claims, the brief tables.

Pure. Fleet text is escaped so that it is neither markup nor a link; the whole keeps to a size, since every
materialization is stored with it. The full report is the HTML page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from optiinfra_pipelines.analysis.report.document import Card, Document, Grid, Part, Section, Words

# A materialization's event is stored twice and never purged.
MAX_CHARS = 12_000
_MAX_ROWS = 12
_MAX_CARDS = 5
_MARKUP = re.compile(r"([\\`*_{}\[\]#|~>$^])")
# What begins a list, a heading or a rule where it begins a line.
_AT_START = re.compile(r"^(\s*\d*)([-+=](?=[-+=\s]|$)|[.)](?=\s|$))")


def to_markdown(document: Document) -> str:
    """The short form of a report; what was cut is said."""
    tiles = " · ".join(
        f"**{escaped(tile.number)}** {escaped(tile.label)}" + (f" ({escaped(tile.note)})" if tile.note else "")
        for tile in document.tiles
    )
    return bounded(
        "\n\n".join([escaped(document.subtitle), tiles, *filter(None, map(section_markdown, document.sections))]),
        "the HTML report has all of it",
    )


def section_markdown(section: Section) -> str:
    """One section, for the asset that it is about; empty when it has nothing short to show."""
    cards = [part for part in section.parts if isinstance(part, Card)]
    shown = [*cards[:_MAX_CARDS], *(part for part in section.parts if not isinstance(part, Card))]
    more = [f"*{len(cards) - _MAX_CARDS} more in the HTML report.*"] if len(cards) > _MAX_CARDS else []
    texts = [text for part in shown if (text := _part(part))]
    return "\n\n".join([f"### {escaped(section.title)}", *texts, *more]) if texts else ""


def bounded(markdown: str, remedy: str, max_chars: int = MAX_CHARS) -> str:
    """Markdown cut at a line's end where it is too long."""
    if len(markdown) <= max_chars:
        return markdown
    return markdown[:max_chars].rsplit("\n", 1)[0] + f"\n\n*Cut here; {remedy}.*"


def escaped(text: str) -> str:
    """Text that markdown and the HTML inside it show as it is."""
    # Viewers make links of addresses even where their punctuation is escaped.
    broken = text.replace("://", "[:]//").replace("www.", "www[.]")
    marked = _AT_START.sub(r"\1\\\2", _MARKUP.sub(r"\\\1", broken))
    return marked.replace("&", "&amp;").replace("<", "&lt;")


def _part(part: Part) -> str:
    match part:
        case Words():
            return escaped(part.text)
        case Grid():
            return _grid(part) if part.is_brief else ""
        case Card():
            return _card(part)
        case _:
            return ""


def _card(card: Card) -> str:
    lines = [f"**{escaped(card.label)}** {escaped(card.title or card.text)}"]
    if card.title and card.text:
        lines.append(escaped(card.text))
    lines += [_grid(grid) for grid in card.grids if grid.is_brief]
    return "\n\n".join(lines)


def _grid(grid: Grid) -> str:
    title = f"**{escaped(grid.title)}**\n\n" if grid.title else ""
    if not grid.rows:
        return f"{title}*{escaped(grid.empty)}*"
    rule = ["---:" if index in grid.numeric else "---" for index in range(len(grid.headings))]
    lines = [_row([escaped(one) for one in grid.headings]), _row(rule)]
    lines += [_row([escaped(cell) for cell in row]) for row in grid.rows[:_MAX_ROWS]]
    if len(grid.rows) > _MAX_ROWS:
        lines.append(f"\n*{len(grid.rows) - _MAX_ROWS} more rows in the HTML report.*")
    note = f"\n\n{escaped(grid.note)}" if grid.note else ""
    return title + "\n".join(lines) + note


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
