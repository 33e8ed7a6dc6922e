"""From a deployment's recorded load to rows of the back-test: which policies, tuned on what, judged on what.

Pure. The replay is `backtest`, choosing parameters `tuning`, manifests `manifests`. Parameters are
chosen on the first part of the window and judged on the rest, never on the same days.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.backtest.manifests import manifest
from optiinfra_pipelines.analysis.backtest.replay import WAIT_BOUND_SECONDS, backtest
from optiinfra_pipelines.analysis.backtest.tuning import (
    choose_policy,
    hpa_candidates,
    keda_candidates,
    trend_candidates,
)
from optiinfra_pipelines.analysis.forecast.rows import demand_steps
from optiinfra_pipelines.analysis.kv_cache.stack import Floats
from optiinfra_pipelines.domain.scaling import (
    BacktestResult,
    Capacity,
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

STEP_SECONDS = 10.0
# Under half an hour the cold start and the 5-minute stabilizations are most of the record.
MIN_HOURS = 0.5
# From two days on one whole day tunes and at least one other judges.
MIN_TUNING_DAYS = 2.0
MAX_BRIDGED_RATIO = 0.2
# What a fixed fleet keeps over the busiest minute known when it is sized.
STATIC_HEADROOM = 1.1
STEPS_PER_MINUTE = round(60 / STEP_SECONDS)
STEPS_PER_DAY = round(86_400 / STEP_SECONDS)

CapacityOrigin = Literal["history", "profile", "given", "assumed"]


@dataclass(frozen=True)
class BacktestQuestion:
    """What to replay with. replicas_at_peak: where no capacity is known, take it so that the peak needs so many."""

    cold_start_seconds: float
    capacity: Capacity | None
    capacity_tokens_per_second: float | None = None
    replicas_at_peak: int | None = None
    present: Policy | None = None
    policies: Sequence[Policy] = ()  # all kinds at their defaults when empty
    tune: bool = True
    aim_ratio: float = 0.999
    wait_bound_seconds: float = WAIT_BOUND_SECONDS
    min_replicas: int = 1
    max_replicas: int | None = None  # twice what a fixed fleet would have when not given
    namespace: str = "default"
    prometheus_url: str = "http://prometheus:9090"


def default_policies(static_replicas: int) -> tuple[Policy, ...]:
    """One of each kind, at the parameters people deploy."""
    return (
        StaticPolicy(replicas=static_replicas),
        HpaPolicy(target_ratio=0.7),
        KedaWaitingPolicy(),
        KedaLoadPolicy(target_ratio=0.9),
        SloRatioPolicy(),
        PlannerPolicy(),
        TrendPolicy(),
        ForesightPolicy(),
    )


def backtest_rows(
    deployment: str, minutes: pl.DataFrame, question: BacktestQuestion, judged_at: datetime
) -> pl.DataFrame:
    """Rows of scaling_backtest for one deployment; one abstaining row where there is nothing to replay.

    minutes: its rows of int_load_minutes, the window to replay. Every policy takes over the replicas that stood there
    when the judged part began; where none were seen, a fixed fleet's.
    """
    base: dict[str, Any] = {
        "judged_at": judged_at,
        "deployment": deployment,
        "cold_start_seconds": question.cold_start_seconds,
        "wait_bound_seconds": question.wait_bound_seconds,
    }
    load, bridged = demand_steps(minutes, STEP_SECONDS)
    hours = len(load) * STEP_SECONDS / 3600
    busiest = _busiest_minute(load)
    capacity, origin = _capacity(question, busiest)
    refusal = _refusal(hours, bridged, busiest, capacity)
    if refusal or capacity is None:
        return _frame([base | {"policy_name": "none", "reason": refusal}])

    tuning, judged = _split(load, question.tune)
    known = minutes.drop_nulls("demand_tokens_per_second")["minute_at"]
    first: datetime = known.min()  # type: ignore[assignment]
    window = (first + timedelta(seconds=(len(load) - len(judged)) * STEP_SECONDS), first + timedelta(hours=hours))
    sized_on = tuning if len(tuning) else judged
    static = max(int(np.ceil(_busiest_minute(sized_on) / capacity * STATIC_HEADROOM)), question.min_replicas, 1)
    options: dict[str, Any] = {
        "wait_bound_seconds": question.wait_bound_seconds,
        "min_replicas": question.min_replicas,
        "max_replicas": question.max_replicas or 2 * static,
        "work_per_request": _tokens_per_request(minutes),
    }
    standing = minutes.filter(pl.col("minute_at") >= window[0])["replica_count"].drop_nulls()
    options["initial_replicas"] = int(standing[0]) if len(standing) and standing[0] else static
    days = [tuning[start : start + STEPS_PER_DAY] for start in range(0, len(tuning), STEPS_PER_DAY)]
    named: list[tuple[str, Policy]] = [
        (_name(policy), policy) for policy in question.policies or default_policies(static)
    ]
    if days:
        for candidates in (hpa_candidates(), keda_candidates(), _few_trend_candidates()):
            chosen = choose_policy(
                days, candidates, capacity, question.cold_start_seconds, attainment_ratio=question.aim_ratio, **options
            )
            named.append((f"{_name(chosen)} (tuned)", chosen))
    if question.present is not None:
        named.append((f"{_name(question.present)} (present)", question.present))
    rows = []
    for name, policy in named:
        result = backtest(judged, policy, capacity, question.cold_start_seconds, step_seconds=STEP_SECONDS, **options)
        applied = manifest(
            policy,
            deployment=deployment,
            namespace=question.namespace,
            capacity=capacity,
            cold_start_seconds=question.cold_start_seconds,
            tokens_per_request=options["work_per_request"],
            min_replicas=question.min_replicas,
            max_replicas=options["max_replicas"],
            prometheus_url=question.prometheus_url,
        )
        rows.append(_row(name, result, applied) | {"is_present": name.endswith("(present)")})
    seen = _observed(minutes.filter(pl.col("minute_at") >= window[0]))
    if seen is not None:
        rows.append({"policy_name": "observed", "kind": "observed", "is_present": True, "replica_hours": seen})
    common = {
        "window_start_at": window[0],
        "window_end_at": window[1],
        "step_seconds": STEP_SECONDS,
        "capacity_tokens_per_second": capacity,
        "capacity_origin": origin,
        "reason": _standing(len(tuning), len(judged), bridged),
    }
    return _marked(_frame([base | common | row for row in rows]), question.aim_ratio)


def _capacity(question: BacktestQuestion, busiest: float) -> tuple[float | None, CapacityOrigin | None]:
    if question.capacity_tokens_per_second is not None:
        return question.capacity_tokens_per_second, "given"
    if question.capacity is not None:
        return question.capacity.per_second, question.capacity.origin
    if question.replicas_at_peak is not None and busiest > 0:
        return busiest / question.replicas_at_peak, "assumed"
    return None, None


def _refusal(hours: float, bridged: float, busiest: float, capacity: float | None) -> str | None:
    if hours < MIN_HOURS:
        return f"{hours:.1f} h of load are stored; a replay needs {MIN_HOURS} h"
    if bridged > MAX_BRIDGED_RATIO:
        return f"{bridged:.0%} of the minutes are unknown; a replay of what was made up would judge nothing"
    if busiest <= 0:
        return "nobody asked for anything in the window"
    if capacity is None:
        return "what a replica carries is not known (see replica_capacity): give it in the job's config"
    return None


def _split(load: Floats, tune: bool) -> tuple[Floats, Floats]:
    """(what parameters are chosen on, what judges them): whole days, the first half of them; all judges if too few."""
    days = len(load) / STEPS_PER_DAY
    if not tune or days < MIN_TUNING_DAYS:
        return load[:0], load
    cut = int(days // 2) * STEPS_PER_DAY
    return load[:cut], load[cut:]


def _few_trend_candidates() -> list[Policy]:
    """Every fifth of ours: all of them over a week cost half a minute, and neighbors differ by a percent."""
    return list(trend_candidates()[::5])


def _busiest_minute(load: Floats) -> float:
    """Tokens a second in the busiest minute; 0 for an empty load."""
    whole = load[: len(load) // STEPS_PER_MINUTE * STEPS_PER_MINUTE]
    return float(whole.reshape(-1, STEPS_PER_MINUTE).mean(axis=1).max(initial=0.0)) / STEP_SECONDS


def _tokens_per_request(minutes: pl.DataFrame) -> float:
    """Mean tokens of a request over the window; 1 (a request is a unit of work) where requests are not counted."""
    both = minutes.drop_nulls(["demand_tokens_per_second", "requests_per_second"])
    tokens, requests = both.select(pl.col("demand_tokens_per_second", "requests_per_second").sum()).row(0)
    return float(tokens / requests) if requests else 1.0


def _name(policy: Policy) -> str:
    main = {
        "static": "replicas",
        "hpa": "target_ratio",
        "keda_load": "target_ratio",
        "keda_waiting": "waiting_per_replica",
        "planner": "target_ratio",
        "trend": "up_ratio",
        "slo_ratio": "wait_target_seconds",
    }
    parameter = main.get(policy.kind)
    return policy.kind if parameter is None else f"{policy.kind} {getattr(policy, parameter):g}"


def _row(name: str, result: BacktestResult, applied: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "policy_name": name,
        "kind": result.policy.kind,
        "policy": result.policy.model_dump_json(),
        "replica_hours": result.replica_hours,
        "oracle_replica_hours": result.oracle_replica_hours,
        "cost_ratio": result.cost_ratio,
        "attainment_ratio": result.attainment_ratio,
        "longest_wait_seconds": result.longest_wait_seconds,
        "peak_replicas": result.peak_replicas,
        "scale_ups": result.scale_ups,
        "scale_downs": result.scale_downs,
        "manifest": None if applied is None else json.dumps(applied),
    }


def _observed(minutes: pl.DataFrame) -> float | None:
    """Replica-hours that answered in the window; None where engines are not seen."""
    counts = minutes["replica_count"].drop_nulls()
    total = float(counts.sum())
    return total / 60 if total else None


def _standing(tuned: int, judged: int, bridged: float) -> str:
    hours, before = judged * STEP_SECONDS / 3600, tuned * STEP_SECONDS / 3600
    chosen = (
        f"tuned on the {before:.0f} h before" if tuned else "no parameter was tuned; static is sized on this very load"
    )
    gaps = f"; {bridged:.1%} of the minutes were bridged" if bridged > 0 else ""
    return f"{hours:.1f} h replayed; {chosen}; bursts inside a minute are not in the record{gaps}"


def _marked(rows: pl.DataFrame, aim_ratio: float) -> pl.DataFrame:
    """Cheapest first, with is_pareto and is_advised."""
    rows = rows.sort("replica_hours", "attainment_ratio", descending=[False, True], nulls_last=True)
    # Perfect knowledge and what merely ran are no choices: they bound the others and stand beside them.
    choice = pl.when(pl.col("kind") != "foresight").then(pl.col("attainment_ratio"))
    best_before = choice.cum_max().forward_fill().shift(1)
    judged = choice.is_not_null()
    can_apply = pl.col("manifest").is_not_null() & (pl.col("attainment_ratio") >= aim_ratio)
    return rows.with_columns(
        is_pareto=judged & (best_before.is_null() | (pl.col("attainment_ratio") > best_before)),
        is_advised=(can_apply & (can_apply.cum_sum() == 1)).fill_null(False),
    )


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    text = ("policy_name", "kind", "policy", "manifest", "capacity_origin", "reason")
    numbers = ("replica_hours", "attainment_ratio", "capacity_tokens_per_second", "cost_ratio", "longest_wait_seconds")
    columns: dict[str, pl.DataType | type[pl.DataType]] = dict.fromkeys(text, pl.String)
    columns |= dict.fromkeys(numbers, pl.Float64)
    frame = pl.DataFrame(rows, infer_schema_length=None)
    return frame.with_columns(
        (pl.col(name) if name in frame.columns else pl.lit(None)).cast(dtype).alias(name)
        for name, dtype in columns.items()
    )
