"""What only shows when the replicas of a deployment stand side by side: imbalance, configuration drift.

Pure. Frontends and caches are not replicas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import polars as pl

from optiinfra_pipelines.analysis.findings.load import finding, gauge
from optiinfra_pipelines.analysis.findings.window import EngineWindow
from optiinfra_pipelines.domain.evidence import Signal
from optiinfra_pipelines.domain.findings import Abstention, Diagnosis, Finding, FindingKind, Severity, Subject

Values = Mapping[str, float]
# Settings that an engine computes from the memory it finds: they differ between equal replicas.
DERIVED_SETTINGS = frozenset(
    {
        "num_gpu_blocks",
        "num_cpu_blocks",
        "kv_cache_size_tokens",
        "kv_cache_max_concurrency",
        "kv_cache_memory_bytes",
        "max_total_num_tokens",
        "frontend_model_total_kv_blocks",
    }
)


@dataclass(frozen=True)
class DeploymentWindow:
    """The engine replicas of one deployment over one window. configs: rows of stg_engine_configs of its targets."""

    deployment: str
    end: datetime
    replicas: Sequence[EngineWindow]
    configs: pl.DataFrame

    @property
    def subject(self) -> Subject:
        return Subject(kind="deployment", name=self.deployment)

    @property
    def engines(self) -> list[EngineWindow]:
        return [replica for replica in self.replicas if replica.vantage == "engine" and replica.steps]


def diagnose_deployment(window: DeploymentWindow, values: Values) -> Diagnosis:
    """IMBALANCE and CONFIG_DRIFT of one deployment."""
    outcomes = {
        FindingKind.IMBALANCE: _imbalance(window, values),
        FindingKind.CONFIG_DRIFT: _drift(window),
    }
    return Diagnosis(
        subject=window.subject,
        at=window.end,
        judged=frozenset(kind for kind, outcome in outcomes.items() if not isinstance(outcome, str)),
        findings=tuple(outcome for outcome in outcomes.values() if isinstance(outcome, Finding)),
        abstentions=tuple(
            Abstention(subject=window.subject, kind=kind, reason=outcome)
            for kind, outcome in outcomes.items()
            if isinstance(outcome, str)
        ),
    )


def _imbalance(window: DeploymentWindow, values: Values) -> Finding | str | None:
    """One replica holds clearly more than another, and its requests wait while the other has room."""
    replicas = window.engines
    if len(replicas) < 2:
        return f"{len(replicas)} engine replicas with fresh data; two are needed"
    loads: list[tuple[float, float, EngineWindow]] = []
    for replica in replicas:
        running, waiting = _mean(replica, "requests_running"), _mean(replica, "requests_waiting")
        if running is None or waiting is None:
            return f"{replica.target} does not tell running and waiting requests"
        loads.append((running + waiting, waiting, replica))
    low, high = min(loads, key=lambda load: load[0]), max(loads, key=lambda load: load[0])
    spread = (high[0] - low[0]) / high[0] if high[0] else 0.0
    if spread < values["imbalance_ratio"] or high[1] < 1 or low[1] >= 1:
        return None
    evidence = [*_load_signals(high[2]), *_load_signals(low[2])]
    summary = (
        f"{high[2].target} had {high[1]:.1f} requests waiting while {low[2].target} had {low[1]:.1f}; "
        f"their loads differ by {100 * spread:.0f} %."
    )
    since = max(replica.steps[0].start_at for replica in replicas)
    span = (since, None, window.end)
    source, kind = replicas[0].source, FindingKind.IMBALANCE
    return finding(window.subject, kind, "uneven_load", Severity.WARNING, span, source, summary, evidence)


def _mean(replica: EngineWindow, name: str) -> float | None:
    known = [value for step in replica.steps if (value := step.gauge(name)) is not None]
    return sum(known) / len(known) if known else None


def _load_signals(replica: EngineWindow) -> list[Signal]:
    span = (replica.steps[0].end_at, replica.steps[-1].end_at)
    columns = ("requests_running", "requests_waiting")
    return [gauge(replica, f"{replica.target} {column}", column, "mean", span, "requests") for column in columns]


def _drift(window: DeploymentWindow) -> Finding | str | None:
    """Replicas of one deployment run different settings; sizes that an engine derives from its memory do not count."""
    current: dict[str, tuple[str, EngineWindow]] = {}
    for replica in window.engines:
        samples = replica.tables.frames["stg_engine_samples"].filter(pl.col("config_hash").is_not_null())
        newest = samples.sort("scraped_at")
        if newest.height:
            current[replica.target] = (str(newest["config_hash"][-1]), replica)
    if len(current) < 2:
        return f"{len(current)} replicas tell their configuration; two are needed"
    if len({replica.engine for _, replica in current.values()}) > 1:
        return "the replicas are different engines"
    chosen = {target: _chosen(window.configs, target, digest) for target, (digest, _) in current.items()}
    unknown = sorted(target for target, settings in chosen.items() if settings is None)
    if unknown and len({digest for digest, _ in current.values()}) > 1:
        return f"the settings behind the configuration of {', '.join(unknown)} are not stored"
    names = {name for settings in chosen.values() if settings for name in settings}
    told = {name: {(settings or {}).get(name) for settings in chosen.values()} for name in sorted(names)}
    differing = [name for name, seen in told.items() if len(seen) > 1]
    if unknown or not differing:
        return None
    evidence = [_hash_signal(replica, digest) for digest, replica in current.values()]
    summary = f"Replicas differ in {', '.join(differing[:5])}{' and more' if len(differing) > 5 else ''}."
    since = min(replica.steps[0].start_at for _, replica in current.values())
    span = (since, None, window.end)
    source, kind = next(iter(current.values()))[1].source, FindingKind.CONFIG_DRIFT
    return finding(window.subject, kind, "settings_differ", Severity.WARNING, span, source, summary, evidence)


def _chosen(configs: pl.DataFrame, target: str, digest: str) -> dict[str, str] | None:
    """The settings behind a hash, without those the engine derives; None when they are not stored."""
    if configs.is_empty():
        return None
    rows = configs.filter(pl.col("target") == target, pl.col("config_hash") == digest)
    if rows.is_empty() or rows["settings"][0] is None:
        return None
    entries = [dict(entry) for entry in rows["settings"][0]]
    return {str(e["key"]): str(e["value"]) for e in entries if e["key"] not in DERIVED_SETTINGS}


def _hash_signal(replica: EngineWindow, digest: str) -> Signal:
    return replica.tables.signal(
        f"samples with {digest}",
        "samples",
        (replica.steps[0].start_at, replica.steps[-1].end_at),
        table="stg_engine_samples",
        keys={"target": replica.target, "config_hash": digest},
        column="config_hash",
        statistic="count",
    )
