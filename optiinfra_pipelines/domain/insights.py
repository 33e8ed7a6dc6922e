"""Nouns of insights: the evidence a writer may use, what it wrote, and which writer it was.

Frozen and closed; units beside every value. Making the evidence, checking a text against it and the template's text
are `analysis.insights_*`; asking a language model is `resources.insights.writer`. Nothing here can start or approve
anything: an insight is text and the ids of the evidence that each sentence cites.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, StringConstraints

from optiinfra_pipelines.domain.base import Frozen

Writer = Literal["model", "template"]
EvidenceKind = Literal["status", "finding", "recommendation", "abstention"]


class Fact(Frozen):
    """One number of the evidence. `unit` as in the tables: s, ratio, requests, tokens/s, USD/h, ..."""

    name: str
    value: Annotated[float, Field(allow_inf_nan=False)]
    unit: str


class EvidenceItem(Frozen):
    """One claim that a sentence may cite: its facts, its names, the numbers of `says`, and `says` as a whole."""

    id: Annotated[str, StringConstraints(pattern=r"^E\d{1,3}$")]
    kind: EvidenceKind
    source_id: str = Field(description="Id of the finding or recommendation, to fetch its rows again.")
    title: str = Field(description="What it claims: MEMORY_PRESSURE, or the kind of a change.")
    severity: str | None = None
    subject: str | None = Field(default=None, description="What it is about; text of the fleet, never trusted.")
    says: str = Field(description="One sentence of ours about it; it may hold text of the fleet.")
    names: tuple[str, ...] = Field(default=(), description="Targets, hosts, GPUs, models, flags, signals it names.")
    facts: tuple[Fact, ...] = ()


class EvidencePack(Frozen):
    """All that a writer sees, most severe first."""

    items: tuple[EvidenceItem, ...]
    left_out: tuple[str, ...] = Field(default=(), description="What did not fit, in words.")
    roster: tuple[str, ...] = Field(
        default=(), description="Every name and kind there is: one that a sentence uses must be in what it cites."
    )


class Sentence(Frozen):
    """One sentence and the evidence it stands on."""

    text: Annotated[str, StringConstraints(min_length=1, max_length=600)]
    evidence: Annotated[tuple[str, ...], Field(min_length=1, max_length=12)]


Sentences = tuple[Sentence, ...]


class Narrative(Frozen):
    """What both writers write: the shape that the model's reply must have."""

    summary: Annotated[Sentences, Field(min_length=1, max_length=5)]
    likely_root_cause: Annotated[Sentences, Field(min_length=1, max_length=4)]
    first_action: Annotated[Sentences, Field(min_length=1, max_length=3)]
    watch_items: Annotated[Sentences, Field(max_length=6)]


class Insight(Frozen):
    """A narrative, who wrote it on which evidence, and what it cost."""

    narrative: Narrative
    evidence: EvidencePack
    writer: Writer
    reason: str = Field(description="Why this writer: for the template, what kept the model's text away.")
    written_at: datetime
    evidence_hash: str = Field(description="Of everything the writer saw.")
    subjects_hash: str = Field(description="Of which things are claimed, without their numbers.")
    model: str | None = None
    calls: NonNegativeInt = 0
    tokens: NonNegativeInt | None = Field(default=None, description="Billed by the service; None when it did not say.")
    usd: NonNegativeFloat | None = Field(default=None, description="None without a price or without a token count.")
