"""How far batching knobs are turned, and what that does: arithmetic with its steps shown.

Each function takes a target's measures and its context and returns a Sized change or why there is none. Memory knobs
are `sizing_memory`, the rest is `sizing_other`; which rule calls which function is `rules`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from optiinfra_pipelines.analysis.kv_arithmetic import NULL_BLOCKS, whole
from optiinfra_pipelines.analysis.recommendations.context import Context, Refused, Sized, Sizing, current_value
from optiinfra_pipelines.analysis.recommendations.flags import Flag, NoFlag, find_flag
from optiinfra_pipelines.analysis.recommendations.limits import KV_TARGET_RATIO, OVERFLOW_CHANCE
from optiinfra_pipelines.analysis.recommendations.measures import Measures
from optiinfra_pipelines.domain.recommendations import Basis, Effect

# vLLM's documentation: above 8192 for throughput, 2048 for inter-token latency.
_BUDGET_MOST, _BUDGET_LEAST = 16_384, 2_048
# A raise by less is not worth a restart.
_LEAST_RAISE = 1.1


def effect(signal: str, unit: str, before: float, low: float, high: float, derivation: str, basis: Basis) -> Effect:
    return Effect(
        signal=signal,
        unit=unit,
        before=before,
        change_low=min(low, high),
        change_high=max(low, high),
        basis=basis,
        derivation=derivation,
    )


def overflow_chance(requests: float, mean: float, deviation: float, capacity: float) -> float:
    """Chance that `requests` independent requests together hold more tokens than `capacity` (central limit)."""
    if requests <= 0:
        return 0.0
    spread = deviation * math.sqrt(requests)
    excess = capacity - requests * mean
    return float(excess < 0) if spread == 0 else 0.5 * math.erfc(excess / spread / math.sqrt(2))


def usable_tokens(measures: Measures) -> float | None:
    """KV tokens that requests can hold: the reported size without vLLM's null block, per rank."""
    tokens, block = measures["kv_capacity_tokens"], measures["kv_block_size_tokens"]
    if tokens is None:
        return None
    reserved = NULL_BLOCKS * (block or 0) * measures.ranks if measures.engine == "vllm" else 0
    return tokens - reserved


def preemption_effect(measures: Measures, requests: float, capacity: float, why: str) -> Effect | Refused:
    """What preemptions per request do when at most `requests` run on `capacity` tokens. Arithmetic of overflow.

    At best they end. At worst they fall in proportion of the chance that a full batch outgrows the cache, then
    against the share of samples in which it is full now.
    """
    rate, mean, deviation = (
        measures["preemptions_per_request"],
        measures["request_tokens_mean"],
        measures["request_tokens_deviation"],
    )
    full = measures["kv_full_share_ratio"]
    if rate is None or mean is None or deviation is None or not full:
        return Refused("the lengths of requests are not known (no histograms of prompt and output tokens)")
    chance = overflow_chance(requests, mean, deviation, capacity)
    left = min(1.0, chance / full)
    return effect(
        "preemptions_per_request",
        "events/request",
        rate,
        -rate,
        -rate * (1 - left),
        f"{why}; a request holds {mean:,.0f} tokens at its end (standard deviation {deviation:,.0f}), so "
        f"{requests:.0f} of them outgrow {capacity:,.0f} tokens with chance {chance:.1%}; the cache is full in "
        f"{full:.0%} of samples now",
        Basis.ARITHMETIC,
    )


def pressure_effect(measures: Measures, requests: float, capacity: float, why: str) -> Effect | Refused:
    """What a cache of `capacity` tokens a rank does: preemptions where there are any, else requests that wait for it.

    requests: of one rank, at most. Arithmetic.
    """
    if measures["preemptions_per_request_low"]:
        return preemption_effect(measures, requests, capacity, why)
    usable, waiting = usable_tokens(measures), measures["waiting_when_queued"]
    held, before = measures["request_tokens_mean"], measures["waiting_mean"]
    if usable is None or waiting is None or not held or not before:
        return Refused("the cache's size, the lengths of requests or how many wait is not told")
    more = capacity * measures.ranks - usable
    leave = min(math.floor(more / held), waiting)
    return effect(
        "requests_waiting_mean",
        "requests",
        before,
        -before,
        -max(0.0, leave) * (measures["waiting_share_ratio"] or 0.0),
        f"{why}; a request holds {held:,.0f} tokens at its end, so {more:,.0f} more take in at least {leave:.0f} of "
        f"the {waiting:.1f} that wait, at best all",
        Basis.ARITHMETIC,
    )


def slots_to_fit(measures: Measures, context: Context) -> Sized | Refused:
    """Batch slots cut to what the KV cache holds to the end of every request, with 90 % chance."""
    flag = find_flag(context.engine, context.engine_version, "max_sequences")
    if isinstance(flag, NoFlag):
        return Refused(flag.reason)
    usable, mean, deviation = (
        usable_tokens(measures),
        measures["request_tokens_mean"],
        measures["request_tokens_deviation"],
    )
    running = measures["running_max"]
    if usable is None or running is None:
        return Refused("the size of the KV cache or the number of running requests is not told")
    if mean is None or deviation is None:
        return Refused("the lengths of requests are not known (no histograms of prompt and output tokens)")
    per_rank = usable / measures.ranks
    fits = 0
    while overflow_chance(fits + 1, mean, deviation, per_rank) <= OVERFLOW_CHANCE and fits < running:
        fits += 1
    if fits < 1:
        return Refused(f"a single request holds {mean:,.0f} tokens on average and the cache {per_rank:,.0f}")
    total = fits * measures.ranks
    if total >= running:
        return Refused(f"{running:.0f} requests run at most and {total} fit: fewer slots would end nothing")
    why = f"{fits} slots{f' a rank, {measures.ranks} ranks' if measures.ranks > 1 else ''}"
    relief = preemption_effect(measures, fits, per_rank, why)
    if isinstance(relief, Refused):
        return relief
    waits = effect(
        "requests_waiting_mean",
        "requests",
        measures["waiting_mean"] or 0.0,
        0.0,
        running - total,
        f"at most {running:.0f} - {total} = {running - total:.0f} requests wait in front that ran before",
        Basis.ARITHMETIC,
    )
    current, note = _slots_now(flag, measures, context)
    return Sized(flag, current, str(fits), (relief, waits), note=note)


def slots_up(measures: Measures, context: Context) -> Sized | Refused:
    """Batch slots raised to what waits, to twice as many at most, and to what the KV cache holds at this mix."""
    flag = find_flag(context.engine, context.engine_version, "max_sequences")
    if isinstance(flag, NoFlag):
        return Refused(flag.reason)
    running, waiting = measures["running_max"], measures["waiting_when_queued"]
    usage = measures["kv_usage_queued_max_ratio"]
    if not running or waiting is None or not usage:
        return Refused("running requests, waiting requests or KV usage while they wait are not told")
    slots = measures["slots"] or running
    per_request = usage / running
    fits = math.floor(KV_TARGET_RATIO / per_request)
    wanted = math.ceil(running + waiting)
    total = min(2 * slots, fits, wanted)
    each = math.floor(total / measures.ranks)
    each = each // 8 * 8 if each >= 16 else each
    more = each * measures.ranks - slots
    if each * measures.ranks < slots * _LEAST_RAISE:
        return Refused(
            f"{slots:.0f} slots hold {usage:.0%} of the KV cache: only {fits} fit under {KV_TARGET_RATIO:.0%}"
            if fits < wanted
            else f"{waiting:.1f} requests wait for {slots:.0f} slots: a raise by less than a tenth is not worth it"
        )
    share = measures["waiting_share_ratio"] or 0.0
    before = measures["waiting_mean"] or 0.0
    leave = min(more, waiting)
    derivation = (
        f"{running:.0f} run and {waiting:.1f} wait in {share:.0%} of samples at {usage:.1%} KV, {per_request:.2%} a "
        f"request: {fits} requests would fill {KV_TARGET_RATIO:.0%}; min(2 x {slots:.0f}, {fits}, {wanted}) -> "
        f"{each}{f' a rank ({measures.ranks} ranks)' if measures.ranks > 1 else ''}; at least {leave:.0f} of those "
        f"waiting run at once, at best all"
    )
    relief = effect("requests_waiting_mean", "requests", before, -before, -leave * share, derivation, Basis.ARITHMETIC)
    current, note = _slots_now(flag, measures, context)
    return Sized(flag, current, str(each), (relief,), note=note)


def _slots_now(flag: Flag, measures: Measures, context: Context) -> tuple[str | None, str]:
    """Slots of one rank, and what to say of where the number comes from.

    Told by the page or declared, else the ceiling that running requests kept while others waited.
    """
    told = current_value(flag, "max_sequences", measures, context)
    if told is not None:
        return told, ""
    if measures["slots"]:
        return str(int(measures["slots"] // measures.ranks)), ""
    running = measures["running_max"] or 0.0
    if (measures["at_ceiling_ratio"] or 0) >= 0.9:
        return str(
            int(running // measures.ranks)
        ), " (its present value is the ceiling seen; the page does not tell it)"
    return None, f" (its present value is not told; {running:.0f} were seen to run)"


def token_budget_up(measures: Measures, context: Context) -> Sized | Refused:
    """Twice the token budget of a step, 16,384 at most."""
    sized = _budget(measures, context)
    if isinstance(sized, Refused):
        return sized
    flag, budget = sized
    proposed = min(2 * budget, _BUDGET_MOST)
    if proposed <= budget:
        return Refused(f"the budget is {budget:,} tokens; larger ones are not known to help")
    before = measures["waiting_mean"] or 0.0
    relief = effect(
        "requests_waiting_mean",
        "requests",
        before,
        -before,
        0.0,
        f"a step may take {proposed:,} tokens for {budget:,}: at best all {before:.1f} waiting are taken in, at worst "
        "the GPU computes no faster and as many wait",
        Basis.ARITHMETIC,
    )
    return Sized(flag, str(budget), str(proposed), (relief,))


def token_budget_down(measures: Measures, context: Context) -> Sized | Refused:
    """The token budget cut to 2,048, vLLM's figure for inter-token latency."""
    sized = _budget(measures, context)
    if isinstance(sized, Refused):
        return sized
    flag, budget = sized
    latency = measures["inter_token_latency_seconds_mean"]
    if budget <= _BUDGET_LEAST:
        return Refused(f"the budget is {budget:,} tokens already")
    if latency is None:
        return Refused("inter-token latency is not told")
    relief = effect(
        "inter_token_latency_mean_seconds",
        "s",
        latency,
        -latency * (1 - _BUDGET_LEAST / budget),
        0.0,
        f"the longest step shrinks from {budget:,} to {_BUDGET_LEAST:,} tokens: at best every step was that long",
        Basis.ARITHMETIC,
    )
    return Sized(flag, str(budget), str(_BUDGET_LEAST), (relief,))


def _budget(measures: Measures, context: Context) -> tuple[Flag, int] | Refused:
    flag = find_flag(context.engine, context.engine_version, "token_budget")
    if isinstance(flag, NoFlag):
        return Refused(flag.reason)
    budget = whole(current_value(flag, "token_budget", measures, context)) or measures["token_budget"]
    return Refused("the token budget is not told by the page and not declared") if not budget else (flag, int(budget))


SIZINGS: Mapping[str, Sizing] = {
    "slots_to_fit": slots_to_fit,
    "slots_up": slots_up,
    "token_budget_up": token_budget_up,
    "token_budget_down": token_budget_down,
}
