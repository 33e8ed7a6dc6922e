"""The rules as data, their flags, and how far memory knobs turn."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.quantization import QuantizationOption, options
from optiinfra_pipelines.analysis.recommendations.context import Context, GpuFacts, PastEffect, Sized, with_context
from optiinfra_pipelines.analysis.recommendations.derive import SIZINGS, Group, recommend
from optiinfra_pipelines.analysis.recommendations.flags import (
    FLAGS,
    GROUPS,
    NoFlag,
    declared_knobs,
    find_flag,
    unread_flags,
)
from optiinfra_pipelines.analysis.recommendations.measures import Histogram, Measures
from optiinfra_pipelines.analysis.recommendations.rule import check
from optiinfra_pipelines.analysis.recommendations.rules import RULES
from optiinfra_pipelines.analysis.recommendations.sizing import overflow_chance, pressure_effect
from optiinfra_pipelines.domain.findings import Subject
from optiinfra_pipelines.domain.fleet import Deployment, Objective
from optiinfra_pipelines.domain.models import known_model
from optiinfra_pipelines.domain.prices import price_of
from optiinfra_pipelines.domain.recommendations import NEEDS_QUALITY_GATE, Basis, Effect, Recommendation
from optiinfra_pipelines.rollout.knobs import group_of
from tests.analysis.advice_cases import START

GIB = 1024**3
LLAMA_8B = known_model("llama-3.1-8b-instruct")
CHAT = Subject(kind="deployment", name="chat")
H100 = Deployment(
    name="chat",
    model="meta-llama/Llama-3.1-8B-Instruct",
    gpu="H100-80GB-SXM",
    gpus_per_replica=1,
    objectives=(
        Objective(kind="itl", target_ratio=0.9, threshold_seconds=0.1),
        Objective(kind="ttft", target_ratio=0.9, threshold_seconds=1.0),
    ),
)
# One replica of Llama-3.1-8B that preempts: 20,000 blocks of 16 tokens, requests of 6,500 +- 2,800 tokens, 64 run.
PRESSED = {
    "window_seconds": 300.0,
    "requests_finished": 200.0,
    "preemptions": 40.0,
    "preemptions_per_request": 0.2,
    "preemptions_per_request_low": 0.15,
    "kv_usage_max_ratio": 1.0,
    "kv_usage_mean_ratio": 0.95,
    "kv_full_share_ratio": 0.6,
    "kv_capacity_tokens": 320_000.0,
    "kv_block_size_tokens": 16.0,
    "running_max": 64.0,
    "running_mean": 60.0,
    "waiting_mean": 2.0,
    "waiting_share_ratio": 0.3,
    "request_tokens_mean": 6500.0,
    "request_tokens_deviation": 2800.0,
}


def measures(settings: dict[str, str] | None = None, **values: float | None) -> Measures:
    return Measures(
        target="r1",
        engine="vllm",
        vantage="engine",
        window_start=START,
        window_end=START + timedelta(minutes=5),
        config_hash="c0",
        ranks=1,
        unusable=None,
        values=PRESSED | values,
        settings={"block_size": "16", "cache_dtype": "auto", "gpu_memory_utilization": "0.9"} | (settings or {}),
    )


def context(**known: object) -> Context:
    base: dict[str, object] = {
        "engine": "vllm",
        "deployment": H100,
        "shape": LLAMA_8B,
        "price": price_of("H100-80GB-SXM"),
        "gpu": GpuFacts(memory_total_bytes=80 * GIB, memory_free_min_bytes=6 * GIB),
    }
    return Context(**(base | known))  # type: ignore[arg-type]


def advised(measured: Measures, known: Context) -> tuple[Recommendation | None, dict[str, str]]:
    advice = recommend([Group(CHAT, ("r1",), known)], {"r1": measured}, at=START)
    return next(iter(advice.first), None), {one.rule: one.reason for one in advice.abstentions}


def test_every_rule_is_complete_data() -> None:
    """A rule without reason, source, risk, way to verify and undo, sizing or known knob could not be followed."""
    for rule in RULES:
        assert all((rule.reason, rule.source, rule.risk, rule.verify, rule.undo, rule.conditions)), rule.name
        assert rule.sizing in SIZINGS
        assert rule.knob in GROUPS
        assert 1 <= rule.risk_weight <= 5
        assert set(rule.after) < {one.name for one in RULES}
        assert all(one.reason for one in rule.conditions)
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_knob_groups_agree_with_those_of_rollouts() -> None:
    """A flag that a rollout knows is in the same group there: one group a change, by one count."""
    for flags in FLAGS.values():
        for knob, flag in flags.items():
            theirs = group_of(flag.flag)
            # TGI's --max-total-tokens bounds a request, SGLang's the cache: one name, two groups.
            if theirs is not None and flag.flag != "max-total-tokens":
                assert theirs is GROUPS[knob], (flag.flag, knob)


def test_what_changes_precision_has_a_quality_gate() -> None:
    """FP8 KV and FP8 weights come with their gate whatever led to them; metrics cannot see answers get worse."""
    sizings = [rule.sizing for rule in RULES if rule.knob in ("kv_dtype", "weights_format")]
    sized = [SIZINGS[name](measures(inter_token_latency_seconds_mean=0.2), context()) for name in sizings]

    assert len(sized) == 4
    assert all(isinstance(one, Sized) and "evaluation set" in (one.quality_gate or "") for one in sized)
    assert {GROUPS["kv_dtype"], GROUPS["weights_format"]} == set(NEEDS_QUALITY_GATE)


def test_a_gpu_with_memory_left_gets_a_larger_share_first() -> None:
    """0.9 -> 0.92 of 80 GiB is 1.6 GiB, and at 131,072 B a token 13,107 tokens: the arithmetic is on the page."""
    first, reasons = advised(measures(), context())

    assert first is not None
    assert first.change_text == "--gpu-memory-utilization 0.9 -> --gpu-memory-utilization 0.92"
    assert "1.60 GiB / 131,072 B = 13,107 tokens more" in first.effects[0].derivation
    assert first.effects[0].basis is Basis.ARITHMETIC
    assert reasons["max_sequences_down"].startswith("first --gpu-memory-utilization")


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ({"gpu": GpuFacts()}, "GPU telemetry is missing"),
        ({"gpu": GpuFacts(memory_total_bytes=80 * GIB, memory_free_min_bytes=2 * GIB)}, "no memory left: 2.0 GiB free"),
    ],
)
def test_without_free_memory_the_batch_is_cut_instead(known: dict[str, object], says: str) -> None:
    """Unknown or full memory: the share abstains with its reason, and fewer slots are the change."""
    first, reasons = advised(measures(), context(**known))

    assert first is not None
    assert first.rule == "max_sequences_down"
    assert says in reasons["kv_memory_up"]


def test_the_largest_share_is_the_last() -> None:
    """At 0.95 nothing is left to give."""
    _, reasons = advised(measures({"gpu_memory_utilization": "0.95"}), context())
    assert "0.95 is the most" in reasons["kv_memory_up"]


def test_fp8_kv_follows_where_fewer_slots_are_no_change() -> None:
    """No memory left and the slots fit already: the next step halves the bytes of a number, on a GPU that can."""
    few = measures(running_max=8.0, request_tokens_mean=20_000.0, request_tokens_deviation=1_000.0)
    full = GpuFacts(memory_total_bytes=80 * GIB, memory_free_min_bytes=0.0)
    first, _ = advised(few, context(gpu=full))
    old, reasons = advised(few, context(gpu=full, deployment=H100.model_copy(update={"gpu": "A100-80GB"})))

    assert first is not None
    assert (first.rule, first.proposed) == ("kv_dtype_fp8", {"kv-cache-dtype": "fp8"})
    assert first.quality_gate
    assert old is None or old.rule != "kv_dtype_fp8"
    assert "Ada, Hopper or later" in reasons["kv_dtype_fp8"]


def test_an_old_version_is_not_given_a_flag_it_lacks() -> None:
    """--kv-offloading-size came with 0.11.1: 0.9.2 has none; an unknown version is told what it needs."""
    assert isinstance(find_flag("vllm", "0.9.2", "kv_offload"), NoFlag)
    assert not isinstance(find_flag("vllm", "0.32.0", "kv_offload"), NoFlag)
    assert not isinstance(find_flag("vllm", None, "kv_offload"), NoFlag)
    assert isinstance(find_flag(None, None, "kv_offload"), NoFlag)


def test_an_effect_without_a_basis_is_an_abstention_until_there_is_history() -> None:
    """One more front-end process: no arithmetic bounds it. Five measured changes do."""
    front = {
        "preemptions_per_request_low": 0.0,
        "kv_usage_max_ratio": 0.2,
        "waiting_share_ratio": 0.9,
        "at_ceiling_ratio": 0.1,
        "cpu_cores_busy": 0.97,
        "waiting_mean": 10.0,
        "budget_use_ratio": 0.1,
    }
    none, reasons = advised(measures(**front), context())
    known = context(past={"frontend_processes_up": PastEffect(-0.6, -0.2, 5)})
    first, _ = advised(measures(**front), known)

    assert none is None
    assert "no basis" in reasons["frontend_processes_up"]
    assert first is not None
    assert (first.effects[0].basis, first.effects[0].change_low) == (Basis.HISTORY, -6.0)


def test_a_day_of_spare_hands_a_replica_to_the_scaling_policy() -> None:
    """Four replicas at 30 % KV all day: one less reaches 40 %, frees one H100, and is not a change of flags."""
    day = {
        "window_seconds": 86_400.0,
        "preemptions_per_request_low": 0.0,
        "kv_usage_max_ratio": 0.3,
        "waiting_max": 0.0,
        "waiting_share_ratio": 0.0,
    }
    first, _ = advised(measures(**day), context(replicas=4))
    least, reasons = advised(measures(**day), context(replicas=1))

    assert first is not None
    assert (first.rule, first.usd_per_hour_change, first.effects[0].change_low) == ("replicas_down", -3.0, -1.0)
    with pytest.raises(ValueError, match="not a change of a deployment's flags"):
        first.to_change()
    assert least is None
    assert "1 replicas run and 1 must" in reasons["replicas_down"]


def test_an_objective_missed_in_decode_cuts_the_token_budget() -> None:
    """Inter-token latency misses, time to first token does not: 8,192 -> 2,048 where the budget is known."""
    itl = Histogram((0.05, 0.1, 0.2, float("inf")), (10.0, 50.0, 100.0, 100.0), 12.0, 100.0)
    ttft = Histogram((0.5, 1.0, float("inf")), (90.0, 99.0, 100.0), 30.0, 100.0)
    calm = measures(preemptions_per_request_low=0.0, kv_usage_max_ratio=0.5, inter_token_latency_seconds_mean=0.12)
    slow = Measures(
        **{
            **calm.__dict__,
            "histograms": {"inter_token_latency_seconds": itl, "time_to_first_token_seconds": ttft},
        }
    )
    first, _ = advised(slow, context(declared={"token_budget": "8192"}))
    blind, reasons = advised(slow, context())

    assert first is not None
    assert first.change_text == "--max-num-batched-tokens 8192 -> --max-num-batched-tokens 2048"
    assert first.effects[0].change_low == pytest.approx(-0.12 * 0.75)
    assert blind is None
    assert "not told by the page and not declared" in reasons["token_budget_down"]


@pytest.mark.parametrize(
    ("gpu", "formats"),
    [
        ("H100-80GB-SXM", {"fp8", "int8", "int4"}),
        ("NVIDIA A100-SXM4-80GB", {"fp8", "int8", "int4"}),
        ("NVIDIA B200", {"fp8", "int4"}),
        ("Tesla T4", {"int8", "int4"}),
        ("Tesla V100", set()),
        ("unheard-of", set()),
        (None, set()),
    ],
)
def test_formats_follow_the_hardware(gpu: str | None, formats: set[str]) -> None:
    """FP8 from Ampere on (weight-only there), INT8 not on Blackwell, INT4 from Turing; unknown GPUs get nothing."""
    offered = [one for one in options("vllm", gpu, LLAMA_8B) if isinstance(one, QuantizationOption)]
    assert {one.format for one in offered} == formats
    for one in offered:
        assert one.quality_gate
        assert 0 < one.freed_bytes_low <= one.freed_bytes_high < 8.03e9 * 2
        assert "GiB freed" in one.derivation
    if gpu == "NVIDIA A100-SXM4-80GB":
        assert {one.format: one.is_weight_only for one in offered}["fp8"]


def test_quantized_weights_are_not_quantized_again() -> None:
    """DeepSeek-V3 is published in FP8: every format is refused with that reason."""
    refused = options("vllm", "H200", known_model("deepseek-v3"), 8)
    assert not any(isinstance(one, QuantizationOption) for one in refused)


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(sorted(PRESSED)),
        st.one_of(st.none(), st.floats(0, 1e6), st.sampled_from([0.0, 1.0])),
        max_size=8,
    ),
    st.booleans(),
)
def test_no_measure_makes_a_rule_crash_or_promise_nonsense(values: dict[str, float | None], has_shape: bool) -> None:
    """Any mix of unknown and odd measures: proposals keep ordered intervals and evidence, the rest are reasons."""
    known = context() if has_shape else context(shape=None, gpu=GpuFacts(), deployment=None, price=None)
    advice = recommend([Group(CHAT, ("r1",), known)], {"r1": measures(**values)}, at=START)

    for one in advice.candidates:
        assert one.evidence
        assert all(effect.change_low <= effect.change_high and effect.derivation for effect in one.effects)
        assert one.risk
        assert one.undo
    assert all(entry.reason for entry in advice.abstentions)
    assert len({str(one.subject) for one in advice.first}) == len(advice.first)


@given(st.integers(1, 500), st.floats(1, 1e4), st.floats(0, 5e3), st.floats(0, 1e7))
def test_a_fuller_batch_never_outgrows_less_often(n: int, mean: float, deviation: float, capacity: float) -> None:
    """A chance between 0 and 1 that more cache never raises."""
    chance = overflow_chance(n, mean, deviation, capacity)
    assert 0 <= chance <= 1
    assert overflow_chance(n, mean, deviation, capacity * 1.1 + 1) <= chance + 1e-12


def test_a_failed_condition_settles_a_rule_whatever_else_is_unknown() -> None:
    """An idle target needs no objective to be left alone; a busy one with unknowns makes the rule abstain."""
    by_name = {rule.name: rule for rule in RULES}
    seen = with_context(measures(kv_usage_max_ratio=0.1, preemptions_per_request_low=None), context())
    assert check(by_name["kv_memory_up"], seen).unknown == ()
    unsure = with_context(measures(preemptions_per_request_low=None), context())
    assert check(by_name["kv_memory_up"], unsure).unknown == ("preemptions_per_request_low",)


def waiting_for_blocks(**values: float | None) -> Measures:
    """40 run, 10 wait, the cache is full most of the time, and nothing is thrown out."""
    quiet: dict[str, float | None] = {
        "preemptions": 0.0,
        "preemptions_per_request": 0.0,
        "preemptions_per_request_low": 0.0,
        "running_max": 44.0,
        "waiting_mean": 8.0,
        "waiting_when_queued": 10.0,
        "waiting_share_ratio": 0.8,
        "kv_full_share_ratio": 0.7,
        "at_ceiling_ratio": 0.3,
    }
    return measures(**(quiet | values))


def test_requests_that_wait_for_blocks_without_preemptions_get_more_cache() -> None:
    """13,107 tokens more at 6,500 a request take in two of the ten that wait, in the 80 % of samples with a queue."""
    first, _ = advised(waiting_for_blocks(), context())

    assert first is not None
    assert (first.rule, first.proposed) == ("kv_memory_for_queue", {"gpu-memory-utilization": "0.92"})
    relief = first.effects[0]
    assert relief.signal == "requests_waiting_mean"
    assert (relief.before, relief.change_low) == (8.0, -8.0)
    assert relief.change_high == pytest.approx(-2 * 0.8)


def test_an_engine_without_a_preemption_counter_gets_the_same_advice() -> None:
    """TGI and llama.cpp count none: that requests wait before a full cache is enough."""
    first, _ = advised(waiting_for_blocks(preemptions_per_request=None, preemptions_per_request_low=None), context())

    assert first is not None
    assert first.rule == "kv_memory_for_queue"


@pytest.mark.parametrize(
    "value",
    [{"at_ceiling_ratio": 1.0}, {"kv_full_share_ratio": 0.2}, {"waiting_share_ratio": 0.2}],
    ids=["slots taken", "cache seldom full", "a burst"],
)
def test_a_queue_of_another_cause_gets_no_cache(value: dict[str, float]) -> None:
    """Batch slots that are all taken, a cache that is seldom full, a burst: memory is not what they wait for."""
    first, reasons = advised(waiting_for_blocks(**value), context())

    assert first is None or not first.rule.endswith("_for_queue")
    assert not any(name.endswith("_for_queue") for name in reasons)


def test_without_memory_left_the_numbers_get_smaller_and_a_quality_gate() -> None:
    """The GPU is full: FP8 KV doubles the tokens, and its gate comes with it."""
    first, reasons = advised(
        waiting_for_blocks(), context(gpu=GpuFacts(memory_total_bytes=80 * GIB, memory_free_min_bytes=GIB / 2))
    )

    assert first is not None
    assert (first.rule, first.proposed) == ("kv_dtype_for_queue", {"kv-cache-dtype": "fp8"})
    assert first.quality_gate
    assert "no memory left" in reasons["kv_memory_for_queue"]


@given(st.floats(1, 500), st.floats(10, 20_000), st.floats(0, 1), st.integers(1, 8), st.floats(1, 2e6))
def test_the_effect_on_a_queue_never_promises_more_than_waits(
    waiting: float, held: float, share: float, ranks: int, capacity: float
) -> None:
    """Whatever the numbers: between all that wait and none, never a growing queue."""
    seen = waiting_for_blocks(
        waiting_mean=waiting, waiting_when_queued=waiting, request_tokens_mean=held, waiting_share_ratio=share
    )
    relief = pressure_effect(dataclasses.replace(seen, ranks=ranks), 40, capacity, "so")

    assert isinstance(relief, Effect)
    assert -waiting <= relief.change_low <= relief.change_high <= 0


def test_flags_that_a_page_does_not_tell_count_as_a_person_declared_them() -> None:
    """vLLM's page names no --max-num-seqs: declared, advice starts from it; the page wins."""
    flags = {"max_num_seqs": "48", "gpu-memory-utilization": "0.5", "made-up": "1"}
    known = context(declared=declared_knobs("vllm", flags))

    assert known.declared == {"max_sequences": "48", "kv_memory_share": "0.5"}
    assert unread_flags("vllm", flags) == ["made-up"]
    assert with_context(measures(), known)["slots"] == 48
    assert with_context(dataclasses.replace(measures(), ranks=2), known)["slots"] == 96
    first, _ = advised(measures(), known)
    assert first is not None
    assert first.current == {"gpu-memory-utilization": "0.9"}
