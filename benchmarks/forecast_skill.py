"""Skill over persistence and coverage of P90 on the public ServeGen fleets under $OPTIINFRA_DATA/data.

Requests per second in 10-minute windows, clients as members; the last 4 days as rolling origins, refit daily on what
lies before. Error is WAPE on the origins where both ends are known. CPU seconds include every refit.
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


def main() -> None:
    data = Path(os.environ["OPTIINFRA_DATA"]) / "data"
    fleets = pl.read_parquet(data / "servegen_fleet_load_10min.parquet")
    clients = pl.read_parquet(data / "servegen_client_load_10min.parquet").with_columns(pl.col("fleet").cast(pl.String))
    for fleet in ("m-large", "m-small"):
        history = fleets.filter(pl.col("fleet") == fleet).select(
            series="fleet", at="window_start_s", value="requests_per_s"
        )
        members = clients.filter(pl.col("fleet") == fleet).select(
            series="fleet", member="client", at="window_start_s", value="requests_per_s"
        )
        for horizon in (600, 1800, 3600):
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
                f"{fleet} {horizon // 60:>3} min: WAPE {error:6.2%}, persistence {naive:6.2%}, "
                f"skill {1 - error / naive:6.1%}, P90 coverage {under_p90.mean():.1%}, P10-P90 {inside.mean():.1%}, "
                f"{found.height} origins, {spent:.1f} CPU s, "
                f"models {dict(found['model'].value_counts(sort=True).iter_rows())}",
                flush=True,
            )
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
