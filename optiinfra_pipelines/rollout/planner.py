"""How long each step must be: the time in which the judge would find the regression it is there to find.

Pure; randomness is a seed. The detection time is computed by running the judge itself on simulated counts with the
stable replicas' own latency shares and the canary's request rate, without replica noise, and a step gets half as much
again for that noise. A step shorter than that could only pass, so it is refused with what would suffice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optiinfra_pipelines.domain.rollouts import RolloutPlan, Stage, Step
from optiinfra_pipelines.rollout.eprocess import (
    ERROR_ALTERNATIVES,
    Counts,
    Floats,
    first_crossing,
)
from optiinfra_pipelines.rollout.judge import ERROR_NULL_ODDS, LATENCY_PLAIN_SHARE
from optiinfra_pipelines.rollout.margins import StableHistogram, judged_edges, merge
from optiinfra_pipelines.rollout.tempering import LATENCY_ALTERNATIVES, latency_rule, plain_rule
from optiinfra_pipelines.rollout.warm_up import longest_warm_up

TICK_SECONDS = 5.0
# Found in nine of ten simulated steps: with the median, every second bad candidate would outlive its step.
FOUND_RATIO = 0.9
SIMULATED_STEPS = 40
# Replicas that drift and bursts of load: nine of ten were found within 0.7 to 1.6 times the time computed without them
# (SIMULATED, +25 to +100 % at 0.5 to 10 requests/s, 300 to 1,500 steps each: benchmarks/judge_acceptance.py).
NOISE_FACTOR = 1.5
# Longer steps than this are no canary; the traffic share has to grow instead.
LONGEST_STEP_SECONDS = 8 * 3600.0
# Even with much traffic: load has to move through a few of its own swings before a step says anything.
SHORTEST_STEP_SECONDS = 120.0
# Errors that must be found where no latency can be judged: one request in twenty.
_ERROR_RATIO, _USUAL_ERROR_RATIO = 0.05, 0.002


@dataclass(frozen=True)
class Traffic:
    """What the deployment carries now, before the rollout. minutes: stable increments, one histogram a minute."""

    requests_per_second: float
    stable_replicas: int
    minutes: Mapping[str, Sequence[StableHistogram]]


@dataclass(frozen=True)
class PlanRefusal:
    """Why a plan cannot be carried out on this traffic, and what would suffice."""

    reason: str


def plan_steps(plan: RolloutPlan, traffic: Traffic, *, stake: float, seed: int) -> tuple[Step, ...] | PlanRefusal:
    """All steps of a rollout with their times, the first STAGING and the last BAKE; or the refusal."""
    if traffic.requests_per_second <= 0:
        return PlanRefusal("the deployment has no requests; a canary without traffic cannot be judged")
    steps = [Step(stage=Stage.STAGING, percent=0, dwell_seconds=0, max_seconds=1800)]
    too_short: list[str] = []
    for stage, percent in stages(plan.percents, traffic.stable_replicas, plan.candidate_replicas):
        if percent >= 100:
            steps.append(_step(plan, stage, percent, SHORTEST_STEP_SECONDS))
            continue
        needed = needed_seconds(plan, traffic, percent, stake=stake, seed=seed)
        wanted = None if plan.step_minutes is None else plan.step_minutes * 60
        if needed is None:
            rate = traffic.requests_per_second * percent / 100
            return PlanRefusal(
                f"at {percent:g} % the candidate gets {rate:.3g} requests/s, and +{plan.detect_ratio:.0%} would not be "
                f"found within {LONGEST_STEP_SECONDS / 3600:g} h: begin at a larger share, or accept to find only a "
                "larger regression (detect_ratio)"
            )
        if wanted is not None and wanted < needed:
            too_short.append(f"{percent:g} %: {needed / 60:.1f} min")
        steps.append(_step(plan, stage, percent, max(wanted or 0.0, needed)))
    if too_short:
        return PlanRefusal(
            f"steps of {plan.step_minutes:g} min are too short to find +{plan.detect_ratio:.0%} in nine of ten cases "
            f"at {traffic.requests_per_second:.3g} requests/s; needed after each warm-up: {', '.join(too_short)}. "
            "Lengthen step_minutes, leave it out, or begin at a larger share"
        )
    # No warm-up: the share does not grow into the bake, and nothing is compared in it.
    bake = max(plan.bake_minutes * 60, 0.0)
    steps.append(Step(stage=Stage.BAKE, percent=100, dwell_seconds=bake, max_seconds=bake + LONGEST_STEP_SECONDS))
    return tuple(steps)


def stages(percents: Sequence[float], stable_replicas: int, candidate_replicas: int) -> list[tuple[Stage, float]]:
    """The stage of each share. VALIDATION stands where a candidate replica carries what a stable one does.

    Below it the candidate is idler than its baseline and looks better than it is: only there do latency and
    throughput compare like with like.
    """
    fair = 100 * candidate_replicas / (candidate_replicas + stable_replicas)
    below = [percent for percent in percents if percent < fair and percent < 100]
    above = [percent for percent in percents if percent > fair and percent < 100]
    ordered = [(Stage.CANARY, percent) for percent in below]
    ordered.append((Stage.VALIDATION, round(fair, 3)))
    return [*ordered, *[(Stage.GRADUAL, percent) for percent in above], (Stage.GRADUAL, 100.0)]


def needed_seconds(plan: RolloutPlan, traffic: Traffic, percent: float, *, stake: float, seed: int) -> float | None:
    """Least time of a step at a share: to find `detect_ratio` and to see `min_requests` in each arm; None: too long.

    From the end of the warm-up, whose longest time counts against the limit: what is seen in it finds nothing.
    """
    canary = traffic.requests_per_second * percent / 100
    baseline = traffic.requests_per_second - canary
    enough = plan.min_requests / min(canary, baseline)
    found = detection_seconds(plan, traffic, canary, baseline, stake=stake, seed=seed)
    if found is None:
        return None
    # A tenth more: arrivals are random, and the minimum should be met without an extension.
    seconds = max(NOISE_FACTOR * found, 1.1 * enough, SHORTEST_STEP_SECONDS)
    longest = LONGEST_STEP_SECONDS - longest_warm_up(plan.warm_up_seconds)
    return math.ceil(seconds / TICK_SECONDS) * TICK_SECONDS if seconds <= longest else None


def detection_seconds(
    plan: RolloutPlan, traffic: Traffic, canary_rate: float, baseline_rate: float, *, stake: float, seed: int
) -> float | None:
    """Time in which a latency regression of `detect_ratio` is found in nine of ten steps without replica noise.

    The quickest signal counts, for one is enough. Without a usable latency histogram: 5 % errors instead.
    """
    signals = {name: minutes for name, minutes in traffic.minutes.items() if judged_edges(minutes, plan.margin_ratio)}
    limit = math.log((len(signals) + 1) / plan.alpha)
    times = [
        _latency_seconds(plan, minutes, canary_rate, baseline_rate, stake, limit, seed + index)
        for index, minutes in enumerate(signals.values())
    ]
    if not times:
        times = [_error_seconds(canary_rate, baseline_rate, limit, seed)]
    found = [time for time in times if time is not None]
    return min(found) if found else None


def _latency_seconds(
    plan: RolloutPlan,
    minutes: Sequence[StableHistogram],
    canary_rate: float,
    baseline_rate: float,
    stake: float,
    limit: float,
    seed: int,
) -> float | None:
    whole = merge(minutes)
    edges = judged_edges(minutes, plan.margin_ratio)
    slower = [whole.tail_ratio(edge.bound_seconds / (1 + plan.detect_ratio)) for edge in edges]
    usual = [whole.tail_ratio(edge.bound_seconds) for edge in edges]
    log_nulls = np.log(np.array([edge.null_odds for edge in edges]))
    return _found_seconds(
        np.array(slower),
        np.array(usual),
        log_nulls,
        LATENCY_ALTERNATIVES,
        (latency_rule(stake), LATENCY_PLAIN_SHARE),
        (canary_rate, baseline_rate),
        limit,
        seed,
    )


def _error_seconds(canary_rate: float, baseline_rate: float, limit: float, seed: int) -> float | None:
    return _found_seconds(
        np.array([_ERROR_RATIO]),
        np.array([_USUAL_ERROR_RATIO]),
        np.log(np.array([ERROR_NULL_ODDS])),
        ERROR_ALTERNATIVES,
        (plain_rule([1.0] * len(ERROR_ALTERNATIVES)), 0.5),
        (canary_rate, baseline_rate),
        limit,
        seed,
    )


def _found_seconds(
    canary_tails: Floats,
    baseline_tails: Floats,
    log_nulls: Floats,
    alternatives: Sequence[float],
    bets: tuple[Floats, float],
    rates: tuple[float, float],
    limit: float,
    seed: int,
) -> float | None:
    """Time by which nine of ten simulated steps cross; None past the longest. bets: rule, share of plain ones."""
    random = np.random.default_rng(seed)
    log_ratios = np.log(np.asarray(alternatives, dtype=np.float64))
    # At a crawl of traffic most ticks are empty; longer ticks say the same with less work.
    tick = max(TICK_SECONDS, min(60.0, 1.0 / rates[0]))
    ticks = int(LONGEST_STEP_SECONDS / tick)
    for horizon in (min(ticks, 240), ticks):
        crossings = []
        for _ in range(SIMULATED_STEPS):
            totals = np.stack([random.poisson(rate * tick, horizon) for rate in rates], axis=1).astype(np.int64)
            overs = np.stack(
                [_nested(random, totals[:, 0], canary_tails), _nested(random, totals[:, 1], baseline_tails)], axis=2
            )
            crossed = first_crossing(
                totals, overs, log_nulls, log_ratios, bets[0], np.zeros((0, 0)), bets[1], horizon, limit
            )
            crossings.append(crossed if crossed else math.inf)
        found = sorted(crossings)[math.ceil(FOUND_RATIO * SIMULATED_STEPS) - 1]
        if math.isfinite(found):
            return float(found) * tick
    return None


def _nested(random: np.random.Generator, totals: Counts, tails: Floats) -> Counts:
    """Requests over each edge, [tick, edge]; edges ascend, so those over one are among those over the one before."""
    left, share, columns = totals, 1.0, []
    for tail in tails:
        left = random.binomial(left, min(1.0, float(tail) / share) if share > 0 else 0.0)
        share = float(tail)
        columns.append(left)
    return np.stack(columns, axis=1).astype(np.int64)


def _step(plan: RolloutPlan, stage: Stage, percent: float, dwell: float) -> Step:
    return Step(
        stage=stage,
        percent=percent,
        dwell_seconds=dwell,
        max_seconds=dwell * (1 + plan.max_extensions),
        warm_up_seconds=plan.warm_up_seconds,
        max_warm_up_seconds=longest_warm_up(plan.warm_up_seconds),
    )
