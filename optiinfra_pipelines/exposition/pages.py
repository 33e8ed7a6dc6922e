"""A page of Prometheus text: its shape, its values, and the first, unhurried reading of it.

Here: `Layout` (what stays the same from scrape to scrape), `Page` (what changes), `read_page` (every line through the
full grammar). Not here: the fast second reading and its cache (`reader`), frames (`frames`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from optiinfra_pipelines.exposition.errors import ExpositionError, foreign_document
from optiinfra_pipelines.exposition.grammar import (
    KnownLabels,
    Labels,
    MalformedError,
    read_metadata,
    read_sample,
)


@dataclass(frozen=True, eq=False, repr=False)
class Layout:
    """The series of a page, in page order: one entry of `names` and of `labels` per sample.

    One object stands for all pages of the same shape that one `Reader` reads while it remembers the shape, so a plan
    can be kept per layout, by identity, in a WeakKeyDictionary. types: metric family -> the type it declares.
    """

    names: tuple[str, ...]
    labels: tuple[Labels, ...]
    types: Mapping[str, str]

    @cached_property
    def duplicates(self) -> tuple[int, ...]:
        """Positions whose series has already stood on the page; Prometheus drops these samples.

        The order of labels does not matter, and a label with an empty value is the same as none.
        """
        seen: set[tuple[str, Labels]] = set()
        repeated = []
        for position, (name, labels) in enumerate(zip(self.names, self.labels, strict=True)):
            series = name, tuple(sorted(label for label in labels if label[1]))
            if series in seen:
                repeated.append(position)
            seen.add(series)
        return tuple(repeated)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Page:
    """One scrape: a value per sample of the layout, and the timestamps (milliseconds) of those that carry one."""

    layout: Layout
    values: list[float]
    timestamps_ms: Mapping[int, int]


_BLANK = frozenset({"", " ", "\t"})
NO_TIMESTAMPS: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Draft:
    """A page as first read, with the place of each sample: its line (0-based) and where in it the value begins."""

    names: tuple[str, ...]
    labels: tuple[Labels, ...]
    types: Mapping[str, str]
    values: list[float]
    timestamps_ms: Mapping[int, int]
    places: list[tuple[int, int]]


def read_page(text: str, lines: list[str]) -> Draft:
    """Read every line by the full grammar. `lines` is `text` split at line feeds.

    Raises ExpositionError at the first line that breaks the format.
    """
    refuse_surrogates(text)
    names: list[str] = []
    labels: list[Labels] = []
    types: dict[str, str] = {}
    values: list[float] = []
    stamps: dict[int, int] = {}
    places: list[tuple[int, int]] = []
    known: KnownLabels = {}
    spellings: dict[str, str] = {}  # one object per metric name, however many buckets it has
    for number, line in enumerate(lines):
        first = line[:1]
        if first in _BLANK:
            first = line.lstrip(" \t")[:1]
            if not first:
                continue
        try:
            if first == "#":
                declared = read_metadata(line)
                if declared is not None:
                    types[declared[0]] = declared[1]
                continue
            name, pairs, value, stamp, start = read_sample(line, known)
        except MalformedError as broken:
            cause = foreign_document(text) or str(broken)
            raise ExpositionError(number + 1, cause, line) from None
        if stamp is not None:
            stamps[len(values)] = stamp
        names.append(spellings.setdefault(name, name))
        labels.append(pairs)
        values.append(value)
        places.append((number, start))
    return Draft(
        tuple(names), tuple(labels), MappingProxyType(types), values, stamps if stamps else NO_TIMESTAMPS, places
    )


def decoded(body: bytes) -> str:
    """The text of a page's bytes. Raises ExpositionError where they are not UTF-8."""
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as broken:
        start = body.rfind(b"\n", 0, broken.start) + 1
        end = body.find(b"\n", start)
        line = body[start : end if end >= 0 else len(body)]
        cause = (
            "the page is still compressed with gzip"
            if body.startswith(b"\x1f\x8b")
            else f"byte 0x{body[broken.start]:02x} at column {broken.start - start + 1} is not valid UTF-8"
        )
        raise ExpositionError(body.count(b"\n", 0, broken.start) + 1, cause, line.decode("utf-8", "replace")) from None


def refuse_surrogates(text: str) -> None:
    """Raise ExpositionError for half of a surrogate pair, which UTF-8 cannot say (a str can hold one, bytes cannot)."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as broken:
        number = text.count("\n", 0, broken.start)
        cause = f"U+{ord(text[broken.start]):04X} is half of a surrogate pair, which is not valid UTF-8"
        line = text.split("\n")[number].encode("utf-8", "replace").decode("utf-8")
        raise ExpositionError(number + 1, cause, line) from None
