"""The asset `load_forecast`: names, dependencies and metadata; the forecast is `analysis.forecast.forecaster`."""

from collections.abc import Callable
from datetime import datetime

import dagster as dg
import polars as pl

from optiinfra_pipelines.analysis.forecast.rows import BOOSTED_ROWS, load_steps
from optiinfra_pipelines.analysis.plots import as_markdown, fan_chart
from optiinfra_pipelines.defs.advice import advice_asset, result
from optiinfra_pipelines.domain.fleet import Fleet
from resources.advice.advisor import Advisor
from resources.warehouse import Warehouse

SHOWN_MEASURE = "demand_tokens_per_second"


def forecast_assets(
    warehouse: Warehouse, clock: Callable[[], datetime], fleet: Fleet, boosted_rows: int = BOOSTED_ROWS
) -> list[dg.AssetsDefinition]:
    """`load_forecast`, hourly. boosted_rows: see `Advisor`."""
    advisor = Advisor(warehouse, clock, fleet, boosted_rows)

    @advice_asset("load_forecast", ["int_load_minutes", "int_replica_starts"])
    def load_forecast() -> dg.MaterializeResult[None]:
        rows = advisor.forecast_load()
        known = rows.drop_nulls("p50")
        busiest = known.filter(pl.col("measure") == SHOWN_MEASURE).sort("p50", descending=True).head(1)
        picture = "nothing is forecast yet: the rows say why"
        if busiest.height:
            name = busiest["deployment"][0]
            steps = load_steps(advisor.minutes(days=1.0).filter(pl.col("deployment") == name), SHOWN_MEASURE)
            own = known.filter((pl.col("deployment") == name) & (pl.col("measure") == SHOWN_MEASURE))
            picture = as_markdown(fan_chart(steps, own, f"{name}: tokens a second, P10 to P90"), f"forecast of {name}")
        return result(
            rows.sort(pl.col("p50").is_null(), ~pl.col("is_cold_start").fill_null(False)),
            ["deployment", "measure", "horizon_seconds", "p10", "p50", "p90", "skill_ratio", "coverage_ratio"],
            forecasts=known.height,
            abstentions=rows.height - known.height,
            better_than_last_value=known.filter(pl.col("model") != "persistence").height,
            fan_chart=dg.MetadataValue.md(picture),
        )

    return [load_forecast]
