"""Scaling decisions: up for what is ahead, down only when the rest can carry it, and no decision without evidence."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.scaling.capacity import profile_tokens_per_second, replica_capacity
from optiinfra_pipelines.analysis.scaling.replicas import (
    LoadOutlook,
    ScalingSettings,
    breach_probability,
    recommend_scaling,
    replicas_needed,
)
from optiinfra_pipelines.domain.scaling import Capacity, ScalingAdvice

NOW = datetime(2026, 11, 20, tzinfo=UTC)
CAPACITY = Capacity(
    per_second=100, low_per_second=90, high_per_second=110, origin="history", minutes=60, reason="measured"
)


def outlook(present: float | None = 300.0, p90: float | None = 320.0, queued: float = 0.0) -> LoadOutlook:
    p50 = None if p90 is None else p90 * 0.9
    p10 = None if p90 is None else p90 * 0.8
    return LoadOutlook(present=present, p10=p10, p50=p50, p90=p90, horizon_seconds=180, queued_work=queued)


def decide(ahead: LoadOutlook, current: int | None = 4, **changed: Any) -> ScalingAdvice:
    given_: dict[str, Any] = {
        "current_replicas": current,
        "outlook": ahead,
        "capacity": CAPACITY,
        "seconds_since_change": 1e6,
        "settings": ScalingSettings(),
    }
    return recommend_scaling("chat", NOW, **(given_ | changed))


def test_up_to_what_the_p90_ahead_needs() -> None:
    """500 a second at 95 % of 100 each are 6 replicas; two more cost twice the price."""
    advice = decide(outlook(p90=500), usd_per_replica_hour=3.0)
    assert (advice.action, advice.proposed_replicas, advice.usd_per_hour_change) == ("up", 6, 6.0)
    assert advice.breach_probability is not None
    assert advice.breach_probability < 0.05


def test_the_queue_adds_replicas_and_forbids_removing_any() -> None:
    """12,000 units waiting are two replicas more for a minute; while anything waits none goes."""
    assert decide(outlook(p90=380, queued=12_000)).proposed_replicas == 6
    held = decide(outlook(present=10, p90=10, queued=1))
    assert (held.action, held.proposed_replicas) == ("hold", 4)
    assert "waiting" in held.reason


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"seconds_since_change": 10.0}, "cool-down"),
        ({"seconds_since_change": None}, "not known"),
        ({"draining_replicas": 1}, "draining"),
    ],
)
def test_a_removal_waits_for_quiet(changed: dict[str, Any], why: str) -> None:
    """Cool-down, drain and an unknown last change hold a fleet that is too large."""
    advice = decide(outlook(present=100, p90=100), **changed)
    assert advice.action == "hold"
    assert why in advice.reason


def test_a_removal_is_judged_by_what_remains() -> None:
    """From 4 to 3 replicas 240 a second would be 80 % of each; at 280 a second it would be 93 % and nobody goes."""
    assert decide(outlook(present=240, p90=240)).proposed_replicas == 3
    assert decide(outlook(present=280, p90=280)).action == "hold"


@example(5e-324, 0, 1)
@given(st.floats(0, 2000), st.integers(0, 30), st.integers(1, 4))
def test_following_the_advice_ends_in_a_hold(load: float, current: int, step: int) -> None:
    """Decisions do not chase each other: after the proposed change the same load asks for nothing more."""
    settings = ScalingSettings(step_replicas=step)
    first = decide(outlook(present=load, p90=load), current, settings=settings)
    assert first.proposed_replicas is not None
    again = decide(outlook(present=load, p90=load), first.proposed_replicas, settings=settings)
    assert again.action == "hold"
    if first.action != "hold":
        assert first.proposed_replicas % step == 0 or first.proposed_replicas == settings.min_replicas


def test_limits_are_kept_and_said() -> None:
    """Past the maximum the advice goes as far as it may and names what was needed."""
    advice = decide(outlook(p90=2000), settings=ScalingSettings(max_replicas=8))
    assert (advice.action, advice.proposed_replicas) == ("up", 8)
    assert "the maximum is 8" in advice.reason
    stuck = decide(outlook(p90=2000), 8, settings=ScalingSettings(max_replicas=8))
    assert stuck.action == "hold"
    assert "22 replicas are needed" in stuck.reason
    assert decide(outlook(present=0, p90=0), settings=ScalingSettings(min_replicas=2)).proposed_replicas == 2


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"capacity": None}, "what a replica carries"),
        ({"current": None}, "how many replicas"),
        ({"ahead": outlook(present=None)}, "present load"),
        ({"ahead": outlook(p90=None)}, "no forecast"),
    ],
)
def test_missing_evidence_is_an_abstention(changed: dict[str, Any], why: str) -> None:
    """Unknown is not zero load: nothing is proposed."""
    advice = decide(**({"ahead": outlook()} | changed))
    assert (advice.action, advice.proposed_replicas, advice.breach_probability) == ("abstain", None, None)
    assert why in advice.reason


def test_the_breach_probability_agrees_with_the_quantiles_it_is_made_of() -> None:
    """Carrying P10, P50 or P90 is exceeded with 90, 50 and 10 %."""
    ahead = LoadOutlook(present=1, p10=80, p50=100, p90=140, horizon_seconds=60)
    for carried, chance in ((80.0, 0.9), (100.0, 0.5), (140.0, 0.1)):
        assert breach_probability(ahead, carried) == pytest.approx(chance, abs=1e-3)
    assert breach_probability(ahead, 0) == 1.0


def test_a_replica_is_needed_for_any_load_and_none_for_none() -> None:
    """Ceiling arithmetic, safe against rounding: exactly 3 replicas' worth is 3."""
    assert [replicas_needed(load, 100, target_ratio=1.0) for load in (0, 0.1, 300, 300.001)] == [0, 1, 3, 4]


def minutes(work: list[float], waiting: float = 3.0, kept: bool | None = True, running: float = 8.0) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "work_per_second": work,
            "running": [running] * len(work),
            "waiting": [waiting] * len(work),
            "max_running": [16.0] * len(work),
            "is_within_objective": [kept] * len(work),
        },
        schema_overrides={"is_within_objective": pl.Boolean},
    )


def test_capacity_is_what_was_carried_when_busy() -> None:
    """Busy minutes within objectives count; idle ones and those that broke an objective say nothing of it."""
    busy = minutes([100.0 + number % 10 for number in range(60)])
    idle = minutes([5.0] * 500, waiting=0.0)
    broken = minutes([900.0] * 500, kept=False)
    found = replica_capacity(pl.concat([busy, idle, broken]))
    assert found is not None
    assert (found.origin, found.minutes) == ("history", 60)
    assert found.low_per_second <= found.per_second <= found.high_per_second
    assert found.per_second == pytest.approx(108, abs=1.1)


def test_thin_history_falls_back_to_a_profile_and_then_to_nothing() -> None:
    """Ten busy minutes are not enough; minutes whose objectives are unknown are none."""
    thin = minutes([100.0] * 10)
    assert replica_capacity(thin) is None
    assert replica_capacity(minutes([100.0] * 500, kept=None)) is None
    profile = replica_capacity(thin, profile_per_second=1000)
    assert profile is not None
    assert (profile.origin, profile.low_per_second, profile.high_per_second) == ("profile", 500, 800)
    with pytest.raises(ValueError, match="is_within_objective"):
        replica_capacity(thin.drop("is_within_objective"))


def test_profiles_speak_only_for_what_was_measured() -> None:
    """A 72B model on 8 H100 is near the measured 70B; an 8B model or another GPU is near nothing."""
    tokens = profile_tokens_per_second(72, "NVIDIA H100 80GB HBM3", 8, 1000, 200)
    assert tokens == pytest.approx(1200 / (1000 / 11877 + 200 / 829))
    assert profile_tokens_per_second(8, "NVIDIA H100 80GB HBM3", 8, 1000, 200) is None
    assert profile_tokens_per_second(70, "NVIDIA L40S", 8, 1000, 200) is None


def test_profile_points_are_the_published_medians() -> None:
    """The facts in the table are the source's: prefill at batch 4 and decode at batch 32 of 512-token prompts."""
    folder = os.environ.get("OPTIINFRA_DATA")
    if not folder:
        pytest.skip("OPTIINFRA_DATA is not set: the public measurements are not part of the project")
    table = pl.read_parquet(Path(folder) / "data/splitwise_perf_model.parquet").filter(
        (pl.col("tensor_parallel") == 8) & (pl.col("prompt_size") == 512)
    )
    for model, size in (("llama2-70b", 70), ("bloom-176b", 176)):
        for hardware, gpu in (("a100-80gb", "a100"), ("h100-80gb-pcap", "h100")):
            rows = table.filter((pl.col("model") == model) & (pl.col("hardware") == hardware))
            prefill = 4 * 512_000 / rows.filter(pl.col("batch_size") == 4)["prompt_time"].median()  # type: ignore[operator]
            decode = 32_000 / rows.filter(pl.col("batch_size") == 32)["token_time"].median()  # type: ignore[operator]
            assert profile_tokens_per_second(size, gpu, 8, 1, 0) == pytest.approx(prefill, rel=1e-3)
            assert profile_tokens_per_second(size, gpu, 8, 0, 1) == pytest.approx(decode, rel=2e-3)
