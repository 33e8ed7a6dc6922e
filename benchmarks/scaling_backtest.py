"""Scaling policies replayed on public loads under $OPTIINFRA_DATA/data: replica-hours against the offline oracle.

ServeGen fleets: real 10-minute token rates of 10 days, interpolated to 10 s and given gamma noise of the published
burstiness, so ramps inside 10 minutes are hidden. Capacity: the busiest minute / 40. Parameters of the tuned rows are
chosen on days 1-6 alone and judged on days 7-10. Azure: the real arrivals of one hour; there is no history to tune on,
so the rows carry the parameters chosen on the ServeGen fleets.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from optiinfra_pipelines.analysis.backtest.replay import backtest
from optiinfra_pipelines.analysis.backtest.tuning import (
    choose_policy,
    hpa_candidates,
    keda_candidates,
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
Array = npt.NDArray[np.float64]


def servegen(data: Path, fleet: str, seed: int = 0) -> tuple[Array, float]:
    """Tokens per 10-s step, and mean tokens per request; recorder gaps are bridged by a straight line."""
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
    at = np.arange(0, len(tokens) * 600, STEP) + STEP / 2
    rate, arrivals = (np.interp(at, middles[known], values[known]) for values in (tokens, requests))
    relative_sd = np.sqrt(np.interp(at, middles, spread.to_numpy()) / np.maximum(arrivals * STEP, 1e-9))
    noise = np.random.default_rng(seed).gamma(1 / relative_sd**2, relative_sd**2)
    return rate * noise * STEP, float(rate.sum() / arrivals.sum())


def azure(data: Path) -> tuple[Array, float]:
    trace = pl.read_parquet(data / "azure_llm_2023_conv_requests.parquet")
    seconds = (trace["timestamp"] - trace["timestamp"][0]).dt.total_milliseconds().to_numpy() / 1000
    tokens = (trace["input_tokens"] + trace["output_tokens"]).to_numpy().astype(np.float64)
    load = np.bincount((seconds // STEP).astype(np.int64), weights=tokens)
    return load[: len(load) // 6 * 6], float(tokens.mean())


def busiest_minute(load: Array) -> float:
    return float(load[: len(load) // 6 * 6].reshape(-1, 6).mean(axis=1).max()) / STEP


def show(name: str, policy: Policy, load: Array, capacity: float, per_request: float, most: int) -> None:
    result = backtest(
        load, policy, capacity, COLD_START, step_seconds=STEP, max_replicas=most, work_per_request=per_request
    )
    print(
        f"  {name:<44} {result.cost_ratio:5.2f} x oracle  {100 * (result.attainment_ratio or 0):6.2f} %  "
        f"{result.replica_hours:8.0f} replica-hours  longest wait {result.longest_wait_seconds or 0:6.0f} s"
    )


def main() -> None:
    data = Path(os.environ["OPTIINFRA_DATA"]) / "data"
    chosen: dict[str, Policy] = {}
    for fleet in ("m-large", "m-small"):
        load, per_request = servegen(data, fleet)
        history, test = load[: 6 * DAY], load[6 * DAY :]
        days = [history[day * DAY : (day + 1) * DAY] for day in range(6)]
        history_capacity, capacity = busiest_minute(history) / 40, busiest_minute(test) / 40
        peak = int(np.ceil(busiest_minute(history) / capacity * 1.1))
        print(f"{fleet}, days 7-10, {len(test):,} steps of {STEP} s")
        fixed: list[Policy] = [
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
        for policy in fixed:
            show(f"{policy.kind} {getattr(policy, 'target_ratio', '')}", policy, test, capacity, per_request, 2 * peak)
        for goal in (0.99, 0.995, 0.999):
            for kind, candidates in (
                ("hpa", hpa_candidates()), ("keda_load", keda_candidates()), ("trend", trend_candidates())
            ):  # fmt: skip
                started = time.process_time()
                policy = choose_policy(days, candidates, history_capacity, COLD_START, attainment_ratio=goal)
                spent = time.process_time() - started
                show(f"{kind} tuned on days 1-6 for {goal:.1%} ({spent:.1f} s)", policy, test, capacity, per_request,
                     2 * peak)  # fmt: skip
                chosen[f"{kind} {goal:.1%} of {fleet}"] = policy
                print(f"      {policy.model_dump_json(exclude_defaults=True)}")
    load, per_request = azure(data)
    capacity = busiest_minute(load) / 20
    print(f"Azure conversation 2023, {len(load)} steps of {STEP} s, real arrivals")
    for policy in (StaticPolicy(replicas=20), HpaPolicy(target_ratio=0.5), HpaPolicy(target_ratio=0.7)):
        show(f"{policy.kind} {getattr(policy, 'target_ratio', '')}", policy, load, capacity, per_request, 60)
    for name, policy in chosen.items():
        show(name, policy, load, capacity, per_request, 60)
    show("foresight", ForesightPolicy(), load, capacity, per_request, 60)

    started = time.process_time()
    for fleet in ("m-large", "m-small", "deepseek-r1"):
        load, per_request = servegen(data, fleet)
        day = load[-DAY:]
        for policy in fixed[:1] + fixed[2:3] + fixed[4:]:
            backtest(day, policy, busiest_minute(day) / 40, COLD_START, max_replicas=80, work_per_request=per_request)
    print(f"one day x 3 fleets x {len(fixed[:1] + fixed[2:3] + fixed[4:])} policies: "
          f"{time.process_time() - started:.1f} CPU s, reading the load included")  # fmt: skip


if __name__ == "__main__":
    main()
