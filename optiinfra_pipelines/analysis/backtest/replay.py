"""Replay a recorded load against a scaling policy: what it would have cost, and how long demand would have waited.

Pure: frames and policies in, results out. A fluid queue in steps of at most 10 s (or of the record, if coarser): a
replica ordered at t is paid from t and serves from t + cold start; a removed one is paid until it has drained and
serves nothing meanwhile; replicas not yet ready are cancelled first. What each policy wants is `policies`;
the manifest that sets it is `manifests`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.backtest.policies import Wants, wants
from optiinfra_pipelines.analysis.kv_cache.stack import Floats
from optiinfra_pipelines.domain.scaling import BacktestResult, Policy

WAIT_BOUND_SECONDS = 10.0  # the bound of the public measurements this is compared with; set it from the objective
# The oracle may move work within a minute: bursts shorter than that wait seconds, not a cold start.
ORACLE_WINDOW_SECONDS = 60.0
COMPILED_FROM_STEPS = 3000  # interpreted to here: about 5 us a step, less than importing numba costs

TIMELINE_SCHEMA = pl.Schema(
    {
        "second": pl.Float64,  # start of the step
        "arrived": pl.Float64,  # units of work in the step
        "served": pl.Float64,
        "queued": pl.Float64,  # at the end of the step
        "wait_seconds": pl.Float64,  # of what arrived in the step, at the capacity ready then; inf without a replica
        "ready_replicas": pl.Int64,
        "paid_replicas": pl.Int64,  # ready, starting and draining
    }
)


def _replay(
    arrived: Any, up: Any, down: Any, numbers: Any, ready_at: Any, paid_until: Any, served: Any, queued: Any,
    ready_out: Any, paid_out: Any, recent: Any, changes: Any,
) -> None:  # fmt: skip
    """The loop. numbers: see `replay`. ready_at, paid_until: zeros, steps + longest delay; recent: zeros, a ring."""
    work_per_step = numbers[0]
    cold_steps = int(numbers[1])
    drain_steps = int(numbers[2])
    sync_steps = int(numbers[3])
    hold_steps = int(numbers[4])
    tolerance = numbers[5]
    per_queued = numbers[6]
    least = int(numbers[7])
    most = int(numbers[8])
    growth = numbers[9]
    wait_target_steps = numbers[10]
    ready = int(numbers[11])
    starting = 0
    draining = 0
    queue = 0.0
    decisions = 0
    held_for = len(recent)
    for step in range(len(arrived)):
        starting -= ready_at[step]
        ready += ready_at[step]
        draining -= paid_until[step]
        queue += arrived[step]
        done = min(queue, ready * work_per_step)
        queue -= done
        served[step] = done
        queued[step] = queue
        ready_out[step] = ready
        paid_out[step] = ready + starting + draining
        # The step is over and its load known: what is decided now holds from the next one on.
        if step % sync_steps == 0:
            current = ready + starting
            if wait_target_steps > 0:
                pressure = queue / max(ready * work_per_step, 1e-9) / wait_target_steps
                # Of the ready ones: those starting are the answer to the same wait, not a reason for more.
                wanted_up = ready * min(pressure, 2.0) if pressure > 1 else 0.0
                wanted_down = down[step]
                if wanted_down < current - 1:
                    wanted_down = current - 1
            else:
                wanted_up = up[step] + queue * per_queued
                wanted_down = down[step] + queue * per_queued
            if current > 0 and abs(wanted_up / current - 1) <= tolerance:
                wanted_up = current
                wanted_down = current
            if growth > 0 and wanted_up > current * growth:
                wanted_up = max(current * growth, current + 4)
            target_up = min(max(int(np.ceil(wanted_up - 1e-9)), least), most)
            target_down = min(max(int(np.ceil(max(wanted_up, wanted_down) - 1e-9)), least), most)
            recent[decisions % held_for] = target_down
            decisions += 1
            if target_up > current:
                changes[0] += 1
                added = target_up - current
                starting += added
                ready_at[step + 1 + cold_steps] += added
            else:
                floor = target_down
                window = min(decisions, max(hold_steps // sync_steps, 1))
                for back in range(window):
                    floor = max(floor, recent[(decisions - 1 - back) % held_for])
                if floor < current:
                    changes[1] += 1
                    surplus = current - floor
                    newest = step + 1 + cold_steps
                    while surplus > 0 and starting > 0 and newest > step:
                        cancelled = min(surplus, ready_at[newest])
                        ready_at[newest] -= cancelled
                        starting -= cancelled
                        surplus -= cancelled
                        newest -= 1
                    ready -= surplus
                    if drain_steps > 0:
                        draining += surplus
                        paid_until[step + 1 + drain_steps] += surplus


@cache
def _compiled() -> Any:
    import numba  # here, not above: a replay of an hour must not pay for importing it

    try:
        return numba.njit(cache=True, nogil=True)(_replay)
    except RuntimeError:  # nowhere to keep the compiled code
        return numba.njit(nogil=True)(_replay)


def replay(
    arrived: Floats,
    policy: Policy,
    *,
    capacity: float,
    cold_start_seconds: float,
    step_seconds: float = 10.0,
    drain_seconds: float = 0.0,
    min_replicas: int = 1,
    max_replicas: int | None = None,
    initial_replicas: int | None = None,
    work_per_request: float = 1.0,
) -> tuple[pl.DataFrame, tuple[int, int]]:
    """The timeline (TIMELINE_SCHEMA) of a policy on a load, and how often it scaled up and down.

    arrived: units of work that arrive in each step, no NaN; capacity: units per second and replica. Starts with
    initial_replicas ready: by default what the first minute's load needs. work_per_request turns waiting work into
    waiting requests for policies that count those.
    """
    if not len(arrived):
        raise ValueError("the load has no steps: give at least one")
    if not np.isfinite(arrived).all() or (arrived < 0).any():
        raise ValueError("the load holds NaN or negative work: fill or cut recording gaps before a replay")
    if not capacity > 0 or not step_seconds > 0 or cold_start_seconds < 0 or drain_seconds < 0:
        raise ValueError(f"capacity {capacity} and step {step_seconds} must be over 0, cold start and drain not under")
    plan = wants(policy, arrived / step_seconds, capacity, cold_start_seconds, step_seconds, work_per_request)
    most = max_replicas if max_replicas is not None else 1_000_000_000
    first = arrived[: max(1, round(60 / step_seconds))].mean() / step_seconds
    initial = initial_replicas if initial_replicas is not None else int(np.ceil(first / capacity - 1e-9))
    if plan.initial is not None:
        initial = plan.initial
    cold_steps, drain_steps = round(cold_start_seconds / step_seconds), round(drain_seconds / step_seconds)
    numbers = _numbers(plan, capacity, step_seconds, cold_steps, drain_steps)
    numbers += [float(min_replicas), float(most), plan.growth, plan.wait_target_seconds / step_seconds]
    numbers += [float(min(max(initial, min_replicas), most))]
    steps = len(arrived)
    holding = max(1, int(numbers[4] // numbers[3]))
    delays = [np.zeros(steps + delay + 1, dtype=np.int64) for delay in (cold_steps, drain_steps)]
    served, queued = np.zeros(steps), np.zeros(steps)
    ready, paid = np.zeros(steps, dtype=np.int64), np.zeros(steps, dtype=np.int64)
    recent, changes = np.zeros(holding, dtype=np.int64), np.zeros(2, dtype=np.int64)
    run = _compiled() if steps >= COMPILED_FROM_STEPS else _replay
    ready_at, paid_until = delays
    load = arrived.astype(np.float64)
    run(load, plan.up, plan.down, np.array(numbers), ready_at, paid_until, served, queued, ready, paid, recent, changes)
    with np.errstate(divide="ignore", invalid="ignore"):
        wait = np.where(queued > 0, queued / (ready * capacity), 0.0)
    timeline = pl.DataFrame(
        {
            "second": np.arange(steps) * step_seconds,
            "arrived": arrived,
            "served": served,
            "queued": queued,
            "wait_seconds": wait,
            "ready_replicas": ready,
            "paid_replicas": paid,
        },
        schema=TIMELINE_SCHEMA,
    )
    return timeline, (int(changes[0]), int(changes[1]))


def _numbers(plan: Wants, capacity: float, step_seconds: float, cold_steps: int, drain_steps: int) -> list[float]:
    sync = max(1, round(plan.sync_seconds / step_seconds))
    hold = max(1, round(plan.stabilization_seconds / step_seconds))
    work = capacity * step_seconds
    return [work, float(cold_steps), float(drain_steps), float(sync), float(hold), plan.tolerance, plan.per_queued]


def oracle_replica_hours(
    arrived: Floats,
    *,
    capacity: float,
    cold_start_seconds: float,
    step_seconds: float = 10.0,
    window_seconds: float = ORACLE_WINDOW_SECONDS,
    min_replicas: int = 0,
) -> float:
    """The least replica-hours that serve every window's work within the window, knowing the future, cold starts paid.

    Each replica of the stack is on while needed, and over a gap it costs the lesser of staying on and starting again.
    Demand at the start finds its replicas running, as in `replay`. With window_seconds = step_seconds no schedule
    without any wait is cheaper.
    """
    steps = max(1, round(window_seconds / step_seconds))
    whole = len(arrived) // steps * steps
    work = arrived[:whole].reshape(-1, steps).sum(axis=1)
    lengths = np.full(len(work), steps)
    if whole < len(arrived):
        work = np.append(work, arrived[whole:].sum())
        lengths = np.append(lengths, len(arrived) - whole)
    needed = np.ceil(work / (capacity * step_seconds * lengths) - 1e-9).astype(np.int64)
    needed = np.repeat(needed, lengths)
    cold_steps = round(cold_start_seconds / step_seconds)
    total = 0
    for level in range(1, max(int(needed.max(initial=0)), min_replicas) + 1):
        if level <= min_replicas:
            total += len(needed)
            continue
        on = np.flatnonzero(needed >= level)
        gaps = np.diff(on) - 1
        total += len(on) + int(np.minimum(gaps, cold_steps).sum()) + min(int(on[0]), cold_steps)
    return total * step_seconds / 3600


def backtest(
    load: pl.DataFrame | Floats,
    policy: Policy,
    capacity: float,
    cold_start_seconds: float,
    *,
    step_seconds: float = 10.0,
    wait_bound_seconds: float = WAIT_BOUND_SECONDS,
    oracle_window_seconds: float = ORACLE_WINDOW_SECONDS,
    drain_seconds: float = 0.0,
    min_replicas: int = 1,
    max_replicas: int | None = None,
    initial_replicas: int | None = None,
    work_per_request: float = 1.0,
) -> BacktestResult:
    """Cost and attainment of one policy on one recorded load.

    load: units of work per step, an array or a frame with column `arrived`. Attainment is the share of work whose wait
    (queue over the capacity ready when it arrives) is within wait_bound_seconds. Other arguments as in `replay`.
    """
    arrived = _arrived(load)
    timeline, (ups, downs) = replay(
        arrived,
        policy,
        capacity=capacity,
        cold_start_seconds=cold_start_seconds,
        step_seconds=step_seconds,
        drain_seconds=drain_seconds,
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        initial_replicas=initial_replicas,
        work_per_request=work_per_request,
    )
    wait = timeline["wait_seconds"].to_numpy()
    total = float(arrived.sum())
    longest = float(wait[arrived > 0].max(initial=0.0))
    return BacktestResult(
        policy=policy,
        steps=len(arrived),
        step_seconds=step_seconds,
        replica_hours=float(timeline["paid_replicas"].sum()) * step_seconds / 3600,
        attainment_ratio=min(float(arrived[wait <= wait_bound_seconds].sum()) / total, 1.0) if total else None,
        arrived=total,
        served=float(timeline["served"].sum()),
        queued_at_end=float(timeline["queued"][-1]),
        longest_wait_seconds=longest if np.isfinite(longest) else None,
        peak_replicas=int(timeline["paid_replicas"].to_numpy().max()),
        scale_ups=ups,
        scale_downs=downs,
        oracle_replica_hours=oracle_replica_hours(
            arrived,
            capacity=capacity,
            cold_start_seconds=cold_start_seconds,
            step_seconds=step_seconds,
            window_seconds=oracle_window_seconds,
            min_replicas=min_replicas,
        ),
    )


def _arrived(load: pl.DataFrame | Floats) -> Floats:
    if not isinstance(load, pl.DataFrame):
        return np.asarray(load, dtype=np.float64)
    if "arrived" not in load.columns:
        raise ValueError(f"the load needs a column arrived, units of work per step; it has {load.columns}")
    return load["arrived"].cast(pl.Float64).to_numpy()


def compare_policies(
    load: pl.DataFrame | Floats,
    policies: Sequence[Policy],
    capacity: float,
    cold_start_seconds: float,
    **options: Any,
) -> pl.DataFrame:
    """One row per policy, cheapest first: kind, policy (JSON), replica_hours, cost_ratio, attainment_ratio,
    longest_wait_seconds, peak_replicas, scale_ups, scale_downs, is_pareto (nothing is both cheaper and better kept).

    options: as for `backtest`.
    """
    rows = []
    for policy in policies:
        result = backtest(load, policy, capacity, cold_start_seconds, **options)
        rows.append(
            {
                "kind": policy.kind,
                "policy": policy.model_dump_json(),
                "replica_hours": result.replica_hours,
                "cost_ratio": result.cost_ratio,
                "attainment_ratio": result.attainment_ratio,
                "longest_wait_seconds": result.longest_wait_seconds,
                "peak_replicas": result.peak_replicas,
                "scale_ups": result.scale_ups,
                "scale_downs": result.scale_downs,
            }
        )
    schema = {"kind": pl.String, "policy": pl.String, "replica_hours": pl.Float64, "cost_ratio": pl.Float64}
    schema |= {"attainment_ratio": pl.Float64, "longest_wait_seconds": pl.Float64, "peak_replicas": pl.Int64}
    schema |= {"scale_ups": pl.Int64, "scale_downs": pl.Int64}
    frame = pl.DataFrame(rows, schema=schema).sort("replica_hours", "attainment_ratio", descending=[False, True])
    best_before = pl.col("attainment_ratio").cum_max().shift(1)
    return frame.with_columns(is_pareto=(best_before.is_null() | (pl.col("attainment_ratio") > best_before)))
