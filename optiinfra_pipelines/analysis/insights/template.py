"""The narrative that needs no language model: the same shape, made of the evidence alone.

Pure. Its text passes the same check as a model's (`grounding`); a test holds that.
"""

from __future__ import annotations

from collections.abc import Sequence

from optiinfra_pipelines.domain.insights import EvidenceItem, EvidencePack, Narrative, Sentence

# Sentence.text holds 600 characters; an item's own sentence takes up to 360 of them.
_MAX_SHOWN = 4


def template_narrative(pack: EvidencePack) -> Narrative:
    """What is claimed, the cause as the worst finding names it, the first recommendation, and what to watch."""
    status = pack.items[0]
    findings = [item for item in pack.items if item.kind == "finding"]
    recommendations = [item for item in pack.items if item.kind == "recommendation"]
    abstentions = [item for item in pack.items if item.kind == "abstention"]
    return Narrative(
        summary=(_says(status), *(_about(item) for item in findings[:_MAX_SHOWN])),
        likely_root_cause=_causes(findings, status),
        first_action=_first_action(findings, recommendations, abstentions, status),
        watch_items=tuple(_about(item) for item in (*findings[_MAX_SHOWN:], *abstentions)[:_MAX_SHOWN]),
    )


def _says(item: EvidenceItem) -> Sentence:
    return Sentence(text=_stopped(item.says), evidence=(item.id,))


def _about(item: EvidenceItem) -> Sentence:
    """The item's own sentence, with its subject before it unless it is named there."""
    if item.subject is None or item.subject in item.says:
        return _says(item)
    return Sentence(text=f"{item.subject}: {_stopped(item.says)}", evidence=(item.id,))


def _stopped(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _causes(findings: Sequence[EvidenceItem], status: EvidenceItem) -> tuple[Sentence, ...]:
    if not findings:
        return (Sentence(text="There is no open finding to explain.", evidence=(status.id,)),)
    worst = findings[0]
    cause = worst.names[0] if worst.subject is None else worst.subject
    return (
        Sentence(
            text=f"The most severe finding is {worst.title} of {cause}; its cause is in what it says, and no further "
            "cause was found.",
            evidence=(worst.id,),
        ),
    )


def _first_action(
    findings: Sequence[EvidenceItem],
    recommendations: Sequence[EvidenceItem],
    abstentions: Sequence[EvidenceItem],
    status: EvidenceItem,
) -> tuple[Sentence, ...]:
    if recommendations:
        return (_about(recommendations[0]),)
    if findings:
        text = f"No change is recommended; look at the evidence of {findings[0].title} first."
        return (Sentence(text=text, evidence=(findings[0].id, status.id)),)
    if abstentions:
        text = "No change is recommended; find out first why judgments were declined."
        return (Sentence(text=text, evidence=(status.id, abstentions[0].id)),)
    return (Sentence(text="No change is recommended.", evidence=(status.id,)),)
