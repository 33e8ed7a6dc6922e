"""How far replicas, caches, routing, clocks and serving processes are turned, and what that does.

The same shape as `sizing`. A change whose effect nothing here can bound is refused as such, not guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from optiinfra_pipelines.analysis.kv_arithmetic import whole
from optiinfra_pipelines.analysis.recommendations.context import Context, Refused, Sized, Sizing, current_value
from optiinfra_pipelines.analysis.recommendations.flags import Flag, Knob, NoFlag, find_flag, needs_version
from optiinfra_pipelines.analysis.recommendations.measures import Measures
from optiinfra_pipelines.analysis.recommendations.sizing import effect
from optiinfra_pipelines.domain.recommendations import Basis, Effect


def replicas_up(measures: Measures, context: Context) -> Sized | Refused:
    """Replicas in proportion of what waits to what runs; a hand-over to the scaling policy."""
    running, waiting = measures["running_mean"], measures["waiting_mean"]
    if not running or waiting is None:
        return Refused("running or waiting requests are not told")
    if context.deployment is None:
        return Refused("fleet.yaml names no deployment for this target, so nothing can be scaled")
    now = context.replicas
    wanted = math.ceil(now * (running + waiting) / running)
    most = context.deployment.max_replicas
    proposed = wanted if most is None else min(wanted, most)
    if proposed <= now:
        return Refused(f"{now} replicas are the most that fleet.yaml allows")
    left = max(0.0, now * (running + waiting) / proposed - running)
    relief = effect(
        "requests_waiting_mean",
        "requests",
        waiting,
        -waiting,
        left - waiting,
        f"{now} replicas run {running:.1f} and keep {waiting:.1f} waiting each; {proposed} share the same demand of "
        f"{now * (running + waiting):.0f}: {left:.1f} wait each at worst (nothing runs faster), none at best",
        Basis.ARITHMETIC,
    )
    return _replicas(context, now, proposed, relief)


def replicas_down(measures: Measures, context: Context) -> Sized | Refused:
    """One replica less, when the rest would stay under 70 % of KV at the same peak and fleet.yaml allows it."""
    usage, now = measures["kv_usage_max_ratio"], context.replicas
    if usage is None:
        return Refused("KV usage is not told")
    if context.deployment is None or context.deployment.gpus_per_replica < 1:
        return Refused("fleet.yaml does not tell the deployment or its GPUs per replica, so no whole GPU is freed")
    least = max(context.deployment.min_replicas, 1)
    if now - 1 < least:
        return Refused(f"{now} replicas run and {least} must")
    after = usage * now / (now - 1)
    if after >= 0.7:
        return Refused(f"the others would reach {after:.0%} of their KV cache at the peak")
    gpus = context.deployment.gpus_per_replica
    freed = effect(
        "gpus_held",
        "GPUs",
        float(now * gpus),
        -float(gpus),
        -float(gpus),
        f"{gpus} GPUs of one replica; the other {now - 1} reach {after:.0%} of their KV cache at the day's peak",
        Basis.ARITHMETIC,
    )
    return _replicas(context, now, now - 1, freed)


def _replicas(context: Context, now: int, proposed: int, relief: Effect) -> Sized:
    gpus = context.deployment.gpus_per_replica if context.deployment else 0
    price = None if context.price is None else context.price.usd_per_gpu_hour
    return Sized(
        Flag("replicas", dashes=""),
        str(now),
        str(proposed),
        (relief,),
        usd_per_hour_change=None if price is None or not gpus else (proposed - now) * gpus * price,
    )


def prefix_caching_on(measures: Measures, context: Context) -> Sized | Refused:
    """Prefix caching switched on where the page says it is off and the workload is known to share prefixes."""
    flag = find_flag(context.engine, context.engine_version, "prefix_caching")
    if isinstance(flag, NoFlag):
        return Refused(flag.reason)
    ceiling = context.reuse_ceiling_ratio
    if ceiling is None:
        return Refused("unknown: no basis for an effect; how far the workload shares prefixes was not measured")
    if context.engine == "sglang":
        return Refused("SGLang caches prefixes unless --disable-radix-cache stands there: take that flag away")
    gain = effect(
        "prefix_hit_ratio",
        "ratio",
        0.0,
        0.0,
        ceiling,
        f"the workload's own ceiling is {ceiling:.0%}; how much of it this cache reaches is between none and all",
        Basis.HISTORY,
    )
    return Sized(flag, None, "", (gain,))


def prefix_routing(measures: Measures, context: Context) -> Sized | Refused:
    """Routing by prefix, where little is found although much is shared."""
    ceiling, hits = context.reuse_ceiling_ratio, measures["prefix_hit_ratio"]
    if ceiling is None or hits is None:
        return Refused("unknown: no basis for an effect; the workload's ceiling or its hit ratio was not measured")
    if context.replicas < 2:
        return Refused("one replica: there is nothing to route between; look at salt, order and hash seed")
    gain = effect(
        "prefix_hit_ratio",
        "ratio",
        hits,
        0.0,
        max(0.0, ceiling - hits),
        f"{hits:.0%} is found of a ceiling of {ceiling:.0%}",
        Basis.HISTORY,
    )
    return Sized(Flag("routing-policy", dashes=""), "not told", "prefix-aware", (gain,))


def offload_tier(measures: Measures, context: Context) -> Sized | Refused:
    """The tier behind the GPU that the reuse curve pays for, per rank, through the engine's own offload."""
    flag = find_flag(context.engine, context.engine_version, "kv_offload")
    if isinstance(flag, NoFlag):
        return Refused(flag.reason)
    tier = next((one for one in context.cache_tiers or () if one.tier == "cpu" and one.size_bytes > 0), None)
    if tier is None:
        return Refused("unknown: no basis for an effect; the reuse curve names no host tier that pays")
    gib = math.ceil(tier.size_bytes / 1024**3)
    gain = effect(
        "external_hit_ratio",
        "ratio",
        0.0,
        0.0,
        tier.hit_ratio_after - tier.hit_ratio_before,
        f"the replayed reuse curve: {tier.hit_ratio_before:.1%} -> {tier.hit_ratio_after:.1%} of tokens at {gib} GiB; "
        f"{tier.reason}",
        Basis.HISTORY,
    )
    current = current_value(flag, "kv_offload", measures, context)
    return Sized(flag, current, str(gib), (gain,), note=needs_version(flag, context.engine_version))


def sm_clock_lock(measures: Measures, context: Context) -> Sized | Refused:
    """A trial lock of the SM clocks at three quarters of the maximum."""
    power, most = context.gpu.power_mean_watts, context.gpu.sm_clock_max_mhz
    if power is None or most is None:
        return Refused("power or the largest SM clock is not told")
    # NVIDIA's clocks come in steps of 15 MHz; three quarters is where to begin a trial, not where to end it.
    clock = int(most * 0.75 // 15 * 15)
    saving = effect(
        "power_mean_watts",
        "W",
        power,
        -0.32 * power,
        0.0,
        "up to 32 % of decode energy on H200 in arXiv 2605.11999; other cards and mixes may save nothing",
        Basis.PROFILE,
    )
    return Sized(Flag("lock-gpu-clocks"), None, f"0,{clock}", (saving,), note=" (nvidia-smi, as root)")


def frontend_processes(measures: Measures, context: Context) -> Sized | Refused:
    """One more serving process, where earlier changes of this kind tell what it does."""
    knob: Knob = "frontend_processes"
    flag = find_flag(context.engine, context.engine_version, knob)
    if isinstance(flag, NoFlag):
        return Refused(flag.reason)
    past, before = context.past.get("frontend_processes_up"), measures["waiting_mean"]
    if past is None or before is None:
        return Refused(
            f"unknown: no basis for an effect; {flag.dashes}{flag.flag} 2 is worth a trial, and once measured here "
            "will be proposed with its interval"
        )
    relief = effect(
        "requests_waiting_mean",
        "requests",
        before,
        past.relative_low * before,
        past.relative_high * before,
        f"{past.n} earlier changes by this rule: {past.relative_low:+.0%} to {past.relative_high:+.0%}",
        Basis.HISTORY,
    )
    now = whole(current_value(flag, knob, measures, context)) or 1
    return Sized(flag, str(now), str(now + 1), (relief,), note=needs_version(flag, context.engine_version))


def look_first(measures: Measures, context: Context) -> Sized | Refused:
    """A fault to look at and no flag to turn."""
    return Refused("look before changing anything: the connector's latency, timeouts and the remote store")


SIZINGS: Mapping[str, Sizing] = {
    "replicas_up": replicas_up,
    "replicas_down": replicas_down,
    "prefix_caching_on": prefix_caching_on,
    "prefix_routing": prefix_routing,
    "offload_tier": offload_tier,
    "sm_clock_lock": sm_clock_lock,
    "frontend_processes": frontend_processes,
    "look_first": look_first,
}
