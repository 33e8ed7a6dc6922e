"""From minutes of load to the forecast table: series on the forecaster's grid, horizons, rows with their standing.

Pure. Forecasting is `forecast`, the horizon that matters is `cold_start`; reading minutes and keeping rows is the work
of `resources` and `defs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.forecast.forecaster import forecast
from optiinfra_pipelines.analysis.forecast.panel import recorder_gaps
from optiinfra_pipelines.analysis.kv_cache.stack import Floats
from optiinfra_pipelines.analysis.scaling.cold_start import ColdStart

# The step that the models and their features were measured with on the public fleets.
STEP_SECONDS = 600.0
HORIZONS_SECONDS = (600.0, 1800.0, 3600.0)
# A step stands on at least half of its minutes; with fewer it is a gap, not a quiet stretch.
MIN_MINUTES = 5
MEASURES = (
    "requests_per_second",
    "prompt_tokens_per_second",
    "generation_tokens_per_second",
    "demand_tokens_per_second",
)
# Four measures at three horizons cost 15 CPU seconds with boosting at 20,000 rows (10 deployments, 14 days) and 1.2
# without; an hourly run must stay at a few.
BOOSTED_ROWS = 4_000


def load_steps(minutes: pl.DataFrame, measure: str) -> pl.DataFrame:
    """One measure of every deployment on whole steps: deployment, at (s), value (mean), peak (busiest minute).

    minutes: rows of int_load_minutes. A step with fewer than MIN_MINUTES known minutes is left out: a gap. The step
    under way at the end is left out too.
    """
    step = (pl.col("minute_at").dt.epoch("s") // int(STEP_SECONDS) * int(STEP_SECONDS)).cast(pl.Float64)
    known = minutes.drop_nulls(measure)
    last = known["minute_at"].dt.epoch("s").max()
    whole = (float(last) + 60) // STEP_SECONDS * STEP_SECONDS if isinstance(last, int) else 0.0
    return (
        known.group_by("deployment", at=step)
        .agg(value=pl.col(measure).mean(), peak=pl.col(measure).max(), minutes=pl.len())
        .filter((pl.col("minutes") >= MIN_MINUTES) & (pl.col("at") < whole))
        .select("deployment", "at", "value", "peak")
        .sort("deployment", "at")
    )


def forecast_rows(
    minutes: pl.DataFrame,
    cold_starts: Mapping[str, ColdStart],
    *,
    clients: pl.DataFrame | None = None,
    horizons_seconds: Sequence[float] = HORIZONS_SECONDS,
    boosted_rows: int = BOOSTED_ROWS,
) -> pl.DataFrame:
    """Rows of load_forecast: every measure of every deployment at every horizon and at its own cold start.

    clients: deployment, client, at (s), requests_per_second, demand_tokens_per_second on the same steps, where the
    record tells them; replicas of a deployment are no clients (what they get depends on how many there are).
    boosted_rows: up to how many rows of a panel gradient boosting takes part. Empty without a whole step of load.
    """
    frames = []
    covered = {name: _whole_steps(start.seconds) for name, start in cold_starts.items()}
    for measure in MEASURES:
        steps = load_steps(minutes, measure).rename({"deployment": "series"})
        for horizon in sorted({*horizons_seconds, *covered.values()}):
            wanted = [name for name, own_horizon in covered.items() if own_horizon == horizon]
            own = steps if horizon in horizons_seconds else steps.filter(pl.col("series").is_in(wanted))
            if own.is_empty():
                continue
            members = _members(clients, measure, own)
            rows = own.height + (0 if members is None else members.height)
            made = forecast(own, [horizon], step_seconds=STEP_SECONDS, members=members, boosting=rows <= boosted_rows)
            frames.append(made.with_columns(measure=pl.lit(measure)))
    if not frames:
        return pl.DataFrame()
    starts = pl.DataFrame(
        [
            {
                "series": start.deployment,
                "cold_start_seconds": start.seconds,
                "cold_start_origin": start.origin,
                "cold_start_reason": start.reason,
            }
            for start in cold_starts.values()
        ],
        schema={
            "series": pl.String,
            "cold_start_seconds": pl.Float64,
            "cold_start_origin": pl.String,
            "cold_start_reason": pl.String,
        },
    )
    covers = pl.col("series").replace_strict(covered, default=None, return_dtype=pl.Float64)
    return (
        pl.concat(frames)
        .join(starts, on="series", how="left")
        .with_columns(
            is_cold_start=pl.col("horizon_seconds") == covers,
            step_seconds=pl.lit(STEP_SECONDS),
            origin_at=pl.from_epoch((pl.col("origin") * 1_000_000).cast(pl.Int64), "us").dt.replace_time_zone("UTC"),
        )
        .rename({"series": "deployment"})
        .drop("origin")
    )


def _whole_steps(seconds: float) -> float:
    return float(np.ceil(seconds / STEP_SECONDS - 1e-9) * STEP_SECONDS)


def _members(clients: pl.DataFrame | None, measure: str, own: pl.DataFrame) -> pl.DataFrame | None:
    if clients is None or measure not in clients.columns or clients.is_empty():
        return None
    found = clients.join(own.select("series").unique(), left_on="deployment", right_on="series", how="semi")
    first, last = own["at"].min(), own["at"].max()
    inside = found.filter((pl.col("at") >= first) & (pl.col("at") <= last))
    named = inside.select(series="deployment", member=pl.col("client").cast(pl.String), at="at", value=measure)
    return None if named.is_empty() else named


def demand_steps(minutes: pl.DataFrame, step_seconds: float) -> tuple[Floats, float]:
    """A deployment's demand as tokens per step, and the share of minutes that had to be bridged.

    minutes: its rows of int_load_minutes, in order. Each minute is spread evenly over its steps (bursts inside a
    minute are not in the record); minutes without a value, and drops to nothing between busy ones, are bridged by a
    straight line. step_seconds divides 60. Empty when fewer than two minutes are known.
    """
    known = minutes.drop_nulls("demand_tokens_per_second").sort("minute_at")
    if known.height < 2:
        return np.empty(0), 1.0
    at = known["minute_at"].dt.epoch("s").to_numpy() // 60
    rate = np.full(int(at[-1] - at[0]) + 1, np.nan)
    rate[at - at[0]] = known["demand_tokens_per_second"].to_numpy()
    coarse = rate[: len(rate) // 10 * 10].reshape(-1, 10)
    if len(coarse):
        filled = np.where(np.isfinite(coarse), coarse, 0.0).mean(axis=1)
        rate[: coarse.size][np.repeat(recorder_gaps(filled), 10)] = np.nan
    finite = np.isfinite(rate)
    places = np.arange(len(rate))
    bridged = np.interp(places, places[finite], rate[finite])
    return np.repeat(bridged * step_seconds, round(60 / step_seconds)), float(1 - finite.mean())
