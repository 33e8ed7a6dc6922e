"""The nouns an engine's table is written in: where a column's value comes from, over the releases that named it.

Here: the vocabulary of `vllm.py` and its neighbors, immutable. Not here: finding the series on a page (`plan`),
reading values (`normalize`). A table is data: it may be read, diffed and tested without a page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from optiinfra_pipelines.domain.base import Engine

Vantage = Literal["engine", "frontend", "cache"]
# How several series of one rank become one number. "same": a configuration value that must agree, else unknown.
Fold = Literal["sum", "max", "same"]


@dataclass(frozen=True, slots=True)
class Where:
    """A condition on one label. `values` may end in `*`. `negated`: none of them. An absent label has the value ''."""

    label: str
    values: tuple[str, ...]
    negated: bool = False

    def holds(self, value: str) -> bool:
        hit = any(value.startswith(v[:-1]) if v.endswith("*") else value == v for v in self.values)
        return hit is not self.negated


def is_(label: str, *values: str) -> Where:
    return Where(label, values)


def is_not(label: str, *values: str) -> Where:
    return Where(label, values, negated=True)


@dataclass(frozen=True, slots=True)
class Take:
    """The series of one sample name that meet every condition, folded into one number per rank.

    scale: multiplier to the column's unit. zero_is_unset: the engine prints 0 for "not known".
    zero_when_absent: children of this family appear at their first event, so a missing child beside a present
    sibling has counted nothing (an outcome that has not happened yet).
    """

    name: str
    where: tuple[Where, ...] = ()
    fold: Fold = "sum"
    scale: float = 1.0
    zero_is_unset: bool = False
    zero_when_absent: bool = False


@dataclass(frozen=True, slots=True)
class Setting:
    """A number printed as a label of an information family (`Dialect.info`), such as block_size."""

    key: str


@dataclass(frozen=True, slots=True)
class Combine:
    """Two expressions made one. Unknown when either side is.

    plus, times; over: left / right, unknown when right is 0; share: over, and unknown above 1 (two gauges that
    disagree); at_least: left, unknown when it is under right (left misses some of what right has counted);
    given: left, unknown when right is (a numerator without its denominator misleads).
    """

    how: Literal["plus", "times", "over", "share", "at_least", "given"]
    left: Expression
    right: Expression


@dataclass(frozen=True, slots=True)
class IsZero:
    """True when the number is 0, False when it is not, unknown when it is unknown."""

    of: Take


Expression = Take | Setting | Combine | IsZero
# Alternatives by precedence: the first that the page has is used for every rank; two are never added up.
Alternatives = tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Histogram:
    """A family of buckets (or a summary without) that becomes one normalized metric.

    names: aliases by precedence. scale: multiplier of bounds and sum to seconds or tokens.
    vantage: where it differs from the page's. is_proxy: it only bounds the metric; `note` says from which side.
    """

    metric: str
    names: tuple[str, ...]
    where: tuple[Where, ...] = ()
    scale: float = 1.0
    is_proxy: bool = False
    vantage: Vantage | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """A sum and a count without buckets: only its mean is known. `source` names what it was made from."""

    metric: str
    total: Expression
    count: Expression
    source: str
    is_proxy: bool = False


@dataclass(frozen=True, slots=True)
class Need:
    """A family that ought to be there. `names`: any of them will do. `flag`: what turns it on, None when nothing does.

    zero_is_off: the family is always printed and stays 0 until the flag is set.
    """

    names: tuple[str, ...]
    flag: str | None = None
    is_required: bool = True
    zero_is_off: bool = False


@dataclass(frozen=True, slots=True)
class Ignored:
    """Families left unmapped on purpose. `patterns` are canonical names; `*` is a wildcard."""

    reason: str
    patterns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scope:
    """Families under the prefix `limits` count only for those values of `label` that families under `named_by` have."""

    label: str
    named_by: str
    limits: str


@dataclass(frozen=True, slots=True)
class Dialect:
    """All that one engine's page means.

    prefixes: of the families that are the engine's own. rank_label: tells data-parallel ranks apart.
    replica_labels: tell copies of the same quantity apart (tensor-parallel ranks): one copy counts.
    total_label: '' marks the total beside its parts. columns: of raw_engine_samples. tiers: tier -> columns of
    raw_kv_tier_samples. info: families whose labels are the configuration. config_gauges: gauges that are.
    notes: what a reader of the rows must know.
    """

    engine: Engine
    prefixes: tuple[str, ...]
    vantage: Vantage
    model_label: str
    columns: Mapping[str, Alternatives] = field(default_factory=dict)
    histograms: tuple[Histogram, ...] = ()
    summaries: tuple[Summary, ...] = ()
    tiers: Mapping[str, Mapping[str, Alternatives]] = field(default_factory=dict)
    rank_label: str | None = None
    replica_labels: tuple[str, ...] = ()
    total_label: str | None = None
    scope: Scope | None = None
    info: tuple[str, ...] = ()
    config_gauges: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()
    ignored: tuple[Ignored, ...] = ()
    notes: tuple[str, ...] = ()


def first(*expressions: Expression) -> Alternatives:
    return expressions


def take(*names: str, fold: Fold = "sum", where: tuple[Where, ...] = ()) -> Alternatives:
    """Aliases of one plain column, newest name first."""
    return tuple(Take(name, where=where, fold=fold) for name in names)


def canonical(name: str) -> str:
    """The name that a family and its counter, creation-time and info spellings share."""
    return name.removesuffix("_created").removesuffix("_total")
