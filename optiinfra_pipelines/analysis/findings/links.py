"""Which finding follows from a finding about another subject: the host, the GPU, the engine behind a frontend.

Pure. A link is a claim of order, not a merger: both findings stay, and the one that follows names the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from optiinfra_pipelines.domain.findings import Finding, FindingKind, Severity

# What a host or one of its GPUs can do to the engines on it.
_BENEATH = (FindingKind.GPU_FAULT, FindingKind.THROTTLED, FindingKind.HOST_BOUND)
# What an engine's own trouble looks like, and what it makes of the frontend before it.
_AT_ENGINE = (FindingKind.MEMORY_PRESSURE, FindingKind.LOW_THROUGHPUT, FindingKind.QUEUE_BUILDUP)
_SUFFERED = (FindingKind.LOW_THROUGHPUT, FindingKind.QUEUE_BUILDUP, FindingKind.HIGH_LATENCY)


def link_causes(
    findings: Iterable[Finding],
    *,
    host_of: Mapping[str, str],
    deployment_of: Mapping[str, str],
    frontends: frozenset[str],
) -> tuple[Finding, ...]:
    """The findings, each with the open finding it follows from; without one, its caused_by is None.

    host_of, deployment_of: by target. Only what is open and not merely informative causes anything.
    """
    every = list(findings)
    causes = [one for one in every if one.is_open and one.severity is not Severity.INFO]
    return tuple(
        one.model_copy(update={"caused_by": _cause(one, causes, host_of, deployment_of, frontends)}) for one in every
    )


def _cause(
    one: Finding,
    causes: Sequence[Finding],
    host_of: Mapping[str, str],
    deployment_of: Mapping[str, str],
    frontends: frozenset[str],
) -> str | None:
    if one.subject.kind != "target" or one.kind not in _SUFFERED:
        return None
    host = host_of.get(one.subject.name)
    deployment = deployment_of.get(one.subject.name)
    for cause in causes:
        if cause.kind in _BENEATH and host is not None and _host(cause) == host:
            return cause.id
    if one.subject.name not in frontends or deployment is None:
        return None
    for cause in causes:
        is_engine = cause.subject.kind == "target" and cause.subject.name not in frontends
        if is_engine and cause.kind in _AT_ENGINE and deployment_of.get(cause.subject.name) == deployment:
            return cause.id
    return None


def _host(finding: Finding) -> str | None:
    if finding.subject.kind == "host":
        return finding.subject.name
    return finding.subject.name.split("/", 1)[0] if finding.subject.kind == "gpu" else None
