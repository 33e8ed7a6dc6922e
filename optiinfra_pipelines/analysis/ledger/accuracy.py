"""How right recommendations have been, by kind and rule: shares with their intervals, and nothing said below n.

Pure. What was measured is `effect`; the table is `fct_recommendation_accuracy`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from optiinfra_pipelines.analysis.ledger.life import has_right_sign
from optiinfra_pipelines.analysis.recommendations.context import PastEffect
from optiinfra_pipelines.analysis.recommendations.limits import MIN_ACCURACY_N
from optiinfra_pipelines.domain.recommendations import (
    Accuracy,
    Grade,
    LedgerEntry,
    LedgerState,
    RealizedEffect,
)

EVERY = "all"
# Measured changes by one rule from which the range of what they did is a basis for the next.
MIN_PAST_EFFECTS = 5


def accuracy(
    entries: Sequence[LedgerEntry], realized: Mapping[str, RealizedEffect], minimum_n: int = MIN_ACCURACY_N
) -> list[Accuracy]:
    """One row for everything, one a kind (rule 'all') and one a rule. Every measured change counts, unclear ones too:
    leaving those out would count the successes only.
    """
    groups: dict[tuple[str, str], list[LedgerEntry]] = {(EVERY, EVERY): list(entries)}
    for entry in entries:
        one = entry.recommendation
        groups.setdefault((one.kind.value, EVERY), []).append(entry)
        groups.setdefault((one.kind.value, one.rule), []).append(entry)
    return [_row(kind, rule, group, realized, minimum_n) for (kind, rule), group in sorted(groups.items())]


def _row(
    kind: str, rule: str, entries: Iterable[LedgerEntry], realized: Mapping[str, RealizedEffect], minimum_n: int
) -> Accuracy:
    applied = [entry for entry in entries if entry.applied_at is not None]
    measured = [(entry, realized[entry.recommendation.id]) for entry in applied if entry.recommendation.id in realized]
    n = len(measured)
    right = sum(has_right_sign(entry.recommendation.effects[0], effect) for entry, effect in measured)
    covered = sum(
        entry.recommendation.effects[0].change_low <= effect.change <= entry.recommendation.effects[0].change_high
        for entry, effect in measured
    )
    dollars = [effect.usd_per_hour for _, effect in measured if effect.usd_per_hour is not None]
    right_low, right_high = share_interval(right, n)
    covered_low, covered_high = share_interval(covered, n)
    return Accuracy(
        kind=kind,
        rule=rule,
        n=n,
        minimum_n=minimum_n,
        is_enough=n >= minimum_n,
        right_sign_share_ratio=right / n if n else None,
        right_sign_low_ratio=right_low,
        right_sign_high_ratio=right_high,
        coverage_share_ratio=covered / n if n else None,
        coverage_low_ratio=covered_low,
        coverage_high_ratio=covered_high,
        concurrent_n=sum(effect.grade is Grade.CONCURRENT for _, effect in measured),
        applied_n=len(applied),
        unverifiable_n=sum(entry.state is LedgerState.UNVERIFIABLE for entry in applied),
        realized_usd_per_hour=sum(dollars) if dollars else None,
        says=_says(n, minimum_n, right, covered, (right_low, right_high)),
    )


def _says(n: int, minimum_n: int, right: int, covered: int, bounds: tuple[float | None, float | None]) -> str:
    if n < minimum_n:
        return f"too few to say how accurate: {n} of {minimum_n} measured changes"
    low, high = bounds
    return (
        f"right sign in {right} of {n} ({right / n:.0%}, 95 % interval {low:.0%} to {high:.0%}); "
        f"{covered} of {n} effects lay within the stated interval"
    )


def share_interval(hits: int, n: int, level: float = 0.95) -> tuple[float | None, float | None]:
    """Exact (Clopper and Pearson 1934) interval of a share; None without any trial."""
    if not n:
        return None, None
    tail = (1 - level) / 2
    from scipy.stats import beta  # half a second to import: only where it is used

    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


def past_effects(entries: Iterable[LedgerEntry], realized: Mapping[str, RealizedEffect]) -> dict[str, PastEffect]:
    """What earlier changes by each rule did, relative to before: the basis of rules that arithmetic cannot bound."""
    relative: dict[str, list[float]] = {}
    for entry in entries:
        effect = realized.get(entry.recommendation.id)
        before = entry.recommendation.effects[0].before
        if effect is not None and before:
            relative.setdefault(entry.recommendation.rule, []).append(effect.change / abs(before))
    return {
        rule: PastEffect(min(values), max(values), len(values))
        for rule, values in relative.items()
        if len(values) >= MIN_PAST_EFFECTS
    }
