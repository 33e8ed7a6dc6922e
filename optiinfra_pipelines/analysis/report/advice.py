"""The sections of a report that hold claims: the insight, findings, recommendations, and how right past advice was.

Pure. Nouns in, sections out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime

from optiinfra_pipelines.analysis.report.document import Card, Grid, Part, Section, Tone, Words
from optiinfra_pipelines.analysis.report.values import at, change, digits, duration, interval, value
from optiinfra_pipelines.domain.evidence import Signal
from optiinfra_pipelines.domain.findings import Abstention, Finding, Severity
from optiinfra_pipelines.domain.insights import Insight, Sentence
from optiinfra_pipelines.domain.recommendations import Accuracy, Effect, Recommendation, RuleAbstention

_NOT_MADE = "Not made yet: the next refresh makes it."
_RANK = {Severity.CRITICAL: 0, Severity.WARNING: 1, Severity.INFO: 2}
_TONES: dict[Severity, Tone] = {
    Severity.CRITICAL: "critical",
    Severity.WARNING: "warning",
    Severity.INFO: "info",
}
# A person on call reads this many; the rest is a table.
MAX_CARDS = 25


def insight_section(insight: Insight | None) -> Section:
    """The narrative with its citations, and who wrote it."""
    title = "In plain words"
    if insight is None:
        return Section(title, [Words(_NOT_MADE, "quiet")])
    narrative = insight.narrative
    parts: list[Part] = [
        Card("info", label, "", _joined(sentences), (("stands on", _cited(insight, sentences)),))
        for label, sentences in (
            ("summary", narrative.summary),
            ("likely root cause", narrative.likely_root_cause),
            ("first action", narrative.first_action),
            ("watch", narrative.watch_items),
        )
        if sentences
    ]
    if insight.writer == "model":
        said = f"Written by {insight.model} at {at(insight.written_at)}; {insight.reason}."
        said += f" {digits(insight.tokens)} tokens." if insight.tokens is not None else " Tokens unknown."
    else:
        said = f"Written from a template at {at(insight.written_at)}, not by a language model: {insight.reason}."
    if insight.evidence.left_out:
        said += f" The writer did not see: {'; '.join(insight.evidence.left_out)}."
    return Section(title, [*parts, Words(said, "quiet")])


def _joined(sentences: Sequence[Sentence]) -> str:
    return " ".join(sentence.text for sentence in sentences)


def _cited(insight: Insight, sentences: Sequence[Sentence]) -> str:
    items = {item.id: item for item in insight.evidence.items}
    cited = dict.fromkeys(name for sentence in sentences for name in sentence.evidence)
    return ", ".join(f"{items[name].title} {items[name].source_id}" for name in cited if name in items)


def findings_section(
    findings: Sequence[Finding] | None, abstentions: Sequence[Abstention] | None, made_at: datetime
) -> Section:
    """Open findings, most severe first, each with its evidence; then what could not be judged."""
    if findings is None:
        return Section("Findings", [Words(_NOT_MADE, "quiet")])
    ranked = sorted(
        (finding for finding in findings if finding.is_open), key=lambda one: (_RANK[one.severity], one.since, one.id)
    )
    parts: list[Part] = [_finding_card(finding, made_at) for finding in ranked[:MAX_CARDS]]
    if len(ranked) > MAX_CARDS:
        parts.append(_more_findings(ranked[MAX_CARDS:]))
    if not ranked:
        parts.append(Words("No finding is open. What was not judged is listed below, if anything.", "quiet"))
    parts.append(_abstentions(abstentions))
    return Section("Findings", parts)


def _finding_card(finding: Finding, made_at: datetime) -> Card:
    facts = [
        ("since", f"{at(finding.since)} ({duration(made_at - finding.since)})"),
        ("last seen", at(finding.last_seen_at)),
        ("source", finding.source),
        ("id", finding.id),
    ]
    if finding.caused_by is not None:
        facts.append(("follows from", finding.caused_by))
    facts += [("also seen", f"{one.kind.value} ({one.cause}): {one.summary}") for one in finding.consequences]
    return Card(
        _TONES[finding.severity],
        finding.severity.value,
        f"{finding.subject}: {finding.kind.value} ({finding.cause})",
        finding.summary,
        tuple(facts),
        (evidence_grid(finding.evidence),),
    )


def evidence_grid(signals: Sequence[Signal]) -> Grid:
    """Each signal with value, threshold, window, and the rows it can be fetched from."""
    return Grid(
        ("signal", "value", "held against", "window", "from"),
        tuple(
            (
                signal.name,
                value(signal.value, signal.unit),
                "nothing" if signal.threshold is None else value(signal.threshold, signal.unit),
                f"{duration(signal.window_end - signal.window_start)} to {at(signal.window_end)}",
                f"{signal.statistic}({signal.column}) of {signal.table} where "
                + " and ".join(f"{key} = {text}" for key, text in signal.keys),
            )
            for signal in signals
        ),
        title="Evidence",
        numeric=frozenset({1, 2}),
        is_brief=False,
    )


def _more_findings(findings: Sequence[Finding]) -> Grid:
    return Grid(
        ("severity", "subject", "kind", "since", "what"),
        tuple(
            (one.severity.value, str(one.subject), f"{one.kind.value} ({one.cause})", at(one.since), one.summary)
            for one in findings
        ),
        title=f"{len(findings)} more findings",
        is_brief=False,
    )


def _abstentions(abstentions: Sequence[Abstention] | None) -> Grid:
    groups = Counter((one.kind.value, one.reason) for one in abstentions or ())
    subjects: dict[tuple[str, str], list[str]] = {}
    for one in abstentions or ():
        subjects.setdefault((one.kind.value, one.reason), []).append(str(one.subject))
    return Grid(
        ("kind", "why not judged", "subjects", "such as"),
        tuple(
            (kind, reason, digits(count), ", ".join(subjects[kind, reason][:3]))
            for (kind, reason), count in groups.most_common()
        ),
        title="Not judged",
        note="Neither a finding nor a clean bill.",
        numeric=frozenset({2}),
        empty="everything was judged" if abstentions is not None else "not known",
        is_brief=False,
    )


def recommendations_section(
    recommendations: Sequence[Recommendation] | None, refusals: Sequence[RuleAbstention] | None
) -> Section:
    """Changes in their order, each with effect, risk, check and undo; then why other rules propose nothing."""
    if recommendations is None:
        return Section("Recommendations", [Words(_NOT_MADE, "quiet")])
    parts: list[Part] = [_recommendation_card(one, place) for place, one in enumerate(recommendations[:MAX_CARDS], 1)]
    if len(recommendations) > MAX_CARDS:
        parts.append(Words(f"{len(recommendations) - MAX_CARDS} more are in the ledger.", "quiet"))
    if not recommendations:
        parts.append(Words("No change is recommended.", "quiet"))
    if refusals:
        groups = Counter((one.rule, one.reason) for one in refusals)
        parts.append(
            Grid(
                ("rule", "why it proposes nothing", "subjects"),
                tuple((rule, reason, digits(count)) for (rule, reason), count in groups.most_common(20)),
                title="Rules that declined",
                note=f"{len(groups) - 20} more reasons are not shown." if len(groups) > 20 else "",
                numeric=frozenset({2}),
                is_brief=False,
            )
        )
    return Section("Recommendations", parts)


def _recommendation_card(one: Recommendation, place: int) -> Card:
    usd = one.usd_per_hour_change
    facts = [
        ("why", one.reason),
        ("risk", one.risk),
        ("verify", one.verify),
        ("undo", one.undo),
        ("quality gate", one.quality_gate or "none needed"),
        ("cost", "frees or takes no whole GPU" if usd is None else change(usd, "USD/h")),
        ("stands on", f"{duration(one.made_at - one.window_start)} to {at(one.made_at)}, {one.source} data"),
        ("rule", f"{one.rule} ({one.rule_source})"),
        ("findings", ", ".join(one.finding_ids) or "none"),
        ("id", one.id),
    ]
    return Card(
        "info",
        f"{place}",
        f"{one.subject}: {one.change_text}",
        "",
        tuple(facts),
        (effects_grid(one.effects), evidence_grid(one.evidence)),
    )


def effects_grid(effects: Sequence[Effect]) -> Grid:
    """Before, and the interval of the expected change and of the value after it."""
    return Grid(
        ("signal", "before", "change", "after", "how obtained"),
        tuple(
            (
                effect.signal,
                value(effect.before, effect.unit),
                f"{change(effect.change_low, effect.unit)} to {change(effect.change_high, effect.unit)}",
                interval(effect.before + effect.change_low, effect.before + effect.change_high, effect.unit),
                f"{effect.basis.value}: {effect.derivation}",
            )
            for effect in effects
        ),
        title="Expected effect on the mean",
        numeric=frozenset({1, 2, 3}),
    )


def accuracy_section(accuracy: Sequence[Accuracy] | None) -> Section:
    """How right past advice was; a share only where enough was measured."""
    title = "How right past advice was"
    if accuracy is None:
        return Section(title, [Words(_NOT_MADE, "quiet")])
    return Section(
        title,
        [
            Grid(
                ("kind", "rule", "measured", "right direction", "inside its interval", "realized", "what that says"),
                tuple(_accuracy_row(one) for one in accuracy),
                note="Shares with their 95 % interval; none where fewer were measured than a share needs.",
                numeric=frozenset({2, 3, 4, 5}),
                empty="No recommendation has been applied and measured yet, so nothing is called accurate.",
            )
        ],
    )


def _accuracy_row(one: Accuracy) -> tuple[str, ...]:
    def share(middle: float | None, low: float | None, high: float | None) -> str:
        if middle is None or not one.is_enough:
            return f"unknown (needs {one.minimum_n})"
        return f"{value(middle, 'ratio')} ({interval(low, high, 'ratio')})"

    return (
        one.kind,
        one.rule,
        f"{one.n} of {one.applied_n} applied",
        share(one.right_sign_share_ratio, one.right_sign_low_ratio, one.right_sign_high_ratio),
        share(one.coverage_share_ratio, one.coverage_low_ratio, one.coverage_high_ratio),
        "unknown" if one.realized_usd_per_hour is None else change(one.realized_usd_per_hour, "USD/h"),
        one.says,
    )
