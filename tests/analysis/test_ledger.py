"""The life of a recommendation: every state and event, what counts as applied, what a measurement proves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import product

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.ledger import life as ledger
from optiinfra_pipelines.analysis.ledger.accuracy import accuracy, past_effects, share_interval
from optiinfra_pipelines.analysis.ledger.effect import EARLY, EARLY_DUE, SETTLED, measure_effect
from optiinfra_pipelines.domain.evidence import Signal
from optiinfra_pipelines.domain.findings import Subject
from optiinfra_pipelines.domain.recommendations import (
    FINAL,
    Basis,
    ChangeKind,
    Effect,
    Grade,
    LedgerEntry,
    LedgerEvent,
    LedgerEventKind,
    LedgerState,
    RealizedEffect,
    Recommendation,
)
from optiinfra_pipelines.domain.rollouts import KnobGroup

START = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
SIGNAL = Signal(
    name="waiting_mean",
    value=40.0,
    unit="requests",
    window_start=START,
    window_end=START,
    table="stg_engine_samples",
    keys=(("target", "r1"),),
    column="requests_waiting",
    statistic="mean",
)


def advice(
    number: int = 0,
    rule: str = "max_sequences_up",
    slots: str = "32",
    low: float = -40.0,
    high: float = -16.0,
    **update: object,
) -> Recommendation:
    made = Recommendation(
        id=f"{number:016x}",
        rule=rule,
        kind=ChangeKind.MAX_SEQUENCES,
        knob="max_sequences",
        knob_group=KnobGroup.BATCHING,
        direction="loosen",
        subject=Subject(kind="deployment", name="chat"),
        source="live",
        engine="vllm",
        engine_version=None,
        config_hash="c0",
        window_start=START - timedelta(minutes=5),
        made_at=START,
        current={"max-num-seqs": "16"},
        proposed={"max-num-seqs": slots},
        change_text=f"--max-num-seqs 16 -> --max-num-seqs {slots}",
        effects=(
            Effect(
                signal="requests_waiting_mean",
                unit="requests",
                before=40.0,
                change_low=low,
                change_high=high,
                basis=Basis.ARITHMETIC,
                derivation="d",
            ),
        ),
        score=0.5,
        reason="r",
        rule_source="s",
        risk="k",
        verify="v",
        undo="u",
        evidence=(SIGNAL,),
    )
    return made.model_copy(update=update)


def entry(state: LedgerState = LedgerState.OPEN, about: Recommendation | None = None, hours: float = 0) -> LedgerEntry:
    at = START - timedelta(hours=hours)
    applied = at if state in {LedgerState.APPLIED, *FINAL} else None
    return LedgerEntry(recommendation=about or advice(), state=state, state_at=at, last_seen_at=at, applied_at=applied)


def event(kind: LedgerEventKind, number: int = 0, minutes: float = 0) -> LedgerEvent:
    return LedgerEvent(
        recommendation_id=f"{number:016x}", at=START + timedelta(minutes=minutes), kind=kind, reason="because"
    )


def realized(change: float, half: float, number: int = 0) -> RealizedEffect:
    return RealizedEffect(
        recommendation_id=f"{number:016x}",
        signal="requests_waiting_mean",
        unit="requests",
        change=change,
        change_low=change - half,
        change_high=change + half,
        level_ratio=0.95,
        grade=Grade.CONCURRENT,
        periods_before=12,
        periods_after=12,
        replicas_changed=2,
        replicas_unchanged=2,
        adjusted_for=(),
        measured_at=START,
    )


def test_every_state_and_event_has_one_answer() -> None:
    """Total: 88 pairs, each moves to a state or refuses with a reason and stays; final states never move."""
    moved = set()
    for state, kind in product(LedgerState, LedgerEventKind):
        move = ledger.transition(state, kind)
        if move.refusal is None:
            moved.add((state, kind))
            assert state not in FINAL
        else:
            assert (move.state, bool(move.refusal)) == (state, True)
    assert moved == {
        (LedgerState(a), LedgerEventKind(b))
        for a, b in (
            ("open", "seen"),
            ("open", "superseded"),
            ("open", "expired"),
            ("open", "proposed"),
            ("open", "applied"),
            ("superseded", "seen"),
            ("expired", "seen"),
            ("superseded", "applied"),
            ("expired", "applied"),
            ("proposed", "seen"),
            ("proposed", "withdrawn"),
            ("proposed", "expired"),
            ("proposed", "applied"),
            ("applied", "measured_early"),
            ("applied", "measured_right"),
            ("applied", "measured_wrong"),
            ("applied", "measured_unclear"),
            ("applied", "rolled_back"),
        )
    }


def test_only_what_was_applied_is_ever_judged() -> None:
    """verified and refuted are reached from applied alone, and every state but those can be left or is final."""
    into = {state: {a for (a, _), b in ledger.TRANSITIONS.items() if b is state} for state in LedgerState}
    assert into[LedgerState.VERIFIED] == into[LedgerState.REFUTED] == {LedgerState.APPLIED}
    assert {a for a, _ in ledger.TRANSITIONS} | FINAL == set(LedgerState)


@given(st.lists(st.sampled_from(list(LedgerEventKind)), min_size=1, max_size=12))
def test_a_fold_never_leaves_the_table(kinds: list[LedgerEventKind]) -> None:
    """Any sequence of events folds to a state that the table reaches step by step, and final ones stay."""
    events = [event(kind, minutes=i) for i, kind in enumerate(kinds)]
    state = LedgerState.OPEN
    for kind in kinds[1:]:
        before, state = state, ledger.transition(state, kind).state
        assert before not in FINAL or state is before

    folded = ledger.fold(advice(), events)

    assert folded is not None
    assert folded.state is state


def test_a_condition_seen_again_is_the_same_recommendation() -> None:
    """32 and 36 slots are one proposal a few minutes apart; 64 is another and follows only when the first is gone."""
    standing = entry()
    again = ledger.look([standing], [advice(1, slots="36")], START)
    other = ledger.look([standing], [advice(1, slots="64")], START)

    assert (again.seen, again.opened) == ((standing.recommendation.id,), ())
    assert [one.id for one in other.opened] == [advice(1).id]
    assert [(one.recommendation_id, one.kind) for one in other.events] == [
        (advice(1).id, LedgerEventKind.SEEN),
        (advice(0).id, LedgerEventKind.SUPERSEDED),
    ]


def test_one_recommendation_a_subject_is_open_at_a_time() -> None:
    """The best of two candidates is opened; while it holds the other waits, whatever its score."""
    first = ledger.look([], [advice(1), advice(2, rule="token_budget_up")], START)
    then = ledger.look([entry(about=advice(1))], [advice(2, rule="token_budget_up"), advice(1)], START)

    assert [one.id for one in first.opened] == [advice(1).id]
    assert then.opened == ()
    assert then.seen == (advice(1).id,)


def test_a_proposed_recommendation_holds_its_subject() -> None:
    """While a rollout of one is under way nothing else is opened for that deployment."""
    held = entry(LedgerState.PROPOSED)
    assert ledger.look([held], [advice(1, rule="token_budget_up")], START) == ledger.Step()


def test_an_open_recommendation_expires_a_day_after_it_was_last_seen() -> None:
    """23 hours keep it, 24 end it, and its condition coming back opens it again."""
    assert ledger.lapse([entry(hours=23)], START) == []
    [expired] = ledger.lapse([entry(hours=24)], START)
    assert expired.kind is LedgerEventKind.EXPIRED
    assert ledger.transition(LedgerState.EXPIRED, LedgerEventKind.SEEN).state is LedgerState.OPEN


def change(minutes: float, new: str, old: str | None = "c0") -> ledger.ConfigChange:
    return ledger.ConfigChange("r1", START + timedelta(minutes=minutes), old, new)


def test_a_configuration_that_shows_the_proposed_value_is_applied() -> None:
    """The page tells --num-gpu-blocks-override: 412 as advised is applied, 300 makes the advice void."""
    blocks = {"current": {"num-gpu-blocks-override": "256"}, "proposed": {"num-gpu-blocks-override": "412"}}
    about = advice(rule="kv_memory_up", **blocks)
    told = {("r1", "c1"): {"num_gpu_blocks_override": "412"}, ("r1", "c2"): {"num_gpu_blocks_override": "300"}}

    applied = ledger.detect(entry(about=about), [change(5, "c1")], told, START + HOUR)
    other = ledger.detect(entry(about=about), [change(5, "c2")], told, START + HOUR)

    assert applied is not None
    assert (applied.kind, applied.at) == (LedgerEventKind.APPLIED, START + timedelta(minutes=5))
    assert other is not None
    assert other.kind is LedgerEventKind.SUPERSEDED


@pytest.mark.parametrize(
    "changes",
    [[], [change(-5, "c1")], [change(120, "c1")], [change(5, "c1", old="c9")], [change(5, "c0")]],
    ids=["none", "before", "later than now", "from another configuration", "no change"],
)
def test_changes_that_are_not_of_this_advice_prove_nothing(changes: list[ledger.ConfigChange]) -> None:
    """Only a change away from the advised configuration, after the advice and before now, counts."""
    assert ledger.detect(entry(), changes, {}, START + HOUR) is None


def test_a_change_that_the_page_does_not_show_is_never_called_applied() -> None:
    """max-num-seqs is not on vLLM's page: another hash makes the advice void, more running requests prove it."""
    void = ledger.detect(entry(), [change(5, "c1")], {("r1", "c1"): {"block_size": "32"}}, START + HOUR)
    seen = ledger.detect_ceiling(entry(), [("r1", START + HOUR, 16.0), ("r2", START + HOUR, 29.0)])

    assert void is not None
    assert void.kind is LedgerEventKind.SUPERSEDED
    assert seen is not None
    assert (seen.kind, seen.detail["target"]) == (LedgerEventKind.APPLIED, "r2")
    assert ledger.detect_ceiling(entry(), [("r1", START + HOUR, 16.0)]) is None


def test_a_replica_less_in_fleet_is_the_applied_scale_down() -> None:
    """From 4 to 3 was advised: 4 is nothing, 3 is it, 5 is the other way."""
    about = advice(kind=ChangeKind.REPLICAS, current={"replicas": "4"}, proposed={"replicas": "3"})
    later = START + HOUR
    assert ledger.detect_replicas(entry(about=about), [(later, 4), (later, 5)]) is None
    found = ledger.detect_replicas(entry(about=about), [(later, 4), (later + HOUR, 3)])
    assert found is not None
    assert found.at == later + HOUR


@pytest.mark.parametrize(
    ("change", "half", "verdict"),
    [
        (-20.0, 5.0, LedgerEventKind.MEASURED_RIGHT),
        (-5.0, 2.0, LedgerEventKind.MEASURED_RIGHT),  # less than promised, and surely on the promised side
        (+20.0, 5.0, LedgerEventKind.MEASURED_WRONG),
        (0.0, 5.0, LedgerEventKind.MEASURED_WRONG),  # surely less than promised, and maybe nothing
        (-10.0, 30.0, LedgerEventKind.MEASURED_UNCLEAR),
    ],
)
def test_a_measurement_verifies_refutes_or_leaves_open(change: float, half: float, verdict: LedgerEventKind) -> None:
    """Promised: -40 to -16."""
    assert ledger.decide(advice().effects[0], realized(change, half)) is verdict


def series(
    effect: float,
    *,
    controls: int = 2,
    periods: int = 12,
    trend: float = 0.0,
    load_jump: float = 0.0,
    noise: float = 1.0,
    seed: int = 0,
) -> pl.DataFrame:
    """Five-minute rows of 2 changed and some unchanged replicas; what happens at noon happens to all but `effect`."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(-periods, periods + 2):
        at = START + timedelta(minutes=5 * i)
        load = 5 + (load_jump if i >= 0 else 0.0) + rng.normal(0, 0.5)
        shared = rng.normal(0, 2 * noise) + trend * i
        for n in range(2 + controls):
            mine = load + rng.normal(0, 0.1)
            value = 20 + 3 * mine + shared + rng.normal(0, noise) + (effect if n < 2 and i >= 0 else 0.0)
            rows.append(
                {
                    "target": f"r{n}",
                    "period_at": at,
                    "is_changed": n < 2,
                    "value": value,
                    "arrivals_per_second": mine,
                    "prompt_tokens_per_request": 400.0,
                    "generation_tokens_per_request": 100.0,
                }
            )
    return pl.DataFrame(rows)


def measured(rows: pl.DataFrame) -> RealizedEffect:
    outcome = measure_effect("0" * 16, "requests_waiting_mean", rows, START, START + timedelta(hours=3))
    assert isinstance(outcome, RealizedEffect), outcome
    return outcome


def test_concurrent_replicas_take_out_what_happened_to_all() -> None:
    """A load that rises by half at the moment of the change does not pass for its effect."""
    against_others = measured(series(-16.0, load_jump=5.0))
    assert against_others.grade is Grade.CONCURRENT
    assert against_others.replicas_unchanged == 2
    assert against_others.change_low < -16 < against_others.change_high
    assert against_others.change_high < 0


def test_without_unchanged_replicas_the_grade_is_weaker_and_says_so() -> None:
    """Before and after alone: adjusted for load, which moved; the grade names its weakness."""
    alone = measured(series(-16.0, controls=0, periods=36, noise=0.5))
    assert alone.grade is Grade.BEFORE_AFTER
    assert "weaker" in alone.grade
    assert "arrivals_per_second" in alone.adjusted_for
    assert alone.change_low < -16 < alone.change_high


def test_too_few_periods_are_no_measurement() -> None:
    """Under half an hour on either side nothing is told; the warm-up after the change does not count."""
    outcome = measure_effect("0" * 16, "requests_waiting_mean", series(-16.0, periods=4), START, START + HOUR)
    assert isinstance(outcome, str)
    assert "4 periods before and 4 after" in outcome
    assert timedelta(minutes=10) == SETTLED.warm_up
    assert measure_effect("0" * 16, "power_mean_watts", series(1.0), START, START + HOUR) == (
        "power_mean_watts is not measured"
    )


def minutes_of(effect: float, *, load_jump: float = 0.0, seed: int = 0) -> pl.DataFrame:
    """One-minute rows of a swap: old replicas until noon, in part relieved from five minutes before, new ones after."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(-20, 15):
        for target in ("old", "new") if -5 <= i < 0 else ("old",) if i < 0 else ("new",):
            load = 5 + (load_jump if i >= 0 else 0.0) + rng.normal(0, 0.1)
            value = 30 + rng.normal(0, 1) + (effect if i >= 0 else effect / 2 if i >= -5 else 0.0)
            at = START + timedelta(minutes=i)
            mix = {"prompt_tokens_per_request": None, "generation_tokens_per_request": 100.0}
            rows.append(
                {"target": target, "period_at": at, "is_changed": True, "value": value, "arrivals_per_second": load}
                | mix
            )
    return pl.DataFrame(rows)


def early(rows: pl.DataFrame) -> RealizedEffect | str:
    return measure_effect(
        *("0" * 16, "requests_waiting_mean", rows, START, START + EARLY_DUE),
        changing_since=START - timedelta(minutes=5),
        scale=EARLY,
    )


def test_an_early_look_compares_whole_minutes_before_the_change_began_and_after_it_was_done() -> None:
    """The old replicas' fifteen minutes before the rollout began, the new ones' seven after their warm-up."""
    outcome = early(minutes_of(-25.0))

    assert isinstance(outcome, RealizedEffect)
    assert (outcome.periods_before, outcome.periods_after) == (15, 7)
    assert outcome.change_low < -25 < outcome.change_high < 0
    assert outcome.change_high - outcome.change_low < 5


def test_an_early_look_at_another_load_tells_nothing() -> None:
    outcome = early(minutes_of(-25.0, load_jump=2.0))

    assert isinstance(outcome, str)
    assert re.search(r"arrivals_per_second changed by \+(3|4)\d% meanwhile", outcome)


def test_an_early_look_does_not_decide() -> None:
    """It is in the log, and the change stays applied until the settled measurement."""
    after = ledger.transition(LedgerState.APPLIED, LedgerEventKind.MEASURED_EARLY)

    assert (after.state, after.refusal) == (LedgerState.APPLIED, None)


@pytest.mark.parametrize(("controls", "periods"), [(2, 8), (2, 24), (0, 24), (0, 48)])
def test_the_interval_holds_the_true_effect_as_often_as_it_says(controls: int, periods: int) -> None:
    """200 histories with a known effect: 95 % intervals contain it in 90 % or more."""
    hits = 0
    for seed in range(200):
        found = measured(series(-8.0, controls=controls, periods=periods, seed=seed))
        hits += found.change_low <= -8.0 <= found.change_high
    assert hits >= 180


def test_nothing_is_called_accurate_below_the_stated_n() -> None:
    """Three of three right is too few to say; twenty of twenty is said with its interval."""

    def rows(n: int) -> Sequence[str]:
        entries = [entry(LedgerState.VERIFIED, advice(i)) for i in range(n)]
        effects = {advice(i).id: realized(-20.0, 1.0, i) for i in range(n)}
        return [row.says for row in accuracy(entries, effects)]

    assert all(said.startswith("too few to say") for said in rows(3))
    assert all("20 of 20" in said for said in rows(20))
    assert accuracy([], {})[0].right_sign_share_ratio is None


def test_unclear_measurements_count_in_the_shares() -> None:
    """Leaving out what could not be verified would count successes only."""
    entries = [entry(LedgerState.VERIFIED, advice(0)), entry(LedgerState.UNVERIFIABLE, advice(1))]
    effects = {advice(0).id: realized(-20.0, 1.0, 0), advice(1).id: realized(+2.0, 30.0, 1)}

    everything = accuracy(entries, effects)[0]

    assert (everything.n, everything.right_sign_share_ratio, everything.coverage_share_ratio) == (2, 0.5, 0.5)
    assert everything.realized_usd_per_hour is None


@given(st.integers(1, 200), st.data())
@settings(max_examples=50)
def test_a_share_lies_in_its_interval(n: int, data: st.DataObject) -> None:
    """Clopper-Pearson: the share is inside, and the bounds stay in 0 to 1."""
    hits = data.draw(st.integers(0, n))
    low, high = share_interval(hits, n)
    assert low is not None
    assert high is not None
    assert 0 <= low <= hits / n <= high <= 1


def test_five_measured_changes_are_a_basis_for_the_next() -> None:
    """The range of what a rule did, relative to before; four are none."""
    entries = [entry(LedgerState.VERIFIED, advice(i)) for i in range(5)]
    effects = {advice(i).id: realized(-10.0 * (i + 1), 1.0, i) for i in range(5)}
    past = past_effects(entries, effects)["max_sequences_up"]
    assert (past.relative_low, past.relative_high, past.n) == (-1.25, -0.25, 5)
    assert past_effects(entries[:4], effects) == {}
