"""A report as one HTML page that needs nothing else: no script, no font, no address outside it.

Pure. Every text is escaped here, once, at the last step; only the SVG of `plots` goes in as it is. The page's
own Content-Security-Policy forbids scripts and every request, should anything slip through all the same.
"""

from __future__ import annotations

from dataclasses import replace
from html import escape

from optiinfra_pipelines.analysis.report.document import Card, Document, Grid, Part, Picture, Section, Tile, Words

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --sheet: #ffffff; --ink: #1d2430; --soft: #5b6573; --line: #d9dde3;
  --critical: #b3261e; --warning: #8a5a00; --info: #2f5d9b; --good: #1e6b3a; --quiet: #5b6573; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --sheet: #1c2128; --ink: #e4e8ee; --soft: #9aa5b3;
  --line: #39424e; --critical: #ff8a80; --warning: #f2b84b; --info: #8ab4f8; --good: #7fd99a; --quiet: #9aa5b3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 38px 0 12px; }
h3 { font-size: 15px; margin: 0; overflow-wrap: anywhere; } p { margin: 0 0 10px; overflow-wrap: anywhere; }
nav { margin: 14px 0 0; font-size: 13px; } nav a { color: var(--info); margin-right: 14px; white-space: nowrap; }
.soft { color: var(--soft); } .small { font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0 0; }
.tile, .card, figure, .grid { background: var(--sheet); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 12px 14px; } .tile b { display: block; font-size: 22px; line-height: 1.25; }
.card { padding: 14px 16px; margin: 0 0 12px; border-left: 4px solid var(--tone); }
.badge { display: inline-block; font-size: 12px; font-weight: 600; color: var(--tone); border: 1px solid var(--tone);
  border-radius: 99px; padding: 0 9px; margin: 0 8px 6px 0; }
.critical { --tone: var(--critical); } .warning { --tone: var(--warning); } .info { --tone: var(--info); }
.good { --tone: var(--good); } .quiet { --tone: var(--quiet); } .tile b { color: var(--tone); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 10px 0 0; font-size: 13px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0 0 12px; padding: 12px 14px; } figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: 13px; color: var(--soft); margin-top: 6px; }
.grid { overflow-x: auto; margin: 0 0 12px; } table { border-collapse: collapse; width: 100%; font-size: 13px; }
.card .grid { margin: 12px 0 0; }
caption { text-align: left; font-weight: 600; padding: 10px 12px 4px; font-size: 13px; }
th { text-align: left; color: var(--soft); font-weight: 600; vertical-align: bottom; }
th, td { padding: 6px 12px; border-top: 1px solid var(--line); }
td { vertical-align: top; overflow-wrap: break-word; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } td.n { white-space: nowrap; }
td.long { min-width: 220px; overflow-wrap: anywhere; white-space: normal; text-align: left; }
.note { padding: 6px 12px 10px; font-size: 13px; color: var(--soft); margin: 0; }
.unknown { color: var(--soft); font-style: italic; }
details > summary { cursor: pointer; font-size: 13px; color: var(--info); margin-top: 10px; }
@media print { .card, figure, .grid { break-inside: avoid; } nav { display: none; } }
"""
# Columns with longer texts get room instead of a word to a line.
_LONG_CHARS = 40


def to_html(document: Document) -> str:
    """The page, UTF-8."""
    sections = "".join(_section(index, section) for index, section in enumerate(document.sections, 1))
    links = "".join(
        f'<a href="#s{index}">{escape(section.title)}</a>' for index, section in enumerate(document.sections, 1)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(document.title)}</title>\n<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n'
        f'<body>\n<main>\n<h1>{escape(document.title)}</h1>\n<p class="soft">{escape(document.subtitle)}</p>\n'
        f'<nav>{links}</nav>\n<div class="tiles">{"".join(map(_tile, document.tiles))}</div>\n{sections}'
        "</main>\n</body>\n</html>\n"
    )


def _tile(tile: Tile) -> str:
    note = f'<div class="soft small">{escape(tile.note)}</div>' if tile.note else ""
    return (
        f'<div class="tile {tile.tone}"><span class="soft small">{escape(tile.label)}</span>'
        f"<b>{escape(tile.number)}</b>{note}</div>"
    )


def _section(index: int, section: Section) -> str:
    return (
        f'<section id="s{index}">\n<h2>{escape(section.title)}</h2>\n{"".join(map(_part, section.parts))}</section>\n'
    )


def _part(part: Part) -> str:
    match part:
        case Words():
            return f"<p{_soft(part)}>{escape(part.text)}</p>\n"
        case Grid():
            return _grid(part)
        case Card():
            return _card(part)
        case Picture():
            return f"<figure>{part.svg}<figcaption>{escape(part.caption)}</figcaption></figure>\n"


def _soft(words: Words) -> str:
    return ' class="soft"' if words.tone == "quiet" else ""


def _card(card: Card) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in card.facts)
    title = f"<h3>{escape(card.title)}</h3>" if card.title else ""
    text = f"<p>{escape(card.text)}</p>" if card.text else ""
    shown = "".join(_grid(grid) for grid in card.grids if grid.is_brief)
    more = "".join(
        f"<details><summary>{escape(grid.title)}</summary>{_grid(replace(grid, title=''))}</details>"
        for grid in card.grids
        if not grid.is_brief
    )
    return (
        f'<article class="card {card.tone}"><span class="badge">{escape(card.label)}</span>'
        f"{title}{text}{f'<dl>{facts}</dl>' if facts else ''}{shown}{more}</article>\n"
    )


def _grid(grid: Grid) -> str:
    title = f"<caption>{escape(grid.title)}</caption>" if grid.title else ""
    note = f'<p class="note">{escape(grid.note)}</p>' if grid.note else ""
    if not grid.rows:
        return f'<div class="grid"><table>{title}</table><p class="note">{escape(grid.empty)}</p></div>\n'
    head = "".join(
        f"<th{_class(index in grid.numeric and 'n')}>{escape(text)}</th>" for index, text in enumerate(grid.headings)
    )
    long = {index for row in grid.rows for index, text in enumerate(row) if len(text) > _LONG_CHARS}
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_class(index in grid.numeric and 'n', index in long and 'long', text == 'unknown' and 'unknown')}>"
            f"{escape(text)}</td>"
            for index, text in enumerate(row)
        )
        + "</tr>\n"
        for row in grid.rows
    )
    return (
        f'<div class="grid"><table>{title}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>{note}</div>\n'
    )


def _class(*names: str | bool) -> str:
    shown = " ".join(name for name in names if isinstance(name, str))
    return f' class="{shown}"' if shown else ""
