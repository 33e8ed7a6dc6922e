"""What GPUs did with their hours and what it cost: states, dollars, tokens, and what is not known."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.waste import PERIOD_HOURS, GpuState, deployment_costs, gpu_hours, gpu_states
from optiinfra_pipelines.domain.prices import price_of

START = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
SCHEMA = {
    "host": pl.String,
    "gpu_uuid": pl.String,
    "mig_instance": pl.String,
    "name": pl.String,
    "period_at": pl.Datetime("us", "UTC"),
    "sample_count": pl.Int64,
    "unhealthy_count": pl.Int64,
    "gpu_utilization_max_ratio": pl.Float64,
    "sm_active_mean_ratio": pl.Float64,
    "memory_used_max_bytes": pl.Float64,
    "memory_total_bytes": pl.Float64,
    "process_count_max": pl.Int64,
}
ACTIVE = {
    "host": "h0",
    "gpu_uuid": "g0",
    "mig_instance": "",
    "name": "NVIDIA H100 80GB HBM3",
    "period_at": START,
    "sample_count": 60,
    "unhealthy_count": 0,
    "gpu_utilization_max_ratio": 1.0,
    "sm_active_mean_ratio": 0.4,
    "memory_used_max_bytes": 70e9,
    "memory_total_bytes": 80e9,
    "process_count_max": 1,
}
QUIET = {"gpu_utilization_max_ratio": 0.0, "sm_active_mean_ratio": 0.0}
EMPTY = {"memory_used_max_bytes": 0.5e9, "process_count_max": 0}


def frame(*rows: dict[str, object]) -> pl.DataFrame:
    return pl.DataFrame([ACTIVE | row for row in rows], schema=SCHEMA)


def state(row: dict[str, object], requests: float | None = None, cards: int = 1) -> str:
    rows = [row, *({"gpu_uuid": f"g{n}"} for n in range(1, cards))]
    asked = pl.DataFrame(
        [{"host": "h0", "period_at": START, "requests_running_mean": requests}],
        schema={"host": pl.String, "period_at": pl.Datetime("us", "UTC"), "requests_running_mean": pl.Float64},
    )
    states = gpu_states(frame(*rows), None if requests is None else asked)
    return str(states.filter(pl.col("gpu_uuid") == "g0")["state"].item())


@pytest.mark.parametrize(
    ("row", "requests", "expected"),
    [
        ({}, None, GpuState.ACTIVE),
        (QUIET, None, GpuState.IDLE_HELD),
        (QUIET | EMPTY, None, GpuState.IDLE_FREE),
        # A duty cycle of 100 % with no SM at work is a spinning kernel, not load.
        ({"sm_active_mean_ratio": 0.01}, None, GpuState.IDLE_HELD),
        # No SM counter: a busy duty cycle alone proves nothing, a zero one proves idleness, and so do the engine's
        # requests on a host of one card.
        ({"sm_active_mean_ratio": None}, None, GpuState.UNKNOWN),
        ({"sm_active_mean_ratio": None, "gpu_utilization_max_ratio": 0.0}, None, GpuState.IDLE_HELD),
        ({"sm_active_mean_ratio": None}, 3.0, GpuState.ACTIVE),
        ({"sm_active_mean_ratio": None}, 0.0, GpuState.IDLE_HELD),
        # Little memory and processes that cannot be listed.
        (QUIET | {"memory_used_max_bytes": 0.5e9, "process_count_max": None}, None, GpuState.IDLE_FREE),
        (QUIET | {"memory_used_max_bytes": 4e9, "process_count_max": None}, None, GpuState.UNKNOWN),
        (QUIET | {"memory_used_max_bytes": 0.5e9, "process_count_max": 1}, None, GpuState.IDLE_HELD),
        ({"unhealthy_count": 60}, None, GpuState.UNKNOWN),
        ({"sample_count": 0}, None, GpuState.UNKNOWN),
    ],
)
def test_the_state_of_a_gpu(row: dict[str, object], requests: float | None, expected: GpuState) -> None:
    """Activity first, then the engine's requests, then who holds it; unknown is a state of its own."""
    assert state(row, requests) == expected


def test_requests_of_a_host_with_two_cards_tell_nothing_of_one() -> None:
    """Which of them runs the requests is not known."""
    assert state({"sm_active_mean_ratio": None}, requests=3.0, cards=2) == GpuState.UNKNOWN


def test_slices_are_left_out() -> None:
    """Only whole GPUs cost money."""
    assert gpu_states(frame({"mig_instance": "1"})).height == 0


def test_hours_and_dollars_by_state() -> None:
    """Twelve five-minute rows are an hour; an hour of a held H100 costs what the table says, with its range."""
    rows = [QUIET | {"period_at": START + timedelta(minutes=5 * i)} for i in range(12)]
    states = gpu_states(frame(*rows))
    name = "NVIDIA H100 80GB HBM3"

    [row] = gpu_hours(states, {name: price_of(name)}, ["host"]).to_dicts()

    assert row["state"] == "idle_held"
    assert row["gpu_hours"] == pytest.approx(1.0)
    assert (row["usd"], row["usd_low"], row["usd_high"]) == pytest.approx((3.0, 1.99, 6.88))


def test_an_unknown_price_makes_the_dollars_unknown() -> None:
    """One card without a price leaves the host's sum open: NULL, not the price of the others."""
    states = gpu_states(frame(QUIET, QUIET | {"gpu_uuid": "g1", "name": "Tesla T4"}))

    [row] = gpu_hours(states, {"NVIDIA H100 80GB HBM3": price_of("H100")}, ["host"]).to_dicts()

    assert (row["gpu_hours"], row["usd"]) == (pytest.approx(2 * PERIOD_HOURS), None)


@given(st.lists(st.sampled_from([{}, QUIET, QUIET | EMPTY, {"sm_active_mean_ratio": None}]), min_size=1, max_size=40))
def test_no_hour_is_lost_or_counted_twice(rows: list[dict[str, object]]) -> None:
    """The hours of all states together are the hours observed."""
    timed = [row | {"period_at": START + timedelta(minutes=5 * i)} for i, row in enumerate(rows)]
    hours = gpu_hours(gpu_states(frame(*timed)), {}, ["host"])

    assert hours["gpu_hours"].sum() == pytest.approx(len(rows) * PERIOD_HOURS)


def costs(load: list[dict[str, object]], price: float | None = 3.0, joules: float | None = None) -> dict[str, object]:
    base = {
        "deployment": "chat",
        "target": "r1",
        "period_at": START,
        "prompt_tokens": 600_000.0,
        "generation_tokens": 400_000.0,
        "prefill_seconds": 60.0,
        "decode_seconds": 180.0,
    }
    deployments = pl.DataFrame(
        [("chat", 2, price)],
        schema={"deployment": pl.String, "gpus_per_replica": pl.Int64, "usd_per_gpu_hour": pl.Float64},
        orient="row",
    )
    energy = pl.DataFrame({"deployment": ["chat"], "energy_joules": [joules]}) if joules else None
    schema = {
        "deployment": pl.String,
        "target": pl.String,
        "period_at": pl.Datetime("us", "UTC"),
        **dict.fromkeys(("prompt_tokens", "generation_tokens", "prefill_seconds", "decode_seconds"), pl.Float64),
    }
    [row] = deployment_costs(pl.DataFrame([base | one for one in load], schema=schema), deployments, energy).to_dicts()
    return row


def test_the_cost_of_a_million_tokens_adds_up() -> None:
    """2 GPUs for 5 minutes at 3 USD: 0.5 USD for a million tokens; a quarter of the time is prefill."""
    row = costs([{}], joules=4e5)

    assert row["usd"] == pytest.approx(0.5)
    assert row["usd_per_million_tokens"] == pytest.approx(0.5)
    assert row["usd_per_million_prompt_tokens"] == pytest.approx(0.5 * 0.25 / 0.6)
    assert row["usd_per_million_generation_tokens"] == pytest.approx(0.5 * 0.75 / 0.4)
    assert row["joules_per_generation_token"] == pytest.approx(1.0)


def test_what_is_not_known_of_a_cost_is_null() -> None:
    """No price, no phase times, no energy, no tokens: each leaves its own columns NULL and no other."""
    assert costs([{}], price=None)["usd_per_million_tokens"] is None
    no_phases = costs([{"prefill_seconds": None}])
    assert no_phases["usd_per_million_prompt_tokens"] is None
    assert no_phases["usd_per_million_tokens"] == pytest.approx(0.5)
    assert no_phases["joules_per_generation_token"] is None
    idle = costs([{"prompt_tokens": 0.0, "generation_tokens": 0.0}])
    assert (idle["usd"], idle["usd_per_million_tokens"]) == (pytest.approx(0.5), None)
    assert costs([{}, {"target": "r2", "prompt_tokens": None}])["usd_per_million_tokens"] is None


def test_an_hour_of_a_replica_is_counted_once() -> None:
    """Two rows of one replica and period (two bucket layouts, say) are one period of its GPUs."""
    assert costs([{}, {}])["gpu_hours"] == pytest.approx(2 * PERIOD_HOURS)
    assert costs([{}, {"target": "r2"}])["gpu_hours"] == pytest.approx(4 * PERIOD_HOURS)
