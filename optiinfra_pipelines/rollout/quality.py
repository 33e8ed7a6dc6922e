"""Does the candidate still answer as well? A fixed set of prompts with known answers, candidate against baseline.

Pure. Made for what no latency shows: fewer bits in weights or in the KV cache. Both arms answer the same prompts
without sampling, the baseline twice: engines batch differently each time and are not quite deterministic, so a prompt
on which the baseline contradicts itself says nothing of the candidate. Of the others, only those that exactly one arm
gets right tell them apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from pydantic import Field
from scipy.stats import beta, binomtest

from optiinfra_pipelines.domain.base import Frozen
from optiinfra_pipelines.domain.verdicts import VerdictKind

# Fewer prompts cannot show a loss of one answer in ten.
MIN_PROMPTS = 20
# One answer in a hundred may go either way by rounding alone.
ACCEPTED_LOSS_RATIO = 0.01
# What must be shown with 95 % confidence: of a hundred answers that the baseline has right, the candidate loses at most
# so many more than it wins. 26 prompts without a loss show it, 40 with one; a stricter bound needs hundreds.
MOST_LOST_RATIO = 0.12
# Of the 5 % error, 4 go to the answers lost and 1 to those won.
_LOST_ERROR, _WON_ERROR = 0.04, 0.01
# A baseline that contradicts itself on more than one prompt in five is no measure.
MOST_UNSTEADY_RATIO = 0.2
# A baseline that knows fewer than half of the answers is the wrong baseline, or these are the wrong prompts.
MIN_BASELINE_RATIO = 0.5


class Prompt(Frozen):
    """One prompt. expect: regular expression that a right answer contains, case aside."""

    prompt: str = Field(min_length=1)
    expect: str = Field(min_length=1)


class Quality(Frozen):
    """What the comparison came to. most_lost_ratio: 95 % upper bound of answers lost less those won, per prompt.

    INCONCLUSIVE: these prompts, or this baseline, cannot show whether the candidate lost anything.
    """

    kind: VerdictKind
    reason: str
    most_lost_ratio: float | None = None


def read_prompts(text: str) -> list[Prompt]:
    """JSON lines to prompts. ValueError names the line and what is wrong with it."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompt = Prompt.model_validate(json.loads(line))
            re.compile(prompt.expect)
        except (ValueError, re.error) as error:
            raise ValueError(f"line {number} is no prompt like {{'prompt': ..., 'expect': ...}}: {error}") from error
        found.append(prompt)
    if len(found) < MIN_PROMPTS:
        raise ValueError(f"{len(found)} prompts; at least {MIN_PROMPTS} are needed to show a loss")
    return found


def compare(
    prompts: Sequence[Prompt],
    answers: Sequence[tuple[str | None, str | None]],
    again: Sequence[str | None] | None = None,
) -> Quality:
    """Judge answers of (candidate, baseline) to each prompt. None is no answer, which is a wrong one.

    again: the baseline's second answers. PASS needs both: no loss beyond one in a hundred that does not look like
    chance, and a loss of more than MOST_LOST_RATIO excluded; a candidate that loses more passes at most once in twenty.
    """
    first = [_is_right(one, theirs) for one, (_, theirs) in zip(prompts, answers, strict=True)]
    second = first if again is None else [_is_right(one, text) for one, text in zip(prompts, again, strict=True)]
    right = [
        (_is_right(one, ours), theirs)
        for one, (ours, _), theirs, repeated in zip(prompts, answers, first, second, strict=True)
        if theirs == repeated
    ]
    unsteady = len(prompts) - len(right)
    if unsteady > MOST_UNSTEADY_RATIO * len(prompts):
        why = f"the baseline contradicts itself on {unsteady} of {len(prompts)} prompts at temperature 0; use others"
        return Quality(kind=VerdictKind.INCONCLUSIVE, reason=why)
    ours, theirs = sum(one for one, _ in right), sum(other for _, other in right)
    lost = sum(1 for one, other in right if other and not one)
    won = sum(1 for one, other in right if one and not other)
    counts = f"{ours} of {len(right)} right, the baseline {theirs}"
    counts += f", {unsteady} left out as it contradicts itself on them" if unsteady else ""
    if theirs < MIN_BASELINE_RATIO * len(right):
        reason = f"{counts}: the baseline fails these prompts itself; use others"
        return Quality(kind=VerdictKind.INCONCLUSIVE, reason=reason)
    most = most_lost(lost, won, len(right))
    # Beyond the accepted loss a difference must look like chance to be let through (one-sided sign test): one lost
    # answer does, two lost and none won do not.
    chance = float(binomtest(lost, lost + won, 0.5, alternative="greater").pvalue) if lost + won else 1.0
    is_equal = ours >= theirs - ACCEPTED_LOSS_RATIO * len(right) or chance > 0.3
    told = f"{counts}; {lost} lost, {won} won, chance {chance:.2f}; at most {most:.1%} lost with 95 % confidence"
    if is_equal and most > MOST_LOST_RATIO:
        told += f", {MOST_LOST_RATIO:.0%} must be shown: set more prompts"
    kind = VerdictKind.PASS if most <= MOST_LOST_RATIO else VerdictKind.INCONCLUSIVE
    return Quality(kind=kind if is_equal else VerdictKind.FAIL, reason=told, most_lost_ratio=most)


def most_lost(lost: int, won: int, prompts: int) -> float:
    """95 % upper bound of the share of answers lost less the share won, from exact (Clopper-Pearson) bounds of each."""
    upper = 1.0 if lost >= prompts else float(beta.ppf(1 - _LOST_ERROR, lost + 1, prompts - lost))
    lower = float(beta.ppf(_WON_ERROR, won, prompts - won + 1)) if won else 0.0
    return upper - lower


def _is_right(prompt: Prompt, answer: str | None) -> bool:
    return answer is not None and re.search(prompt.expect, answer, re.IGNORECASE) is not None
