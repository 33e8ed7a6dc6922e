"""One window after the other: what the rules say, what was applied, what it did. Live refreshes and replays alike.

Windows lie on a fixed grid of the clock and only closed ones are looked at, so the ledger does not depend on when
somebody looked. Here: stepping over windows of an open warehouse. Not here: the rules (`analysis`), the tables
(`resources.ledger.store`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import duckdb

from optiinfra_pipelines.analysis.ledger import life as ledger
from optiinfra_pipelines.analysis.ledger.accuracy import past_effects
from optiinfra_pipelines.analysis.ledger.effect import DUE, EARLY, EARLY_DUE, LEVEL, SETTLED, Scale, measure_effect
from optiinfra_pipelines.analysis.ledger.held import Span, is_held
from optiinfra_pipelines.analysis.recommendations.context import Context, GpuFacts
from optiinfra_pipelines.analysis.recommendations.derive import Advice, Group, recommend
from optiinfra_pipelines.analysis.recommendations.flags import declared_knobs
from optiinfra_pipelines.analysis.recommendations.measures import Measures, measure_targets
from optiinfra_pipelines.analysis.recommendations.rules import DAILY
from optiinfra_pipelines.domain.findings import Subject
from optiinfra_pipelines.domain.fleet import Fleet, Target
from optiinfra_pipelines.domain.models import shape_of
from optiinfra_pipelines.domain.prices import price_of
from optiinfra_pipelines.domain.recommendations import (
    ChangeKind,
    Effect,
    Grade,
    LedgerEntry,
    LedgerEvent,
    LedgerEventKind,
    LedgerState,
    RealizedEffect,
    Recommendation,
    RuleAbstention,
)
from optiinfra_pipelines.rollout.present import Present, declared_now
from resources.ledger.windows import (
    read_changed_targets,
    read_changes,
    read_day,
    read_effect_rows,
    read_findings,
    read_gpus,
    read_reuse,
    read_settings,
    read_versions,
    read_window,
)

DAY = timedelta(days=1)
# Subject and rule of each candidate of one window -> in how many windows up to it, in a row, it was one.
Standing = Mapping[tuple[str, str], int]


@dataclass
class Ledger:
    """The ledger as it is worked on: entries and measured effects, and what a run of steps adds to them.

    held: when rollouts of a recommendation were open, in which only they may say that it was applied. present: flags
    that completed rollouts left, by deployment.
    """

    entries: dict[str, LedgerEntry]
    realized: dict[str, RealizedEffect] = field(default_factory=dict)
    held: Mapping[str, Sequence[Span]] = field(default_factory=dict)
    present: Mapping[str, Mapping[str, Present]] = field(default_factory=dict)
    new: list[Recommendation] = field(default_factory=list)
    events: list[tuple[LedgerEvent, LedgerState]] = field(default_factory=list)
    abstentions: tuple[RuleAbstention, ...] = ()

    def add(self, event: LedgerEvent, recommendation: Recommendation | None = None) -> None:
        """Let something happen; what the state does not allow changes nothing and is not kept."""
        known = self.entries.get(event.recommendation_id)
        about = known.recommendation if known is not None else recommendation
        if about is None or (known is not None and ledger.transition(known.state, event.kind).refusal is not None):
            return
        self.entries[about.id] = ledger.apply(known, about, event)
        self.events.append((event, self.entries[about.id].state))

    def look(self, candidates: Sequence[Recommendation], at: datetime) -> None:
        """Take over what one look says: new recommendations, events, and which open ones were seen again."""
        step = ledger.look(list(self.entries.values()), candidates, at)
        opened = {one.id: one for one in step.opened}
        self.new += step.opened
        for event in step.events:
            self.add(event, opened.get(event.recommendation_id))
        for recommendation_id in step.seen:
            self.see(recommendation_id, at)

    def see(self, recommendation_id: str, at: datetime) -> None:
        entry = self.entries[recommendation_id]
        self.entries[recommendation_id] = entry.model_copy(update={"last_seen_at": max(entry.last_seen_at, at)})


@dataclass(frozen=True)
class Deriver:
    """Steps over windows. in_a_row: windows that a candidate must have stood in before it is opened."""

    fleet: Fleet
    window: timedelta
    in_a_row: int

    def windows(self, after: datetime, until: datetime) -> list[datetime]:
        """Ends of the closed windows of the grid after `after` and not after `until`."""
        seconds = self.window.total_seconds()
        first = math.floor(after.timestamp() / seconds) + 1
        last = math.floor(until.timestamp() / seconds)
        return [datetime.fromtimestamp(n * seconds, UTC) for n in range(first, last + 1)]

    def advise(
        self, connection: duckdb.DuckDBPyConnection, end: datetime, book: Ledger
    ) -> tuple[Advice, dict[str, Measures], list[Group]]:
        """What the rules say of the window that ends at `end`."""
        start = end - self.window
        rows = read_window(connection, start, end)
        measures = measure_targets(rows.samples, rows.histograms, rows.settings)
        groups = self.groups(connection, start, end, measures, book)
        advice = recommend(
            groups,
            measures,
            at=end,
            findings=read_findings(connection, start, end),
            recent=list(book.entries.values()),
        )
        return advice, measures, groups

    def step(self, connection: duckdb.DuckDBPyConnection, end: datetime, book: Ledger, standing: Standing) -> Standing:
        """One window: what was applied, what it did, what lapsed, what is advised.

        standing: what this returned for the window before; empty when that one was not looked at.
        """
        self._detect(connection, end, book)
        self._measure(connection, end, book)
        for event in ledger.lapse(list(book.entries.values()), end):
            book.add(event)
        advice, measures, groups = self.advise(connection, end, book)
        self._detect_seen(end, book, measures, groups)
        keys = [(str(one.subject), one.rule) for one in advice.candidates]
        now = {key: standing.get(key, 0) + 1 for key in keys}
        book.look([one for one, key in zip(advice.candidates, keys, strict=True) if now[key] >= self.in_a_row], end)
        book.abstentions = advice.abstentions
        if end.timestamp() % DAY.total_seconds() == 0:
            book.look(self._advise_day(connection, end, book).candidates, end)
        return now

    def _advise_day(self, connection: duckdb.DuckDBPyConnection, end: datetime, book: Ledger) -> Advice:
        """What the daily rules say of the UTC day that ends at `end`; its evidence is a day, so once is enough."""
        measures = read_day(connection, end - DAY, end)
        groups = self.groups(connection, end - DAY, end, measures, book)
        return recommend(groups, measures, at=end, recent=list(book.entries.values()), rules=DAILY)

    def groups(
        self,
        connection: duckdb.DuckDBPyConnection,
        start: datetime,
        end: datetime,
        measures: Mapping[str, Measures],
        book: Ledger,
    ) -> list[Group]:
        """Every deployment, and every target that belongs to none, with what is known around it."""
        versions = read_versions(connection)
        gpus = read_gpus(connection, start, end)
        past = past_effects(book.entries.values(), book.realized)
        reuse = read_reuse(connection, end)
        members: dict[Subject, list[Target]] = {}
        for target in self.fleet.targets:
            kind, name = ("deployment", target.deployment) if target.deployment else ("target", target.name)
            members.setdefault(Subject.model_validate({"kind": kind, "name": name}), []).append(target)
        deployments = {one.name: one for one in self.fleet.deployments}
        groups = []
        for subject, targets in members.items():
            deployment = deployments.get(subject.name) if subject.kind == "deployment" else None
            seen = [measures[target.name] for target in targets if target.name in measures]
            engines = {one.engine for one in seen if one.vantage == "engine"}
            engine = (deployment.engine if deployment else None) or (engines.pop() if len(engines) == 1 else None)
            facts = _worst([gpus[target.host] for target in targets if target.host in gpus])
            context = Context(
                engine=engine,
                engine_version=next((versions[t.name] for t in targets if t.name in versions), None),
                deployment=deployment,
                replicas=max(1, sum(one.vantage == "engine" for one in seen)),
                shape=shape_of(deployment),
                declared=declared_knobs(
                    engine, declared_now(deployment.flags if deployment else {}, book.present.get(subject.name, {}))
                ),
                gpu=facts,
                price=price_of(
                    (deployment.gpu if deployment else None) or facts.name,
                    deployment.price_usd_per_gpu_hour if deployment else None,
                ),
                reuse_ceiling_ratio=reuse[subject.name].ceiling_ratio if subject.name in reuse else None,
                cache_tiers=reuse[subject.name].tiers if subject.name in reuse else None,
                past=past,
            )
            names = tuple(target.name for target in targets)
            groups.append(Group(subject, names, context, source=targets[0].source))
        return groups

    def _targets(self, entry: LedgerEntry) -> list[str]:
        subject = entry.recommendation.subject
        if subject.kind == "target":
            return [subject.name]
        return [target.name for target in self.fleet.targets if target.deployment == subject.name]

    def _detect(self, connection: duckdb.DuckDBPyConnection, end: datetime, book: Ledger) -> None:
        """Configurations that changed: the advised way, or another."""
        waiting = [entry for entry in book.entries.values() if entry.state in _NOT_APPLIED]
        if not waiting:
            return
        since = min(entry.recommendation.made_at for entry in waiting)
        changes = read_changes(connection, since, end)
        settings = read_settings(connection) if changes else {}
        for entry in waiting:
            targets, name = set(self._targets(entry)), entry.recommendation.id
            own = [one for one in changes if one.target in targets and not is_held(book.held, name, one.changed_at)]
            event = ledger.detect(entry, own, settings, end)
            if event is not None:
                book.add(event)

    def _detect_seen(
        self, end: datetime, book: Ledger, measures: Mapping[str, Measures], groups: Sequence[Group]
    ) -> None:
        """Changes that no page tells: more requests running than the ceiling let, another number of replicas."""
        for entry in [one for one in book.entries.values() if one.state in _NOT_APPLIED]:
            if is_held(book.held, entry.recommendation.id, end - self.window, end):
                continue
            targets = [name for name in self._targets(entry) if name in measures]
            running = [(name, end, measures[name]["running_max"] or 0.0) for name in targets]
            event = ledger.detect_ceiling(entry, running)
            if event is None and entry.recommendation.kind is ChangeKind.REPLICAS:
                # Targets of fleet.yaml, not those that answered: a lost replica is no scale-down.
                event = ledger.detect_replicas(entry, [(end, len(self._targets(entry)))])
            if event is not None:
                book.add(event)

    def _measure(self, connection: duckdb.DuckDBPyConnection, end: datetime, book: Ledger) -> None:
        """Measurements that fell due in this window; the last one leaves nothing unclear open."""
        for entry in [one for one in book.entries.values() if one.state is LedgerState.APPLIED]:
            applied_at = entry.applied_at
            if applied_at is not None and end - self.window < applied_at + EARLY_DUE <= end:
                book.add(self._early(connection, entry, applied_at))
            due = [applied_at + wait for wait in DUE] if applied_at is not None else []
            now = next((at for at in due if end - self.window < at <= end), None)
            if applied_at is None or now is None:
                continue
            outcome = self._effect(connection, entry, applied_at, now, SETTLED)
            effect = entry.recommendation.effects[0]
            is_last = now == due[-1]
            if isinstance(outcome, RealizedEffect):
                book.realized[entry.recommendation.id] = outcome
                kind = ledger.decide(effect, outcome)
                reason = _measured(outcome, effect)
            else:
                kind, reason = LedgerEventKind.MEASURED_UNCLEAR, outcome
            if kind is not LedgerEventKind.MEASURED_UNCLEAR or is_last:
                book.add(LedgerEvent(recommendation_id=entry.recommendation.id, at=now, kind=kind, reason=reason))

    def _early(self, connection: duckdb.DuckDBPyConnection, entry: LedgerEntry, applied_at: datetime) -> LedgerEvent:
        """What the first minutes show, for people who wait; a reason where they show nothing."""
        at = applied_at + EARLY_DUE
        outcome = self._effect(connection, entry, applied_at, at, EARLY)
        detail: dict[str, str | float | int | None] = {}
        if isinstance(outcome, RealizedEffect):
            detail = {"change": outcome.change, "change_low": outcome.change_low, "change_high": outcome.change_high}
            reason = _measured(outcome, entry.recommendation.effects[0])
        else:
            reason = outcome
        return LedgerEvent(
            recommendation_id=entry.recommendation.id,
            at=at,
            kind=LedgerEventKind.MEASURED_EARLY,
            reason=f"the first {EARLY_DUE.total_seconds() / 60:.0f} minutes, which decide nothing: {reason}",
            detail=detail,
        )

    def _effect(
        self,
        connection: duckdb.DuckDBPyConnection,
        entry: LedgerEntry,
        applied_at: datetime,
        now: datetime,
        scale: Scale,
    ) -> RealizedEffect | str:
        targets = self._targets(entry)
        if entry.recommendation.effects[0].signal == "gpus_held":
            return self._freed(entry, len(targets), now)
        changed, alone = read_changed_targets(connection, targets, applied_at, now)
        # A change that no page and no restart shows reached all of them, as far as we know.
        changed = changed or targets
        others = [target for target in alone if target not in changed]
        since = entry.changing_since or applied_at
        signal = entry.recommendation.effects[0].signal
        window = (since - (now - applied_at) - scale.period, now)
        rows = read_effect_rows(connection, signal, [*changed, *others], changed, window, scale)
        return measure_effect(entry.recommendation.id, signal, rows, applied_at, now, changing_since=since, scale=scale)

    def _freed(self, entry: LedgerEntry, replicas: int, now: datetime) -> RealizedEffect | str:
        """GPUs are counted, not estimated: the interval is a point."""
        effect = entry.recommendation.effects[0]
        deployment = next((d for d in self.fleet.deployments if d.name == entry.recommendation.subject.name), None)
        if deployment is None:
            return "fleet.yaml names the deployment no more"
        change = replicas * deployment.gpus_per_replica - effect.before
        price = price_of(deployment.gpu, deployment.price_usd_per_gpu_hour)
        return RealizedEffect(
            recommendation_id=entry.recommendation.id,
            signal=effect.signal,
            unit=effect.unit,
            change=change,
            change_low=change,
            change_high=change,
            level_ratio=LEVEL,
            grade=Grade.BEFORE_AFTER,
            periods_before=1,
            periods_after=1,
            replicas_changed=replicas,
            replicas_unchanged=0,
            adjusted_for=(),
            measured_at=now,
            usd_per_hour=None if price is None else -change * price.usd_per_gpu_hour,
        )


_NOT_APPLIED = frozenset({LedgerState.OPEN, LedgerState.PROPOSED, LedgerState.EXPIRED, LedgerState.SUPERSEDED})


def _measured(outcome: RealizedEffect, effect: Effect) -> str:
    return (
        f"{outcome.signal} changed by {outcome.change:+.4g} {outcome.unit} "
        f"({outcome.change_low:+.4g} to {outcome.change_high:+.4g}; {outcome.grade}); promised "
        f"{effect.change_low:+.4g} to {effect.change_high:+.4g}"
    )


def _worst(facts: Sequence[GpuFacts]) -> GpuFacts:
    """Of the hosts' GPUs those with the least memory free: what is proposed has to fit there too."""
    return min(
        facts, key=lambda one: (one.memory_free_min_bytes is None, one.memory_free_min_bytes), default=GpuFacts()
    )
