"""Scaling policies replayed on a recorded load: what each would have cost, and how long demand would have waited."""

from optiinfra_pipelines.analysis.backtest.replay import backtest, compare_policies, oracle_replica_hours

__all__ = ["backtest", "compare_policies", "oracle_replica_hours"]
