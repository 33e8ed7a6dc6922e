"""Keep findings over time: both edges have hysteresis, one trouble that comes and goes is one finding.

Pure. The rising edge is in the diagnosis itself (a condition must be sustained to be found); here are the falling one
and the identity: a finding stays open until its subject was judged free of it for a while, and is opened again, with
its id, when the trouble is back soon.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from optiinfra_pipelines.domain.findings import Diagnosis, Finding, FindingKind, Subject

Values = Mapping[str, float]
Key = tuple[Subject, FindingKind]


def update_findings(
    previous: Iterable[Finding], diagnoses: Iterable[Diagnosis], now: datetime, values: Values
) -> tuple[Finding, ...]:
    """Every finding as it stands at `now`: open ones, and closed ones that may yet come back. Oldest first.

    previous: what the last update returned (closed ones that are too old to come back are dropped from the answer;
    the store keeps them). diagnoses: one for every subject that is watched; the findings of any other subject end. A
    kind that could not be judged leaves its open findings as they are: nothing is closed for lack of data. What a
    deeper finding of its subject now names as its consequence ends as a finding of its own.
    """
    close_after = timedelta(seconds=values["close_after_seconds"])
    reopen_within = timedelta(seconds=values["reopen_within_seconds"])
    known: dict[Key, Finding] = {}
    for one in sorted(previous, key=lambda finding: (finding.since, finding.id)):
        if one.is_open or now - one.last_seen_at <= reopen_within:
            known[one.subject, one.kind] = one
    watched: set[Subject] = set()
    judged: set[Key] = set()
    seen: dict[Key, Finding] = {}
    for diagnosis in diagnoses:
        watched.add(diagnosis.subject)
        judged |= {(diagnosis.subject, kind) for kind in diagnosis.judged}
        for one in diagnosis.findings:
            key = (one.subject, one.kind)
            seen[key] = _merged(seen.get(key), one, reopen_within)
    for key, one in seen.items():
        known[key] = _merged(known.get(key), one, reopen_within)
    absorbed = {(one.subject, effect.kind) for one in seen.values() for effect in one.consequences} - set(seen)
    standing = []
    for key, one in known.items():
        is_gone = (key in judged or key in seen) and now - one.last_seen_at >= close_after
        if is_gone or key in absorbed or key[0] not in watched:
            standing.append(one.model_copy(update={"until": one.until or one.last_seen_at}))
        else:
            # Within the close time an end that the window showed is not believed yet.
            standing.append(one.model_copy(update={"until": None}))
    return tuple(sorted(standing, key=lambda finding: (finding.since, finding.id)))


def _merged(before: Finding | None, now: Finding, reopen_within: timedelta) -> Finding:
    """The newer evidence under the older identity, where both are one trouble."""
    if before is None or now.since - before.last_seen_at > reopen_within:
        return now
    if now.last_seen_at < before.last_seen_at:
        return before
    return now.model_copy(update={"id": before.id, "since": before.since, "until": None if now.is_open else now.until})
