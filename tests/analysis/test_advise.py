"""From stored minutes to advice rows: what is a gap, what judges what, what is too old, what is not drawn."""

from __future__ import annotations

import io
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from PIL import Image

from optiinfra_pipelines.analysis.backtest.rows import BacktestQuestion, backtest_rows
from optiinfra_pipelines.analysis.forecast.rows import demand_steps, load_steps
from optiinfra_pipelines.analysis.plots import MAX_BYTES, as_markdown, fan_chart, pareto_plot, reuse_plot
from optiinfra_pipelines.analysis.scaling.cold_start import ColdStart
from optiinfra_pipelines.analysis.scaling.rows import billion_parameters, scaling_rows
from optiinfra_pipelines.domain.fleet import Deployment
from resources.advice.store import advice_tables, shaped

END = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
CHAT = Deployment(
    name="chat", model="m", gpu="H100-80GB-SXM", gpus_per_replica=8, price_usd_per_gpu_hour=2.0, max_replicas=6
)


def minutes_of(rates: list[float | None]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "deployment": ["chat"] * len(rates),
            "minute_at": [END - timedelta(minutes=len(rates) - place) for place in range(len(rates))],
            "demand_tokens_per_second": rates,
            "requests_per_second": [None if rate is None else rate / 100 for rate in rates],
            "requests_waiting_last": [0.0] * len(rates),
            "replica_count": [3] * len(rates),
        },
        schema_overrides={"minute_at": pl.Datetime("us", "UTC"), "demand_tokens_per_second": pl.Float64},
    )


def test_a_step_of_few_minutes_is_a_gap_and_the_one_under_way_is_left_out() -> None:
    """A forecast from half a step would be one from half a load."""
    first = minutes_of([10.0] * 40)
    steps = load_steps(first, "demand_tokens_per_second")
    assert steps.height == 4
    with_gap = first.with_columns(
        demand_tokens_per_second=pl.when(pl.int_range(pl.len()).is_between(10, 16)).then(None).otherwise(10.0)
    )
    assert load_steps(with_gap, "demand_tokens_per_second").height == 3
    assert load_steps(first.head(37), "demand_tokens_per_second").height == 3


def test_minutes_become_steps_without_losing_work_and_gaps_are_bridged() -> None:
    """Six steps of ten seconds carry a minute's tokens; an unknown minute lies on the line between its neighbors."""
    load, bridged = demand_steps(minutes_of([60.0, None, 120.0]), 10.0)
    assert load.tolist() == [600.0] * 6 + [900.0] * 6 + [1200.0] * 6
    assert bridged == pytest.approx(1 / 3)
    assert demand_steps(minutes_of([None, 5.0]), 10.0)[0].size == 0


def test_mostly_unknown_load_is_not_replayed() -> None:
    """A replay of a load that was made up by bridging would judge nothing."""
    rows = backtest_rows("chat", minutes_of([60.0, None] * 60), BacktestQuestion(180.0, None, replicas_at_peak=5), END)
    assert rows["policy_name"].to_list() == ["none"]
    assert "unknown" in rows["reason"][0]


def test_parameters_are_chosen_on_days_that_do_not_judge_them() -> None:
    """Two days with a spike on the second only: what is tuned saw the first alone, so static is sized without it."""
    day = [100 + 50 * math.sin(minute / 200) for minute in range(1440)]
    question = BacktestQuestion(60.0, None, capacity_tokens_per_second=10.0, aim_ratio=0.99)
    calm = backtest_rows("chat", minutes_of([*day, *day]), question, END)
    spiked = backtest_rows("chat", minutes_of([*day, *(4 * rate for rate in day)]), question, END)

    for rows in (calm, spiked):
        assert (rows["window_end_at"][0] - rows["window_start_at"][0]) == timedelta(days=1)
    tuned = [set(rows.filter(pl.col("policy_name").str.ends_with("(tuned)"))["policy"]) for rows in (calm, spiked)]
    assert tuned[0] == tuned[1]
    static = [rows.filter(pl.col("kind") == "static")["policy_name"].item() for rows in (calm, spiked)]
    assert static[0] == static[1] == "static 17"


def test_an_old_forecast_is_no_forecast() -> None:
    """Past its horizon it says nothing of the load ahead: the recommendation abstains, naming what is missing."""
    starts = {"chat": ColdStart(deployment="chat", seconds=180.0, origin="default", starts=0, reason="x")}
    capacity = shaped(
        "replica_capacity",
        pl.DataFrame(
            {"deployment": ["chat"], "is_present": [True], "tokens_per_second": [50.0], "low_tokens_per_second": [40.0],
             "high_tokens_per_second": [60.0], "origin": ["history"], "minutes": [99], "reason": ["x"]}
        ),
    )  # fmt: skip

    def decide(age: timedelta) -> dict[str, Any]:
        made = pl.DataFrame(
            {"deployment": ["chat"], "measure": ["demand_tokens_per_second"], "is_cold_start": [True],
             "origin_at": [END - age], "horizon_seconds": [600.0], "step_seconds": [600.0],
             "p10": [90.0], "p50": [100.0], "p90": [210.0]}
        )  # fmt: skip
        rows = scaling_rows(
            minutes_of([100.0] * 30), shaped("load_forecast", made), capacity, {"chat": CHAT}, starts, END
        )
        return rows.row(0, named=True)

    fresh = decide(timedelta(minutes=10))
    assert (fresh["action"], fresh["current_replicas"], fresh["proposed_replicas"]) == ("up", 3, 5)
    assert fresh["usd_per_hour_change"] == 32.0
    old = decide(timedelta(hours=2))
    assert (old["action"], old["proposed_replicas"]) == ("abstain", None)
    assert "no forecast" in old["reason"]


@pytest.mark.parametrize(
    ("model", "size"),
    [("x/Llama-2-70b-hf", 70.0), ("qwen2.5-72b-instruct", 72.7), ("mixtral-8x7b-instruct-v0.1", 46.7),
     ("my-finetune", None), ("a4b5-chat", None), ("granite_8B", 8.0), ("phi-3.8b", 3.8)],
)  # fmt: skip
def test_a_models_size_is_known_or_in_its_name_or_unknown(model: str, size: float | None) -> None:
    """A profile of another size would be a capacity of another model."""
    assert billion_parameters(model) == size


def test_pictures_stand_empty_and_constant_data() -> None:
    """Nothing to draw is an empty frame, not an error; a picture that is too large becomes words."""
    steps = pl.DataFrame(schema={"at": pl.Float64, "value": pl.Float64})
    empty = {name: table.empty() for name, table in advice_tables().items()}
    for png in (
        fan_chart(steps, empty["load_forecast"], "x"),
        pareto_plot(empty["scaling_backtest"], "x"),
        reuse_plot(empty["kv_reuse_curve"], "x"),
    ):
        assert png.startswith(b"\x89PNG")
        assert len(png) <= MAX_BYTES
    assert "over" in as_markdown(b"x" * (MAX_BYTES + 1), "x")


def colors_of(png: bytes) -> set[tuple[int, ...]]:
    found = Image.open(io.BytesIO(png)).convert("RGB").getcolors(maxcolors=100_000)
    return {color for _, color in found or [] if isinstance(color, tuple)}


def test_the_advised_policy_stands_out_among_many() -> None:
    """Fourteen policies fit the size that the event log bears, and one advised is red; with none, nothing is."""
    rows = pl.DataFrame(
        {
            "policy_name": [f"keda_load 0.{number} (tuned)" for number in range(14)],
            "kind": ["keda_load"] * 14,
            "replica_hours": [100.0 + 9 * number for number in range(14)],
            "attainment_ratio": [0.95 + number / 280 for number in range(14)],
            "is_pareto": [True] * 14,
            "is_advised": [number == 12 for number in range(14)],
        }
    )
    png = pareto_plot(rows, "chat")
    assert len(png) <= MAX_BYTES

    def red(picture: bytes) -> bool:
        return any(r > 150 and g < 90 and b < 90 for r, g, b in colors_of(picture))

    assert red(png)
    assert not red(pareto_plot(rows.with_columns(is_advised=pl.lit(False)), "chat"))


def test_a_fan_and_a_curve_are_drawn_with_their_parts() -> None:
    """The band is there where there is a forecast, and the line of 95 % where there is a ceiling."""
    steps = pl.DataFrame({"at": [600.0 * step for step in range(90)], "value": [100.0 + step for step in range(90)]})
    ahead = pl.DataFrame(
        {"horizon_seconds": [600.0, 3600.0], "p10": [150.0, 90.0], "p50": [190.0] * 2, "p90": [250.0] * 2}
    )
    band = colors_of(fan_chart(steps, ahead, "chat")) - colors_of(fan_chart(steps, ahead.clear(), "chat"))
    assert any(b > r + 20 and r > 150 for r, _, b in band)  # light blue
    known = {
        "capacity_blocks": [1, 10, 100],
        "capacity_tokens": [512, 5120, 51_200],
        "block_hit_ratio": [0.1, 0.3, 0.4],
    }
    curve = shaped("kv_reuse_curve", pl.DataFrame(known))
    assert any(r > 150 and g < 110 and b < 110 for r, g, b in colors_of(reuse_plot(curve, "chat")))
    assert len(reuse_plot(curve, "chat")) <= MAX_BYTES
