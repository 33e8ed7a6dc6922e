"""What a writer of insights may see: open findings, recommendations and abstentions as one short, ranked pack.

Pure. Text of the fleet is data: a name that does not look like a name is put in quotes and shortened, characters
that could hide something become "?". A pack keeps to a size; what did not fit is said in words. The prompt made of it
is `prompt`, the check against it `grounding`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from optiinfra_pipelines.analysis.insights.words import is_plain
from optiinfra_pipelines.domain.evidence import Signal
from optiinfra_pipelines.domain.findings import Abstention, Finding, FindingKind, Severity
from optiinfra_pipelines.domain.insights import EvidenceItem, EvidencePack, Fact
from optiinfra_pipelines.domain.recommendations import Recommendation

# About 4,000 tokens: with the word list, the rules and a reply it stays under 8,000, the least a minute of the
# service's free plan allows for one request.
MAX_PACK_CHARS = 14_000
# What is shown of each kind before the rest competes for the space left.
_FIRST = {"finding": 8, "recommendation": 5, "abstention": 3}
_MAX_FACTS = 16
_MAX_WINDOWS = 3
_MAX_SAYS_CHARS = 360
_MAX_NAME_CHARS = 120
_RANK = {Severity.CRITICAL: 0, Severity.WARNING: 1, Severity.INFO: 2}
_NAME_LIKE = re.compile(r"(?=.*[A-Za-z])(?:--)?[A-Za-z0-9][A-Za-z0-9_.\-/:@+=~]*")
_HIDING = re.compile(r"[^\x20-\x7e]")
_NAMING_KEYS = ("target", "deployment", "host", "gpu_uuid", "model_name", "engine_rank", "metric", "pid")


def make_pack(
    findings: Sequence[Finding],
    recommendations: Sequence[Recommendation],
    abstentions: Sequence[Abstention],
    *,
    roster: Iterable[str] = (),
    max_chars: int = MAX_PACK_CHARS,
) -> EvidencePack:
    """The pack of one moment: open findings by severity, recommendations in their order, abstentions by reason.

    roster: every name of the fleet, so that a text that brings in a thing which its evidence does not name is found
    even where the name is an ordinary word.
    """
    open_findings = sorted(
        (finding for finding in findings if finding.is_open),
        key=lambda finding: (_RANK[finding.severity], finding.since, finding.id),
    )
    queues: dict[str, list[EvidenceItem]] = {
        "finding": [_finding_item(finding) for finding in open_findings],
        "recommendation": [_recommendation_item(one) for one in recommendations],
        "abstention": _abstention_items(abstentions),
    }
    first = [item for kind, count in _FIRST.items() for item in queues[kind][:count]]
    rest = [item for kind, count in _FIRST.items() for item in queues[kind][count:]]
    kept, left_out = _fit([*first, *rest], max_chars)
    status = _status(open_findings, recommendations, abstentions, len(left_out))
    ordered = [item for kind in _FIRST for item in kept if item.kind == kind]
    items = [status, *(item.model_copy(update={"id": f"E{i}"}) for i, item in enumerate(ordered, 1))]
    return EvidencePack(
        items=tuple(items),
        left_out=tuple(_told(left_out)),
        roster=_roster([item for queue in queues.values() for item in queue], roster),
    )


def _roster(items: Sequence[EvidenceItem], fleet: Iterable[str]) -> tuple[str, ...]:
    """Names that no sentence may use without citing them. A signal's name that is plain English is no such name."""
    names = {*map(shown_name, fleet), *(item.subject or "" for item in items), *(kind.value for kind in FindingKind)}
    for item in items:
        names |= {name for name in item.names if not all(map(is_plain, re.split(r"[_\-]", name)))}
    return tuple(sorted(name for name in names if name))


def shown_name(name: str) -> str:
    """A name as a pack shows it: as it is when it looks like one, else cut, cleaned and in quotes."""
    if _NAME_LIKE.fullmatch(name) and len(name) <= _MAX_NAME_CHARS:
        return name
    cleaned = clean(name, _MAX_NAME_CHARS).replace('"', "'")
    return f'"{cleaned}"' if cleaned.strip() else ""


def clean(text: str, max_chars: int) -> str:
    """One line of plain characters; what is cut off is marked."""
    plain = _HIDING.sub("?", " ".join(text.split()))
    return plain if len(plain) <= max_chars else plain[: max_chars - 4] + " ..."


def evidence_hash(pack: EvidencePack, salt: str) -> str:
    """Of everything the writer sees. `salt`: model and version of the prompt."""
    return hashlib.sha256(f"{salt}\n{pack.model_dump_json()}".encode()).hexdigest()


def subjects_hash(pack: EvidencePack) -> str:
    """Of which claims are made about what: the same while only their numbers move."""
    claims = [[item.kind, item.title, item.severity, item.subject] for item in pack.items if item.kind != "status"]
    return hashlib.sha256(json.dumps(claims).encode()).hexdigest()


def moments(*at: datetime | None) -> list[str]:
    """A time as texts may repeat it, with and without its date."""
    known = [moment.astimezone(UTC) for moment in at if moment is not None]
    return [form for moment in known for form in (f"{moment:%Y-%m-%d %H:%M} UTC", f"{moment:%H:%M} UTC")]


def signal_facts(signals: Iterable[Signal]) -> list[Fact]:
    """Each value with its threshold, then the lengths of the windows. A value that is not known is no fact."""
    facts: list[Fact] = []
    windows: list[Fact] = []
    for signal in signals:
        if signal.value is None:
            continue
        facts.append(Fact(name=signal.name, value=signal.value, unit=signal.unit))
        if signal.threshold is not None:
            facts.append(Fact(name=f"{signal.name} threshold", value=signal.threshold, unit=signal.unit))
        # Scrapes are some milliseconds off their cadence; a window is told in whole seconds.
        seconds = round((signal.window_end - signal.window_start).total_seconds())
        windows.append(Fact(name="window", value=seconds, unit="s"))
    return [*dict.fromkeys(facts)][:_MAX_FACTS] + [*dict.fromkeys(windows)][:_MAX_WINDOWS]


def signal_names(signals: Iterable[Signal]) -> list[str]:
    """Names of the signals, and of what their rows are about."""
    return [
        name
        for signal in signals
        for name in (signal.name, *(value for key, value in signal.keys if key in _NAMING_KEYS))
        if re.search(r"[A-Za-z]", name)
    ]


def _finding_item(finding: Finding) -> EvidenceItem:
    lasted = round((finding.last_seen_at - finding.since).total_seconds())
    raw_names = [
        finding.subject.name,
        *finding.subject.name.split("/"),
        finding.cause,
        *signal_names(finding.evidence),
        *(consequence.kind.value for consequence in finding.consequences),
    ]
    followed = "".join(f" {clean(consequence.summary, 160)}" for consequence in finding.consequences[:2])
    return EvidenceItem(
        id="E1",
        kind="finding",
        source_id=finding.id,
        title=finding.kind.value,
        severity=finding.severity.value,
        subject=shown_name(finding.subject.name) or None,
        says=_say(finding.summary + followed, raw_names),
        names=_names([*raw_names, *moments(finding.since)]),
        facts=(*signal_facts(finding.evidence), Fact(name="lasted", value=max(0, lasted), unit="s")),
    )


def _recommendation_item(one: Recommendation) -> EvidenceItem:
    """Flags are names, with and without their dashes; their values are facts where they are numbers, else names."""
    flags = sorted({*one.current, *one.proposed})
    raw_names = [
        one.subject.name,
        *flags,
        *(f"--{flag}" for flag in flags),
        one.rule,
        one.knob,
        *signal_names(one.evidence),
        *(effect.signal for effect in one.effects),
    ]
    facts: list[Fact] = []
    for what, values in (("current", one.current), ("proposed", one.proposed)):
        for flag, value in values.items():
            if (number := _number(value)) is not None:
                facts.append(Fact(name=f"{what} {flag}", value=number, unit=""))
            elif value is not None:
                raw_names.append(value)
    for effect in one.effects:
        facts += [
            Fact(name=f"{effect.signal} {what}", value=value, unit=effect.unit)
            for what, value in (
                ("before", effect.before),
                ("change at least", effect.change_low),
                ("change at most", effect.change_high),
            )
        ]
    if one.usd_per_hour_change is not None:
        facts.append(Fact(name="cost change", value=one.usd_per_hour_change, unit="USD/h"))
    return EvidenceItem(
        id="E1",
        kind="recommendation",
        source_id=one.id,
        title=one.kind.value,
        subject=shown_name(one.subject.name) or None,
        says=_say(f"{one.change_text}: {one.reason}", raw_names),
        names=_names(raw_names),
        facts=tuple(dict.fromkeys([*facts, *signal_facts(one.evidence)])),
    )


def _number(value: str | None) -> float | None:
    try:
        number = float(value) if value is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _say(text: str, raw_names: Iterable[str]) -> str:
    """A sentence of ours with the names in it as the pack shows them."""
    for name in sorted(set(raw_names), key=len, reverse=True):
        # A name without a letter cannot be told from the sentence's own numbers.
        if re.search(r"[^\W\d_]", name) and name != shown_name(name):
            text = text.replace(name, shown_name(name))
    return clean(text, _MAX_SAYS_CHARS)


def _names(raw: Iterable[str]) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(
            shown
            for name in raw
            # A moment has a space and a colon and is ours.
            if (shown := name if name.endswith(" UTC") else shown_name(name))
        )
    )


def _abstention_items(abstentions: Sequence[Abstention]) -> list[EvidenceItem]:
    """One item per kind and reason, the most frequent first."""
    groups: dict[tuple[FindingKind, str], list[str]] = {}
    for abstention in abstentions:
        groups.setdefault((abstention.kind, abstention.reason), []).append(abstention.subject.name)
    items = []
    for (kind, reason), subjects in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])):
        # Ten names tell an operator where to look; the count tells the rest.
        shown = [name for subject in subjects[:10] if (name := shown_name(subject))]
        declined = f"{kind.value} was not judged for {_counted(len(subjects), 'subject')}: {reason}"
        items.append(
            EvidenceItem(
                id="E1",
                kind="abstention",
                source_id=f"{kind.value}: {clean(reason, 80)}",
                title=kind.value,
                subject=shown[0] if len(subjects) == 1 and shown else None,
                says=clean(declined, _MAX_SAYS_CHARS),
                names=tuple(shown),
                facts=(Fact(name="subjects", value=len(subjects), unit="subjects"),),
            )
        )
    return items


def _status(
    findings: Sequence[Finding],
    recommendations: Sequence[Recommendation],
    abstentions: Sequence[Abstention],
    left_out: int,
) -> EvidenceItem:
    """Counts over everything, also over what was left out. No finding with abstentions is no all-clear."""
    by_severity = Counter(finding.severity for finding in findings)
    counts = {
        "open findings": len(findings),
        **{f"{severity.value} findings": by_severity[severity] for severity in Severity},
        "recommendations": len(recommendations),
        "abstentions": len(abstentions),
        "left out items": left_out,
    }
    severities = ", ".join(f"{by_severity[severity]} {severity.value}" for severity in _RANK if by_severity[severity])
    says = _counted(len(findings), "open finding") + (f" ({severities})" if severities else "")
    says += f", {_counted(len(recommendations), 'recommendation')}, {_counted(len(abstentions), 'judgment')} declined."
    return EvidenceItem(
        id="E0",
        kind="status",
        source_id="status",
        title="STATUS",
        says=says,
        facts=tuple(Fact(name=name, value=count, unit=name.split()[-1]) for name, count in counts.items()),
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _fit(items: Sequence[EvidenceItem], max_chars: int) -> tuple[list[EvidenceItem], list[EvidenceItem]]:
    """As many as the size allows, in order; the rest. An item that is too large does not shut out smaller ones."""
    kept: list[EvidenceItem] = []
    left_out: list[EvidenceItem] = []
    room = max_chars
    for item in items:
        size = len(item.model_dump_json())
        if size <= room and len(kept) < 99:
            kept.append(item)
            room -= size
        else:
            left_out.append(item)
    return kept, left_out


def _told(left_out: Sequence[EvidenceItem]) -> list[str]:
    counts = Counter((item.kind, item.title, item.severity) for item in left_out)
    return [
        f"{_counted(count, kind)}, {title}" + (f" ({severity})" if severity else "") + ", left out"
        for (kind, title, severity), count in counts.most_common()
    ]
