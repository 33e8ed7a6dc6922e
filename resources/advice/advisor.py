"""Make each kind of advice once: read what is stored, ask the pure core, keep its rows.

Here: which reading goes to which core, and the cache settings of a fleet as far as they are measured. Not here: the
cores (`rows` of each analysis package), the queries (`load_history`), the tables (`store`), when it happens (`defs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import polars as pl

from optiinfra_pipelines.analysis.backtest.rows import BacktestQuestion, backtest_rows
from optiinfra_pipelines.analysis.forecast.rows import BOOSTED_ROWS, forecast_rows
from optiinfra_pipelines.analysis.kv_arithmetic import bytes_per_token
from optiinfra_pipelines.analysis.kv_cache.curve import Reuse
from optiinfra_pipelines.analysis.kv_cache.rows import (
    EVENTS_ALONE,
    NO_ACCESSES,
    CacheQuestion,
    cache_rows,
    curve_rows,
    histogram_rows,
    reuse_of,
    working_set_rows,
)
from optiinfra_pipelines.analysis.scaling.cold_start import ColdStart, cold_start, replica_starts
from optiinfra_pipelines.analysis.scaling.rows import capacity_rows, present_capacity, scaling_rows
from optiinfra_pipelines.domain.fleet import Deployment, Fleet
from optiinfra_pipelines.domain.models import shape_of
from resources.advice.load_history import LoadHistory
from resources.advice.store import AdviceStore, advice_tables, shaped
from resources.warehouse import Warehouse

# Minutes live 14 days as shipped; what is older is not there to be read.
HISTORY = timedelta(days=14)
# Starts are rare: a P95 needs months of them.
STARTS_HISTORY = timedelta(days=180)
CLIENT_HISTORY = timedelta(days=60)


def token_bytes(deployment: Deployment) -> float | None:
    """KV bytes of a token over all ranks of a replica, at the model's own type; None for a model of unknown shape."""
    shape, ranks = shape_of(deployment), max(1, deployment.gpus_per_replica)
    try:
        return None if shape is None else float(bytes_per_token(shape, tensor_parallel=ranks)) * ranks
    except ValueError:
        return None


@dataclass(frozen=True)
class Advisor:
    """One fleet's advice over one warehouse. Every method stores its rows and returns them, in the table's schema.

    boosted_rows: up to how many rows gradient boosting takes part in a forecast; it is most of what a run costs.
    """

    warehouse: Warehouse
    clock: Callable[[], datetime]
    fleet: Fleet
    boosted_rows: int = BOOSTED_ROWS

    @property
    def history(self) -> LoadHistory:
        return LoadHistory(self.warehouse)

    @property
    def store(self) -> AdviceStore:
        return AdviceStore(self.warehouse)

    @property
    def deployments(self) -> Mapping[str, Deployment]:
        return {deployment.name: deployment for deployment in self.fleet.deployments}

    def minutes(self, days: float = HISTORY.days) -> pl.DataFrame:
        """Minutes of load of the fleet's deployments."""
        found = self.history.minutes(self.clock() - timedelta(days=days))
        return found.filter(pl.col("deployment").is_in(list(self.deployments)))

    def cold_starts(self, minutes: pl.DataFrame) -> Mapping[str, ColdStart]:
        """From scale-up to ready, per deployment of fleet.yaml."""
        events = self.history.starts(self.clock() - STARTS_HISTORY)
        starts = replica_starts(events, minutes)
        return {name: cold_start(starts, name) for name in self.deployments}

    def forecast_load(self) -> pl.DataFrame:
        """load_forecast: one row per deployment, measure and horizon."""
        minutes = self.minutes()
        clients = self.history.clients(self.clock() - CLIENT_HISTORY)
        made = forecast_rows(minutes, self.cold_starts(minutes), clients=clients, boosted_rows=self.boosted_rows)
        return self._kept("load_forecast", made)

    def fit_capacity(self) -> pl.DataFrame:
        """replica_capacity: one row per deployment, configuration and length mix."""
        now = self.clock()
        found = self.history.replica_minutes(now - HISTORY, self.fleet.deployments)
        return self._kept("replica_capacity", capacity_rows(found, self.deployments, now))

    def advise_scaling(self) -> pl.DataFrame:
        """scaling_recommendations: one row per deployment."""
        minutes = self.minutes(days=1.0)
        made = scaling_rows(
            minutes,
            self.store.newest("load_forecast"),
            self.store.newest("replica_capacity"),
            self.deployments,
            self.cold_starts(minutes),
            self.clock(),
        )
        return self._kept("scaling_recommendations", made)

    def backtest(
        self, question: BacktestQuestion, *, window_days: float, deployments: Sequence[str] = ()
    ) -> pl.DataFrame:
        """scaling_backtest. question: what is the same for all; capacity, cold start (when 0) and bounds are filled in
        per deployment from what is measured and from fleet.yaml.
        """
        minutes = self.minutes(days=window_days)
        capacities = self.store.newest("replica_capacity")
        frames = []
        starts = self.cold_starts(minutes)
        for name, deployment in self.deployments.items():
            if deployments and name not in deployments:
                continue
            own = replace(
                question,
                capacity=present_capacity(capacities, name),
                cold_start_seconds=question.cold_start_seconds or starts[name].seconds,
                min_replicas=max(question.min_replicas, deployment.min_replicas),
                max_replicas=question.max_replicas or deployment.max_replicas,
            )
            rows = backtest_rows(name, minutes.filter(pl.col("deployment") == name), own, self.clock())
            frames.append(shaped("scaling_backtest", rows))
        return self._kept("scaling_backtest", pl.concat(frames) if frames else pl.DataFrame())

    def measure_reuse(self, bytes_per_token: float | None = None) -> pl.DataFrame:
        """kv_reuse_curve: from accesses where a log of them is stored, else from histograms, else an abstention."""
        now = self.clock()
        histograms = self.history.reuse_histograms(now - HISTORY)
        frames = []
        for name, reuse in self._reuses().items():
            exported = histograms.filter(pl.col("deployment") == name)
            if isinstance(reuse, str) and exported.height:
                row = exported.row(0, named=True)
                made = histogram_rows(name, row["upper_bounds"], row["counts"], now)
            else:
                made = curve_rows(name, reuse, now, bytes_per_token or token_bytes(self.deployments[name]))
            frames.append(shaped("kv_reuse_curve", made))
        return self._kept("kv_reuse_curve", pl.concat(frames) if frames else pl.DataFrame())

    def measure_working_set(self) -> pl.DataFrame:
        """kv_working_set: from KV events where they are stored, else an abstention."""
        now = self.clock()
        events = self.history.kv_events()
        frames = []
        for name in self.deployments:
            own = None if events is None else events.filter(pl.col("deployment") == name).drop("deployment")
            frames.append(shaped("kv_working_set", working_set_rows(name, own, now)))
        return self._kept("kv_working_set", pl.concat(frames) if frames else pl.DataFrame())

    def advise_cache(self, question: CacheQuestion) -> pl.DataFrame:
        """kv_cache_recommendations: one row per deployment and tier."""
        now = self.clock()
        frames = []
        for name, reuse in self._reuses().items():
            known = question.bytes_per_token or token_bytes(self.deployments[name])
            rows = cache_rows(name, reuse, replace(question, bytes_per_token=known), now)
            frames.append(shaped("kv_cache_recommendations", rows))
        return self._kept("kv_cache_recommendations", pl.concat(frames) if frames else pl.DataFrame())

    def _reuses(self) -> Mapping[str, Reuse | str]:
        accesses = self.history.accesses()
        found: dict[str, Reuse | str] = dict.fromkeys(self.deployments, NO_ACCESSES)
        found |= dict.fromkeys(self.history.deployments_with_kv_events(), EVENTS_ALONE)
        if accesses is not None:
            for name in self.deployments:
                own = accesses.filter(pl.col("deployment") == name)
                if own.height:
                    found[name] = reuse_of(own)
        return found

    def _kept(self, table: str, rows: pl.DataFrame) -> pl.DataFrame:
        made = shaped(table, rows) if rows.width else advice_tables()[table].empty()
        self.store.keep(table, made)
        return made
