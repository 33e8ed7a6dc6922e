"""What is wrong with what: findings with their evidence, abstentions with their reason.

Nouns only. Deciding is `analysis.findings.diagnosis` and the modules it names; storing is `resources.findings.store`.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from enum import StrEnum
from typing import Literal

from optiinfra_pipelines.domain.base import Frozen, Source
from optiinfra_pipelines.domain.evidence import Signal


class FindingKind(StrEnum):
    """The closed list of what can be wrong. Its sub-kind is a finding's `cause`."""

    MEMORY_PRESSURE = "MEMORY_PRESSURE"
    HIGH_LATENCY = "HIGH_LATENCY"
    LOW_THROUGHPUT = "LOW_THROUGHPUT"
    QUEUE_BUILDUP = "QUEUE_BUILDUP"
    CACHE_INEFFICIENCY = "CACHE_INEFFICIENCY"
    HOST_BOUND = "HOST_BOUND"
    THROTTLED = "THROTTLED"
    IDLE_HELD = "IDLE_HELD"
    IDLE_FREE = "IDLE_FREE"
    IMBALANCE = "IMBALANCE"
    RESTARTED = "RESTARTED"
    STALE_OR_MISSING_DATA = "STALE_OR_MISSING_DATA"
    GPU_FAULT = "GPU_FAULT"
    CONFIG_DRIFT = "CONFIG_DRIFT"


class Severity(StrEnum):
    """info: worth knowing. warning: costs latency or money now. critical: requests or hardware are being lost."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


class Subject(Frozen):
    """The thing a finding is about. A GPU's name is 'host/uuid', with '/instance' behind it for a MIG slice."""

    kind: Literal["target", "deployment", "gpu", "host"]
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class Consequence(Frozen):
    """What else was seen in the same window and follows from the finding; no finding of its own."""

    kind: FindingKind
    cause: str
    summary: str


class Finding(Frozen):
    """One claim about one subject.

    since: when the evidence begins. until: when it ended, None while it holds. last_seen_at: newest moment at which
    it was seen to hold. id: of subject, kind and since; kept for the finding's whole life. caused_by: id of a finding
    about another subject that this one follows from.
    """

    id: str
    subject: Subject
    kind: FindingKind
    cause: str
    severity: Severity
    since: datetime
    until: datetime | None
    last_seen_at: datetime
    source: Source
    summary: str
    evidence: tuple[Signal, ...]
    consequences: tuple[Consequence, ...] = ()
    caused_by: str | None = None

    @property
    def is_open(self) -> bool:
        return self.until is None


class Abstention(Frozen):
    """What could not be judged, and why: neither a finding nor a clean bill."""

    subject: Subject
    kind: FindingKind
    reason: str


class Diagnosis(Frozen):
    """One look at one subject. A kind in `judged` without a finding here was looked at and is not the case."""

    subject: Subject
    at: datetime
    judged: frozenset[FindingKind] = frozenset()
    findings: tuple[Finding, ...] = ()
    abstentions: tuple[Abstention, ...] = ()


def finding_id(subject: Subject, kind: FindingKind, since: datetime) -> str:
    """16 hex digits, the same on every machine and at every replay of the same data."""
    text = f"{subject.kind}|{subject.name}|{kind}|{since.timestamp():.6f}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
