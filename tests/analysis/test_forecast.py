"""Forecasts: no future leaks in, persistence where no skill is shown, intervals that hold, gaps that are named."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest

from optiinfra_pipelines.analysis.forecast.forecaster import (
    FORECAST_SCHEMA,
    fit_forecaster,
    forecast,
    predict,
    rolling_forecasts,
)
from optiinfra_pipelines.analysis.forecast.panel import make_panel, recorder_gaps

STEP = 600.0


def history(values: np.ndarray, name: str = "chat") -> pl.DataFrame:
    at = np.arange(len(values)) * STEP
    return pl.DataFrame({"series": [name] * len(values), "at": at, "value": values})


def members_of(parts: np.ndarray, name: str = "chat") -> pl.DataFrame:
    frames = [history(parts[:, column], name).with_columns(member=pl.lit(column)) for column in range(parts.shape[1])]
    return pl.concat(frames)


def walk(seed: int, steps: int = 900) -> np.ndarray:
    """A load without anything to learn: its logarithm wanders."""
    return 100 * np.exp(np.cumsum(np.random.default_rng(seed).normal(0, 0.05, steps)))


def returning(seed: int, steps: int = 900, clients: int = 6) -> np.ndarray:
    """Clients that each fall back to their mean within about an hour."""
    rng = np.random.default_rng(seed)
    log = np.zeros((steps, clients))
    for step in range(1, steps):
        log[step] = 0.8 * log[step - 1] + rng.normal(0, 0.3, clients)
    return 20 * np.exp(log)


def test_a_load_that_returns_to_its_mean_is_forecast_better_than_the_last_value() -> None:
    """The skill that is claimed is there on origins that the fit never saw, and P90 holds."""
    parts = returning(1)
    found = rolling_forecasts(
        history(parts.sum(axis=1)), 1800, step_seconds=STEP, first_origin=700, refit_steps=200,
        members=members_of(parts), boosting=False,
    )  # fmt: skip
    kept = found.drop_nulls(["actual", "p50"])
    error = (kept["actual"] - kept["p50"]).abs().sum()
    naive = (kept["actual"] - kept["persistence"]).abs().sum()
    assert set(kept["model"]) <= {"linear", "linear_total", "persistence"}
    assert (kept["skill_ratio"] > 0).all()
    assert error < 0.95 * naive
    assert 0.84 <= (kept["actual"] <= kept["p90"]).to_numpy().mean() <= 0.96
    assert (kept["p10"] <= kept["p50"]).all()
    assert (kept["p50"] <= kept["p90"]).all()


def test_a_load_with_nothing_to_learn_mostly_stays_at_persistence() -> None:
    """The mix holds persistence: of 40 random walks at most a tenth is taken for more, and their skill is small."""
    frame = pl.concat(history(walk(seed), f"walk {seed}") for seed in range(40))
    found = forecast(frame, [1800], step_seconds=STEP, boosting=False)
    kept = found.filter(pl.col("model") == "persistence")
    assert kept.height >= 36
    assert kept["p50"].to_list() == [pytest.approx(walk(int(name[5:]))[-1]) for name in kept["series"]]
    assert set(kept["skill_ratio"]) == {0.0}
    assert "no candidate beat" in kept["reason"][0]
    mixed = found.filter(pl.col("model") != "persistence")
    assert (mixed["skill_ratio"] < 0.04).all()
    last = np.array([walk(int(name[5:]))[-1] for name in mixed["series"]])
    assert np.abs(mixed["p50"].to_numpy() / last - 1).max(initial=0.0) < 0.05


def test_a_forecast_knows_nothing_of_what_comes_after_its_origin() -> None:
    """Another future, other members growing in it: every forecast before it is the same to the last digit."""
    parts = returning(2)
    other = parts.copy()
    other[744:] *= np.random.default_rng(9).gamma(2, 3, other[744:].shape)
    made = [
        rolling_forecasts(
            history(load.sum(axis=1))[:750], 1800, step_seconds=STEP, first_origin=740, refit_steps=10,
            members=members_of(load[:750]),
        ).filter(pl.col("origin") < 744 * STEP)
        for load in (parts, other)
    ]  # fmt: skip
    same = [name for name in FORECAST_SCHEMA if name != "burst_ratio"]
    assert made[0].select(same).equals(made[1].select(same))
    assert made[0]["model"].is_in(["linear", "linear_total", "boosted"]).any()


def test_a_rolling_forecast_is_what_a_forecast_at_that_time_was() -> None:
    """Replayed history and the live call are one computation."""
    values = returning(3).sum(axis=1)
    rolled = rolling_forecasts(
        history(values), 1800, step_seconds=STEP, first_origin=800, refit_steps=50, boosting=False
    ).head(1)
    live = forecast(history(values[:801]), [1800], step_seconds=STEP, boosting=False)
    assert rolled.select(live.columns).equals(live)


def test_too_little_history_is_an_abstention() -> None:
    """Half a day cannot state an interval: NULL and the count, not a guess."""
    row = forecast(history(walk(1, 40)), [1800], step_seconds=STEP)
    assert row.select("p10", "p50", "p90", "model").row(0) == (None, None, None, None)
    assert row["reason"][0].startswith("37 of 72 origins")
    assert forecast(history(np.array([])), [600], step_seconds=STEP).schema == FORECAST_SCHEMA


def test_a_gap_at_the_end_is_nothing_to_forecast_from() -> None:
    """The recorder stopped: the last value is unknown, so is the next."""
    values = walk(1)
    values[-1] = np.nan
    frame = history(values).with_columns(pl.col("value").fill_nan(None))
    row = forecast(frame, [600], step_seconds=STEP, boosting=False)
    assert row["p50"].to_list() == [None]
    assert "gap" in row["reason"][0]


def test_a_missing_row_is_a_gap_and_a_short_drop_to_nothing_too() -> None:
    """Six silent windows between busy ones are the recorder's; a night of silence is the fleet's."""
    values = np.full(100, 50.0)
    values[30:36] = 0.0
    values[60:80] = 0.0
    assert np.flatnonzero(recorder_gaps(values)).tolist() == list(range(30, 36))
    holed = history(values).filter(~pl.col("at").is_in([10 * STEP, 11 * STEP]))
    panel = make_panel(holed, STEP)
    assert np.flatnonzero(~panel.known[:, 0]).tolist() == [10, 11, *range(30, 36)]
    assert panel.load[10, 0] == 50.0


def test_gaps_are_not_scored() -> None:
    """An origin or outcome in a gap has no actual: it counts neither for nor against a model."""
    values = walk(2)
    values[820:823] = 0.0
    found = rolling_forecasts(
        history(values), 600, step_seconds=STEP, first_origin=815, refit_steps=100, boosting=False
    )
    unknown = found.filter(pl.col("actual").is_null())["origin"] / STEP
    assert unknown.to_list() == [819, 820, 821, 822]


def test_bursts_inside_a_step_are_stated() -> None:
    """Means of ten minutes hide what a second brings: the ratio of peak to mean is its own column."""
    frame = history(walk(1)).with_columns(peak=pl.col("value") * 3)
    assert forecast(frame, [600], step_seconds=STEP, boosting=False)["burst_ratio"][0] == pytest.approx(3)


def test_a_negative_load_is_refused() -> None:
    """A rate below zero is a counter's reset that nobody handled."""
    with pytest.raises(ValueError, match="counter's reset"):
        forecast(history(np.array([1.0, -1.0])), [600], step_seconds=STEP)
    with pytest.raises(ValueError, match="no column"):
        forecast(pl.DataFrame({"series": ["a"]}), [600], step_seconds=STEP)


def test_a_fit_serves_many_origins() -> None:
    """One fit, then predictions without refitting: what an hourly refresh needs."""
    panel = make_panel(history(returning(4).sum(axis=1)), STEP)
    fitted = fit_forecaster(panel, 3, 850, boosting=False)
    frames = [predict(fitted, panel, origin) for origin in (850, 870)]
    assert [frame["origin"][0] for frame in frames] == [850 * STEP, 870 * STEP]


def test_two_hundred_series_take_seconds() -> None:
    """Each is judged on its own; one fit of the linear candidates serves all."""
    rng = np.random.default_rng(1)
    frame = pl.concat(history(walk(int(seed), 600), f"s{seed}") for seed in rng.permutation(200))
    start = time.process_time()
    found = forecast(frame, [1800], step_seconds=STEP, boosting=False)
    assert found.height == 200
    assert time.process_time() - start < 20


def test_importing_the_forecaster_loads_no_heavy_library() -> None:
    """LightGBM and statsforecast cost seconds to import: only a fit that uses them pays."""
    code = (
        "import sys, optiinfra_pipelines.analysis.forecast.forecaster; "
        "print([m for m in ('lightgbm', 'statsforecast', 'sklearn', 'numba') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "[]"
