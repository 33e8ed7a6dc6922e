"""Scaling policies replayed on public loads under $OPTIINFRA_DATA/data: replica-hours against the offline oracle.

ServeGen fleets: real 10-minute token rates of 10 days, interpolated and given gamma noise, so ramps inside 10 minutes
are hidden. Capacity: the busiest minute / 40; cold start 3 min. Twice: in 1-minute steps with noise of one size all
along (the median of the published burstiness, 1.4 and 2.8 %), as the published measurements of these policies were
made; and in 10-second steps with noise that follows the published burstiness of each window, which is harsher.
Parameters of the tuned rows are chosen on days 1-6 alone and judged on days 7-10.

Azure: the real arrivals of one hour in 10-second steps, capacity the busiest minute / 20. There is no history to tune
on: rows carry defaults. The load doubles within its first three minutes, so whoever starts with what the first minute
needs fails 8 % at once; rows start from the fixed fleet of 20 that stood there before, which is also the maximum.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from optiinfra_pipelines.analysis.backtest.replay import backtest
from optiinfra_pipelines.analysis.backtest.tuning import (
    hpa_candidates,
    keda_candidates,
    pick,
    score_policies,
    trend_candidates,
)
from optiinfra_pipelines.domain.scaling import (
    ForesightPolicy,
    HpaPolicy,
    KedaLoadPolicy,
    KedaWaitingPolicy,
    PlannerPolicy,
    Policy,
    SloRatioPolicy,
    StaticPolicy,
    TrendPolicy,
)

STEP = 10
DAY = 86_400 // STEP
COLD_START = 180.0
# What is tuned for: less than the aim, the aim, and half of its misses left for days unlike those before.
GOALS = (0.995, 0.999, 0.9995)
Array = npt.NDArray[np.float64]


def servegen(data: Path, fleet: str, step: int = STEP, *, seed: int = 0, is_even: bool = False) -> tuple[Array, float]:
    """Tokens per step, and mean tokens per request; recorder gaps are bridged. is_even: noise of one size all along."""
    load = pl.read_parquet(data / "servegen_fleet_load_10min.parquet").filter(pl.col("fleet") == fleet)
    load = load.sort("window_start_s")
    clients = pl.read_parquet(data / "servegen_client_load_10min.parquet")
    clients = clients.filter(pl.col("fleet").cast(pl.String) == fleet)
    spread = (
        clients.group_by("window_start_s")
        .agg((pl.col("interarrival_cv") ** 2 * pl.col("requests_per_s")).sum() / pl.col("requests_per_s").sum())
        .sort("window_start_s")
        .to_series(1)
        .fill_nan(None)
        .fill_null(1.0)
    )
    tokens = (load["input_tokens_per_s"] + load["output_tokens_per_s"]).to_numpy()
    requests = load["requests_per_s"].to_numpy()
    known = tokens > 0.02 * np.median(tokens)
    middles = np.arange(len(tokens)) * 600 + 300
    at = np.arange(0, len(tokens) * 600, step) + step / 2
    rate, arrivals = (np.interp(at, middles[known], values[known]) for values in (tokens, requests))
    relative_sd = np.sqrt(np.interp(at, middles, spread.to_numpy()) / np.maximum(arrivals * step, 1e-9))
    if is_even:
        relative_sd = np.full(len(at), np.median(relative_sd))
    noise = np.random.default_rng(seed).gamma(1 / relative_sd**2, relative_sd**2)
    return rate * noise * step, float(rate.sum() / arrivals.sum())


def azure(data: Path) -> tuple[Array, float]:
    trace = pl.read_parquet(data / "azure_llm_2023_conv_requests.parquet")
    seconds = (trace["timestamp"] - trace["timestamp"][0]).dt.total_milliseconds().to_numpy() / 1000
    tokens = (trace["input_tokens"] + trace["output_tokens"]).to_numpy().astype(np.float64)
    load = np.bincount((seconds // STEP).astype(np.int64), weights=tokens)
    return load[: len(load) // 6 * 6], float(tokens.mean())


def busiest_minute(load: Array, step: int = STEP) -> float:
    per_minute = 60 // step
    return float(load[: len(load) // per_minute * per_minute].reshape(-1, per_minute).mean(axis=1).max()) / step


def show(name: str, policy: Policy, load: Array, capacity: float, step: int = STEP, **options: Any) -> None:
    result = backtest(load, policy, capacity, COLD_START, step_seconds=step, **options)
    print(
        f"  {name:<44} {result.cost_ratio:5.2f} x oracle  {100 * (result.attainment_ratio or 0):6.2f} %  "
        f"{result.replica_hours:8.0f} replica-hours  longest wait {result.longest_wait_seconds or 0:6.0f} s",
        flush=True,
    )


def fixed_policies(peak: int) -> list[Policy]:
    return [
        StaticPolicy(replicas=peak),
        HpaPolicy(target_ratio=0.5),
        HpaPolicy(target_ratio=0.7),
        HpaPolicy(target_ratio=0.8),
        KedaWaitingPolicy(),
        KedaLoadPolicy(target_ratio=0.9),
        SloRatioPolicy(),
        PlannerPolicy(),
        TrendPolicy(),
        ForesightPolicy(),
    ]


def fleets(data: Path, step: int, *, is_even: bool) -> None:
    day = 86_400 // step
    for fleet in ("m-large", "m-small"):
        load, per_request = servegen(data, fleet, step, is_even=is_even)
        history, test = load[: 6 * day], load[6 * day :]
        days = [history[at * day : (at + 1) * day] for at in range(6)]
        history_capacity, capacity = busiest_minute(history, step) / 40, busiest_minute(test, step) / 40
        peak = int(np.ceil(busiest_minute(history, step) / capacity * 1.1))
        options: dict[str, Any] = {"work_per_request": per_request, "max_replicas": 2 * peak}
        noise = "even noise" if is_even else "noise as published per window"
        print(f"{fleet}, days 7-10, {len(test):,} steps of {step} s, {noise}")
        for policy in fixed_policies(peak):
            show(f"{policy.kind} {getattr(policy, 'target_ratio', '')}", policy, test, capacity, step, **options)
        for kind, candidates in (
            ("hpa", hpa_candidates()), ("keda_load", keda_candidates()), ("trend", trend_candidates())
        ):  # fmt: skip
            started = time.process_time()
            scores = score_policies(days, candidates, history_capacity, COLD_START, step_seconds=step)
            spent = time.process_time() - started
            for goal in GOALS:
                policy = pick(scores, goal)
                name = f"{kind} tuned on days 1-6 for {goal:.2%} ({spent:.1f} s)"
                show(name, policy, test, capacity, step, **options)
                print(f"      {policy.model_dump_json(exclude_defaults=True)}")


def main() -> None:
    data = Path(os.environ["OPTIINFRA_DATA"]) / "data"
    load, _ = azure(data)
    capacity = busiest_minute(load) / 20
    print(f"Azure conversation 2023, {len(load)} steps of {STEP} s, real arrivals")
    for policy in fixed_policies(20):
        show(f"{policy.kind} {getattr(policy, 'target_ratio', '')}", policy, load, capacity, max_replicas=20,
             initial_replicas=20)  # fmt: skip
    show("trend, started with the first minute's need", TrendPolicy(), load, capacity, max_replicas=20)

    started = time.process_time()
    for fleet in ("m-large", "m-small", "deepseek-r1"):
        load, per_request = servegen(data, fleet)
        day = load[-DAY:]
        fixed = fixed_policies(40)
        chosen = fixed[:1] + fixed[2:3] + fixed[4:]
        for policy in chosen:
            backtest(day, policy, busiest_minute(day) / 40, COLD_START, max_replicas=80, work_per_request=per_request)
    print(f"one day x 3 fleets x {len(chosen)} policies: "
          f"{time.process_time() - started:.1f} CPU s, reading the load included", flush=True)  # fmt: skip
    fleets(data, 60, is_even=True)
    fleets(data, STEP, is_even=False)


if __name__ == "__main__":
    main()
