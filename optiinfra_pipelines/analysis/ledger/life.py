"""The life of recommendations: what one more look changes, what counts as applied, what a measurement decides.

Pure. Events in, entries out; the same events in the same order always give the same ledger, so that a replay of
recorded history fills it as live data did. The table of states is `domain.recommendations`, measuring an effect is
`effect`, storing is `resources.ledger.store`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from optiinfra_pipelines.analysis.recommendations.flags import FLAGS
from optiinfra_pipelines.analysis.recommendations.limits import EXPIRE_HOURS
from optiinfra_pipelines.domain.recommendations import (
    FINAL,
    TRANSITIONS,
    ChangeKind,
    Effect,
    LedgerEntry,
    LedgerEvent,
    LedgerEventKind,
    LedgerState,
    RealizedEffect,
    Recommendation,
)
from optiinfra_pipelines.domain.rollouts import Rollout, RolloutState

_WAITING = frozenset({LedgerState.OPEN, LedgerState.PROPOSED})
# Numbers of two looks at one condition differ by noise; this much is another proposal.
SAME_PROPOSAL_RATIO = 0.25


@dataclass(frozen=True)
class Move:
    """What an event does to a state. refusal: why it does nothing; None when it is accepted."""

    state: LedgerState
    refusal: str | None = None


@dataclass(frozen=True)
class Step:
    """What one look adds: new recommendations with the events of their life, and which open ones were seen again."""

    opened: tuple[Recommendation, ...] = ()
    events: tuple[LedgerEvent, ...] = ()
    seen: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConfigChange:
    """A target's configuration became another one."""

    target: str
    changed_at: datetime
    previous_hash: str | None
    config_hash: str


def transition(state: LedgerState, event: LedgerEventKind) -> Move:
    """The next state of any state on any event; one that cannot be leaves the state and says so."""
    after = TRANSITIONS.get((state, event))
    if after is not None:
        return Move(after)
    if state in FINAL:
        return Move(state, f"{state} is final: {event} changes nothing")
    return Move(state, f"{event} does not follow on {state}")


def fold(recommendation: Recommendation, events: Iterable[LedgerEvent]) -> LedgerEntry | None:
    """Where a recommendation stands after its events, in order of time; None before the first."""
    entry: LedgerEntry | None = None
    for event in sorted(events, key=lambda one: (one.at, list(LedgerEventKind).index(one.kind))):
        entry = apply(entry, recommendation, event)
    return entry


def apply(entry: LedgerEntry | None, recommendation: Recommendation, event: LedgerEvent) -> LedgerEntry:
    """The entry after one event; refused events leave it as it is."""
    if entry is None:
        return LedgerEntry(
            recommendation=recommendation, state=LedgerState.OPEN, state_at=event.at, last_seen_at=event.at
        )
    move = transition(entry.state, event.kind)
    if move.refusal is not None:
        return entry
    update: dict[str, object] = {"state": move.state}
    if move.state is not entry.state:
        update["state_at"] = event.at
    if event.kind is LedgerEventKind.SEEN:
        update["last_seen_at"] = max(entry.last_seen_at, event.at)
    if event.kind is LedgerEventKind.APPLIED:
        update["applied_at"] = event.at
        since = event.detail.get("changing_since")
        update["changing_since"] = datetime.fromisoformat(since) if isinstance(since, str) else None
    if event.kind is LedgerEventKind.SUPERSEDED:
        update["replaced_by"] = event.detail.get("replaced_by")
    return entry.model_copy(update=update)


def look(entries: Sequence[LedgerEntry], candidates: Sequence[Recommendation], at: datetime) -> Step:
    """What the candidates of one moment do to the ledger: best first, one open recommendation a subject.

    A candidate that an open entry already says (same rule and configuration, numbers within 25 %) is that entry seen
    again. While an open entry still holds, others of its subject wait; when it no longer does, the best one follows it.
    """
    opened: list[Recommendation] = []
    events: list[LedgerEvent] = []
    seen: list[str] = []
    by_subject: dict[str, list[Recommendation]] = {}
    for candidate in candidates:
        by_subject.setdefault(str(candidate.subject), []).append(candidate)
    known = {entry.recommendation.id: entry for entry in entries}
    for subject, offered in by_subject.items():
        waiting = [e for e in entries if str(e.recommendation.subject) == subject and e.state in _WAITING]
        again = [e for e in waiting if any(_says_the_same(e.recommendation, one) for one in offered)]
        if again:
            seen += [entry.recommendation.id for entry in again]
            continue
        if any(entry.state is LedgerState.PROPOSED for entry in waiting):
            continue
        best = offered[0]
        back = known.get(best.id)
        if back is not None and transition(back.state, LedgerEventKind.SEEN).refusal is not None:
            continue
        if back is None:
            opened.append(best)
        reason = f"score {best.score:.3f}: {best.reason}" if back is None else "its condition is back"
        events.append(LedgerEvent(recommendation_id=best.id, at=at, kind=LedgerEventKind.SEEN, reason=reason))
        events += [_superseded(entry, at, best) for entry in waiting]
    return Step(tuple(opened), tuple(events), tuple(seen))


def lapse(entries: Sequence[LedgerEntry], at: datetime) -> list[LedgerEvent]:
    """Open recommendations whose condition has not been seen for a day are over."""
    limit = timedelta(hours=EXPIRE_HOURS)
    return [
        LedgerEvent(
            recommendation_id=entry.recommendation.id,
            at=at,
            kind=LedgerEventKind.EXPIRED,
            reason=f"its condition was last seen at {entry.last_seen_at:%Y-%m-%d %H:%M} UTC",
        )
        for entry in entries
        if entry.state in _WAITING and at - entry.last_seen_at >= limit
    ]


def detect(
    entry: LedgerEntry,
    changes: Sequence[ConfigChange],
    settings: Mapping[tuple[str, str], Mapping[str, str]],
    at: datetime,
) -> LedgerEvent | None:
    """Whether the first change of configuration since the recommendation was that change, or made it void.

    changes: of the subject's targets, any order. Where the page tells the flag's value, the value decides; where it
    does not, another change of configuration proves nothing about it and the advice, made for the old one, is void.
    """
    advised = entry.recommendation
    if advised.kind is ChangeKind.REPLICAS or entry.state in FINAL or entry.applied_at is not None:
        return None
    later = [
        one
        for one in changes
        if advised.made_at < one.changed_at <= at
        and one.previous_hash == advised.config_hash
        and one.config_hash != advised.config_hash
    ]
    if not later:
        return None
    change = min(later, key=lambda one: (one.changed_at, one.target))
    told = _told(advised, settings.get((change.target, change.config_hash), {}))
    detail: dict[str, str | float | int | None] = {"target": change.target, "config_hash": change.config_hash}
    if told is not None and all(_alike(advised.proposed.get(flag), value, 0.0) for flag, value in told.items()):
        return LedgerEvent(
            recommendation_id=advised.id,
            at=change.changed_at,
            kind=LedgerEventKind.APPLIED,
            reason=f"the page of {change.target} shows {told}",
            detail=detail,
        )
    if entry.state not in _WAITING:
        return None
    shown = "not told by the page" if told is None else f"now {told}"
    return LedgerEvent(
        recommendation_id=advised.id,
        at=change.changed_at,
        kind=LedgerEventKind.SUPERSEDED if entry.state is LedgerState.OPEN else LedgerEventKind.EXPIRED,
        reason=f"the configuration of {change.target} changed otherwise ({shown}); the advice was for the one before",
        detail=detail,
    )


def detect_ceiling(entry: LedgerEntry, running_max: Sequence[tuple[str, datetime, float]]) -> LedgerEvent | None:
    """A raise of batch slots that no page tells, seen by its work: more run than the ceiling let.

    running_max: target, moment and most requests running at it, after the recommendation was made.
    """
    advised = entry.recommendation
    if advised.rule != "max_sequences_up" or entry.applied_at is not None or entry.state in FINAL:
        return None
    ceiling = next((number(flag) for flag in advised.current.values() if flag), None)
    over = [one for one in running_max if ceiling is not None and one[1] > advised.made_at and one[2] > ceiling]
    if not over:
        return None
    target, seen_at, running = min(over, key=lambda one: (one[1], one[0]))
    return LedgerEvent(
        recommendation_id=advised.id,
        at=seen_at,
        kind=LedgerEventKind.APPLIED,
        reason=f"{running:.0f} requests run on {target}, more than the former ceiling of {ceiling:.0f}",
        detail={"target": target, "running": running},
    )


def detect_replicas(entry: LedgerEntry, counts: Sequence[tuple[datetime, int]]) -> LedgerEvent | None:
    """A change of the number of ready replicas to the proposed side. counts: moment and replicas, any order."""
    advised = entry.recommendation
    if advised.kind is not ChangeKind.REPLICAS or entry.applied_at is not None or entry.state in FINAL:
        return None
    now, wanted = (number(one.get("replicas") or "") for one in (advised.current, advised.proposed))
    if now is None or wanted is None:
        return None
    for moment, count in sorted(counts):
        if moment > advised.made_at and (count - now) * (wanted - now) > 0:
            return LedgerEvent(
                recommendation_id=advised.id,
                at=moment,
                kind=LedgerEventKind.APPLIED,
                reason=f"{count} replicas are ready; {now:.0f} were, {wanted:.0f} were advised",
                detail={"replicas": count},
            )
    return None


def spokesmen(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """The rollouts that speak for their recommendations, oldest first.

    Of each recommendation the newest real one, and what takes that back: a rehearsal changed nothing, and an earlier
    attempt must not undo what a later one has come to.
    """
    forward: dict[str, Rollout] = {}
    back: dict[str, Rollout] = {}
    for one in sorted(rollouts, key=lambda one: (one.proposal.created_at, one.proposal.undoes is not None)):
        recommendation = one.proposal.recommendation_id
        if recommendation is None or one.proposal.target == "dry_run":
            continue
        if one.proposal.undoes is None:
            forward[recommendation] = one
            back.pop(recommendation, None)
        else:
            back[recommendation] = one
    return [*forward.values(), *back.values()]


def from_rollout(entry: LedgerEntry, rollout: Rollout) -> LedgerEvent | None:
    """What a rollout of this recommendation reports; None when it says nothing new."""
    is_back = rollout.proposal.undoes is not None
    if is_back and rollout.position.state is not RolloutState.COMPLETED:
        return None
    kinds = {
        RolloutState.PENDING_APPROVAL: LedgerEventKind.PROPOSED,
        RolloutState.APPROVED: LedgerEventKind.PROPOSED,
        RolloutState.IN_PROGRESS: LedgerEventKind.PROPOSED,
        RolloutState.REJECTED: LedgerEventKind.WITHDRAWN,
        RolloutState.COMPLETED: LedgerEventKind.ROLLED_BACK if is_back else LedgerEventKind.APPLIED,
        RolloutState.ROLLED_BACK: LedgerEventKind.ROLLED_BACK
        if entry.state is LedgerState.APPLIED
        else LedgerEventKind.WITHDRAWN,
    }
    kind = kinds.get(rollout.position.state)
    if kind is None or transition(entry.state, kind).refusal is not None:
        return None
    return LedgerEvent(
        recommendation_id=entry.recommendation.id,
        at=rollout.updated_at,
        kind=kind,
        reason=f"rollout {rollout.rollout_id} is {rollout.position}",
        detail={
            "rollout_id": rollout.rollout_id,
            "changing_since": rollout.started_at.isoformat() if rollout.started_at else None,
        },
    )


def decide(effect: Effect, realized: RealizedEffect) -> LedgerEventKind:
    """What a measurement says of a promise.

    Right: the whole realized interval is on the promised side of zero. Wrong: it is on the other side, or it leaves
    the promised interval and holds zero. Anything else is unclear.
    """
    side = _side(effect)
    if side * realized.change_low > 0 and side * realized.change_high > 0:
        return LedgerEventKind.MEASURED_RIGHT
    is_opposite = side * realized.change_low < 0 and side * realized.change_high < 0
    is_apart = realized.change_high < effect.change_low or realized.change_low > effect.change_high
    return LedgerEventKind.MEASURED_WRONG if is_opposite or is_apart else LedgerEventKind.MEASURED_UNCLEAR


def has_right_sign(effect: Effect, realized: RealizedEffect) -> bool:
    """Whether the estimate lies on the promised side of zero."""
    return _side(effect) * realized.change > 0


def _side(effect: Effect) -> int:
    return 1 if effect.change_low + effect.change_high > 0 else -1


def number(text: str) -> float | None:
    """The number in a flag's value; None where it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _told(advised: Recommendation, settings: Mapping[str, str]) -> dict[str, str] | None:
    """The values the page now tells for the advised flags; None when it tells none of them."""
    if advised.engine is None:
        return None
    keys = {flag.flag: flag.setting for flag in FLAGS.get(advised.engine, {}).values() if flag.setting}
    told = {name: settings[keys[name]] for name in advised.proposed if name in keys and keys[name] in settings}
    return told or None


def _says_the_same(one: Recommendation, other: Recommendation) -> bool:
    if (one.rule, one.config_hash, one.subject) != (other.rule, other.config_hash, other.subject):
        return False
    if set(one.proposed) != set(other.proposed):
        return False
    return all(_alike(one.proposed[flag], other.proposed[flag], SAME_PROPOSAL_RATIO) for flag in one.proposed)


def _alike(a: str | None, b: str | None, ratio: float) -> bool:
    x, y = number(a or ""), number(b or "")
    if x is None or y is None:
        return a == b or (a == "" and b == "True")
    return abs(x - y) <= ratio * max(abs(x), abs(y)) + 1e-9


def _superseded(entry: LedgerEntry, at: datetime, by: Recommendation) -> LedgerEvent:
    return LedgerEvent(
        recommendation_id=entry.recommendation.id,
        at=at,
        kind=LedgerEventKind.SUPERSEDED,
        reason=f"its condition is gone and another one holds: {by.change_text}",
        detail={"replaced_by": by.id},
    )
