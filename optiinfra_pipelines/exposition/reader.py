"""Read page after page of the same targets quickly, and never differently.

Here: the memory of page shapes and the fast reading by it. Not here: the grammar, which alone decides what a page
says the first time (`pages.read_page`).

Why the fast way is safe. A template is a page that the full grammar accepted, cut into the constant texts between its
values. A new page is read by it only if constants and new values, joined again, are the whole new page to the last
character; what stands at a value's place must then be a number on its own (or pass the grammar's rule for value,
timestamp and exemplar). Constants end in a blank or a brace, so no value can grow into a name.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import accumulate, compress
from math import isfinite
from operator import getitem
from sys import getsizeof
from threading import Lock
from typing import cast
from weakref import WeakValueDictionary

import polars as pl

from optiinfra_pipelines.exposition.grammar import MalformedError, read_number, read_rest
from optiinfra_pipelines.exposition.pages import (
    NO_TIMESTAMPS,
    Draft,
    Layout,
    Page,
    decoded,
    read_page,
    refuse_surrogates,
)

# One template per target of a large fleet, and as many again while a rolling restart changes all their labels.
MAX_LAYOUTS = 4_096
# A 62 kB vLLM page takes about 0.2 MB here; 2,000 targets that all differ in their labels fit.
MAX_BYTES = 512 * 2**20
# Keys cost little, but a caller may invent them without end (pod names): past this the table starts anew.
MAX_KEYS = 65_536

# All that a decimal number, an infinity or a NaN is made of.
_NUMBER_CHARACTERS = b"0123456789+-.eEinftyaINFTYA"

# str's own way to cut, without the detour through a slot wrapper
_part = cast(Callable[[str, slice], str], getitem)


class _Template:
    """One accepted page, cut at its values."""

    __slots__ = ("__weakref__", "constants", "fingerprint", "is_sample", "layout", "line_count", "size", "value_parts")

    def __init__(self, text: str, lines: list[str], draft: Draft, layout: Layout, fingerprint: int) -> None:
        starts = list(accumulate((len(line) + 1 for line in lines), initial=0))
        constants: list[str] = []
        end = 0
        is_sample = bytearray(len(lines))
        for number, value_start in draft.places:
            is_sample[number] = 1
            constants += (text[end : starts[number] + value_start], "")
            end = starts[number + 1] - 1
        constants.append(text[end:])
        self.constants = constants  # with a place for each value between two of them
        self.is_sample = is_sample
        parts: dict[int, slice] = {}  # one slice for all values that begin at the same column
        self.value_parts = [parts.setdefault(start, slice(start, None)) for _, start in draft.places]
        self.line_count = len(lines)
        self.layout = layout
        self.fingerprint = fingerprint
        self.size = _size(text, layout) + 84 * len(parts)  # a slice and its start, CPython 3.11

    def fill(self, text: str, lines: list[str]) -> Page | None:
        """The page that `text` is by this template; None where it is another shape or not plainly right."""
        if len(lines) != self.line_count:
            return None
        tokens = list(map(_part, compress(lines, self.is_sample), self.value_parts))
        rebuilt = self.constants.copy()
        rebuilt[1::2] = tokens
        if "".join(rebuilt) != text:
            return None
        together = "".join(tokens)
        if together.isascii() and not together.encode().translate(None, _NUMBER_CHARACTERS):
            # polars reads 500 numbers in a third of the time of Python's float, and rounds as correctly
            numbers = pl.Series(tokens, dtype=pl.String).cast(pl.Float64, strict=False)
            if not numbers.null_count():
                values: list[float] = numbers.to_list()
                if isfinite(sum(values)) or _are_special(tokens, values):
                    return Page(self.layout, values, NO_TIMESTAMPS)
        return self._fill_by_grammar(text, tokens)

    def _fill_by_grammar(self, text: str, tokens: list[str]) -> Page | None:
        """As `fill`, for values that bring timestamps, exemplars or blanks."""
        refuse_surrogates(text)
        values: list[float] = []
        stamps: dict[int, int] = {}
        try:
            for position, token in enumerate(tokens):
                value, stamp = read_rest(token)
                values.append(value)
                if stamp is not None:
                    stamps[position] = stamp
        except MalformedError:
            return None
        return Page(self.layout, values, stamps if stamps else NO_TIMESTAMPS)


class Reader:
    """Reads pages; remembers the shapes it met, up to max_layouts and about max_bytes of memory, and max_keys keys.

    Safe to share between threads. What is remembered changes the speed of an answer, never the answer.
    """

    def __init__(self, max_layouts: int = MAX_LAYOUTS, max_bytes: int = MAX_BYTES, max_keys: int = MAX_KEYS) -> None:
        self._max_layouts = max_layouts
        self._max_bytes = max_bytes
        self._max_keys = max_keys
        self._templates: OrderedDict[int, _Template] = OrderedDict()  # by fingerprint, least recently used first
        self._latest: WeakValueDictionary[Hashable, _Template] = WeakValueDictionary()  # by the caller's key
        self._layouts: WeakValueDictionary[Hashable, Layout] = WeakValueDictionary()  # by content
        self._bytes = 0
        self._lock = Lock()

    @property
    def layout_count(self) -> int:
        """Page shapes remembered now."""
        return len(self._templates)

    @property
    def byte_count(self) -> int:
        """Memory that the remembered shapes take, in bytes, estimated from their parts."""
        return self._bytes

    @property
    def key_count(self) -> int:
        """Keys whose last shape is remembered now."""
        return len(self._latest)

    def forget(self) -> None:
        """Let go of every remembered shape."""
        with self._lock:
            self._templates.clear()
            self._latest.clear()
            self._bytes = 0

    def read(self, text: str | bytes, key: Hashable = None) -> Page:
        """The samples of a page.

        key: whose page it is (a target's name): its last shape is tried first, which spares looking the shape up.
        Raises ExpositionError, with line number and cause, on anything that the text format forbids.
        """
        if isinstance(text, bytes):
            text = decoded(text)
        lines = text.split("\n")
        template = self._latest.get(key)
        if template is not None:
            page = template.fill(text, lines)
            if page is not None:
                self._touch(template)
                return page
        fingerprint = _fingerprint(lines)
        template = self._templates.get(fingerprint)
        if template is not None:
            page = template.fill(text, lines)
            if page is not None:
                self._remember_key(key, template)
                self._touch(template)
                return page
        return self._read_anew(text, lines, key, fingerprint)

    def _read_anew(self, text: str, lines: list[str], key: Hashable, fingerprint: int) -> Page:
        draft = read_page(text, lines)
        layout = self._layout(draft)
        template = _Template(text, lines, draft, layout, fingerprint)
        if template.size <= self._max_bytes:
            self._remember(template)
            self._remember_key(key, template)
        return Page(layout, draft.values, draft.timestamps_ms)

    def _layout(self, draft: Draft) -> Layout:
        """The layout of this content: the one already there, or a new one."""
        content = (draft.names, draft.labels, tuple(draft.types.items()))
        with self._lock:
            layout = self._layouts.get(content)
            if layout is None:
                layout = Layout(draft.names, draft.labels, draft.types)
                self._layouts[content] = layout
        return layout

    def _touch(self, template: _Template) -> None:
        with self._lock:
            if template.fingerprint in self._templates:
                self._templates.move_to_end(template.fingerprint)

    def _remember(self, template: _Template) -> None:
        with self._lock:
            replaced = self._templates.pop(template.fingerprint, None)
            self._bytes += template.size - (replaced.size if replaced else 0)
            self._templates[template.fingerprint] = template
            while len(self._templates) > self._max_layouts or self._bytes > self._max_bytes:
                _, dropped = self._templates.popitem(last=False)
                self._bytes -= dropped.size

    def _remember_key(self, key: Hashable, template: _Template) -> None:
        with self._lock:
            if len(self._latest) >= self._max_keys:
                self._latest.clear()
            self._latest[key] = template


def _are_special(tokens: list[str], values: list[float]) -> bool:
    """Whether each infinity and NaN is spelled as one; an overflow or a signed NaN is neither, as in Go."""
    try:
        for token, value in zip(tokens, values, strict=True):
            if not isfinite(value):
                read_number(token)
    except MalformedError:
        return False
    return True


def _fingerprint(lines: list[str]) -> int:
    """A number that stays the same while only values change. Chance equality costs time, never truth."""
    return hash(
        "\n".join(
            line if line[:1] == "#" else line[: line.rfind("}")] if "}" in line else line.partition(" ")[0]
            for line in lines
        )
    )


def _size(text: str, layout: Layout) -> int:
    """Bytes of memory that the constants of a page and its layout hold, each object counted once.

    Headers are those of CPython 3.11. A sample: a text (49) and places in five lists and tuples (48), rounded up. A
    family with a type: its name, an entry in a table and a pair in the layout's key. The rest of a template and its
    layout: 2,000.
    """
    label_lists = {id(labels): labels for labels in layout.labels}.values()
    pairs = [pair for labels in label_lists for pair in labels]
    return (
        2_000
        + getsizeof(text)
        + 110 * len(layout.names)
        + sum(map(getsizeof, set(layout.names)))
        + sum(map(getsizeof, label_lists))
        + sum([56 + getsizeof(name) + getsizeof(value) for name, value in pairs])
        + 300 * len(layout.types)
    )
