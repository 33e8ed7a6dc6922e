"""Who may approve, what may start, and when a share may grow: approvals, freeze windows, blast radius.

Pure; the clock and secrets are arguments. Each check answers None or the reason for its refusal, with the remedy.
Taking traffic away from a candidate is never asked about here: going back is always allowed.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from optiinfra_pipelines.domain.people import SERVICE, same_person, secret_name
from optiinfra_pipelines.domain.rollout_policy import RolloutPolicy
from optiinfra_pipelines.domain.rollouts import (
    HOLDING,
    Approval,
    PauseReason,
    Proposal,
    Rollout,
    RolloutState,
    Step,
)
from optiinfra_pipelines.rollout.present import present_flags, stale_faults
from optiinfra_pipelines.rollout.proposal import faults, proposal_hash

# Clocks of one host's processes agree to well under a second; a stamp from further ahead means that the clock jumped.
CLOCK_SLACK = timedelta(seconds=60)
# So many digits of the hash cannot be met by chance or by a hurried edit.
MIN_HASH_DIGITS = 12


def approval_code(secret: str, full_hash: str) -> str:
    """What proves an approver: HMAC-SHA256 of the proposal's hash under their secret, 64 hex digits.

    The secret itself never enters a run's config, where Dagster would keep and show it. By hand:
    printf %s <hash> | openssl dgst -sha256 -hmac <secret>
    """
    return hmac.new(secret.encode(), full_hash.encode(), hashlib.sha256).hexdigest()


def approval_refusal(
    rollout: Rollout,
    *,
    approver: str,
    stated_hash: str,
    code: str,
    now: datetime,
    policy: RolloutPolicy,
    environ: Mapping[str, str],
    others: Sequence[Rollout],
) -> str | None:
    """Why this person may not approve this proposal now; None when they may. others: all other rollouts."""
    if rollout.position.state is not RolloutState.PENDING_APPROVAL:
        return f"the rollout is {rollout.position}; only one that waits for approval can be approved"
    return (
        _person_refusal(rollout, approver, policy)
        or _hash_refusal(rollout, stated_hash)
        or _code_refusal(rollout, approver, code, policy, environ)
        or _clock_refusal(rollout.proposal.created_at, now, "proposal")
        or _policy_refusal(rollout, now, policy, others)
    )


def start_refusal(rollout: Rollout, *, now: datetime, policy: RolloutPolicy, others: Sequence[Rollout]) -> str | None:
    """Why an approved rollout may not start now, however it was launched; None when it may."""
    if rollout.position.state is not RolloutState.APPROVED:
        return f"the rollout is {rollout.position}, not APPROVED"
    return approval_fault(rollout, now) or _policy_refusal(rollout, now, policy, others)


def approval_fault(rollout: Rollout, now: datetime, *, may_be_old: bool = False) -> str | None:
    """Why the approval on a row does not cover the proposal on it. may_be_old: it has started within its time."""
    approval = rollout.approval
    if approval is None:
        return "nobody has approved it; launch approve_rollout"
    actual = proposal_hash(rollout.proposal)
    if not approval.proposal_hash == actual == rollout.proposal_hash:
        return (
            f"the proposal was edited after its approval: approved {approval.proposal_hash[:12]}, it is now "
            f"{actual[:12]}; propose and approve it anew"
        )
    if same_person(approval.approver, rollout.proposal.requester):
        return f"{approval.approver} requested and approved it; another person must approve"
    if may_be_old:
        return None
    if now >= approval.expires_at:
        return f"the approval expired at {approval.expires_at.isoformat()}; propose it anew"
    return _clock_refusal(approval.approved_at, now, "approval")


def step_refusal(
    rollout: Rollout, step: Step, present_percent: float, *, now: datetime, policy: RolloutPolicy
) -> tuple[PauseReason, str] | None:
    """Why a share may not grow to a step's now. A step that does not grow is never refused."""
    if step.percent <= present_percent:
        return None
    frozen = freeze_of(rollout, now, policy)
    if frozen is not None:
        return PauseReason.FREEZE, frozen
    # A step that runs again after weight 0 is no rise beyond the plan: what counts is the share before it.
    reached = max((one.percent for one in rollout.steps[: rollout.position.step]), default=0.0)
    radius = policy.blast_radius
    limit = radius.max_increase_percent if reached > 0 else radius.max_first_percent
    increase = step.percent - max(reached, present_percent)
    if increase > limit:
        return (
            PauseReason.BLAST_RADIUS,
            f"the step adds {increase:g} percentage points, the blast radius allows {limit:g}",
        )
    return None


def freeze_of(rollout: Rollout, now: datetime, policy: RolloutPolicy) -> str | None:
    """The freeze window that holds a rollout now; None for one that takes another back."""
    if rollout.proposal.undoes is not None:
        return None
    for window in policy.freeze_windows:
        if window.holds(now):
            return f"freeze window {window.name} holds until {window.until:%H:%M} {window.time_zone}"
    return None


def approve(rollout: Rollout, approver: str, now: datetime, policy: RolloutPolicy, comment: str, code: str) -> Approval:
    """The approval to put on the row, once `approval_refusal` has none."""
    return Approval(
        approver=approver.strip(),
        proposal_hash=rollout.proposal_hash,
        approved_at=now,
        expires_at=now + timedelta(hours=policy.approval_hours),
        comment=comment,
        is_token_checked=bool(code),
    )


def _person_refusal(rollout: Rollout, approver: str, policy: RolloutPolicy) -> str | None:
    if not approver.strip():
        return "an approval needs a name"
    if same_person(approver, rollout.proposal.requester):
        return f"{approver} requested it; another person must approve"
    if same_person(approver, SERVICE):
        return f"{SERVICE} executes rollouts and may not approve them"
    if policy.approvers and not any(same_person(approver, name) for name in policy.approvers):
        return f"{approver} is not among the approvers: {', '.join(policy.approvers)}"
    return None


def _hash_refusal(rollout: Rollout, stated: str) -> str | None:
    stated = stated.strip().lower()
    actual = proposal_hash(rollout.proposal)
    if actual != rollout.proposal_hash:
        return (
            f"the stored proposal was edited: it was {rollout.proposal_hash[:12]}, it is {actual[:12]}; propose it anew"
        )
    if len(stated) < MIN_HASH_DIGITS or not actual.startswith(stated):
        return f"proposal_hash {stated or 'is missing'}: read the proposal, then copy its hash, {actual}"
    return None


def _code_refusal(
    rollout: Rollout, approver: str, code: str, policy: RolloutPolicy, environ: Mapping[str, str]
) -> str | None:
    name = secret_name(approver)
    secret = environ.get(name, "")
    if not secret:
        if code:
            return f"a code was given, but {name} is not set here, so it cannot be checked; leave it out or set {name}"
        if policy.must_prove_approver:
            return f"approvers must prove themselves: set {name} in the environment and give the code"
        return None
    if not hmac.compare_digest(approval_code(secret, rollout.proposal_hash), code.strip().lower()):
        return (
            f"the code does not prove {approver}: it is HMAC-SHA256 of the proposal's hash under the secret in {name}"
        )
    return None


def _clock_refusal(stamp: datetime, now: datetime, what: str) -> str | None:
    if stamp - now > CLOCK_SLACK:
        return f"the {what} is from {stamp.isoformat()}, which is yet to come: the clock jumped back; correct it first"
    return None


def stale_refusals(proposal: Proposal, policy: RolloutPolicy, others: Sequence[Rollout]) -> list[str]:
    """What a proposal takes for the present flags that completed rollouts left otherwise; others: all other rollouts.

    Only where candidates, and so the replicas after a completed rollout, are started by us: elsewhere a person may have
    changed them since, and the record proves nothing.
    """
    haproxy = policy.of(proposal.change.deployment).haproxy
    if proposal.target != "haproxy" or haproxy is None or haproxy.launch is None:
        return []
    return stale_faults(proposal.change, present_flags(others, proposal.change.deployment, proposal.target))


def _policy_refusal(rollout: Rollout, now: datetime, policy: RolloutPolicy, others: Sequence[Rollout]) -> str | None:
    found = [*faults(rollout.proposal, policy), *stale_refusals(rollout.proposal, policy, others)]
    if found:
        return "; ".join(found)
    holding = [other for other in others if other.position.state in HOLDING and other.rollout_id != rollout.rollout_id]
    for other in others:
        is_unsettled = other.position.state is RolloutState.COMPLETED and not other.is_settled
        if other.deployment == rollout.deployment and is_unsettled:
            return f"rollout {other.rollout_id} is completed, its old replicas are not out of service yet"
    for other in holding:
        if other.deployment == rollout.deployment:
            return f"deployment {rollout.deployment} is held by rollout {other.rollout_id} ({other.position})"
    limit = policy.blast_radius.max_concurrent_rollouts
    running = [other.rollout_id for other in holding if other.position.state is not RolloutState.APPROVED]
    if len(running) >= limit:
        return f"{len(running)} rollouts are in progress ({', '.join(running)}), the blast radius allows {limit}"
    return freeze_of(rollout, now, policy)
