"""What a page of one layout becomes: its rows, prepared once and kept as long as the layout lives.

Here: which ranks, tiers, histograms and configurations a page has, and the cache of that. Not here: how one number is
found (`compiler`) or read (`normalize`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from weakref import WeakKeyDictionary

from optiinfra_pipelines.domain.base import Engine
from optiinfra_pipelines.engines.catalog import Identity, acquaintance, dialects_of, identify
from optiinfra_pipelines.engines.compiler import Compiler, Flaw, HistogramPlan, Number, Picks, Values
from optiinfra_pipelines.engines.dialect import Dialect, Expression, Need, Take
from optiinfra_pipelines.engines.index import ONLY_RANK, Index, families
from optiinfra_pipelines.engines.process import PROCESS
from optiinfra_pipelines.exposition import Layout
from optiinfra_pipelines.sql.sources import raw_tables

ENGINE_COLUMNS = tuple(raw_tables()["raw_engine_samples"].columns)
TIER_COLUMNS = tuple(raw_tables()["raw_kv_tier_samples"].columns)
_ENGINE_PLACES = {name: place for place, name in enumerate(ENGINE_COLUMNS)}
_TIER_PLACES = {name: place for place, name in enumerate(TIER_COLUMNS)}
_START = Take("process_start_time_seconds", fold="max", zero_is_unset=True)


class UnknownEngineError(ValueError):
    """A page of no engine that is known. `families`: what it has instead."""

    def __init__(self, seen: tuple[str, ...]) -> None:
        self.families = seen
        some = ", ".join(seen[:8]) + (f" and {len(seen) - 8} more" if len(seen) > 8 else "")
        super().__init__(
            f"no known engine's families on the page (it has {some or 'none'}); turn the engine's metrics on, "
            "or name the engine of this target in fleet.yaml"
        )


@dataclass(frozen=True, slots=True)
class Missing:
    """A family that ought to be on the page and is not (or is never filled), and what turns it on."""

    families: tuple[str, ...]
    flag: str | None
    is_required: bool


@dataclass(frozen=True, slots=True)
class ConfigPlan:
    """A rank's configuration: what labels print, and gauges that do not change at run time."""

    printed: Mapping[str, str]
    gauges: tuple[tuple[str, Number], ...]

    def read(self, values: Values) -> tuple[str, Mapping[str, str]] | None:
        """Hash and settings; None when the page tells nothing."""
        numbers = tuple((key, number(values)) for key, number in self.gauges)
        known = tuple((key, value) for key, value in numbers if value is not None)
        return _hashed(tuple(sorted(self.printed.items())), known) if self.printed or known else None


@lru_cache(maxsize=4096)
def _hashed(
    printed: tuple[tuple[str, str], ...], gauges: tuple[tuple[str, float], ...]
) -> tuple[str, Mapping[str, str]]:
    settings = dict(printed)
    for key, value in gauges:
        settings[key] = str(int(value)) if value.is_integer() else repr(value)
    text = json.dumps(sorted(settings.items()), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16], settings


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One row of raw_engine_samples."""

    rank: str
    model_name: str | None
    picks: tuple[Picks, ...]
    config: ConfigPlan


@dataclass(frozen=True, slots=True)
class TierPlan:
    """One row of raw_kv_tier_samples."""

    tier: str
    model_name: str | None
    picks: Picks
    is_healthy: Number | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything of a page that its layout alone decides."""

    identity: Identity
    ranks: tuple[RankPlan, ...]
    histograms: tuple[HistogramPlan, ...]
    flaws: tuple[Flaw, ...]
    tiers: tuple[TierPlan, ...]
    started: Number | None
    mapped: tuple[str, ...]
    ignored: tuple[str, ...]
    unknown: tuple[str, ...]
    missing: tuple[Missing, ...]
    off_while_zero: tuple[tuple[Number, Missing], ...]
    notes: tuple[str, ...]


_plans: WeakKeyDictionary[Layout, dict[Engine | None, Plan]] = WeakKeyDictionary()


def plan_for(layout: Layout, engine: Engine | None = None) -> Plan:
    """The plan of a layout, compiled at first sight. Raises UnknownEngineError."""
    known = _plans.setdefault(layout, {})
    plan = known.get(engine)
    if plan is None:
        plan = known[engine] = _compile(layout, engine)
    return plan


_kept: WeakKeyDictionary[Layout, dict[tuple[str, ...], tuple[tuple[int, str, dict[str, str]], ...]]] = (
    WeakKeyDictionary()
)


def kept_series(layout: Layout, keep: tuple[str, ...]) -> tuple[tuple[int, str, dict[str, str]], ...]:
    """Position, name and labels of the series whose family or own name a pattern of `keep` names."""
    known = _kept.setdefault(layout, {})
    if keep not in known:
        wanted = {f for f in families(layout) if any(fnmatchcase(f, pattern) for pattern in keep)}
        suffixes = ("", "_bucket", "_sum", "_count", "_total", "_info")
        names = {f"{family}{suffix}" for family in wanted for suffix in suffixes}
        repeated = set(layout.duplicates)
        known[keep] = tuple(
            (i, name, dict(layout.labels[i]))
            for i, name in enumerate(layout.names)
            if i not in repeated and (name in names or any(fnmatchcase(name, pattern) for pattern in keep))
        )
    return known[keep]


def _compile(layout: Layout, engine: Engine | None) -> Plan:
    identity = identify(layout, engine)
    if identity is None:
        raise UnknownEngineError(families(layout))
    dialects = dialects_of(layout, engine)
    indexes = [(dialect, Index(layout, dialect)) for dialect in dialects]
    engines = [(d, index) for d, index in indexes if d.columns]
    known = acquaintance(layout, dialects)
    missing = [(need, index) for dialect, index in indexes for need in dialect.needs]
    compiled = [
        found for dialect, index in indexes for found in _histograms(dialect, index, identity) if found is not None
    ]
    taken: dict[tuple[str, str], HistogramPlan | Flaw] = {}
    for found in compiled:
        taken.setdefault((found.rank, found.metric), found)
    process = Compiler(indexes[0][1], {})
    return Plan(
        identity=identity,
        ranks=_rank_plans(engines),
        histograms=tuple(h for h in taken.values() if isinstance(h, HistogramPlan)),
        flaws=tuple(f for f in taken.values() if isinstance(f, Flaw)),
        tiers=_tier_plans(layout, dialects),
        started=process.number(_START, indexes[0][1].ranks[0]) if process.is_on_page(_START) else None,
        mapped=known.mapped,
        ignored=known.ignored,
        unknown=known.unknown,
        missing=tuple(_missing(need) for need, index in missing if not any(map(index.has, need.names))),
        off_while_zero=tuple(
            (number, _missing(need)) for need, index in missing if need.zero_is_off and (number := _off(need, index))
        ),
        notes=tuple(note for dialect in dialects for note in dialect.notes),
    )


def _missing(need: Need) -> Missing:
    return Missing(need.names, need.flag, need.is_required)


def _off(need: Need, index: Index) -> Number | None:
    compiler = Compiler(index, {})
    expression = compiler.choose(tuple(Take(name) for name in need.names))
    return None if expression is None else compiler.number(expression, index.ranks[0])


def _rank_plans(engines: list[tuple[Dialect, Index]]) -> tuple[RankPlan, ...]:
    """A row per rank of the first dialect. Later dialects fill what it leaves open, in the lowest rank's row."""
    if not engines:
        return ()
    first_dialect, first_index = engines[0]
    plans = []
    for rank in first_index.ranks:
        printed = _settings(first_dialect, first_index, rank)
        compiler = Compiler(first_index, printed)
        chosen = _chosen(compiler, {**first_dialect.columns, **PROCESS})
        picks = [compiler.picks(chosen, _ENGINE_PLACES, rank)]
        if rank == first_index.ranks[0]:
            for dialect, index in engines[1:]:
                more = Compiler(index, {})
                columns = {c: e for c, e in _chosen(more, dialect.columns).items() if c not in chosen}
                picks.append(more.picks(columns, _ENGINE_PLACES, index.ranks[0]))
        model = first_index.models(first_index.in_rank(first_index.own_series(), rank))
        config = ConfigPlan(printed, _config_gauges(first_dialect, compiler, rank))
        plans.append(RankPlan(rank, model, tuple(picks), config))
    return tuple(plans)


def _chosen(compiler: Compiler, columns: Mapping[str, tuple[Expression, ...]]) -> dict[str, Expression]:
    found = ((column, compiler.choose(alternatives)) for column, alternatives in columns.items())
    return {column: expression for column, expression in found if expression is not None}


def _settings(dialect: Dialect, index: Index, rank: str) -> dict[str, str]:
    """Labels of the information families. One without a rank label describes every rank.

    A key that two families print differently is kept under both names.
    """
    apart = {dialect.rank_label, dialect.model_label, *dialect.replica_labels}
    settings: dict[str, str] = {}
    for family in dialect.info:
        for series in sorted(index.series(family), key=lambda i: sorted(index.labels(i).items())):
            labels = index.labels(series)
            if labels.get(dialect.rank_label or "", "") not in ("", rank):
                continue
            for key, value in labels.items():
                if key in apart:
                    continue
                name = key if settings.get(key, value) == value else f"{_bare(family, dialect)}.{key}"
                settings[name] = value
    return settings


def _config_gauges(dialect: Dialect, compiler: Compiler, rank: str) -> tuple[tuple[str, Number], ...]:
    found = (
        (name, compiler.number(Take(name, fold="same"), rank))
        for name in dialect.config_gauges
        if compiler.is_on_page(Take(name))
    )
    return tuple((_bare(name, dialect), number) for name, number in found if number is not None)


def _bare(name: str, dialect: Dialect) -> str:
    """A family's name without the dialect's prefix."""
    return next((name.removeprefix(prefix) for prefix in dialect.prefixes if name.startswith(prefix)), name)


def _histograms(dialect: Dialect, index: Index, identity: Identity) -> list[HistogramPlan | Flaw | None]:
    compiler = Compiler(index, {})
    vantage = dialect.vantage if dialect.vantage == "cache" else identity.vantage
    ranks = index.ranks if dialect.columns else (ONLY_RANK,)
    return [
        *(compiler.histogram(spec, rank, vantage) for rank in ranks for spec in dialect.histograms),
        *(compiler.summary(spec, rank, vantage) for rank in ranks for spec in dialect.summaries),
    ]


def _tier_plans(layout: Layout, dialects: tuple[Dialect, ...]) -> tuple[TierPlan, ...]:
    """A row per tier, over all ranks. A cache's own families describe a tier before the engine's view of it does."""
    plans: dict[str, TierPlan] = {}
    for dialect in sorted((d for d in dialects if d.tiers), key=lambda d: d.vantage != "cache"):
        index = Index(layout, replace(dialect, rank_label=None))
        compiler = Compiler(index, {})
        for tier, columns in dialect.tiers.items():
            chosen = _chosen(compiler, columns)
            healthy = chosen.pop("is_healthy", None)
            picks = compiler.picks(chosen, _TIER_PLACES, ONLY_RANK)
            if (picks or healthy) and tier not in plans:
                is_healthy = compiler.number(healthy, ONLY_RANK) if healthy else None
                plans[tier] = TierPlan(tier, index.models(index.own_series()), picks, is_healthy)
    return tuple(plans.values())
