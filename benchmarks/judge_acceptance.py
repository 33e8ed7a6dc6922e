"""False rollbacks and detection delays of the canary judge, on simulated fleets with fresh seeds.

    python benchmarks/judge_acceptance.py [--runs 2000] [--regression-runs 300] [--seed N] [--rates ...]
        [--models real second ...] [--only-false]

SIMULATED throughout. Model "real": time to first token lognormal (sigma 0.6) with a 5 % Pareto (2.5) tail; load shared
by all replicas (AR(1), sd 0.15 over 60 s; a daily shape of x1.4; a burst every ten minutes) moving latency and
traffic together; each replica drifts (AR(1), sd 0.08 over 45 s) and differs for ever (sd 0.02); one canary against
nine stable replicas; vLLM's bucket edges; a look every 5 s for 30 minutes, or for 50 where a regression begins in
mid-step and may by its limit take longer than what half an hour leaves; a percentile later than the end is printed as
">" and the longest time that could be seen. "iid" has neither shared nor replica
noise, "shared" no replica noise. "second" is another world: log-logistic latencies, faster and stronger replica drift
(sd 0.12 over 20 s), on-off traffic. "wild" is beyond what the stakes were made for: drift of 0.10 over 60 s, replicas
that differ by 0.03, and shared load that swings twice as far.

Edges, margins and the stake come from the stable replicas' last simulated hour, as in production; during the step the
stakes follow the stable replicas' counts. Beside it, in brackets: the default stake without history and without counts
by replica, which is the worst that can be asked of the judge.

"planned": the rollout planner's expected detection time for this regression at these rates, of the same hour and stake:
that by which nine of ten are found, computed without replica noise, drift and bursts. The ratios of the measured median
and 90th percentile to it say how far that goes; a step lasts the planner's NOISE_FACTOR times it at least.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass

import numpy as np
from numba import njit
from scipy.stats import beta

from optiinfra_pipelines.domain.rollouts import RolloutPlan
from optiinfra_pipelines.rollout.calibration import calibrate, drifts
from optiinfra_pipelines.rollout.eprocess import ERROR_ALTERNATIVES, first_crossing
from optiinfra_pipelines.rollout.judge import ERROR_NULL_ODDS, LATENCY_PLAIN_SHARE
from optiinfra_pipelines.rollout.margins import StableHistogram, judged_edges
from optiinfra_pipelines.rollout.planner import Traffic, detection_seconds
from optiinfra_pipelines.rollout.tempering import (
    DEFAULT_STAKE,
    LATENCY_ALTERNATIVES,
    WINDOW_TICKS,
    Drift,
    latency_rule,
    plain_rule,
    scale_of,
)

TICKS, HOUR, TICK_SECONDS, STABLE = 360, 720, 5.0, 9
LOG_LIMIT = math.log(100)  # alpha 1 % for each signal
# Hours that the planner is asked about; its time depends little on which.
PLANNED_HOURS = 5
# What it plans for where no latency can be judged.
PLANNED_ERROR_RATIO = 0.05
# vLLM's, from where requests are: hardly one is faster than 0.1 s, and edges there are never judged.
BOUNDS = np.array([0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0])
# Shared sd and time, daily factor, burst; replica sd and time, static sd; on-off chance a tick; is it log-logistic.
MODELS = {
    "real": (0.15, 60.0, 1.4, 0.4, 0.08, 45.0, 0.02, 0.0, 0.0),
    "iid": (0.0, 60.0, 1.0, 0.0, 0.0, 45.0, 0.0, 0.0, 0.0),
    "shared": (0.15, 60.0, 1.4, 0.4, 0.0, 45.0, 0.0, 0.0, 0.0),
    "second": (0.15, 60.0, 1.4, 0.4, 0.12, 20.0, 0.02, 0.05, 1.0),
    "wild": (0.25, 120.0, 1.6, 0.6, 0.10, 60.0, 0.03, 0.02, 0.0),
}
LOG_RATIOS = np.log(np.array(LATENCY_ALTERNATIVES))
# What detection must reach: canary requests/s, regression -> median and 90th percentile, seconds.
REQUIRED = {
    (0.5, 1.5): (560, 980),
    (0.5, 2.0): (170, 280),
    (2.0, 1.25): (800, 1600),
    (2.0, 1.5): (160, 300),
    (2.0, 2.0): (55, 85),
    (10.0, 1.25): (180, 450),
    (10.0, 1.5): (45, 90),
    (10.0, 2.0): (10, 20),
}
# A regression that begins in mid-step, 15 minutes into it, may take so much longer.
LATE_START, LATE_FACTOR = 180, 1.1
# 50 minutes: the limit of +25 % at 2 requests/s after a late onset, 1,760 s, lies beyond the end of 30.
LONG_TICKS = 600
ERRORS_REQUIRED = {(0.5, 0.05): 240, (0.5, 0.2): 45, (2.0, 0.05): 60, (2.0, 0.2): 15, (10.0, 0.05): 15, (10.0, 0.2): 5}


@njit(cache=True)
def tail(seconds, is_logistic):
    """Share of requests above a latency at nominal load."""
    if is_logistic:
        return 1.0 / (1.0 + (seconds / 0.45) ** 2.6)
    body = 0.5 * math.erfc(math.log(seconds / 0.42) / 0.6 / math.sqrt(2.0))
    pareto = 1.0 if seconds < 0.29 else (0.29 / seconds) ** 2.5
    return 0.95 * body + 0.05 * pareto


@njit(cache=True)
def simulate(seed, rate, factor, error_ratio, start, model, warm, bounds, counts, errors):
    """Fill counts[tick, replica, 0] with requests, [.., 1 + edge] with those over each edge, errors[tick, arm].

    Replica 0 is the canary; from tick `start` on, factor scales its latencies and error_ratio is its own. The stable
    errors are 0.2 %, with bursts.
    """
    np.random.seed(seed)
    shared_sd, shared_time, daily, jump, replica_sd, replica_time, static_sd, on_off, is_logistic = model
    shared = np.random.normal(0.0, 1.0) * shared_sd
    drift = np.random.normal(0.0, 1.0, STABLE + 1) * replica_sd
    static = np.random.normal(0.0, 1.0, STABLE + 1) * static_sd
    decay, replica_decay = math.exp(-TICK_SECONDS / shared_time), math.exp(-TICK_SECONDS / replica_time)
    phase, is_on = np.random.random() * 6.28, True
    for t in range(counts.shape[0]):
        shared = decay * shared + math.sqrt(1 - decay * decay) * np.random.normal(0.0, 1.0) * shared_sd
        day = math.log(daily) * 0.5 * math.sin(phase + 6.28 * (t + warm) * TICK_SECONDS / 86400.0 * 12)
        burst = jump if (t + warm) % 120 < 6 else 0.0
        if on_off > 0 and np.random.random() < on_off:
            is_on = not is_on
        load = math.exp(shared + day + burst) * (1.0 if is_on else 0.4)
        failing = 0.03 if np.random.random() < 1 / 200 else 0.002
        for replica in range(STABLE + 1):
            swing = math.sqrt(1 - replica_decay * replica_decay) * np.random.normal(0.0, 1.0) * replica_sd
            drift[replica] = replica_decay * drift[replica] + swing
            scale = math.exp(shared + day + burst + drift[replica] + static[replica])
            is_bad = replica == 0 and t >= start
            if is_bad:
                scale *= factor
            requests = np.random.poisson(rate * TICK_SECONDS * load)
            counts[t, replica, 0] = requests
            left, last = requests, 1.0
            for e in range(bounds.size):
                if left > 0:
                    share = tail(bounds[e] / scale, is_logistic > 0)
                    if share < last * (1 - 1e-7):
                        left = np.random.binomial(left, share / last)
                    last = share
                counts[t, replica, 1 + e] = left
            broken = max(failing, error_ratio) if is_bad else failing
            errors[t, 0 if replica == 0 else 1] += np.random.binomial(requests, broken)


@dataclass(frozen=True)
class Hour:
    """What the hour before a step says: judged bounds, their margins, and the stake for the replicas' drift.

    minutes: the stable replicas' histograms, which the planner goes by.
    """

    bounds: np.ndarray
    log_nulls: np.ndarray
    stake: float
    minutes: list[StableHistogram]


def hour_before(seed: int, rate: float, model: str) -> Hour:
    counts = np.zeros((HOUR, STABLE + 1, 1 + BOUNDS.size), np.int64)
    simulate(seed, rate, 1.0, 0.0, 0, MODELS[model], 0, BOUNDS, counts, np.zeros((HOUR, 2), np.int64))
    stable = counts[:, 1:]
    minutes = stable.sum(axis=1).reshape(60, 12, -1).sum(axis=1)
    histograms = [
        StableHistogram([*BOUNDS, math.inf], [*(row[0] - row[1:]).astype(float), float(row[0])]) for row in minutes
    ]
    edges = judged_edges(histograms)
    columns = [1 + int(np.flatnonzero(edge.bound_seconds == BOUNDS)[0]) for edge in edges]
    replicas = {str(r): (stable[:, r, 0], stable[:, r][:, columns]) for r in range(STABLE)}
    nulls = [edge.null_odds for edge in edges]
    found = calibrate([], nulls, alpha=0.01, drift=drifts(replicas, nulls))
    bounds = np.array([edge.bound_seconds for edge in edges])
    return Hour(bounds, np.log(np.array(nulls)), found.stake, histograms)


def step_ticks(rate: float, factor: float, start: int) -> int:
    """Ticks of a step, with every extension: more where its end would come before the limit of the 90th percentile."""
    _, limit = REQUIRED.get((rate, factor), (0, 0))
    return LONG_TICKS if start and (TICKS - start) * TICK_SECONDS < limit * LATE_FACTOR else TICKS


def judged(
    hour: Hour,
    seed: int,
    rate: float,
    model: str,
    factor: float,
    error_ratio: float,
    start: int,
    ticks: int = TICKS,
) -> list[int]:
    """Ticks at which latency, latency at the default stake by sums alone, and errors cross; 0 = never."""
    edges = hour.bounds.size
    counts, errors = np.zeros((ticks, STABLE + 1, 1 + edges), np.int64), np.zeros((ticks, 2), np.int64)
    simulate(seed, rate, factor, error_ratio, start, MODELS[model], HOUR, hour.bounds, counts, errors)
    arms = np.stack([counts[:, 0], counts[:, 1:].sum(axis=1)], axis=1)
    totals, overs = np.ascontiguousarray(arms[:, :, 0]), np.ascontiguousarray(arms[:, :, 1:].transpose(0, 2, 1))
    shares = np.zeros((ticks, edges))
    for e in range(edges):
        drift = Drift(float(hour.log_nulls[e]))
        shares[:, e] = drift.observe_all(counts[:, 1:, 0].copy(), counts[:, 1:, 1 + e].copy())
    seen = np.where(np.arange(ticks) < WINDOW_TICKS, 2.0, scale_of(shares))
    live = np.repeat(np.minimum(seen, hour.stake / DEFAULT_STAKE)[:, None], edges, axis=1)
    rule, usual = latency_rule(DEFAULT_STAKE), np.zeros((0, 0))
    found = [
        first_crossing(totals, overs, hour.log_nulls, LOG_RATIOS, rule, scales, LATENCY_PLAIN_SHARE, ticks, LOG_LIMIT)
        for scales in (live, usual)
    ]
    log_errors = np.log(np.array(ERROR_ALTERNATIVES))
    plain, null = plain_rule(np.ones(log_errors.size)), np.array([math.log(ERROR_NULL_ODDS)])
    found.append(first_crossing(totals, errors[:, None, :], null, log_errors, plain, usual, 0.5, ticks, LOG_LIMIT))
    return found


def upper_bound(hits: int, runs: int) -> float:
    """95 % upper bound of a share (Clopper-Pearson)."""
    return 1.0 if hits == runs else float(beta.ppf(0.95, hits + 1, runs - hits))


def delays(crossings: list[int], start: int, ticks: int = TICKS) -> tuple[float, float, str]:
    """Median, 90th percentile and a line of text, in seconds from the onset; infinite past the end of the step."""
    found = sorted((tick - start) * TICK_SECONDS if tick > start else math.inf for tick in crossings)
    early = sum(1 for tick in crossings if 0 < tick <= start)
    median, p90 = found[len(found) // 2], found[int(len(found) * 0.9)]
    share = sum(1 for delay in found if math.isfinite(delay)) / len(found)
    longest = f">{(ticks - start) * TICK_SECONDS:.0f}"
    texts = [f"{delay:.0f}" if math.isfinite(delay) else longest for delay in (median, p90)]
    line = f"{share:6.1%}  {texts[0]:>6}  {texts[1]:>6}"
    return median, p90, line + (f"  {early} before it" if start else "")


def planned_seconds(hours: list[Hour], rate: float, factor: float, seed: int) -> float | None:
    """Median over a few hours of what the planner expects; None where it finds nothing in its longest step.

    The planner shares alpha by the signals of a step, latency and errors; doubled, each has the 1 % of this script.
    """
    plan = RolloutPlan(detect_ratio=factor - 1, alpha=0.02)
    found = [
        detection_seconds(
            plan,
            Traffic(rate * (STABLE + 1), STABLE, {"ttft": hour.minutes}),
            rate,
            rate * STABLE,
            stake=hour.stake,
            seed=seed + index,
        )
        for index, hour in enumerate(hours[:PLANNED_HOURS])
    ]
    known = sorted(seconds for seconds in found if seconds is not None)
    return known[len(known) // 2] if len(known) == len(found) else None


def beside(planned: float | None, median: float, p90: float) -> str:
    """The planner's time, and measured median and 90th percentile as multiples of it."""
    if planned is None:
        return "  planned: none"
    return f"  planned {planned:5.0f}, ratios {median / planned:.2f} {p90 / planned:.2f}"


def told(median: float, p90: float, required: tuple[float, float] | None, factor: float = 1.0) -> str:
    if required is None:
        return ""
    is_met = median <= required[0] * factor and p90 <= required[1] * factor
    return f"  required {required[0] * factor:.0f}/{required[1] * factor:.0f}: {'met' if is_met else 'NOT MET'}"


def false_rollbacks(model: str, rate: float, seed: int, runs: int) -> None:
    found, stakes = [], []
    for i in range(runs):
        hour = hour_before(seed + i, rate, model)
        stakes.append(hour.stake)
        found.append(judged(hour, seed + 10**6 + i, rate, model, 1.0, 0.0, 0))
    latency, default, errors = (sum(1 for run in found if run[column]) for column in range(3))
    print(
        f"{model:7} {rate:4g} req/s  harmless: latency fails {latency}/{runs} = {latency / runs:.2%}, 95 % upper bound "
        f"{upper_bound(latency, runs):.2%} (by sums alone {default / runs:.2%}); errors fail {errors / runs:.2%}, "
        f"bound {upper_bound(errors, runs):.2%}; stake {np.median(stakes):.2f}",
        flush=True,
    )


def regressions(model: str, rate: float, seed: int, runs: int) -> None:
    hours = [hour_before(seed + i, rate, model) for i in range(runs)]
    for factor in (1.05, 1.25, 1.5, 2.0):
        # What lies within the margin is never planned for.
        planned = planned_seconds(hours, rate, factor, seed) if factor - 1 > RolloutPlan().margin_ratio else None
        for start in (0, LATE_START):
            ticks = step_ticks(rate, factor, start)
            crossings = [
                judged(hour, seed + 10**6 + i, rate, model, factor, 0.0, start, ticks)[0]
                for i, hour in enumerate(hours)
            ]
            median, p90, line = delays(crossings, start, ticks)
            when = f"after 15 of {ticks * TICK_SECONDS / 60:.0f} min" if start else "from the start    "
            required = REQUIRED.get((rate, factor)) if model == "real" else None
            verdict = told(median, p90, required, LATE_FACTOR if start else 1.0)
            line += "" if start else beside(planned, median, p90)
            print(f"{model:7} {rate:4g} req/s  +{factor - 1:4.0%} {when}  {line}{verdict}", flush=True)
    for ratio in (0.05, 0.2):
        crossings = [judged(hour, seed + 10**6 + i, rate, model, 1.0, ratio, 0)[2] for i, hour in enumerate(hours)]
        median, p90, line = delays(crossings, 0)
        if ratio == PLANNED_ERROR_RATIO:
            blind = Traffic(rate * (STABLE + 1), STABLE, {})
            planned = detection_seconds(RolloutPlan(), blind, rate, rate * STABLE, stake=1.0, seed=seed)
            line += beside(planned, median, p90)
        limit = ERRORS_REQUIRED.get((rate, ratio))
        verdict = "" if limit is None else f"  required {limit}: {'met' if median <= limit else 'NOT MET'}"
        print(f"{model:7} {rate:4g} req/s  errors {ratio:3.0%}                {line}{verdict}", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=2000)
    arguments.add_argument("--regression-runs", type=int, default=300)
    arguments.add_argument("--seed", type=int, default=int(time.time()) % 10**6 * 1000)
    arguments.add_argument("--models", choices=list(MODELS), nargs="+", default=["real"])
    arguments.add_argument("--rates", type=float, nargs="+", default=[0.5, 2.0, 10.0], help="canary requests/s")
    arguments.add_argument("--only-false", action="store_true", help="harmless canaries only")
    given = arguments.parse_args()
    print(f"SIMULATED, seed {given.seed}, alpha 1 % per signal, a look every 5 s for 30 min; delays: median, p90 in s")
    started = time.process_time()
    for model in given.models:
        for rate in given.rates:
            false_rollbacks(model, rate, given.seed, given.runs)
            if not given.only_false:
                regressions(model, rate, given.seed + 5 * 10**6, given.regression_runs)
    print(f"CPU {time.process_time() - started:.0f} s")


if __name__ == "__main__":
    main()
