"""A proposal's hash and its faults: what makes a change unfit to be asked approval for.

Pure. The hash covers every field in one canonical form; an approval binds to it, so any edit voids the approval.
"""

from __future__ import annotations

import hashlib
import json

from optiinfra_pipelines.domain.rollout_policy import RolloutPolicy
from optiinfra_pipelines.domain.rollouts import NEEDS_QUALITY_GATE, Change, KnobGroup, Proposal
from optiinfra_pipelines.rollout.knobs import NOT_A_KNOB, group_of, plain


def proposal_hash(proposal: Proposal) -> str:
    """SHA-256 of the proposal as JSON with sorted keys and no spaces, 64 hex digits."""
    text = json.dumps(proposal.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def faults(proposal: Proposal, policy: RolloutPolicy) -> list[str]:
    """Everything that is wrong with a proposal, each with its remedy; empty when it may be asked approval for."""
    return [
        *change_faults(proposal.change),
        *_plan_faults(proposal, policy),
        *_target_faults(proposal, policy),
    ]


def change_faults(change: Change) -> list[str]:
    """Faults of the change alone: nothing changes, more than one knob group, or a flag that is no knob."""
    changed = changed_flags(change)
    if not changed:
        return ["current and proposed are the same; propose another value"]
    found = []
    untouchable = sorted(flag for flag in changed if plain(flag) in NOT_A_KNOB)
    if untouchable:
        found.append(f"{', '.join(untouchable)}: belongs to the replica's place, not to its tuning; leave it out")
    spellings = [plain(flag) for flag in change.proposed]
    twice = sorted({flag for flag in spellings if spellings.count(flag) > 1})
    if twice:
        found.append(f"{', '.join(twice)}: stands twice in two spellings; write each flag once")
    groups = {flag: group_of(flag) for flag in changed}
    unknown = sorted(flag for flag, group in groups.items() if group is None)
    known = {group for group in groups.values() if group is not None}
    if len(known) > 1 or (known and unknown):
        parts = ", ".join(f"{flag} ({group or 'unknown'})" for flag, group in sorted(groups.items()))
        found.append(
            f"more than one knob group: {parts}; propose one rollout for each, so that an effect has one cause"
        )
    elif len(unknown) > 1:
        found.append(f"unknown flags {', '.join(unknown)}: which thing they act on is not known; change one at a time")
    expected = next(iter(known), KnobGroup.OTHER)
    if len(known) <= 1 and not (known and unknown) and change.knob_group is not expected:
        found.append(f"knob_group says {change.knob_group}, the flags are of {expected}; correct one of the two")
    return found


def changed_flags(change: Change) -> tuple[str, ...]:
    """Proposed flags whose value differs from the present one, as they are spelled; those not named stay."""
    before = {plain(flag): value for flag, value in change.current.items()}
    return tuple(sorted(flag for flag, value in change.proposed.items() if before.get(plain(flag)) != value))


def full_flags(change: Change) -> dict[str, str | None]:
    """What the candidate runs with: the proposed flags over the current ones; None for one that must not stand."""
    spelled = {plain(flag): (flag, value) for flag, value in (*change.current.items(), *change.proposed.items())}
    return dict(spelled.values())


def _plan_faults(proposal: Proposal, policy: RolloutPolicy) -> list[str]:
    plan, radius = proposal.plan, policy.blast_radius
    found = []
    if list(plan.percents) != sorted(set(plan.percents)) or not plan.percents:
        found.append(f"percents {list(plan.percents)} do not rise; write such as [1, 5, 25, 50, 100]")
    elif plan.percents[-1] != 100:
        found.append(f"percents end at {plan.percents[-1]:g}; the last step must be 100")
    if plan.percents and plan.percents[0] > radius.max_first_percent:
        found.append(
            f"the first step is {plan.percents[0]:g} %, the blast radius allows {radius.max_first_percent:g} %; "
            "begin smaller"
        )
    rises = [after - before for before, after in zip(plan.percents, plan.percents[1:], strict=False)]
    if rises and max(rises) > radius.max_increase_percent:
        found.append(
            f"a step adds {max(rises):g} percentage points, the blast radius allows {radius.max_increase_percent:g}; "
            "add a step between"
        )
    if plan.candidate_replicas > radius.max_candidate_replicas:
        found.append(
            f"{plan.candidate_replicas} candidate replicas, the blast radius allows {radius.max_candidate_replicas}"
        )
    return found


def _target_faults(proposal: Proposal, policy: RolloutPolicy) -> list[str]:
    settings = policy.of(proposal.change.deployment)
    found = []
    if proposal.target != "dry_run" and getattr(settings, proposal.target) is None:
        found.append(
            f"deployment {proposal.change.deployment} has no {proposal.target} settings; describe them under its "
            "rollouts, or use dry_run"
        )
    has_quality_gate = settings.quality_prompts is not None
    if proposal.change.knob_group in NEEDS_QUALITY_GATE and not has_quality_gate:
        found.append(
            f"{proposal.change.knob_group} changes the answers, which no latency shows: set quality_prompts of "
            f"deployment {proposal.change.deployment} to a file of prompts with known answers"
        )
    return found
