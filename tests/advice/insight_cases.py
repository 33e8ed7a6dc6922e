"""Findings and recommendations as the rules make them, for tests of what is written about them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from optiinfra_pipelines.domain.evidence import Signal
from optiinfra_pipelines.domain.findings import (
    Abstention,
    Finding,
    FindingKind,
    Severity,
    Subject,
    finding_id,
)
from optiinfra_pipelines.domain.recommendations import (
    Basis,
    ChangeKind,
    Effect,
    Recommendation,
    recommendation_id,
)
from optiinfra_pipelines.domain.rollouts import KnobGroup

NOW = datetime(2026, 11, 20, 16, 42, tzinfo=UTC)
WINDOW = timedelta(minutes=5)


def signal(name: str, value: float | None, unit: str, target: str, threshold: float | None = None) -> Signal:
    return Signal(
        name=name,
        value=value,
        unit=unit,
        window_start=NOW - WINDOW,
        window_end=NOW,
        threshold=threshold,
        table="int_engine_minutes",
        keys=(("target", target),),
        column="kv_cache_usage_max_ratio",
        statistic="max",
    )


def finding(
    target: str = "vllm-7",
    kind: FindingKind = FindingKind.MEMORY_PRESSURE,
    severity: Severity = Severity.WARNING,
    summary: str | None = None,
    signals: tuple[Signal, ...] | None = None,
    minutes: int = 12,
) -> Finding:
    subject = Subject(kind="target", name=target)
    since = NOW - timedelta(minutes=minutes)
    return Finding(
        id=finding_id(subject, kind, since),
        subject=subject,
        kind=kind,
        cause="kv_cache_full",
        severity=severity,
        since=since,
        until=None,
        last_seen_at=NOW,
        source="recorded",
        summary=summary or f"{target} preempts requests: KV cache is used to 97.3 % and 12 requests wait",
        evidence=signals
        or (
            signal("kv_cache_usage", 0.9731, "ratio", target, 0.9),
            signal("preemptions", 41.0, "events", target, 0.0),
            signal("requests_waiting", 12.0, "requests", target),
            signal("queue_seconds", 3.42, "s", target, 1.0),
        ),
    )


def recommendation(deployment: str = "chat-vllm") -> Recommendation:
    subject = Subject(kind="deployment", name=deployment)
    proposed: dict[str, str | None] = {"kv-cache-dtype": "fp8"}
    return Recommendation(
        id=recommendation_id(subject, "kv_dtype", "abc", proposed),
        rule="kv_dtype",
        kind=ChangeKind.KV_CACHE_DTYPE,
        knob="kv_cache_dtype",
        knob_group=KnobGroup.KV_CACHE_DTYPE,
        direction="loosen",
        subject=subject,
        source="recorded",
        engine="vllm",
        engine_version="0.32.0",
        config_hash="abc",
        window_start=NOW - WINDOW,
        made_at=NOW,
        current={"kv-cache-dtype": "auto"},
        proposed=proposed,
        change_text="--kv-cache-dtype auto -> fp8",
        effects=(
            Effect(
                signal="kv_cache_usage",
                unit="ratio",
                before=0.97,
                change_low=-0.48,
                change_high=-0.31,
                basis=Basis.ARITHMETIC,
                derivation="half the bytes per token",
            ),
        ),
        score=0.7,
        reason="the KV cache is full and each of its values takes two bytes",
        rule_source="vLLM documentation, quantized KV cache",
        risk="answers may lose quality",
        verify="kv_cache_usage falls below 0.7",
        undo="--kv-cache-dtype auto",
        quality_gate="the usual evaluation within its noise",
        evidence=(signal("kv_cache_usage", 0.9731, "ratio", "vllm-7", 0.9),),
        finding_ids=("0" * 16,),
        usd_per_hour_change=None,
    )


def abstention(target: str = "sglang-1", reason: str = "3 of 10 minutes of samples") -> Abstention:
    return Abstention(subject=Subject(kind="target", name=target), kind=FindingKind.CACHE_INEFFICIENCY, reason=reason)
