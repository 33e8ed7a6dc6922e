"""From stored minutes to rows of capacity and scaling advice: which minutes belong together, what is unknown and why.

Pure. The fit is `capacity`, the decision is `scaling`; reading minutes and keeping rows is the work of
`resources` and `defs`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import polars as pl

from optiinfra_pipelines.analysis.scaling.capacity import profile_tokens_per_second, replica_capacity
from optiinfra_pipelines.analysis.scaling.cold_start import ColdStart
from optiinfra_pipelines.analysis.scaling.replicas import LoadOutlook, ScalingSettings, recommend_scaling
from optiinfra_pipelines.domain.fleet import Deployment
from optiinfra_pipelines.domain.models import known_model
from optiinfra_pipelines.domain.prices import price_of
from optiinfra_pipelines.domain.scaling import Capacity, ScalingAdvice

# On the measured 70B profile prefill and decode take equally long at 14 input tokens an output token; a factor of
# three to either side one of the two decides what a replica carries.
DECODE_BOUND_RATIO = 4.0
PREFILL_BOUND_RATIO = 40.0
# The state of now is told by the last minutes; older than this nothing is known about it.
FRESH = timedelta(minutes=5)
_BILLIONS = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)\s*[bB](?![A-Za-z0-9])")
LATENCY_KINDS = ("ttft", "tpot", "itl", "e2e")


def length_mix() -> pl.Expr:
    """What decides the capacity at these lengths, from prompt_tokens and generation_tokens; NULL when unknown."""
    ratio = pl.col("prompt_tokens") / pl.col("generation_tokens")
    return (
        pl.when(pl.col("generation_tokens") > 0)
        .then(
            pl.when(ratio < DECODE_BOUND_RATIO)
            .then(pl.lit("decode_bound"))
            .when(ratio >= PREFILL_BOUND_RATIO)
            .then(pl.lit("prefill_bound"))
            .otherwise(pl.lit("balanced"))
        )
        .otherwise(None)
    )


def billion_parameters(model: str) -> float | None:
    """Size of a model by its known shape, else by a name that says it (such as Llama-3.1-70B); None otherwise."""
    shape = known_model(model)
    if shape is not None and shape.parameters is not None:
        return shape.parameters / 1e9
    found = _BILLIONS.search(model.replace("_", "-"))
    return float(found.group(1)) if found else None


def capacity_rows(minutes: pl.DataFrame, deployments: Mapping[str, Deployment], measured_at: datetime) -> pl.DataFrame:
    """Rows of replica_capacity: one per deployment, engine configuration and length mix that its minutes show.

    minutes: one row per replica and minute (`resources.advice.load_history.replica_minutes`): deployment, minute_at,
    config_hash, prompt_tokens, generation_tokens, work_per_second, running, waiting, max_running,
    is_within_objective. A deployment of fleet.yaml without any gets one abstaining row.
    """
    rows: list[dict[str, Any]] = []
    mixed = minutes.with_columns(length_mix=length_mix())
    for name, deployment in deployments.items():
        own = mixed.filter(pl.col("deployment") == name)
        base = {
            "measured_at": measured_at,
            "deployment": name,
            "model": deployment.model,
            "gpu": deployment.gpu,
            "gpus_per_replica": deployment.gpus_per_replica,
        }
        if own.is_empty():
            rows.append(base | {"is_present": True, "reason": "no minute of any of its engines is stored yet"})
            continue
        known = own.filter(pl.col("length_mix").is_not_null())
        newest = (known if known.height else own).sort("minute_at").row(-1, named=True)
        present = (newest["config_hash"], newest["length_mix"])
        for (config_hash, mix), group in own.group_by(["config_hash", "length_mix"], maintain_order=True):
            is_present = (config_hash, mix) == present
            if mix is None and not is_present:
                continue  # idle minutes
            fitted = replica_capacity(group, profile_per_second=_profile(deployment, group) if is_present else None)
            rows.append(
                base
                | {"config_hash": config_hash, "length_mix": mix, "is_present": is_present}
                | (_told(fitted) if fitted else {"reason": _why_unknown(deployment, group)})
            )
    schema: dict[str, pl.DataType | type[pl.DataType]] = {
        "measured_at": pl.Datetime("us", "UTC"),
        "gpus_per_replica": pl.Int64,
        "minutes": pl.Int64,
        "is_present": pl.Boolean,
    }
    return pl.DataFrame(rows, schema_overrides=schema, infer_schema_length=None)


def _told(capacity: Capacity) -> dict[str, Any]:
    return {
        "tokens_per_second": capacity.per_second,
        "low_tokens_per_second": capacity.low_per_second,
        "high_tokens_per_second": capacity.high_per_second,
        "origin": capacity.origin,
        "minutes": capacity.minutes,
        "reason": capacity.reason,
    }


def _profile(deployment: Deployment, minutes: pl.DataFrame) -> float | None:
    size = billion_parameters(deployment.model)
    tokens = minutes.select(pl.col("prompt_tokens", "generation_tokens").sum()).row(0)
    if size is None or deployment.gpu is None or not all(tokens):
        return None
    return profile_tokens_per_second(size, deployment.gpu, deployment.gpus_per_replica, *tokens)


def _why_unknown(deployment: Deployment, minutes: pl.DataFrame) -> str:
    if not has_latency_objective(deployment):
        return "fleet.yaml names no latency objective for it, so no minute is known to have kept one: add objectives"
    judged = minutes["is_within_objective"].drop_nulls()
    kept = int(judged.sum())
    if judged.is_empty():
        return "no busy minute could be judged: no request, or no histogram edge at or under the objective's threshold"
    return f"{kept} busy minutes kept the objectives, too few to fit on, and no public measurement is near it"


def has_latency_objective(deployment: Deployment) -> bool:
    return any(one.kind in LATENCY_KINDS and one.threshold_seconds is not None for one in deployment.objectives)


def present_capacity(rows: pl.DataFrame, deployment: str) -> Capacity | None:
    """The capacity that holds now, from rows of replica_capacity; None when it is unknown."""
    found = rows.filter((pl.col("deployment") == deployment) & pl.col("is_present")).drop_nulls("tokens_per_second")
    if found.is_empty():
        return None
    row = found.row(0, named=True)
    return Capacity(
        per_second=row["tokens_per_second"],
        low_per_second=row["low_tokens_per_second"],
        high_per_second=row["high_tokens_per_second"],
        origin=row["origin"],
        minutes=row["minutes"],
        reason=row["reason"],
    )


def scaling_rows(
    minutes: pl.DataFrame,
    forecasts: pl.DataFrame,
    capacities: pl.DataFrame,
    deployments: Mapping[str, Deployment],
    cold_starts: Mapping[str, ColdStart],
    decided_at: datetime,
) -> pl.DataFrame:
    """Rows of scaling_recommendations, one per deployment of fleet.yaml.

    minutes: rows of int_load_minutes (a day or more); forecasts, capacities: the newest rows of load_forecast and
    replica_capacity.
    """
    rows = []
    for name, deployment in deployments.items():
        start = cold_starts[name]
        own = minutes.filter(pl.col("deployment") == name).sort("minute_at")
        fresh = own.filter(pl.col("minute_at") > decided_at - FRESH)
        price = price_of(deployment.gpu, deployment.price_usd_per_gpu_hour)
        usd = None if price is None else price.usd_per_gpu_hour * deployment.gpus_per_replica
        advice = recommend_scaling(
            name,
            decided_at,
            current_replicas=_current_replicas(fresh),
            outlook=_outlook(own, fresh, forecasts.filter(pl.col("deployment") == name), start, decided_at),
            capacity=present_capacity(capacities, name),
            seconds_since_change=_seconds_since_change(own, decided_at),
            settings=ScalingSettings(
                min_replicas=deployment.min_replicas,
                max_replicas=deployment.max_replicas,
            ),
            usd_per_replica_hour=usd,
        )
        rows.append(_advice_row(advice, start))
    return pl.DataFrame(
        rows,
        schema_overrides={
            "decided_at": pl.Datetime("us", "UTC"),
            "current_replicas": pl.Int64,
            "proposed_replicas": pl.Int64,
            "breach_probability": pl.Float64,
            "usd_per_hour_change": pl.Float64,
        },
        infer_schema_length=None,
    )


def _advice_row(advice: ScalingAdvice, start: ColdStart) -> dict[str, Any]:
    row = advice.model_dump(exclude={"evidence"})
    return row | {"evidence": json.dumps(advice.evidence), "cold_start_seconds": start.seconds}


def _current_replicas(fresh: pl.DataFrame) -> int | None:
    """Engines that answered in the last minute; None when none is known to (a frontend does not count its engines)."""
    counts = fresh["replica_count"].drop_nulls() if fresh.height else pl.Series([], dtype=pl.Int64)
    last = int(counts[-1]) if len(counts) else 0
    return last or None


def _seconds_since_change(minutes: pl.DataFrame, decided_at: datetime) -> float | None:
    """Since replica_count last changed; since the record began where it never did (it is that long at the least)."""
    known = minutes.drop_nulls("replica_count")
    if known.is_empty():
        return None
    other = known.filter(pl.col("replica_count") != known["replica_count"][-1])
    since: datetime = (other if other.height else known)["minute_at"][-1 if other.height else 0]
    return max((decided_at - since).total_seconds(), 0.0)


def _outlook(
    minutes: pl.DataFrame, fresh: pl.DataFrame, forecasts: pl.DataFrame, start: ColdStart, decided_at: datetime
) -> LoadOutlook:
    """Load now and over the cold start. Where the last forecast is older than its horizon, there is none."""
    ahead = forecasts.filter((pl.col("measure") == "demand_tokens_per_second") & pl.col("is_cold_start"))
    row: dict[str, Any] = ahead.row(0, named=True) if ahead.height else {}
    if row:
        until = row["origin_at"] + timedelta(seconds=row["step_seconds"] + row["horizon_seconds"])
        row = row if until >= decided_at else {}
    waiting = fresh["requests_waiting_last"].drop_nulls() if fresh.height else pl.Series([], dtype=pl.Float64)
    hour = minutes.filter(pl.col("minute_at") > decided_at - timedelta(hours=1))
    totals = hour.select(pl.col("demand_tokens_per_second", "requests_per_second").sum()).row(0)
    per_request = totals[0] / totals[1] if totals[1] else None
    queued = float(waiting[-1]) * per_request if len(waiting) and per_request is not None else None
    present = fresh["demand_tokens_per_second"].drop_nulls().mean() if fresh.height else None
    return LoadOutlook(
        present=present if isinstance(present, float) else None,
        p10=row.get("p10"),
        p50=row.get("p50"),
        p90=row.get("p90"),
        horizon_seconds=row.get("horizon_seconds") or start.seconds,
        queued_work=queued,
    )
