"""Findings that need something to hold a replica against: objectives, its own capacity, its own cache history."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from optiinfra_pipelines.analysis.findings.diagnosis import diagnose
from optiinfra_pipelines.analysis.findings.latency_share import PhaseShares, phase_shares, wilson_lower
from optiinfra_pipelines.analysis.findings.window import Capacity, HitHistory
from optiinfra_pipelines.domain.findings import Diagnosis, FindingKind
from optiinfra_pipelines.domain.fleet import Objective
from optiinfra_pipelines.domain.thresholds import threshold_values
from tests.analysis.findings_recordings import EPOCH, RECORDINGS, frames, pages_of, phase, scraped_at, window_of

VALUES = threshold_values({})
VLLM = RECORDINGS / "vllm/0.32.0/small_llama_kv8k"
SHARED, PRESSED, QUEUED = (
    VLLM / name for name in ("03_loaded_shared_prefix_c8", "04_kv_pressure_preempt_c16", "05_overload_queue_c64_low_kv")
)


def objective(kind: Any, seconds: float, target: float = 0.9) -> Objective:
    return Objective(kind=kind, threshold_seconds=seconds, target_ratio=target)


def told(diagnosis: Diagnosis) -> set[tuple[str, str]]:
    return {(finding.kind.value, finding.cause) for finding in diagnosis.findings}


def reason(diagnosis: Diagnosis, kind: FindingKind) -> str:
    [found] = [one.reason for one in diagnosis.abstentions if one.kind == kind]
    return found


def test_a_missed_objective_names_the_phase_that_spends_the_time() -> None:
    """Of the end-to-end time of the shared-prefix phase nine tenths are decode, by exact sums over counts."""
    window = phase(SHARED, objectives=(objective("e2e", 5.0),))

    [finding] = diagnose(window, VALUES).findings

    assert (finding.kind, finding.cause) == (FindingKind.HIGH_LATENCY, "decode")
    shares = phase_shares("e2e", window.steps)
    assert isinstance(shares, PhaseShares)
    assert shares.shares["decode"] == pytest.approx(481.589 / 511.695, abs=0.001)
    assert sum(shares.shares.values()) == pytest.approx(1)


def test_time_to_first_token_of_the_overload_is_queue() -> None:
    """Under overload 97 % of the time to first token is waiting, so its latency is told inside the queue's finding."""
    window = phase(QUEUED, objectives=(objective("ttft", 2.5),))

    [finding] = diagnose(window, VALUES).findings

    assert finding.kind == FindingKind.QUEUE_BUILDUP
    assert [(effect.kind, effect.cause) for effect in finding.consequences] == [(FindingKind.HIGH_LATENCY, "queue")]
    shares = phase_shares("ttft", window.steps)
    assert isinstance(shares, PhaseShares)
    assert shares.shares["queue"] == pytest.approx(2527.529 / 2600.285, abs=0.001)


def test_a_kept_objective_is_no_finding() -> None:
    """All requests of the shared-prefix phase ended within 20 s."""
    diagnosis = diagnose(phase(SHARED, objectives=(objective("e2e", 20.0),)), VALUES)

    assert told(diagnosis) == set()
    assert FindingKind.HIGH_LATENCY in diagnosis.judged


def test_an_objective_between_far_edges_is_not_judged() -> None:
    """At 0.45 s the nearest edge is 0.25 s: what lies between could be good, so nobody accuses, and a flag is named."""
    diagnosis = diagnose(phase(SHARED, objectives=(objective("ttft", 0.45),)), VALUES)

    assert told(diagnosis) == set()
    assert "--custom-histogram-buckets" in reason(diagnosis, FindingKind.HIGH_LATENCY)


def test_an_engine_without_histograms_keeps_no_latency_objective_secret() -> None:
    """llama.cpp has no histogram: the objective cannot be judged there, and the reason says what is missing."""
    llama = RECORDINGS / "llama.cpp/debian-1_0.7.0-b11669/small_np4_c8192/03_shared_prefix_c4"

    diagnosis = diagnose(phase(llama, objectives=(objective("ttft", 1.0),)), VALUES)

    assert reason(diagnosis, FindingKind.HIGH_LATENCY) == "ttft: time_to_first_token_seconds is not exposed"


def test_ten_requests_are_too_few_for_a_verdict_on_latency() -> None:
    """The first steps of the light phase have 11 requests: a share of so few is chance."""
    pages = pages_of(VLLM / "02_light_c1")[:2]
    window = window_of(
        frames([(page, scraped_at(page, 0)) for page in pages]), objectives=(objective("e2e", 0.3, 0.99),)
    )

    diagnosis = diagnose(window, VALUES)

    assert told(diagnosis) == set()
    assert "11 of 20 requests" in reason(diagnosis, FindingKind.HIGH_LATENCY)


def test_a_share_is_missed_only_beyond_chance() -> None:
    """12 slow of 100 do not contradict 90 %, 20 do: the lower ends of their intervals are 7 % and 13 %."""
    assert wilson_lower(12, 100) == pytest.approx(0.0700, abs=0.001)
    assert wilson_lower(20, 100) == pytest.approx(0.1334, abs=0.001)


def test_the_queue_is_held_against_the_deployments_own_promise() -> None:
    """A deployment that promises a minute to the first token queues seven seconds on purpose."""
    assert told(diagnose(phase(QUEUED, objectives=(objective("ttft", 80.0),)), VALUES)) == set()


def test_throughput_below_its_own_capacity_while_work_waits_is_the_root_of_the_queue() -> None:
    """Replicas that were seen to make 900 tokens a second make 290 with 48 requests waiting: the queue follows."""
    [finding] = diagnose(phase(QUEUED, capacity=Capacity(900.0, 20)), VALUES).findings

    assert finding.kind == FindingKind.LOW_THROUGHPUT
    assert [effect.kind for effect in finding.consequences] == [FindingKind.QUEUE_BUILDUP]


@pytest.mark.parametrize("capacity", [Capacity(300.0, 20), Capacity(900.0, 3), None])
def test_full_speed_or_an_unknown_capacity_is_no_low_throughput(capacity: Capacity | None) -> None:
    """At its usual speed, or with too little history to know it, an overloaded replica is overloaded and not slow."""
    assert told(diagnose(phase(QUEUED, capacity=capacity), VALUES)) == {("QUEUE_BUILDUP", "batch_slot_bound")}


def test_an_idle_replica_is_not_slow() -> None:
    """No work waits: tokens a second say what was asked, not what could be done."""
    assert told(diagnose(phase(VLLM / "02_light_c1", capacity=Capacity(900.0, 20)), VALUES)) == set()


@pytest.mark.parametrize(
    ("hits", "truth"),
    [
        (HitHistory((0.8,) * 12), set()),
        (HitHistory(attainable_ratio=0.85), set()),
        (HitHistory((0.3,) * 12), set()),
        (HitHistory(attainable_ratio=1.0), {("CACHE_INEFFICIENCY", "gap_to_attainable")}),
        (HitHistory((0.995, 0.999) * 6), {("CACHE_INEFFICIENCY", "sudden_fall")}),
        # What swings between 60 and 100 % as a rule has not fallen at 79.5 %.
        (HitHistory((0.6, 1.0, 1.0) * 4), set()),
        (HitHistory((0.999,) * 11), set()),
    ],
)
def test_a_cache_is_held_against_its_own_workload(hits: HitHistory, truth: set[tuple[str, str]]) -> None:
    """79.5 % of prompt tokens were hits: good or bad only beside what is usual or attainable there."""
    assert told(diagnose(phase(SHARED, hits=hits), VALUES)) == truth


def test_unique_prompts_have_no_cache_finding() -> None:
    """0 % hits of the overload phase are right for its prompts: without history or a reuse curve nobody complains."""
    diagnosis = diagnose(phase(QUEUED), VALUES)

    assert FindingKind.CACHE_INEFFICIENCY not in diagnosis.judged


def test_a_queue_that_just_began_is_neither_found_nor_denied() -> None:
    """Five seconds of waiting are too short to tell: an abstention, not a clean bill."""
    quiet, busy = pages_of(QUEUED)[0], pages_of(QUEUED)[1]
    hidden = frames([(quiet, EPOCH), (quiet, EPOCH + timedelta(seconds=5)), (busy, EPOCH + timedelta(seconds=10))])
    hidden["raw_engine_histograms"] = hidden["raw_engine_histograms"].clear()

    diagnosis = diagnose(window_of(hidden), VALUES)

    assert told(diagnosis) == set()
    assert "not long enough" in reason(diagnosis, FindingKind.QUEUE_BUILDUP)


def test_memory_pressure_explains_the_latency_of_its_time() -> None:
    """In the KV-pressure phase queue and latency both follow from the lack of blocks: one finding."""
    [finding] = diagnose(phase(PRESSED, objectives=(objective("ttft", 2.5),)), VALUES).findings

    assert finding.kind == FindingKind.MEMORY_PRESSURE
    assert [effect.kind for effect in finding.consequences] == [FindingKind.QUEUE_BUILDUP, FindingKind.HIGH_LATENCY]
