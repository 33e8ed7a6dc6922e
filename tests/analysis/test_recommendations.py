"""What the rules say of recorded phases, and when they must say nothing."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import pytest

from optiinfra_pipelines.analysis.recommendations.context import Context
from optiinfra_pipelines.analysis.recommendations.derive import Group, recommend
from optiinfra_pipelines.analysis.recommendations.measures import measure_targets
from optiinfra_pipelines.domain.findings import Finding, FindingKind, Severity, Subject
from optiinfra_pipelines.domain.fleet import Deployment, ModelShape
from optiinfra_pipelines.domain.recommendations import (
    ChangeKind,
    LedgerEntry,
    LedgerState,
    Recommendation,
)
from tests.analysis.advice_cases import START, VLLM, advise, collect, load, measured, no_histograms, samples

SMALL_LLAMA = ModelShape(layers=8, kv_heads=2, head_dim=64)
CHAT = Subject(kind="deployment", name="chat")
QUEUED = [{"requests_running": 16.0, "requests_waiting": 40.0, "kv_cache_usage_ratio": 0.2}] * 12


def one(rows: list[dict[str, object]], **context: object) -> tuple[Recommendation | None, dict[str, str]]:
    """The first recommendation on written rows, and the reasons of the rules that abstain."""
    group = Group(CHAT, ("r1",), Context(engine="vllm", **context))  # type: ignore[arg-type]
    advice = recommend([group], measure_targets(samples(rows), no_histograms()), at=START + timedelta(minutes=5))
    return next(iter(advice.first), None), {entry.rule: entry.reason for entry in advice.abstentions}


@pytest.mark.parametrize("phase", ["01_idle", "02_light_c1", "03_loaded_shared_prefix_c8", "06_drained_idle"])
def test_idle_light_shared_and_drained_phases_get_no_recommendation(phase: str) -> None:
    """Nothing is wrong there, so there is nothing to change; unknowns stay abstentions."""
    advice, _ = advise(f"{VLLM}/{phase}")

    assert advice.candidates == ()
    assert all(entry.reason for entry in advice.abstentions)


def test_kv_pressure_with_an_unknown_model_cuts_the_batch_to_what_the_cache_holds() -> None:
    """Phase 04: 14 preemptions on 256 blocks x 32. More blocks cannot be judged without the shape: fewer slots."""
    advice, measures = advise(f"{VLLM}/04_kv_pressure_preempt_c16")

    [first] = advice.first
    assert (first.rule, first.proposed) == ("max_sequences_down", {"max-num-seqs": "9"})
    relief = first.effects[0]
    assert relief.before == pytest.approx(14 / 29)
    assert -relief.before <= relief.change_low <= relief.change_high < 0
    assert "8,160 tokens" in relief.derivation  # 255 usable blocks of 32: the null block is not for requests
    assert 9 * (measures["r1"]["request_tokens_mean"] or 0) < 8160
    refused = {entry.rule: entry.reason for entry in advice.abstentions}
    assert "--num-gpu-blocks-override 256" in refused["kv_memory_up"]
    assert "shape is not known" in refused["kv_memory_up"]


def test_kv_pressure_with_a_known_model_raises_the_block_count_within_its_memory() -> None:
    """With the shape, 131,072 B a block: more blocks fit the 1 GiB, and the flag that fixes the count is turned."""
    advice, _ = advise(f"{VLLM}/04_kv_pressure_preempt_c16", Context(engine="vllm", shape=SMALL_LLAMA))

    [first] = advice.first
    assert first.rule == "kv_memory_up"
    assert first.change_text.startswith("--num-gpu-blocks-override 256 -> --num-gpu-blocks-override ")
    blocks = int(first.proposed["num-gpu-blocks-override"] or 0)
    assert 256 < blocks <= 1024**3 // 131_072
    assert {effect.signal for effect in first.effects} == {"preemptions_per_request", "kv_capacity_tokens"}
    assert first.effects[1].change_low == (blocks - 256) * 32
    assert first.to_change().knob_group == "kv_cache"


def test_a_queue_at_low_kv_raises_the_batch_slots() -> None:
    """Phase 05: 48 waiting at 17 % KV behind 16 slots. The slots are not on the page; the ceiling is seen."""
    advice, _ = advise(f"{VLLM}/05_overload_queue_c64_low_kv")

    [first] = advice.first
    assert (first.rule, first.current, first.proposed) == (
        "max_sequences_up",
        {"max-num-seqs": "16"},
        {"max-num-seqs": "32"},
    )
    relief = first.effects[0]
    assert relief.signal == "requests_waiting_mean"
    assert relief.change_low == -relief.before
    assert relief.change_high == pytest.approx(-16 * 0.75)
    assert first.kind is ChangeKind.MAX_SEQUENCES


@pytest.mark.parametrize("offset_seconds", range(0, 30, 5))
def test_wherever_a_grid_of_short_windows_falls_each_trouble_calls_for_its_change(offset_seconds: int) -> None:
    """All phases as collected every 5 s, in windows of 30 s: blocks while they run out, slots in the overload, nothing
    before and after."""
    phases = (
        *("01_idle", "02_light_c1", "03_loaded_shared_prefix_c8"),
        *("04_kv_pressure_preempt_c16", "05_overload_queue_c64_low_kv", "06_drained_idle"),
    )
    connection, ends = collect(phases)
    group = Group(CHAT, ("r1",), Context(engine="vllm", shape=SMALL_LLAMA))
    start = min(ends.values()) - timedelta(minutes=1) + timedelta(seconds=offset_seconds)
    found = []
    while start < ends["06_drained_idle"] + timedelta(minutes=1):
        end = start + timedelta(seconds=30)
        found += [(one.rule, start) for one in recommend([group], measured(connection, start, end), at=end).first]
        start = end

    assert [rule for rule, _ in found] == sorted(rule for rule, _ in found)
    assert {rule for rule, _ in found} == {"kv_memory_up", "max_sequences_up"}
    for rule, begun in found:
        phase = "04_kv_pressure_preempt_c16" if rule == "kv_memory_up" else "05_overload_queue_c64_low_kv"
        assert begun < ends[phase]


def test_every_cited_signal_can_be_fetched_again_and_gives_the_stated_value() -> None:
    """Evidence is rows: each signal's own query returns the value that the recommendation cites."""
    for phase in ("04_kv_pressure_preempt_c16", "05_overload_queue_c64_low_kv"):
        connection, times = load([f"{VLLM}/{phase}"])
        measures = measured(connection, times[0], times[-1])
        advice = recommend([Group(CHAT, ("r1",), Context(engine="vllm"))], measures, at=times[-1])
        [first] = advice.first
        assert len(first.evidence) >= 4
        for signal in first.evidence:
            [(again,)] = connection.execute(signal.sql()).fetchall()
            assert again == pytest.approx(signal.value), signal.name


def test_a_recommendation_cites_the_findings_it_answers() -> None:
    """Findings about its targets and of a kind that the rule answers; no other."""

    def finding(kind: FindingKind, name: str) -> Finding:
        return Finding(
            id=f"{kind}-{name}"[:16],
            subject=Subject(kind="target", name=name),
            kind=kind,
            cause="c",
            severity=Severity.WARNING,
            since=START,
            until=None,
            last_seen_at=START,
            source="live",
            summary="s",
            evidence=(),
        )

    measures = measure_targets(samples(list(QUEUED)), no_histograms())
    found = [finding(FindingKind.QUEUE_BUILDUP, "r1"), finding(FindingKind.QUEUE_BUILDUP, "r2")]
    found.append(finding(FindingKind.THROTTLED, "r1"))
    advice = recommend([Group(CHAT, ("r1",), Context(engine="vllm"))], measures, at=START, findings=found)

    assert advice.first[0].finding_ids == (found[0].id,)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [{**QUEUED[0], "process_started_at": START + timedelta(seconds=s)} for s in (0, 0, 0, 30, 30, 30)],
            "restarted",
        ),
        ([{**QUEUED[0], "config_hash": f"c{i // 3}"} for i in range(6)], "configuration changed"),
        ([{**QUEUED[0], "process_started_at": START - timedelta(seconds=20)}] * 6, "warm-up"),
        ([{**QUEUED[0], "generation_tokens_total": v} for v in (5.0, 9.0, 2.0, 3.0, 4.0, 5.0)], "a counter fell"),
        ([{**QUEUED[0], "is_sleeping": True}] * 6, "asleep"),
        (QUEUED[:4], "4 of 5 samples"),
        ([{**QUEUED[0], "scraped_at": START + timedelta(seconds=s)} for s in (0, 5, 10, 15, 60, 65)], "gap of 45 s"),
        ([{**QUEUED[0], "vantage": "frontend"}] * 6, "frontend"),
        ([], "no samples"),
    ],
)
def test_a_window_that_is_no_steady_state_gets_no_recommendation(rows: list[dict[str, object]], says: str) -> None:
    """Restart, reset, warm-up, another configuration, sleep, thin or torn data: one reason, no rule."""
    first, reasons = one(rows)

    assert first is None
    assert list(reasons) == ["*"]
    assert says in reasons["*"]


@pytest.mark.parametrize("missing", ["requests_running", "requests_waiting", "kv_cache_usage_ratio"])
def test_a_rule_with_an_unknown_input_abstains(missing: str) -> None:
    """A gauge the page lacks is no zero: the rule that needs it names it, and nothing is proposed."""
    first, reasons = one([{name: value for name, value in row.items() if name != missing} for row in QUEUED])

    assert first is None
    assert "max_sequences_up" in reasons
    assert reasons["max_sequences_up"]


def test_one_overloaded_replica_of_many_is_balance_and_not_a_flag() -> None:
    """A flag that all replicas share is not turned because one of four has a queue."""
    idle = {"requests_running": 1.0, "requests_waiting": 0.0, "kv_cache_usage_ratio": 0.01}
    rows = [
        {**(QUEUED[0] if name == "r1" else idle), "target": name, "scraped_at": START + timedelta(seconds=5 * i)}
        for i in range(10)
        for name in ("r1", "r2", "r3", "r4")
    ]
    group = Group(CHAT, ("r1", "r2", "r3", "r4"), Context(engine="vllm", replicas=4))
    advice = recommend([group], measure_targets(samples(rows), no_histograms()), at=START)

    assert advice.candidates == ()
    reasons = {entry.rule: entry.reason for entry in advice.abstentions}
    assert "1 of 4 replicas" in reasons["max_sequences_up"]


def test_replicas_of_two_configurations_are_not_advised_together() -> None:
    """Config drift comes first: one change cannot fit two configurations."""
    rows = [
        {**QUEUED[0], "target": name, "config_hash": name, "scraped_at": START + timedelta(seconds=5 * i)}
        for i in range(10)
        for name in ("r1", "r2")
    ]
    group = Group(CHAT, ("r1", "r2"), Context(engine="vllm", replicas=2))
    advice = recommend([group], measure_targets(samples(rows), no_histograms()), at=START)

    assert "2 configurations" in advice.abstentions[0].reason


def test_a_knob_is_not_turned_back_within_a_day() -> None:
    """What was advised up yesterday noon is not advised down today at eleven; a day later it may be."""
    up, _ = one(list(QUEUED))
    assert up is not None
    down = up.model_copy(update={"id": "0" * 16, "rule": "max_sequences_down", "direction": "tighten"})
    measures = measure_targets(samples(list(QUEUED)), no_histograms())
    group = Group(CHAT, ("r1",), Context(engine="vllm"))

    def entry(hours: float) -> LedgerEntry:
        at = START - timedelta(hours=hours)
        return LedgerEntry(recommendation=down, state=LedgerState.OPEN, state_at=at, last_seen_at=at)

    held = recommend([group], measures, at=START, recent=[entry(23)])
    free = recommend([group], measures, at=START, recent=[entry(25)])

    assert "max_sequences_up" not in {one.rule for one in held.candidates}
    assert "not turned both ways" in {one.rule: one.reason for one in held.abstentions}["max_sequences_up"]
    assert [one.rule for one in free.first] == ["max_sequences_up"]


def test_a_held_back_flag_is_not_answered_with_more_gpus() -> None:
    """Slots were advised down an hour ago and now a queue stands behind them: the queue buys no replicas yet."""
    up, _ = one(list(QUEUED))
    assert up is not None
    down = up.model_copy(update={"id": "0" * 16, "rule": "max_sequences_down", "direction": "tighten"})
    earlier = LedgerEntry(recommendation=down, state=LedgerState.OPEN, state_at=START, last_seen_at=START)
    waits = [{**row, "requests_finished_total": float(i)} for i, row in enumerate(QUEUED)]
    measures = measure_targets(samples(waits), no_histograms())
    slow = dict(measures["r1"].values) | {"queue_seconds_mean": 9.0, "time_to_first_token_seconds_mean": 10.0}
    known = {"r1": dataclasses.replace(measures["r1"], values=slow)}
    group = Group(CHAT, ("r1",), Context(engine="vllm", deployment=Deployment(name="chat", model="m")))

    advice = recommend([group], known, at=START + timedelta(hours=1), recent=[earlier])

    assert advice.candidates == ()
    reasons = {entry.rule: entry.reason for entry in advice.abstentions}
    assert reasons["replicas_up"].startswith("first --max-num-seqs")


def test_what_was_measured_under_this_configuration_is_not_advised_again() -> None:
    """A refuted change does not come back as new after it was undone."""
    up, _ = one(list(QUEUED))
    assert up is not None
    entry = LedgerEntry(recommendation=up, state=LedgerState.REFUTED, state_at=START, last_seen_at=START)
    measures = measure_targets(samples(list(QUEUED)), no_histograms())
    advice = recommend([Group(CHAT, ("r1",), Context(engine="vllm"))], measures, at=START, recent=[entry])

    assert up.id not in {one.id for one in advice.candidates}


def test_the_same_window_gives_the_same_ids() -> None:
    """An id is made of subject, rule, configuration and flags: nothing of the clock or the machine."""
    first, _ = one(list(QUEUED))
    again, _ = one(list(QUEUED))
    assert first is not None
    assert first == again


def test_data_parallel_ranks_share_the_slots() -> None:
    """Two ranks of 16: the flag is per rank, so the proposal is what each gets."""
    rows = [
        {**QUEUED[0], "engine_rank": rank, "scraped_at": START + timedelta(seconds=5 * i)}
        for i in range(10)
        for rank in ("0", "1")
    ]
    first, _ = one(rows)

    assert first is not None
    assert (first.current, first.proposed) == ({"max-num-seqs": "16"}, {"max-num-seqs": "32"})


def test_sglang_gets_its_own_flag() -> None:
    """The same symptom on SGLang turns --max-running-requests; on an engine without the flag it abstains."""
    rows = [{**QUEUED[0], "engine": "sglang", "max_running_requests": 16.0}] * 10
    measures = measure_targets(samples(rows), no_histograms())
    sglang = recommend([Group(CHAT, ("r1",), Context(engine="sglang"))], measures, at=START)
    triton = recommend([Group(CHAT, ("r1",), Context(engine="triton"))], measures, at=START)

    assert sglang.first[0].change_text == "--max-running-requests 16 -> --max-running-requests 32"
    assert triton.candidates == ()
