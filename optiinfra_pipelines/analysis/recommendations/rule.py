"""What a tuning rule is: symptom, change, risk, how to check and undo; and whether it holds for one target.

The rules themselves are `rules` and, about the KV cache's memory, `rules_memory`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from optiinfra_pipelines.analysis.recommendations.flags import Knob
from optiinfra_pipelines.analysis.recommendations.measures import Measures
from optiinfra_pipelines.domain.findings import FindingKind
from optiinfra_pipelines.domain.recommendations import ChangeKind

Operator = Literal[">", ">=", "<", "<="]


@dataclass(frozen=True)
class Condition:
    """One measure against one number, in the measure's unit."""

    measure: str
    operator: Operator
    threshold: float
    reason: str

    def holds(self, value: float) -> bool:
        match self.operator:
            case ">":
                return value > self.threshold
            case ">=":
                return value >= self.threshold
            case "<":
                return value < self.threshold
            case "<=":
                return value <= self.threshold


@dataclass(frozen=True)
class Rule:
    """One symptom and one change. after: rules that must have had nothing to propose first. risk_weight: 1 (undone in
    a restart, no request lost) to 5 (another model to the users); expected effect is divided by it.
    """

    name: str
    kind: ChangeKind
    knob: Knob
    sizing: str
    direction: Literal["loosen", "tighten", "neutral"]
    answers: tuple[FindingKind, ...]
    conditions: tuple[Condition, ...]
    reason: str
    risk: str
    risk_weight: int
    verify: str
    undo: str
    source: str
    after: tuple[str, ...] = ()
    min_window_seconds: float = 0.0


@dataclass(frozen=True)
class Checked:
    """What one rule says of one target. unknown: measures without a value that could still make it hold."""

    rule: Rule
    holds: bool
    unknown: tuple[str, ...]


# Half the samples: a queue that stands, not one that a burst leaves behind.
QUEUED = Condition("waiting_share_ratio", ">=", 0.5, "requests wait in at least half the samples")
BELOW_CEILING = Condition("at_ceiling_ratio", "<", 0.9, "fewer run than could while others wait")
RESTART = "A restart per replica: minutes without it and a cold prefix cache."
UNDO = "Put the flag back to its current value and restart; replicas left unchanged carry the load meanwhile."


def check(rule: Rule, measures: Measures) -> Checked:
    """Whether a rule holds for one target. A condition that fails settles it, whatever else is unknown."""
    unknown: list[str] = []
    for condition in rule.conditions:
        value = measures[condition.measure]
        if value is None:
            unknown.append(condition.measure)
        elif not condition.holds(value):
            return Checked(rule, False, ())
    return Checked(rule, not unknown, tuple(unknown))
