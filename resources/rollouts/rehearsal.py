"""What a dry run is judged by: SIMULATED traffic of both arms, a simulated staging test and a clock that runs ahead.

Everything here says that it is simulated. The judge, the guards and the machine are the real ones; a rehearsal shows
how a plan goes, never whether a change is good.
"""

from __future__ import annotations

import math
from datetime import timedelta

import numpy as np
from scipy.stats import lognorm

from optiinfra_pipelines.domain.rollout_policy import DryRunSettings
from optiinfra_pipelines.domain.rollouts import RolloutPlan
from optiinfra_pipelines.domain.verdicts import VerdictKind
from optiinfra_pipelines.rollout.calibration import Calibration
from optiinfra_pipelines.rollout.counts import Buckets, ProcessPage
from optiinfra_pipelines.rollout.guards import ReplicaHealth
from optiinfra_pipelines.rollout.margins import StableHistogram
from optiinfra_pipelines.rollout.planner import Traffic
from optiinfra_pipelines.rollout.tempering import DEFAULT_STAKE
from resources.rollouts.clock import Moment
from resources.rollouts.ports import Readings, StagingReport
from resources.rollouts.targets import RolloutTarget

SIGNAL = "time_to_first_token_seconds"
# vLLM's edges of the same metric, where requests are.
_BOUNDS = (0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, math.inf)
# Median and spread of time to first token in our recordings under moderate load.
_LATENCY = lognorm(0.6, scale=0.42)
_USUAL_ERROR_RATIO = 0.002


class RehearsalClock:
    """A clock that only waiting moves."""

    def __init__(self, start: Moment) -> None:
        self._now = start

    def __call__(self) -> Moment:
        return self._now

    def sleep(self, seconds: float) -> None:
        """Let time pass at once."""
        self._now = Moment(self._now.at + timedelta(seconds=seconds), self._now.seconds + seconds, self._now.boot_id)


class SimulatedFeed:
    """Poisson arrivals with lognormal latencies, split by the share that the target shows."""

    counts_errors = True

    def __init__(self, target: RolloutTarget, settings: DryRunSettings) -> None:
        self._target = target
        self._settings = settings
        self._random = np.random.default_rng(settings.seed)
        self._last: float | None = None
        self._totals = {"simulated-candidate": _Totals(), "simulated-stable": _Totals()}

    def read(self, now: Moment) -> Readings:
        """Both arms' counters after the traffic since the last read."""
        seconds = 0.0 if self._last is None else max(0.0, now.seconds - self._last)
        self._last = now.seconds
        share = self._target.observe().percent / 100
        settings = self._settings
        self._serve("simulated-candidate", seconds * share, settings.latency_factor, settings.error_ratio)
        self._serve("simulated-stable", seconds * (1 - share), 1.0, _USUAL_ERROR_RATIO)
        pages = {name: totals.page(name) for name, totals in self._totals.items()}
        health = ReplicaHealth("simulated-candidate", is_process_alive=True)
        return Readings((pages["simulated-candidate"],), (pages["simulated-stable"],), (health,), 0.0, 0.0)

    def traffic(self, now: Moment) -> Traffic | str:
        """The load as configured, with an hour of the stable replicas' latencies."""
        per_minute = self._settings.requests_per_second * 60
        minutes = [
            StableHistogram(_BOUNDS, [float(round(per_minute * share)) for share in _LATENCY.cdf(np.array(_BOUNDS))])
            for _ in range(60)
        ]
        return Traffic(self._settings.requests_per_second, self._settings.stable_replicas, {SIGNAL: minutes})

    def calibration(self, plan: RolloutPlan, traffic: Traffic, now: Moment) -> Calibration:
        """The default: simulated replicas do not differ."""
        return Calibration(DEFAULT_STAKE, None, 0, "simulated: the default stake")

    def _serve(self, name: str, seconds: float, factor: float, error_ratio: float) -> None:
        requests = int(self._random.poisson(self._settings.requests_per_second * seconds))
        shares = np.diff(_LATENCY.cdf(np.array(_BOUNDS) / factor), prepend=0.0)
        counts = self._random.multinomial(requests, shares / shares.sum())
        self._totals[name].add(np.cumsum(counts), requests, int(self._random.binomial(requests, error_ratio)))


class _Totals:
    """Cumulative counters of one simulated process."""

    def __init__(self) -> None:
        self._cumulative = np.zeros(len(_BOUNDS))
        self._requests = self._failed = 0

    def add(self, cumulative: np.ndarray, requests: int, failed: int) -> None:
        self._cumulative = self._cumulative + cumulative
        self._requests += requests
        self._failed += failed

    def page(self, name: str) -> ProcessPage:
        buckets = Buckets(_BOUNDS, tuple(float(count) for count in self._cumulative))
        return ProcessPage(name, histograms={SIGNAL: buckets}, requests=self._requests, failed=self._failed)


class SimulatedStaging:
    """A candidate that is ready at once and passes; a rehearsal has nothing to load."""

    def not_ready(self, now: Moment) -> str | None:
        return None

    def test(self) -> StagingReport:
        return StagingReport(VerdictKind.PASS, "simulated: nothing was started or loaded", {"is_simulated": True})
