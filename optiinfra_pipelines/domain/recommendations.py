"""What to change: recommendations with effect, basis and evidence; refusals; and the life of each in the ledger.

Nouns and the table of a recommendation's life. Deciding is `analysis.recommendations.derive`, the ledger's rules are
`analysis.ledger.life`, storing is `resources.ledger.store`. Making a change is a rollout's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, Field, NonNegativeInt, model_validator

from optiinfra_pipelines.domain.base import Engine, Frozen, Ratio, Source
from optiinfra_pipelines.domain.evidence import Signal
from optiinfra_pipelines.domain.findings import Subject
from optiinfra_pipelines.domain.rollouts import NEEDS_QUALITY_GATE, Change, KnobGroup


class ChangeKind(StrEnum):
    """The closed list of what can be proposed."""

    KV_CACHE_SIZE = "KV_CACHE_SIZE"
    KV_CACHE_DTYPE = "KV_CACHE_DTYPE"
    KV_BLOCK_SIZE = "KV_BLOCK_SIZE"
    PREFIX_CACHING = "PREFIX_CACHING"
    OFFLOAD_TIER = "OFFLOAD_TIER"
    MAX_SEQUENCES = "MAX_SEQUENCES"
    TOKEN_BUDGET = "TOKEN_BUDGET"
    CHUNKED_PREFILL = "CHUNKED_PREFILL"
    FRONTEND = "FRONTEND"
    ADMISSION = "ADMISSION"
    QUANTIZATION = "QUANTIZATION"
    PARALLELISM = "PARALLELISM"
    MAX_MODEL_LEN = "MAX_MODEL_LEN"
    ROUTING = "ROUTING"
    REPLICAS = "REPLICAS"
    CONSOLIDATION = "CONSOLIDATION"
    CLOCKS = "CLOCKS"
    MEASUREMENT = "MEASUREMENT"


class Basis(StrEnum):
    """How an expected effect was obtained. There is no entry for a guess: without a basis a rule abstains."""

    ARITHMETIC = "arithmetic"
    HISTORY = "own history"
    PROFILE = "profile"


class Effect(Frozen):
    """What a change should do to one signal: the change of its mean, in its unit, as an interval.

    signal: a name of `analysis.ledger.effect.SIGNALS`, so that it can be measured afterwards. before: its value in the
    window that the recommendation stands on. derivation: the arithmetic or the data, in words and numbers.
    """

    signal: str
    unit: str
    before: float = Field(allow_inf_nan=False)
    change_low: float = Field(allow_inf_nan=False)
    change_high: float = Field(allow_inf_nan=False)
    basis: Basis
    derivation: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.change_low > self.change_high:
            raise ValueError(f"interval from {self.change_low} to {self.change_high} is upside down")
        return self

    @property
    def relief_ratio(self) -> float:
        """Size of the middle of the interval against the value before, at most 1; 1 where nothing was before."""
        middle = abs(self.change_low + self.change_high) / 2
        return 1.0 if middle and not self.before else min(1.0, middle / abs(self.before)) if middle else 0.0


class Recommendation(Frozen):
    """One change to one subject, with everything needed to judge, make, check and undo it.

    current, proposed: engine flags without leading dashes as a rollout takes them; None: flag absent or not known.
    config_hash: the configuration it was made for; another one makes it void. knob: what the flags turn, so that
    nothing else turns it the same day. score: expected effect per risk, to order by. made_at: end of the window.
    """

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    rule: str
    kind: ChangeKind
    knob: str
    knob_group: KnobGroup
    direction: Literal["loosen", "tighten", "neutral"]
    subject: Subject
    source: Source
    engine: Engine | None
    engine_version: str | None
    config_hash: str | None
    window_start: AwareDatetime
    made_at: AwareDatetime
    current: dict[str, str | None]
    proposed: dict[str, str | None]
    change_text: str = Field(description="Current -> proposed with exact flags, for a person.")
    effects: Annotated[tuple[Effect, ...], Field(min_length=1)]
    score: Annotated[float, Field(ge=0)]
    reason: str
    rule_source: str
    risk: str
    verify: str
    undo: str
    quality_gate: str | None = None
    evidence: Annotated[tuple[Signal, ...], Field(min_length=1)]
    finding_ids: tuple[str, ...] = ()
    usd_per_hour_change: float | None = Field(default=None, description="None when it frees or costs no whole GPU.")

    @model_validator(mode="after")
    def _gated(self) -> Self:
        if self.knob_group in NEEDS_QUALITY_GATE and not self.quality_gate:
            raise ValueError(f"{self.kind} changes precision and needs a quality gate")
        return self

    def to_change(self) -> Change:
        """What a rollout takes. ValueError for a recommendation that is not a change of one deployment's flags."""
        if self.subject.kind != "deployment" or self.kind in NOT_FLAGS:
            raise ValueError(f"{self.kind} of {self.subject} is not a change of a deployment's flags")
        return Change(
            deployment=self.subject.name,
            engine=self.engine,
            knob_group=self.knob_group,
            current=self.current,
            proposed=self.proposed,
        )


# Changes that a person or another part makes: nothing a rollout of flags could do.
NOT_FLAGS = frozenset({ChangeKind.ROUTING, ChangeKind.REPLICAS, ChangeKind.CONSOLIDATION, ChangeKind.CLOCKS})


class RuleAbstention(Frozen):
    """Why a rule that could have applied proposes nothing."""

    subject: Subject
    rule: str
    kind: ChangeKind | None
    at: AwareDatetime
    reason: str


def recommendation_id(subject: Subject, rule: str, config_hash: str | None, proposed: Mapping[str, str | None]) -> str:
    """16 hex digits, the same on every machine and at every replay: subject, rule, configuration and proposed flags."""
    text = json.dumps([subject.kind, subject.name, rule, config_hash, sorted(proposed.items())], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class LedgerState(StrEnum):
    """Where a recommendation is in its life."""

    OPEN = "open"
    SUPERSEDED = "superseded"
    EXPIRED = "expired"
    PROPOSED = "proposed"
    APPLIED = "applied"
    VERIFIED = "verified"
    REFUTED = "refuted"
    UNVERIFIABLE = "unverifiable"


class LedgerEventKind(StrEnum):
    """What can happen to it."""

    SEEN = "seen"
    SUPERSEDED = "superseded"
    EXPIRED = "expired"
    PROPOSED = "proposed"
    WITHDRAWN = "withdrawn"
    APPLIED = "applied"
    ROLLED_BACK = "rolled_back"
    MEASURED_EARLY = "measured_early"
    MEASURED_RIGHT = "measured_right"
    MEASURED_WRONG = "measured_wrong"
    MEASURED_UNCLEAR = "measured_unclear"


_S, _K = LedgerState, LedgerEventKind
# State and event -> next state. What is not listed changes nothing and is refused with a reason: the states after a
# measurement are final, and what was never applied cannot be measured.
TRANSITIONS: Mapping[tuple[LedgerState, LedgerEventKind], LedgerState] = MappingProxyType(
    {
        (_S.OPEN, _K.SEEN): _S.OPEN,
        (_S.OPEN, _K.SUPERSEDED): _S.SUPERSEDED,
        (_S.OPEN, _K.EXPIRED): _S.EXPIRED,
        (_S.OPEN, _K.PROPOSED): _S.PROPOSED,
        (_S.OPEN, _K.APPLIED): _S.APPLIED,
        # The condition came back under the same configuration.
        (_S.SUPERSEDED, _K.SEEN): _S.OPEN,
        (_S.EXPIRED, _K.SEEN): _S.OPEN,
        # Somebody acted on it late: what it did is worth knowing all the same.
        (_S.SUPERSEDED, _K.APPLIED): _S.APPLIED,
        (_S.EXPIRED, _K.APPLIED): _S.APPLIED,
        (_S.PROPOSED, _K.SEEN): _S.PROPOSED,
        (_S.PROPOSED, _K.WITHDRAWN): _S.OPEN,
        (_S.PROPOSED, _K.EXPIRED): _S.EXPIRED,
        (_S.PROPOSED, _K.APPLIED): _S.APPLIED,
        # What the first minutes show is told and decides nothing.
        (_S.APPLIED, _K.MEASURED_EARLY): _S.APPLIED,
        (_S.APPLIED, _K.MEASURED_RIGHT): _S.VERIFIED,
        (_S.APPLIED, _K.MEASURED_WRONG): _S.REFUTED,
        (_S.APPLIED, _K.MEASURED_UNCLEAR): _S.UNVERIFIABLE,
        # Taken back before it could be measured.
        (_S.APPLIED, _K.ROLLED_BACK): _S.UNVERIFIABLE,
    }
)
FINAL = frozenset({_S.VERIFIED, _S.REFUTED, _S.UNVERIFIABLE})


class LedgerEvent(Frozen):
    """One thing that happened to one recommendation; the log of them is the ledger."""

    recommendation_id: str
    at: AwareDatetime
    kind: LedgerEventKind
    reason: Annotated[str, Field(min_length=1)]
    detail: dict[str, str | float | int | None] = Field(default_factory=dict)


class LedgerEntry(Frozen):
    """A recommendation and where it stands, folded from its events.

    changing_since: when its rollout began, from when on part of the traffic may have had the change; None where it came
    all at once.
    """

    recommendation: Recommendation
    state: LedgerState
    state_at: AwareDatetime
    last_seen_at: AwareDatetime
    applied_at: AwareDatetime | None = None
    changing_since: AwareDatetime | None = None
    replaced_by: str | None = None


class Grade(StrEnum):
    """How a realized effect was told apart from everything else that changed."""

    CONCURRENT = "concurrent replicas left unchanged"
    BEFORE_AFTER = "before and after, adjusted for load and mix (weaker: anything else that changed is in it)"


class RealizedEffect(Frozen):
    """What the signal really did, in its unit: an estimate with its interval, and how it was measured."""

    recommendation_id: str
    signal: str
    unit: str
    change: float
    change_low: float
    change_high: float
    level_ratio: Ratio
    grade: Grade
    periods_before: NonNegativeInt
    periods_after: NonNegativeInt
    replicas_changed: NonNegativeInt
    replicas_unchanged: NonNegativeInt
    adjusted_for: tuple[str, ...]
    measured_at: AwareDatetime
    usd_per_hour: float | None = None


class Accuracy(Frozen):
    """How right one kind of change and rule has been. Shares are None without any measurement.

    is_enough: whether n reaches the least at which a share may be quoted; `says` never calls fewer accurate.
    """

    kind: str
    rule: str
    n: NonNegativeInt
    minimum_n: NonNegativeInt
    is_enough: bool
    right_sign_share_ratio: Ratio | None
    right_sign_low_ratio: Ratio | None
    right_sign_high_ratio: Ratio | None
    coverage_share_ratio: Ratio | None
    coverage_low_ratio: Ratio | None
    coverage_high_ratio: Ratio | None
    concurrent_n: NonNegativeInt
    applied_n: NonNegativeInt
    unverifiable_n: NonNegativeInt
    realized_usd_per_hour: float | None
    says: str
