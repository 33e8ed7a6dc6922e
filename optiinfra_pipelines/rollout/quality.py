"""Does the candidate still answer as well? A fixed set of prompts with known answers, candidate against baseline.

Pure. Made for what no latency shows: fewer bits in weights or in the KV cache. The two arms answer the same prompts
once, without sampling; only prompts that exactly one of them gets right tell them apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from pydantic import Field
from scipy.stats import binomtest

from optiinfra_pipelines.domain.base import Frozen

# Fewer prompts cannot show a loss of one answer in ten.
MIN_PROMPTS = 20
# One answer in a hundred may go either way by rounding alone.
ACCEPTED_LOSS_RATIO = 0.01
# A baseline that knows fewer than half of the answers is the wrong baseline, or these are the wrong prompts.
MIN_BASELINE_RATIO = 0.5


class Prompt(Frozen):
    """One prompt. expect: regular expression that a right answer contains, case aside."""

    prompt: str = Field(min_length=1)
    expect: str = Field(min_length=1)


class Quality(Frozen):
    """What the comparison came to."""

    is_good: bool
    reason: str


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


def compare(prompts: Sequence[Prompt], answers: Sequence[tuple[str | None, str | None]]) -> Quality:
    """Judge answers of (candidate, baseline) to each prompt. None is no answer, which is a wrong one."""
    right = [
        (_is_right(one, ours), _is_right(one, theirs)) for one, (ours, theirs) in zip(prompts, answers, strict=True)
    ]
    ours, theirs = sum(one for one, _ in right), sum(other for _, other in right)
    lost = sum(1 for one, other in right if other and not one)
    won = sum(1 for one, other in right if one and not other)
    counts = f"{ours} of {len(right)} right, the baseline {theirs}"
    if theirs < MIN_BASELINE_RATIO * len(right):
        return Quality(is_good=False, reason=f"{counts}: the baseline fails these prompts itself; use others")
    if ours >= theirs - ACCEPTED_LOSS_RATIO * len(right):
        return Quality(is_good=True, reason=counts)
    # Beyond the accepted loss a difference must look like chance to be let through (one-sided sign test): one lost
    # answer does, two lost and none won do not.
    chance = float(binomtest(lost, lost + won, 0.5, alternative="greater").pvalue)
    return Quality(is_good=chance > 0.3, reason=f"{counts}; {lost} lost, {won} won, chance {chance:.2f}")


def _is_right(prompt: Prompt, answer: str | None) -> bool:
    return answer is not None and re.search(prompt.expect, answer, re.IGNORECASE) is not None
