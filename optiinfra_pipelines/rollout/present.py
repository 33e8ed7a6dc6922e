"""The flags a deployment runs with now, as far as its completed rollouts left them, and what that means for the next.

Pure. The record of the rollouts is the source: it is there when no page tells a flag. Flags that no rollout has touched
are not known here; who changes flags past the rollouts makes the record wrong, and a proposal says so by its `current`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from optiinfra_pipelines.domain.rollouts import Change, Rollout, RolloutState
from optiinfra_pipelines.rollout.knobs import plain


@dataclass(frozen=True)
class Present:
    """The value that a flag was left with, None where it was taken out, and the rollout that did."""

    value: str | None
    rollout_id: str


def present_flags(rollouts: Iterable[Rollout], deployment: str, target: str | None = None) -> dict[str, Present]:
    """By plain name, every flag that completed rollouts of a deployment left; the later one wins.

    target: only those that acted on this kind; none: on anything real. A rehearsal leaves nothing.
    """
    completed = [
        one
        for one in rollouts
        if one.deployment == deployment
        and one.position.state is RolloutState.COMPLETED
        and one.proposal.target != "dry_run"
        and target in (None, "dry_run", one.proposal.target)
    ]
    found: dict[str, Present] = {}
    for one in sorted(completed, key=lambda one: one.updated_at):
        change = one.proposal.change
        for flag, value in (*change.current.items(), *change.proposed.items()):
            found[plain(flag)] = Present(value, one.rollout_id)
    return found


def with_present(change: Change, present: Mapping[str, Present]) -> Change:
    """The change with the present value of each proposed flag that its `current` does not name: the way back."""
    named = {plain(flag) for flag in change.current}
    missing = [flag for flag in change.proposed if plain(flag) not in named and plain(flag) in present]
    if not missing:
        return change
    return change.model_copy(
        update={"current": {**{flag: present[plain(flag)].value for flag in missing}, **change.current}}
    )


def stale_faults(change: Change, present: Mapping[str, Present]) -> list[str]:
    """What `current` says otherwise than the completed rollouts left it, with the remedy."""
    return [
        f"current says {flag} is {_said(value)}, rollout {known.rollout_id} left it at {_said(known.value)}; propose "
        "it anew with that, or leave it out of current"
        for flag, value in change.current.items()
        if (known := present.get(plain(flag))) is not None and known.value != value
    ]


def declared_now(flags: Mapping[str, str], present: Mapping[str, Present]) -> dict[str, str]:
    """Flags as a person once declared them, with those that completed rollouts have changed since."""
    left = {flag: value for flag, value in flags.items() if plain(flag) not in present}
    return left | {flag: known.value for flag, known in present.items() if known.value is not None}


def _said(value: str | None) -> str:
    return "absent" if value is None else repr(value)
