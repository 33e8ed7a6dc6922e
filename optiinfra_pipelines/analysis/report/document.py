"""The parts a report is made of, before anyone decides whether it is HTML, markdown or a terminal.

Nouns only. What is in them is `sections`; showing them `html`, `markdown` and `commands.report`.
Texts are cleaned here and not escaped: that is each renderer's own, last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from optiinfra_pipelines.analysis.report.values import plain

Tone = Literal["critical", "warning", "info", "good", "quiet"]


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str
    tone: Tone = "info"

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", plain(self.text))


@dataclass(frozen=True)
class Grid:
    """A table. numeric: indexes of columns that hold numbers; is_brief: also shown where there is little room."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    note: str = ""
    numeric: frozenset[int] = frozenset()
    empty: str = "no rows"
    is_brief: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(tuple(plain(cell) for cell in row) for row in self.rows))
        object.__setattr__(self, "headings", tuple(plain(cell) for cell in self.headings))
        for name in ("title", "note", "empty"):
            object.__setattr__(self, name, plain(getattr(self, name)))


@dataclass(frozen=True)
class Card:
    """One claim with its details: a finding or a recommendation."""

    tone: Tone
    label: str
    title: str
    text: str
    facts: tuple[tuple[str, str], ...] = ()
    grids: tuple[Grid, ...] = ()

    def __post_init__(self) -> None:
        for name in ("label", "title", "text"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        object.__setattr__(self, "facts", tuple((plain(name), plain(text)) for name, text in self.facts))


@dataclass(frozen=True)
class Picture:
    """A plot as SVG of ours, with the words that say what it shows."""

    svg: str
    caption: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "caption", plain(self.caption))


Part = Words | Grid | Card | Picture


@dataclass(frozen=True)
class Tile:
    """One number at the top."""

    label: str
    number: str
    note: str = ""
    tone: Tone = "quiet"


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    tiles: Sequence[Tile]
    sections: Sequence[Section] = field(default_factory=tuple)
