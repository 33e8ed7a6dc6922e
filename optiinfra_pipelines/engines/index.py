"""A page's layout, indexed for compiling a plan: series by name, families, ranks, copies of the same quantity.

Here: questions about names and labels. Not here: what they mean (the dialects) and any value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

from optiinfra_pipelines.engines.dialect import Dialect, Take, Where
from optiinfra_pipelines.exposition import Layout

# The rank of an engine that has none, and of series without a rank label when no series has one.
ONLY_RANK = "0"


def rank_order(rank: str) -> tuple[int, float, str]:
    """Sort key: numbers by value, then words."""
    return (0, float(rank), "") if rank.isdigit() else (1, 0.0, rank)


def bound_of(text: str) -> float | None:
    """The value of an `le` label; None when it is not a number."""
    try:
        value = float(text)
    except ValueError:
        return None
    return None if math.isnan(value) else value


_families: WeakKeyDictionary[Layout, tuple[str, ...]] = WeakKeyDictionary()


def families(layout: Layout) -> tuple[str, ...]:
    """Families of the page in order of appearance: the declared ones, then those of undeclared samples."""
    if layout not in _families:
        _families[layout] = _find_families(layout)
    return _families[layout]


def _find_families(layout: Layout) -> tuple[str, ...]:
    found = dict.fromkeys(layout.types)
    buckets = {name.removesuffix("_bucket") for name in layout.names if name.endswith("_bucket")}
    for name in dict.fromkeys(layout.names):
        found.setdefault(_family(name, layout.types, buckets))
    return tuple(found)


def _family(name: str, types: Mapping[str, str], buckets: set[str]) -> str:
    if name in types:
        return name
    for suffix in ("_bucket", "_sum", "_count", "_total", "_created", "_info"):
        base = name.removesuffix(suffix)
        if base != name and (base in types or base in buckets):
            return base
    return name


class Index:
    """The series of one layout, for one dialect. Lives only while a plan is compiled."""

    def __init__(self, layout: Layout, dialect: Dialect) -> None:
        self._labels = [dict(pairs) for pairs in layout.labels]
        self._types = layout.types
        self._dialect = dialect
        self.replica_labels = frozenset(dialect.replica_labels)
        self._by_name: dict[str, list[int]] = {}
        left_out = {*layout.duplicates, *self._out_of_scope(layout)}  # Prometheus drops repeated series too
        for i, name in enumerate(layout.names):
            if i not in left_out:
                self._by_name.setdefault(name, []).append(i)
        self.families = families(layout)
        self._rank_of = self._ranks(layout)
        self.ranks: tuple[str, ...] = tuple(sorted(set(self._rank_of.values()), key=rank_order)) or (ONLY_RANK,)

    def _out_of_scope(self, layout: Layout) -> list[int]:
        scope = self._dialect.scope
        if scope is None:
            return []
        names = layout.names
        named = {self._labels[i].get(scope.label) for i, n in enumerate(names) if n.startswith(scope.named_by)}
        return [
            i
            for i, n in enumerate(names)
            if named and n.startswith(scope.limits) and self._labels[i].get(scope.label) not in named
        ]

    def _ranks(self, layout: Layout) -> dict[int, str]:
        label = self._dialect.rank_label
        if label is None:
            return {}
        return {
            i: rank
            for i, name in enumerate(layout.names)
            if name.startswith(self._dialect.prefixes) and (rank := self._labels[i].get(label, ""))
        }

    def labels(self, i: int) -> Mapping[str, str]:
        return self._labels[i]

    def series(self, name: str) -> list[int]:
        return self._by_name.get(name, [])

    def has(self, name: str) -> bool:
        """True when the family is declared or sampled under this name, with any of its suffixes."""
        spellings = (name, f"{name}_total", name.removesuffix("_total"))
        return any(n in self._types or n in self._by_name for n in spellings) or any(
            f"{name}{suffix}" in self._by_name for suffix in ("_bucket", "_count")
        )

    def in_rank(self, series: Iterable[int], rank: str) -> list[int]:
        """Those of one rank. A series without a rank label belongs to the lowest, so that it is never counted twice."""
        return [i for i in series if self._rank_of.get(i, self.ranks[0]) == rank]

    def matching(self, name: str, where: tuple[Where, ...]) -> list[int]:
        found = self.series(name)
        for condition in where:
            found = [i for i in found if condition.holds(self.labels(i).get(condition.label, ""))]
        return found

    def models(self, series: Iterable[int]) -> str | None:
        names = {self.labels(i).get(self._dialect.model_label, "") for i in series} - {""}
        return ", ".join(sorted(names)) or None

    def own_series(self) -> list[int]:
        return [i for name, found in self._by_name.items() if name.startswith(self._dialect.prefixes) for i in found]

    def copies(self, series: list[int]) -> list[list[int]]:
        """Series grouped by quantity: the copies of one (tensor-parallel ranks) together, the first rank's first."""
        groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for i in series:
            quantity = (pair for pair in self._labels[i].items() if pair[0] not in self.replica_labels)
            groups.setdefault(tuple(sorted(quantity)), []).append(i)
        for group in groups.values():
            group.sort(key=self._copy_order)
        return [groups[key] for key in sorted(groups)]

    def _copy_order(self, i: int) -> tuple[tuple[int, float, str], ...]:
        labels = self.labels(i)
        return tuple(rank_order(labels.get(label, "")) for label in self._dialect.replica_labels)

    def quantities(self, take: Take, rank: str) -> list[list[int]]:
        """The series that `take` folds in one rank, each with its copies."""
        found = self.in_rank(self.matching(take.name, take.where), rank)
        label = self._dialect.total_label
        if label is not None and self.declared(take.name) == "gauge":
            totals = [i for i in found if self.labels(i).get(label) == ""]
            found = totals or found
        return self.copies(found)

    def declared(self, name: str) -> str | None:
        """The type that the page declares for a family."""
        return self._types.get(name)
