"""Compile a dialect's expressions for one layout: functions of `Page.values`, rank by rank.

Here: columns, histograms and summaries, from names and labels to positions. Not here: which rows a page has (`plan`),
the values themselves (`normalize`).
"""

from __future__ import annotations

import hashlib
import math
import operator
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from optiinfra_pipelines.engines.dialect import (
    Alternatives,
    Combine,
    Expression,
    Histogram,
    IsZero,
    Setting,
    Summary,
    Take,
    Vantage,
)
from optiinfra_pipelines.engines.index import Index, bound_of

Values = Sequence[float]
Number = Callable[[Values], float | None]


@dataclass(frozen=True, slots=True)
class Picks:
    """Columns of one row, by place. singles: one series each, all got by one getter. computed: by a function."""

    singles: tuple[int, ...]
    getter: Callable[[Values], Sequence[float]]
    computed: tuple[tuple[int, Number], ...]

    def __bool__(self) -> bool:
        return bool(self.singles or self.computed)

    def fill(self, row: list[object], values: Values) -> None:
        """Write what is known; the rest stays as it is."""
        for place, value in zip(self.singles, self.getter(values), strict=True):
            if 0.0 <= value < math.inf:
                row[place] = value
        for place, number in self.computed:
            row[place] = number(values)


@dataclass(frozen=True, slots=True)
class HistogramPlan:
    """One histogram of one rank. children: series to add up, each as getters of buckets; bounds ascend to +Inf."""

    metric: str
    rank: str
    source: str
    vantage: Vantage
    is_proxy: bool
    bounds: tuple[float, ...] | None
    bounds_id: int | None
    buckets: tuple[Callable[[Values], list[float]], ...]
    total: Number | None
    count: Number | None


@dataclass(frozen=True, slots=True)
class Flaw:
    """A histogram that cannot be read: which, where, why."""

    metric: str
    source: str
    rank: str
    reason: str


def finite(value: float) -> float | None:
    """The value, or None where it says nothing: NaN, infinity, or below zero (no quantity here can be; V0 vLLM
    prints -1 for "off")."""
    return value if 0.0 <= value < math.inf else None


def _picker(groups: list[list[int]], take: Take, is_gauge: bool) -> Number:
    """Fold the quantities of one rank. Copies of a gauge: the largest. Copies of a counter: the first rank's."""
    quantities = [tuple(group) if is_gauge else (group[0],) for group in groups]
    scale, fold, unset = take.scale, take.fold, take.zero_is_unset
    if len(quantities) == 1 and len(quantities[0]) == 1 and scale == 1.0 and not unset:
        only = quantities[0][0]
        return lambda values: finite(values[only])

    def pick(values: Values) -> float | None:
        numbers = []
        for positions in quantities:
            known = [v for i in positions if (v := finite(values[i])) is not None]
            if not known:
                return None
            numbers.append(max(known))
        if fold == "sum":
            number = math.fsum(numbers)
        elif fold == "max" or len(set(numbers)) == 1:
            number = max(numbers)
        else:
            return None
        return None if unset and number == 0 else number * scale

    return pick


def _combine(how: str, left: Number, right: Number) -> Number:
    def both(values: Values) -> float | None:
        a, b = left(values), right(values)
        if a is None or b is None:
            return None
        match how:
            case "plus":
                return a + b
            case "times":
                return a * b
            case "given":
                return a
            case "at_least":
                return a if a >= b else None
            case _:
                share = a / b if b else None
                return None if share is None or (how == "share" and share > 1) else share

    return both


class Compiler:
    """Turns a dialect's expressions into functions of the values, rank by rank."""

    def __init__(self, index: Index, settings: Mapping[str, str]) -> None:
        self._index = index
        self._settings = settings

    def is_on_page(self, expression: Expression) -> bool:
        """True when every part of it has a series (or a printed setting) on the page, in whichever rank."""
        match expression:
            case Take():
                name = expression.name
                return bool(
                    self._index.series(name)
                    if expression.zero_when_absent
                    else self._index.matching(name, expression.where)
                )
            case Setting():
                return _number(self._settings.get(expression.key)) is not None
            case Combine():
                return self.is_on_page(expression.left) and self.is_on_page(expression.right)
            case IsZero():
                return self.is_on_page(expression.of)

    def choose(self, alternatives: Alternatives) -> Expression | None:
        return next((expression for expression in alternatives if self.is_on_page(expression)), None)

    def number(self, expression: Expression, rank: str) -> Number | None:
        """The function for one rank; None when this rank has no such series."""
        match expression:
            case Take():
                return self._take(expression, rank)
            case Setting():
                constant = _number(self._settings.get(expression.key))
                return None if constant is None else lambda _: constant
            case Combine():
                left, right = self.number(expression.left, rank), self.number(expression.right, rank)
                return None if left is None or right is None else _combine(expression.how, left, right)
            case IsZero():
                inner = self.number(expression.of, rank)
                return None if inner is None else lambda values: None if (v := inner(values)) is None else v == 0

    def _take(self, take: Take, rank: str) -> Number | None:
        groups = self._index.quantities(take, rank)
        if groups:
            return _picker(groups, take, self._index.declared(take.name) == "gauge")
        if take.zero_when_absent and self._index.in_rank(self._index.series(take.name), rank):
            return lambda _: 0.0
        return None

    def position(self, expression: Expression, rank: str) -> int | None:
        """The one position that is the whole answer, for the fast way; None when there is more to do."""
        if not isinstance(expression, Take) or expression.scale != 1.0 or expression.zero_is_unset:
            return None
        groups = self._index.quantities(expression, rank)
        return groups[0][0] if len(groups) == 1 and len(groups[0]) == 1 else None

    def picks(self, columns: Mapping[str, Expression], places: Mapping[str, int], rank: str) -> Picks:
        singles: list[int] = []
        positions: list[int] = []
        computed: list[tuple[int, Number]] = []
        for column, expression in columns.items():
            position = self.position(expression, rank)
            if position is not None:
                singles.append(places[column])
                positions.append(position)
            elif (number := self.number(expression, rank)) is not None:
                computed.append((places[column], number))
        return Picks(tuple(singles), _together(positions), tuple(computed))

    def histogram(self, spec: Histogram, rank: str, vantage: Vantage) -> HistogramPlan | Flaw | None:
        """The first alias on the page; None when this rank has none of it."""
        name = next((n for n in spec.names if self._children(n, spec)), None)
        if name is None:
            return None
        sums = self._take(Take(f"{name}_sum", where=spec.where, scale=spec.scale), rank)
        counts = self._take(Take(f"{name}_count", where=spec.where), rank)
        buckets = self._index.in_rank(self._index.matching(f"{name}_bucket", spec.where), rank)
        if not buckets and sums is None and counts is None:
            return None
        bounds, getters, reason = self._bounds(buckets, spec.scale)
        if not buckets and self._index.declared(name) == "histogram":
            reason = "a histogram without buckets"
        if reason:
            return Flaw(spec.metric, name, rank, reason)
        own = spec.vantage or vantage
        return HistogramPlan(
            spec.metric, rank, name, own, spec.is_proxy, bounds, bounds_id(bounds), getters, sums, counts
        )

    def _children(self, name: str, spec: Histogram) -> bool:
        return any(self._index.matching(f"{name}{suffix}", spec.where) for suffix in ("_bucket", "_count", "_sum"))

    def _bounds(
        self, buckets: list[int], scale: float
    ) -> tuple[tuple[float, ...] | None, tuple[Callable[[Values], list[float]], ...], str]:
        """Bounds (None for a summary), a getter of counts per child, and why not. Children add up over equal bounds."""
        if not buckets:
            return None, (), ""
        per_child: dict[tuple[tuple[str, str], ...], list[tuple[float, int]]] = {}
        for copies in self._index.copies(buckets):
            labels = dict(self._index.labels(copies[0]))
            bound = bound_of(labels.pop("le", ""))
            if bound is None:
                return None, (), "a bucket without a numeric le"
            for label in self._index.replica_labels:
                labels.pop(label, None)
            per_child.setdefault(tuple(sorted(labels.items())), []).append((bound, copies[0]))
        shapes = set()
        getters = []
        for child in per_child.values():
            child.sort()
            shape = tuple(bound for bound, _ in child)
            if len(set(shape)) < len(shape):
                return None, (), "two buckets with the same bound"
            if shape[-1] != math.inf:
                return None, (), "no +Inf bucket"
            shapes.add(shape)
            getters.append(_slice([position for _, position in child]))
        if len(shapes) > 1:
            return None, (), "series with different bounds, which cannot be added up"
        return tuple(bound * scale for bound in shapes.pop()), tuple(getters), ""

    def summary(self, spec: Summary, rank: str, vantage: Vantage) -> HistogramPlan | None:
        if not (self.is_on_page(spec.total) and self.is_on_page(spec.count)):
            return None
        total, count = self.number(spec.total, rank), self.number(spec.count, rank)
        if total is None or count is None:
            return None
        return HistogramPlan(spec.metric, rank, spec.source, vantage, spec.is_proxy, None, None, (), total, count)


def _together(positions: Sequence[int]) -> Callable[[Values], Sequence[float]]:
    """A getter of several values at once, always as a sequence."""
    match positions:
        case []:
            return lambda _: ()
        case [only]:
            return lambda values: (values[only],)
        case _:
            return operator.itemgetter(*positions)


def _slice(positions: list[int]) -> Callable[[Values], list[float]]:
    """A getter of these positions as a list; one slice where they stand in a row, as engines print them."""
    first = positions[0]
    if positions == list(range(first, first + len(positions))):
        return operator.itemgetter(slice(first, first + len(positions)))
    getter = _together(positions)
    return lambda values: list(getter(values))


def _number(text: str | None) -> float | None:
    """A setting as a number; None for 'None', 'auto' and the like."""
    try:
        return None if text is None else finite(float(text))
    except ValueError:
        return None


def bounds_id(bounds: tuple[float, ...] | None) -> int | None:
    """The same 64 bits for the same bounds on every machine: the head of SHA-256 over them as little-endian doubles."""
    if bounds is None:
        return None
    packed = struct.pack(f"<{len(bounds)}d", *bounds)
    return int.from_bytes(hashlib.sha256(packed).digest()[:8], "little")
