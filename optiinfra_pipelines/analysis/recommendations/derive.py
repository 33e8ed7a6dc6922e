"""From measures to recommendations: which rule holds for which deployment, what it proposes, which one comes first.

Pure. One knob group at a time for each subject, the largest expected effect per risk first; a rule that could apply
and may not says why. Rules are `rules`, how far a knob turns is `sizing*`, what became of earlier advice is
`ledger`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from optiinfra_pipelines.analysis.recommendations.context import Context, Refused, Sized, with_context
from optiinfra_pipelines.analysis.recommendations.evidence import evidence
from optiinfra_pipelines.analysis.recommendations.flags import GROUPS, render
from optiinfra_pipelines.analysis.recommendations.limits import MIN_REPLICA_SHARE, OPPOSITE_HOURS
from optiinfra_pipelines.analysis.recommendations.measures import Measures
from optiinfra_pipelines.analysis.recommendations.rule import Rule, check
from optiinfra_pipelines.analysis.recommendations.rules import BY_NAME, RULES
from optiinfra_pipelines.analysis.recommendations.sizing import SIZINGS as BATCH_SIZINGS
from optiinfra_pipelines.analysis.recommendations.sizing_memory import SIZINGS as MEMORY_SIZINGS
from optiinfra_pipelines.analysis.recommendations.sizing_other import SIZINGS as OTHER_SIZINGS
from optiinfra_pipelines.domain.base import Source
from optiinfra_pipelines.domain.findings import Finding, Subject
from optiinfra_pipelines.domain.recommendations import (
    FINAL,
    LedgerEntry,
    LedgerState,
    Recommendation,
    RuleAbstention,
    recommendation_id,
)

SIZINGS = {**BATCH_SIZINGS, **MEMORY_SIZINGS, **OTHER_SIZINGS}
ANY_RULE = "*"


@dataclass(frozen=True)
class Group:
    """The replicas that one change would reach: a deployment, or a target that belongs to none."""

    subject: Subject
    targets: tuple[str, ...]
    context: Context
    source: Source = "live"


@dataclass(frozen=True)
class Advice:
    """What one look said. candidates: every rule's proposal, best first; the ledger opens one of them a subject."""

    candidates: tuple[Recommendation, ...] = ()
    abstentions: tuple[RuleAbstention, ...] = ()

    @property
    def first(self) -> tuple[Recommendation, ...]:
        """The best of each subject: one knob group at a time."""
        best: dict[str, Recommendation] = {}
        for candidate in self.candidates:
            best.setdefault(str(candidate.subject), candidate)
        return tuple(best.values())


def recommend(
    groups: Sequence[Group],
    measures: Mapping[str, Measures],
    *,
    at: datetime,
    findings: Sequence[Finding] = (),
    recent: Sequence[LedgerEntry] = (),
    rules: Sequence[Rule] = RULES,
) -> Advice:
    """Proposals and refusals for each group, from the measures of one window that ends at `at`.

    findings: those open at `at`, to cite. recent: ledger entries of the last days, so that advice is not turned round.
    """
    candidates: list[Recommendation] = []
    abstentions: list[RuleAbstention] = []
    for group in groups:
        cited = [finding for finding in findings if _is_about(finding, group)]
        own = [entry for entry in recent if entry.recommendation.subject == group.subject]
        advice = _advise(group, measures, at, cited, own, rules)
        candidates += advice.candidates
        abstentions += advice.abstentions
    return Advice(tuple(candidates), tuple(abstentions))


def _advise(
    group: Group,
    measures: Mapping[str, Measures],
    at: datetime,
    findings: Sequence[Finding],
    recent: Sequence[LedgerEntry],
    rules: Sequence[Rule],
) -> Advice:
    seen = [measures[target] for target in group.targets if target in measures]
    usable = [with_context(one, group.context) for one in seen if one.unusable is None and one.vantage == "engine"]
    refusal = _group_refusal(group, seen, usable)
    if refusal is not None:
        return Advice(
            abstentions=(RuleAbstention(subject=group.subject, rule=ANY_RULE, kind=None, at=at, reason=refusal),)
        )
    proposed: dict[str, Recommendation] = {}
    first: dict[str, str] = {}
    abstentions: list[RuleAbstention] = []
    for rule in rules:
        outcome = _apply(rule, group, usable, at, findings, recent, first)
        if isinstance(outcome, Recommendation):
            proposed[rule.name] = outcome
            first[rule.name] = outcome.change_text
        elif outcome is not None:
            abstentions.append(_abstain(group, rule, at, outcome.reason))
            if outcome.is_held:
                first[rule.name] = outcome.reason
    ordered = sorted(proposed.values(), key=lambda one: (-one.score, list(BY_NAME).index(one.rule)))
    for later in ordered[1:]:
        abstentions.append(
            _abstain(group, BY_NAME[later.rule], at, f"one knob group at a time: first {ordered[0].change_text}")
        )
    return Advice(tuple(ordered), tuple(abstentions))


def _group_refusal(group: Group, seen: Sequence[Measures], usable: Sequence[Measures]) -> str | None:
    """Why no rule at all may act on this group."""
    if not seen:
        return f"no samples of its {len(group.targets)} targets in the window"
    if not usable:
        reasons = sorted(
            {one.unusable or "seen from the frontend only: the engine's own page is needed" for one in seen}
        )
        return "; ".join(reasons[:3])
    configurations = {one.config_hash for one in usable}
    if len(configurations) > 1:
        return f"its replicas run {len(configurations)} configurations: bring them to one before changing it"
    return None


def _apply(
    rule: Rule,
    group: Group,
    usable: Sequence[Measures],
    at: datetime,
    findings: Sequence[Finding],
    recent: Sequence[LedgerEntry],
    first: Mapping[str, str],
) -> Recommendation | Refused | None:
    """The rule's proposal, its refusal, or None where it does not hold. first: rules that others wait for, and why."""
    long_enough = [one for one in usable if (one["window_seconds"] or 0) >= rule.min_window_seconds]
    checked = [(one, check(rule, one)) for one in long_enough]
    holding = [one for one, result in checked if result.holds]
    if not holding:
        unknown = sorted({name for _, result in checked for name in result.unknown})
        return Refused(f"unknown: {', '.join(unknown)}") if unknown else None
    if len(holding) < MIN_REPLICA_SHARE * len(usable):
        return Refused(
            f"{len(holding)} of {len(usable)} replicas show it: look at balance before a flag that all of them share"
        )
    before = [name for name in rule.after if name in first]
    if before:
        return Refused(f"first {first[before[0]]}")
    chosen = sorted(holding, key=lambda one: (one["waiting_mean"] or 0.0, one.target))[len(holding) // 2]
    sized = SIZINGS[rule.sizing](chosen, group.context)
    if isinstance(sized, Refused):
        return sized
    recommendation = _build(rule, group, chosen, sized, at, findings)
    return _refused_by_history(recommendation, recent, at) or recommendation


def _refused_by_history(recommendation: Recommendation, recent: Sequence[LedgerEntry], at: datetime) -> Refused | None:
    for entry in recent:
        earlier = entry.recommendation
        if earlier.id == recommendation.id and entry.state in FINAL:
            return Refused(f"tried before under this configuration: {entry.state}")
        turned_at = entry.applied_at or entry.last_seen_at
        opposite = {earlier.direction, recommendation.direction} == {"loosen", "tighten"}
        is_recent = timedelta(0) <= at - turned_at < timedelta(hours=OPPOSITE_HOURS)
        if earlier.knob == recommendation.knob and opposite and is_recent:
            done = "was applied" if entry.applied_at else "was advised"
            return Refused(
                f"{earlier.change_text} {done} at {turned_at:%Y-%m-%d %H:%M} UTC: one knob is not turned both ways "
                f"within {OPPOSITE_HOURS:g} h",
                is_held=True,
            )
        if entry.state is LedgerState.APPLIED:
            return Refused(
                f"the effect of {earlier.change_text} is still being measured: one change at a time", is_held=True
            )
    return None


def _build(
    rule: Rule, group: Group, measures: Measures, sized: Sized, at: datetime, findings: Sequence[Finding]
) -> Recommendation:
    current = {sized.flag.flag: sized.current}
    proposed = {sized.flag.flag: sized.proposed}
    now, then = render(sized.flag, sized.current), render(sized.flag, sized.proposed)
    return Recommendation(
        id=recommendation_id(group.subject, rule.name, measures.config_hash, proposed),
        rule=rule.name,
        kind=rule.kind,
        knob=rule.knob,
        knob_group=GROUPS[rule.knob],
        direction=rule.direction,
        subject=group.subject,
        source=group.source,
        engine=group.context.engine,
        engine_version=group.context.engine_version,
        config_hash=measures.config_hash,
        window_start=measures.window_start,
        made_at=at,
        current=current,
        proposed=proposed,
        change_text=f"{now} -> {then}{sized.note}",
        effects=sized.effects,
        score=sized.effects[0].relief_ratio / rule.risk_weight,
        reason=rule.reason,
        rule_source=rule.source,
        risk=rule.risk,
        verify=rule.verify,
        undo=f"{rule.undo} ({now})",
        quality_gate=sized.quality_gate,
        evidence=evidence(rule, measures),
        finding_ids=tuple(sorted(one.id for one in findings if one.kind in rule.answers)),
        usd_per_hour_change=sized.usd_per_hour_change,
    )


def _is_about(finding: Finding, group: Group) -> bool:
    if finding.subject.kind == "target":
        return finding.subject.name in group.targets
    return finding.subject == group.subject


def _abstain(group: Group, rule: Rule, at: datetime, reason: str) -> RuleAbstention:
    return RuleAbstention(subject=group.subject, rule=rule.name, kind=rule.kind, at=at, reason=reason)
