"""False rollbacks and detection delays of the canary judge, on a simulated fleet with fresh seeds.

    python benchmarks/judge_acceptance.py [--runs 2000] [--regression-runs 300] [--seed N] [--rates ...]
        [--model real|iid|second] [--stake 0.5]

SIMULATED throughout. Model "real": time to first token lognormal (sigma 0.6) with a 5 % Pareto (2.5) tail; load shared
by all replicas (AR(1), sd 0.15 over 60 s; a daily shape of x1.4; a burst every ten minutes) moving latency and
traffic together; each replica drifts (AR(1), sd 0.08 over 45 s) and differs for ever (sd 0.02); one canary against
nine stable replicas; vLLM's bucket edges; a look every 5 s for 30 minutes. "iid" has neither shared nor replica
noise. "second" is another world: log-logistic latencies, faster and stronger replica drift, on-off traffic.
Edges and margins are estimated from the stable replicas' last simulated hour, as in production.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
from numba import njit

from optiinfra_pipelines.rollout.calibration import DEFAULT_STAKE
from optiinfra_pipelines.rollout.eprocess import (
    ERROR_ALTERNATIVES,
    LATENCY_ALTERNATIVES,
    first_crossing,
    latency_stakes,
)
from optiinfra_pipelines.rollout.judge import ERROR_NULL_ODDS
from optiinfra_pipelines.rollout.margins import StableHistogram, judged_edges

TICKS, TICK_SECONDS, STABLE = 360, 5.0, 9
ALPHA = 0.01
BOUNDS = np.array([0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0])
REAL, IID, SECOND = 0, 1, 2


@njit(cache=True)
def tail(seconds, model):
    """Share of requests above a latency at nominal load."""
    if model == SECOND:
        return 1.0 / (1.0 + (seconds / 0.45) ** 2.6)
    body = 0.5 * math.erfc(math.log(seconds / 0.42) / 0.6 / math.sqrt(2.0))
    pareto = 1.0 if seconds < 0.29 else (0.29 / seconds) ** 2.5
    return 0.95 * body + 0.05 * pareto


@njit(cache=True)
def simulate(seed, rate, factor, error_ratio, model, ticks, warm, bounds, counts, errors):
    """Fill counts[tick, arm, 0] with requests, [.., 1 + edge] with those over each edge, errors[tick, arm].

    factor scales the canary's latencies; error_ratio is the canary's; the stable arm's errors are 0.2 %, with bursts.
    """
    np.random.seed(seed)
    noise = 0.0 if model == IID else 1.0
    replica_sd, replica_time = (0.08, 45.0) if model != SECOND else (0.12, 20.0)
    shared = np.random.normal(0.0, 0.15) * noise
    drift = np.random.normal(0.0, replica_sd, STABLE + 1) * noise
    static = np.random.normal(0.0, 0.02, STABLE + 1) * noise
    decay, replica_decay = math.exp(-TICK_SECONDS / 60.0), math.exp(-TICK_SECONDS / replica_time)
    phase, is_on = np.random.random() * 6.28, True
    for t in range(ticks):
        shared = decay * shared + math.sqrt(1 - decay * decay) * np.random.normal(0.0, 0.15) * noise
        day = noise * math.log(1.4) * 0.5 * math.sin(phase + 6.28 * (t + warm) * TICK_SECONDS / 86400.0 * 12)
        burst = noise * 0.4 if (t + warm) % 120 < 6 else 0.0
        if model == SECOND and np.random.random() < 0.05:
            is_on = not is_on
        load = math.exp(shared + day + burst) * (1.0 if is_on else 0.4)
        failing = 0.03 if np.random.random() < 1 / 200 else 0.002
        for replica in range(STABLE + 1):
            drift[replica] = (
                replica_decay * drift[replica]
                + math.sqrt(1 - replica_decay * replica_decay) * np.random.normal(0.0, replica_sd) * noise
            )
            scale = math.exp(shared + day + burst + drift[replica] + static[replica])
            arm = 0 if replica == 0 else 1
            if arm == 0:
                scale *= factor
            requests = np.random.poisson(rate * TICK_SECONDS * load)
            counts[t, arm, 0] += requests
            left, last = requests, 1.0
            for e in range(bounds.size):
                share = tail(bounds[e] / scale, model)
                left = np.random.binomial(left, min(1.0, share / last)) if left > 0 and last > 0 else 0
                counts[t, arm, 1 + e] += left
                last = share
            broken = max(failing, error_ratio) if arm == 0 else failing
            errors[t, arm] += np.random.binomial(requests, broken)


def one_run(
    seed: int, rate: float, factor: float, error_ratio: float, model: int, start: int, stake: float
) -> tuple[int, int]:
    """First crossing of the latency and of the error process, as ticks from the regression's start; 0 = never."""
    hour = 720
    before, nothing = np.zeros((hour, 2, 1 + BOUNDS.size), np.int64), np.zeros((hour, 2), np.int64)
    simulate(seed, rate, 1.0, 0.0, model, hour, 0, BOUNDS, before, nothing)
    minutes = before[:, 1].reshape(60, 12, -1).sum(axis=1)
    edges = judged_edges(
        [StableHistogram([*BOUNDS, math.inf], [*(row[0] - row[1:]).astype(float), float(row[0])]) for row in minutes]
    )
    bounds = np.array([edge.bound_seconds for edge in edges])
    counts = np.zeros((TICKS, 2, 1 + bounds.size), np.int64)
    errors = np.zeros((TICKS, 2), np.int64)
    simulate(seed + 10**6, rate, factor, error_ratio, model, TICKS, hour, bounds, counts, errors)
    if start:  # healthy until the regression begins
        healthy, fine = np.zeros_like(counts), np.zeros_like(errors)
        simulate(seed + 2 * 10**6, rate, 1.0, 0.0, model, TICKS, hour, bounds, healthy, fine)
        counts[:start], errors[:start] = healthy[:start], fine[:start]
    totals = np.ascontiguousarray(counts[:, :, 0])
    overs = np.ascontiguousarray(counts[:, :, 1:].transpose(0, 2, 1))
    latency = first_crossing(
        totals,
        overs,
        np.log(np.array([edge.null_odds for edge in edges])),
        np.log(np.array(LATENCY_ALTERNATIVES)),
        np.array(latency_stakes(stake)),
        TICKS,
        math.log(1 / ALPHA),
    )
    failing = first_crossing(
        totals,
        np.ascontiguousarray(errors[:, None, :]),
        np.log(np.array([ERROR_NULL_ODDS])),
        np.log(np.array(ERROR_ALTERNATIVES)),
        np.ones(len(ERROR_ALTERNATIVES)),
        TICKS,
        math.log(1 / ALPHA),
    )
    return latency, failing


def upper_bound(hits: int, runs: int) -> float:
    """95 % upper bound of a share (Clopper-Pearson)."""
    from scipy.stats import beta

    return 1.0 if hits == runs else float(beta.ppf(0.95, hits + 1, runs - hits))


def delays(crossings: list[int], start: int) -> str:
    found = sorted((tick - start) * TICK_SECONDS if tick > start else math.inf for tick in crossings)
    early = sum(1 for tick in crossings if 0 < tick <= start)
    median, p90 = found[len(found) // 2], found[int(len(found) * 0.9)]
    share = sum(1 for delay in found if math.isfinite(delay)) / len(found)
    return f"{share:6.1%}  {median:6.0f}  {p90:6.0f}" + (f"  before onset {early}" if start else "")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=2000)
    arguments.add_argument("--regression-runs", type=int, default=300)
    arguments.add_argument("--seed", type=int, default=int(time.time()) % 10**6 * 1000)
    arguments.add_argument("--model", choices=["real", "iid", "second"], default="real")
    arguments.add_argument("--rates", type=float, nargs="+", default=[0.5, 2.0, 10.0], help="canary requests/s")
    arguments.add_argument("--stake", type=float, default=DEFAULT_STAKE, help="as an A/A replay would choose it")
    given = arguments.parse_args()
    model = {"real": REAL, "iid": IID, "second": SECOND}[given.model]
    print(f"simulated, model {given.model}, seed {given.seed}, alpha {ALPHA} per signal, a look every 5 s for 30 min")
    started = time.process_time()
    for rate in given.rates:
        results = [one_run(given.seed + i, rate, 1.0, 0.0, model, 0, given.stake) for i in range(given.runs)]
        for name, column in (("latency", 0), ("errors", 1)):
            hits = sum(1 for run in results if run[column])
            print(
                f"{rate:4g} req/s  A/A {name:8} false rollback {hits}/{given.runs} = {hits / given.runs:.2%}, "
                f"95 % upper bound {upper_bound(hits, given.runs):.2%}",
                flush=True,
            )
        print(f"{rate:4g} req/s  regression             found  median s  p90 s")
        for factor in (1.05, 1.25, 1.5, 2.0):
            for start in (0, 180):
                seeds = range(given.seed + 5 * 10**6, given.seed + 5 * 10**6 + given.regression_runs)
                crossings = [one_run(seed, rate, factor, 0.0, model, start, given.stake)[0] for seed in seeds]
                when = "from the start" if not start else "after 15 min  "
                print(f"{rate:4g} req/s  +{factor - 1:4.0%} {when}  {delays(crossings, start)}", flush=True)
        for ratio in (0.05, 0.2):
            seeds = range(given.seed + 7 * 10**6, given.seed + 7 * 10**6 + given.regression_runs)
            crossings = [one_run(seed, rate, 1.0, ratio, model, 0, given.stake)[1] for seed in seeds]
            print(f"{rate:4g} req/s  errors {ratio:3.0%}            {delays(crossings, 0)}", flush=True)
    print(f"CPU {time.process_time() - started:.0f} s")


if __name__ == "__main__":
    main()
