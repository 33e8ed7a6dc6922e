"""Skill over persistence and coverage of P90 on the public ServeGen fleets under $OPTIINFRA_DATA/data.

Requests and tokens per second in 10-minute windows, clients as members; the last 4 days as rolling origins, refit daily
on what lies before. Error is WAPE on the origins where both ends are known. CPU seconds include every refit. Tokens of
a client are its rate times its mean length; clients without lengths take the fleet's.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.forecast.forecaster import forecast, rolling_forecasts

STEP = 600.0
TEST_ORIGINS = 576


def score(name: str, history: pl.DataFrame, members: pl.DataFrame, horizon: int) -> None:
    start = time.process_time()
    found = rolling_forecasts(
        history,
        horizon,
        step_seconds=STEP,
        first_origin=history.height - TEST_ORIGINS,
        refit_steps=144,
        members=members,
    ).drop_nulls(["actual", "p50"])
    spent = time.process_time() - start
    actual = found["actual"]
    error = (actual - found["p50"]).abs().sum() / actual.sum()
    naive = (actual - found["persistence"]).abs().sum() / actual.sum()
    under_p90 = (actual <= found["p90"]).to_numpy()
    inside = under_p90 & (actual >= found["p10"]).to_numpy()
    print(
        f"{name} {horizon // 60:>3} min: WAPE {error:6.2%}, persistence {naive:6.2%}, "
        f"skill {1 - error / naive:6.1%}, P90 coverage {under_p90.mean():.1%}, P10-P90 {inside.mean():.1%}, "
        f"{found.height} origins, {spent:.1f} CPU s, "
        f"models {dict(found['model'].value_counts(sort=True).iter_rows())}",
        flush=True,
    )


def main() -> None:
    data = Path(os.environ["OPTIINFRA_DATA"]) / "data"
    fleets = pl.read_parquet(data / "servegen_fleet_load_10min.parquet")
    clients = pl.read_parquet(data / "servegen_client_load_10min.parquet").with_columns(pl.col("fleet").cast(pl.String))
    for fleet in ("m-large", "m-small"):
        load = fleets.filter(pl.col("fleet") == fleet).sort("window_start_s")
        own = clients.filter(pl.col("fleet") == fleet).join(load, on="window_start_s", suffix="_fleet")
        for measure, value in (("requests", None), ("input tokens", "input"), ("output tokens", "output")):
            total = "requests_per_s" if value is None else f"{value}_tokens_per_s"
            history = load.select(series="fleet", at="window_start_s", value=total)
            length = pl.lit(1.0) if value is None else pl.col(f"mean_{value}_tokens").fill_nan(None)
            mean = pl.col(total) / pl.col("requests_per_s_fleet") if value else pl.lit(1.0)
            members = own.select(
                series="fleet",
                member="client",
                at="window_start_s",
                value=pl.col("requests_per_s") * length.fill_null(mean).fill_nan(0.0),
            )
            for horizon in (600, 1800, 3600):
                score(f"{fleet} {measure}", history, members, horizon)
    rng = np.random.default_rng(1)
    steps = 1008
    many = pl.concat(
        pl.DataFrame(
            {
                "series": [f"s{number}"] * steps,
                "at": np.arange(steps) * STEP,
                "value": 100 * np.exp(np.cumsum(rng.normal(0, 0.05, steps))),
            }
        )
        for number in range(300)
    )
    for boosting in (False, True):
        start = time.process_time()
        forecast(many, [1800], step_seconds=STEP, boosting=boosting)
        print(f"300 series, a week each, one horizon, boosting {boosting}: {time.process_time() - start:.1f} CPU s")


if __name__ == "__main__":
    main()
