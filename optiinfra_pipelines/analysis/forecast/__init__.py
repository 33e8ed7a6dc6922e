"""Load forecasts with a stated skill over persistence."""

from optiinfra_pipelines.analysis.forecast.forecaster import fit_forecaster, forecast, predict, rolling_forecasts

__all__ = ["fit_forecaster", "forecast", "predict", "rolling_forecasts"]
