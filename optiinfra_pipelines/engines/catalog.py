"""Which engine printed a page: the dialects, the families that give them away, and their usual ports.

Here: detection from family names, what a dialect knows of a page's families, where engines usually listen, and what
turns their metrics on. Not here: values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal
from weakref import WeakKeyDictionary

from optiinfra_pipelines.domain.base import Engine
from optiinfra_pipelines.engines.dialect import (
    Combine,
    Dialect,
    Expression,
    IsZero,
    Setting,
    Take,
    Vantage,
    canonical,
)
from optiinfra_pipelines.engines.dynamo import DYNAMO_FRONTEND, DYNAMO_WORKER
from optiinfra_pipelines.engines.index import families
from optiinfra_pipelines.engines.llamacpp import LLAMACPP
from optiinfra_pipelines.engines.lmcache import LMCACHE, LMCACHE_MP
from optiinfra_pipelines.engines.sglang import SGLANG
from optiinfra_pipelines.engines.tgi import TGI
from optiinfra_pipelines.engines.triton import TRITON
from optiinfra_pipelines.engines.trtllm import TRTLLM
from optiinfra_pipelines.engines.vllm import VLLM, generation_of
from optiinfra_pipelines.exposition import Layout

DIALECTS: Mapping[Engine, Dialect] = {
    dialect.engine: dialect
    for dialect in (
        VLLM,
        SGLANG,
        TGI,
        TRTLLM,
        TRITON,
        DYNAMO_FRONTEND,
        DYNAMO_WORKER,
        LLAMACPP,
        LMCACHE,
        LMCACHE_MP,
    )
}
_ENGINES = (VLLM, SGLANG, TRTLLM, TGI, TRITON, LLAMACPP)
_CACHES = (LMCACHE_MP, LMCACHE)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who printed a page. dialects: all that speak on it, the page's own first. generation: which of its vocabularies,
    where names tell; version: only where the page prints one."""

    engine: Engine
    vantage: Vantage
    dialects: tuple[Engine, ...]
    version: str | None = None
    generation: str | None = None


@dataclass(frozen=True, slots=True)
class Port:
    """Where an engine usually serves its metrics on a host, and what turns them on (None: on by default)."""

    engine: Engine
    port: int
    path: str = "/metrics"
    turn_on: str | None = None


# Defaults of each project's server; 80 and 8080 for TGI are its container and its documentation.
PORTS: tuple[Port, ...] = (
    Port("vllm", 8000, turn_on="on by default; --disable-log-stats turns the engine's families off"),
    Port("sglang", 30000, turn_on="--enable-metrics"),
    Port("tgi", 3000),
    Port("tgi", 8080),
    Port("tgi", 80),
    Port("trtllm", 8000, "/prometheus/metrics", "return_perf_metrics: true and enable_iter_perf_stats: true"),
    Port("triton", 8002, turn_on="on by default; --allow-metrics=false turns them off"),
    Port("dynamo_frontend", 8000),
    Port("dynamo_worker", 8081, turn_on="DYN_SYSTEM_PORT=8081"),
    Port("llamacpp", 8080, turn_on="--metrics"),
    Port("lmcache_mp", 8080, turn_on="--http-port"),
    # 6999 is the scheduler's, one more for each worker after it.
    Port("lmcache", 7000, turn_on="internal_api_server_enabled: true, or PROMETHEUS_MULTIPROC_DIR shared with vLLM"),
    Port("lmcache", 6999, turn_on="internal_api_server_enabled: true, or PROMETHEUS_MULTIPROC_DIR shared with vLLM"),
)


def dialects_of(layout: Layout, engine: Engine | None = None) -> tuple[Dialect, ...]:
    """The dialects on a page, by precedence: earlier ones fill columns first. Empty: none is known.

    engine: what the operator says it is; then that dialect speaks first, whatever the names look like.
    """
    names = families(layout)
    engines = tuple(d for d in _ENGINES if _speaks(d, names))
    caches = tuple(d for d in _CACHES if _speaks(d, names))
    if engine is not None:
        stated = DIALECTS[engine]
        others = engines if stated is DYNAMO_WORKER else ()
        return (*others, stated, *(d for d in caches if d is not stated))
    if any(name.startswith("dynamo_frontend_") for name in names):
        return (DYNAMO_FRONTEND, *caches)
    if any(name.startswith("dynamo_component_") for name in names):
        return (*engines[:1], DYNAMO_WORKER, *caches)
    return (*engines[:1], *caches)


def _speaks(dialect: Dialect, names: Iterable[str]) -> bool:
    return any(name.startswith(dialect.prefixes) for name in names)


_identities: WeakKeyDictionary[Layout, dict[Engine | None, Identity | None]] = WeakKeyDictionary()


def identify(layout: Layout, engine: Engine | None = None) -> Identity | None:
    """Who printed the page; None when no known engine did.

    A page may hold several dialects. A Dynamo frontend or worker is named by its own families; the engine's beside a
    worker's fill the engine columns. A KV cache's families beside an engine's fill the tier tables and do not name
    the page. engine: what the operator says it is, believed before the names.
    """
    known = _identities.setdefault(layout, {})
    if engine not in known:
        known[engine] = _identify(layout, engine)
    return known[engine]


def _identify(layout: Layout, engine: Engine | None) -> Identity | None:
    spoken = dialects_of(layout, engine)
    if not spoken:
        return None
    page = next((d for d in spoken if d in (DYNAMO_WORKER, DYNAMO_FRONTEND)), spoken[0])
    page = page if engine is None else DIALECTS[engine]
    ordered = (page, *(d for d in spoken if d is not page))
    return Identity(
        page.engine,
        page.vantage,
        tuple(dialect.engine for dialect in ordered),
        _version(layout, ordered),
        generation_of(frozenset(layout.names) | frozenset(layout.types)) if VLLM in spoken else None,
    )


def _version(layout: Layout, dialects: tuple[Dialect, ...]) -> str | None:
    """The version label of a build information family of the engine's own, where there is one."""
    for dialect in dialects:
        for name, labels in zip(layout.names, layout.labels, strict=True):
            if name.startswith(dialect.prefixes) and name.endswith(("build_info", "version_info")):
                version = dict(labels).get("version")
                if version:
                    return version
    return None


@dataclass(frozen=True, slots=True)
class Acquaintance:
    """What the dialects make of a page's families: mapped, left out on purpose, never heard of."""

    mapped: tuple[str, ...]
    ignored: tuple[str, ...]
    unknown: tuple[str, ...]


Standing = Literal["mapped", "ignored", "unknown"]


def acquaintance(layout: Layout, dialects: tuple[Dialect, ...]) -> Acquaintance:
    """Sort the families under the dialects' own prefixes, each in order of name."""
    vocabularies = [(dialect, _vocabulary(dialect)) for dialect in dialects]
    found: dict[Standing, list[str]] = {"mapped": [], "ignored": [], "unknown": []}
    for family in sorted(families(layout)):
        standings = {
            _standing(family, dialect, words) for dialect, words in vocabularies if family.startswith(dialect.prefixes)
        }
        if standings:
            found[next(s for s in ("mapped", "ignored", "unknown") if s in standings)].append(family)
    return Acquaintance(tuple(found["mapped"]), tuple(found["ignored"]), tuple(found["unknown"]))


def _standing(family: str, dialect: Dialect, words: frozenset[str]) -> Standing:
    name = canonical(family)
    if name in words:
        return "mapped"
    patterns = (pattern for ignored in dialect.ignored for pattern in ignored.patterns)
    return "ignored" if any(fnmatchcase(name, pattern) for pattern in patterns) else "unknown"


def _vocabulary(dialect: Dialect) -> frozenset[str]:
    """Canonical names of every family that the dialect reads."""
    expressions = [e for alternatives in dialect.columns.values() for e in alternatives]
    expressions += [e for tier in dialect.tiers.values() for alternatives in tier.values() for e in alternatives]
    expressions += [e for summary in dialect.summaries for e in (summary.total, summary.count)]
    names = {name for expression in expressions for name in _names(expression)}
    names |= {name.removesuffix("_sum").removesuffix("_count") for name in names}
    names |= {name for histogram in dialect.histograms for name in histogram.names}
    names |= {*dialect.info, *dialect.config_gauges, *(name for need in dialect.needs for name in need.names)}
    return frozenset(canonical(name) for name in names)


def _names(expression: Expression) -> set[str]:
    match expression:
        case Take():
            return {expression.name}
        case Setting():
            return set()
        case Combine():
            return _names(expression.left) | _names(expression.right)
        case IsZero():
            return {expression.of.name}
