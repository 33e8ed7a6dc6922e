"""How much more memory, fewer bytes or more GPUs give the KV cache, to the token, and what that ends.

The same shape as `sizing`. What is not known of the model or its GPUs makes a refusal that names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from optiinfra_pipelines.analysis.kv_arithmetic import (
    UnknownShapeError,
    bytes_per_token,
    cache_size,
    whole,
)
from optiinfra_pipelines.analysis.quantization import (
    QUALITY_GATE,
    QuantizationOption,
    capability,
    options,
    weight_bytes,
)
from optiinfra_pipelines.analysis.recommendations.context import Context, Refused, Sized, Sizing, current_value
from optiinfra_pipelines.analysis.recommendations.flags import KV_FP8, NoFlag, find_flag, needs_version
from optiinfra_pipelines.analysis.recommendations.limits import (
    MAX_MEMORY_SHARE,
    MEMORY_MARGIN_BYTES,
    MEMORY_SHARE_STEP,
    OVERFLOW_CHANCE,
)
from optiinfra_pipelines.analysis.recommendations.measures import Measures
from optiinfra_pipelines.analysis.recommendations.sizing import (
    effect,
    overflow_chance,
    preemption_effect,
    pressure_effect,
    usable_tokens,
)
from optiinfra_pipelines.domain.recommendations import Basis, Effect

_GIB = 1024**3
_MODEL_UNKNOWN = "the model's shape is not known: name a published model in fleet.yaml, or give its config.json"


def kv_memory(measures: Measures, context: Context) -> Sized | Refused:
    """More KV cache through the flag that decides its size now: block count, bytes, or share of the GPU."""
    if context.engine == "vllm" and whole(measures.settings.get("num_gpu_blocks_override")) is not None:
        return _more_blocks(measures, context)
    return _more_share(measures, context)


def _more_blocks(measures: Measures, context: Context) -> Sized | Refused:
    """vLLM with --num-gpu-blocks-override: the share of memory changes nothing, the count does, up to the memory."""
    flag = find_flag(context.engine, context.engine_version, "kv_blocks")
    if isinstance(flag, NoFlag):
        return Refused(flag.reason)
    override = whole(measures.settings.get("num_gpu_blocks_override")) or 0
    memory = whole(measures.settings.get("kv_cache_memory_bytes"))
    block = measures["kv_block_size_tokens"]
    fixed = f"the cache is fixed by --{flag.flag} {override}, so the share of memory changes nothing; "
    if memory is None or block is None:
        return Refused(fixed + "whether more blocks fit is unknown: the page tells no KV memory in bytes")
    if context.shape is None:
        return Refused(fixed + f"whether more fit into {memory / _GIB:g} GiB is unknown: {_MODEL_UNKNOWN}")
    try:
        size = cache_size(
            context.shape,
            memory,
            block_size_tokens=int(block),
            kv_dtype=measures.settings.get("cache_dtype", "auto"),
            tensor_parallel=context.tensor_parallel,
        )
    except ValueError as error:
        return Refused(fixed + str(error))
    needed = _tokens_needed(measures)
    if isinstance(needed, Refused):
        return needed
    blocks = min(size.blocks, math.ceil(needed / block) + 1)
    if blocks <= override:
        return Refused(fixed + f"{size.blocks} blocks of {size.block_bytes:,} B are all that fit {memory / _GIB:g} GiB")
    tokens = (blocks - 1) * block
    relief = pressure_effect(
        measures,
        (measures["running_max"] or 0) / measures.ranks,
        tokens,
        f"{blocks} blocks x {block:.0f} tokens x {float(size.bytes_per_token):,.0f} B = "
        f"{blocks * size.block_bytes / _GIB:.2f} of {memory / _GIB:.2f} GiB",
    )
    if isinstance(relief, Refused):
        return relief
    now, then = override * block * measures.ranks, blocks * block * measures.ranks
    grown = effect(
        "kv_capacity_tokens",
        "tokens",
        now,
        then - now,
        then - now,
        f"{override} -> {blocks} blocks of {block:.0f} tokens",
        Basis.ARITHMETIC,
    )
    return Sized(flag, str(override), str(blocks), (relief, grown))


def _more_share(measures: Measures, context: Context) -> Sized | Refused:
    """A larger share of the GPU's memory, in steps of 0.02, as far as the GPU has it free."""
    flag = find_flag(context.engine, context.engine_version, "kv_memory_share")
    if isinstance(flag, NoFlag):
        return Refused(flag.reason)
    try:
        share = float(current_value(flag, "kv_memory_share", measures, context) or "")
    except ValueError:
        return Refused(f"--{flag.flag} is not told by the page and not declared")
    proposed = round(min(share + MEMORY_SHARE_STEP, MAX_MEMORY_SHARE), 4)
    if proposed <= share:
        return Refused(f"no memory left: --{flag.flag} is {share:g}, {MAX_MEMORY_SHARE:g} is the most")
    total, free = context.gpu.memory_total_bytes, context.gpu.memory_free_min_bytes
    if total is None or free is None:
        return Refused("how much of the GPU is free is not known: the target's host or its GPU telemetry is missing")
    step = (proposed - share) * total
    if free < step + MEMORY_MARGIN_BYTES:
        return Refused(f"no memory left: {free / _GIB:.1f} GiB free, {step / _GIB:.1f} GiB and 1 GiB of margin needed")
    usable, running = usable_tokens(measures), measures["running_max"]
    if usable is None or not running:
        return Refused("the size of the KV cache or the number of running requests is not told")
    # Without the model's shape: weights and activations only make a byte of the pool dearer than a byte of the step.
    ranks = measures.ranks
    least = usable * (proposed - share) / share
    more, why = least, f"at least {least:,.0f} tokens more, the pool's average of {share:g} x {total / _GIB:.0f} GiB"
    if context.shape is not None:
        try:
            each = bytes_per_token(
                context.shape,
                measures.settings.get("cache_dtype", "auto"),
                tensor_parallel=context.tensor_parallel,
            )
        except ValueError as error:
            return Refused(str(error))
        more = step / float(each) * ranks
        why = f"{step / _GIB:.2f} GiB / {float(each):,.0f} B = {more:,.0f} tokens more"
    relief = pressure_effect(measures, running / ranks, (usable + more) / ranks, why)
    if isinstance(relief, Refused):
        return relief
    return Sized(flag, f"{share:g}", f"{proposed:g}", (relief,))


def _tokens_needed(measures: Measures) -> float | Refused:
    """Tokens of a rank that hold its requests to their end, with 90 % chance: those that run, or run and wait."""
    mean, deviation = measures["request_tokens_mean"], measures["request_tokens_deviation"]
    running = measures["running_max"]
    if mean is None or deviation is None or not running:
        return Refused("the lengths of requests are not known (no histograms of prompt and output tokens)")
    if not measures["preemptions_per_request_low"]:
        running += measures["waiting_when_queued"] or 0.0
    running /= measures.ranks
    low, high = running * mean, running * mean + 10 * deviation * math.sqrt(running) + 1
    while high - low > 1:
        middle = (low + high) / 2
        low, high = (
            (middle, high) if overflow_chance(running, mean, deviation, middle) > OVERFLOW_CHANCE else (low, middle)
        )
    return high


def kv_dtype(measures: Measures, context: Context) -> Sized | Refused:
    """One byte for each stored number where two are spent now."""
    flag = find_flag(context.engine, context.engine_version, "kv_dtype")
    if isinstance(flag, NoFlag) or context.engine is None:
        return Refused(flag.reason if isinstance(flag, NoFlag) else "the engine is not known")
    now = current_value(flag, "kv_dtype", measures, context)
    if now not in ("auto", "bfloat16", "float16"):
        return Refused(f"KV is stored as {now or 'not told'}: that it takes two bytes a number is not known")
    has = capability(context.gpu_name)
    if has is None or has < (8, 9):
        return Refused(f"FP8 KV needs Ada, Hopper or later; the GPU is {context.gpu_name or 'not known'}")
    usable, running = usable_tokens(measures), measures["running_max"]
    if usable is None or not running:
        return Refused("the size of the KV cache or the number of running requests is not told")
    ranks = measures.ranks
    relief = pressure_effect(
        measures, running / ranks, 2 * usable / ranks, f"{usable:,.0f} tokens at 2 bytes are {2 * usable:,.0f} at 1"
    )
    if isinstance(relief, Refused):
        return relief
    note = needs_version(flag, context.engine_version)
    return Sized(flag, now, KV_FP8[context.engine], (relief,), note=note, quality_gate=QUALITY_GATE)


def weights_format(measures: Measures, context: Context) -> Sized | Refused:
    """Weights in FP8, their freed memory given to the KV cache."""
    option = _fp8(context)
    if isinstance(option, Refused) or context.shape is None:
        return option if isinstance(option, Refused) else Refused(_MODEL_UNKNOWN)
    usable, running = usable_tokens(measures), measures["running_max"]
    if usable is None or not running:
        return Refused("the size of the KV cache or the number of running requests is not told")
    each = float(
        bytes_per_token(
            context.shape, measures.settings.get("cache_dtype", "auto"), tensor_parallel=context.tensor_parallel
        )
    )
    ranks = measures.ranks
    more = option.freed_bytes_low / each * ranks
    relief = preemption_effect(
        measures,
        running / ranks,
        (usable + more) / ranks,
        f"{option.derivation}; / {each:,.0f} B = at least {more:,.0f} tokens more",
    )
    if isinstance(relief, Refused):
        return relief
    return _quantized(context, option, relief)


def weights_format_decode(measures: Measures, context: Context) -> Sized | Refused:
    """Weights in FP8, so that a decode step reads fewer bytes."""
    option = _fp8(context)
    shape, latency = context.shape, measures["inter_token_latency_seconds_mean"]
    if isinstance(option, Refused):
        return option
    used, capacity = measures["kv_usage_mean_ratio"], measures["kv_capacity_tokens"]
    if shape is None or shape.parameters is None or latency is None or used is None or capacity is None:
        return Refused("inter-token latency, KV usage or the model's shape is not known")
    parallel = context.tensor_parallel
    weights = weight_bytes(shape.parameters, shape.dtype, parallel)[0]
    kv = used * capacity / measures.ranks * float(bytes_per_token(shape, tensor_parallel=parallel))
    share = option.freed_bytes_high / (weights + kv)
    faster = effect(
        "inter_token_latency_mean_seconds",
        "s",
        latency,
        -latency * share,
        0.0,
        f"a decode step reads {weights / _GIB:.1f} GiB of weights and {kv / _GIB:.1f} GiB of KV; at best "
        f"{option.freed_bytes_high / _GIB:.1f} GiB less, {share:.0%} (mixture-of-experts models read fewer weights)",
        Basis.ARITHMETIC,
    )
    return _quantized(context, option, faster)


def _fp8(context: Context) -> QuantizationOption | Refused:
    offered = options(context.engine, context.gpu_name, context.shape, context.tensor_parallel)[0]
    return offered if isinstance(offered, QuantizationOption) else Refused(f"{offered.format}: {offered.reason}")


def _quantized(context: Context, option: QuantizationOption, relief: Effect) -> Sized | Refused:
    flag = find_flag(context.engine, context.engine_version, "weights_format")
    if isinstance(flag, NoFlag):
        return Refused(flag.reason)
    weight_only = "; weight-only on this GPU, so compute gains nothing" if option.is_weight_only else ""
    return Sized(
        flag,
        None,
        option.format,
        (relief,),
        note=f" ({option.hardware}{weight_only}; {option.risk})",
        quality_gate=option.quality_gate,
    )


def tensor_parallel(measures: Measures, context: Context) -> Sized | Refused:
    """Twice the GPUs per replica, where weights fill most of each."""
    flag = find_flag(context.engine, context.engine_version, "tensor_parallel")
    if isinstance(flag, NoFlag):
        return Refused(flag.reason)
    shape, total = context.shape, context.gpu.memory_total_bytes
    if shape is None or shape.parameters is None:
        return Refused(_MODEL_UNKNOWN)
    if total is None or context.deployment is None or context.deployment.gpus_per_replica < 1:
        return Refused("the GPUs of a replica or their memory are not known")
    now = context.tensor_parallel
    weights = weight_bytes(shape.parameters, shape.dtype, now)[1]
    if weights < total / 2:
        return Refused(f"weights take {weights / _GIB:.0f} of {total / _GIB:.0f} GiB: they do not dominate")
    usable, running = usable_tokens(measures), measures["running_max"]
    if usable is None or not running:
        return Refused("the size of the KV cache or the number of running requests is not told")
    dtype = measures.settings.get("cache_dtype", "auto")
    try:
        before = float(bytes_per_token(shape, dtype, tensor_parallel=now))
        after = float(bytes_per_token(shape, dtype, tensor_parallel=2 * now))
    except (UnknownShapeError, ValueError) as error:
        return Refused(str(error))
    tokens = (usable * before + weights / 2) / after
    relief = preemption_effect(
        measures,
        running,
        tokens,
        f"{weights / 2 / _GIB:.1f} GiB of weights leave each GPU and a token takes {after:,.0f} for {before:,.0f} B: "
        f"{usable:,.0f} -> {tokens:,.0f} tokens",
    )
    if isinstance(relief, Refused):
        return relief
    gpus = context.deployment.gpus_per_replica
    price = None if context.price is None else context.price.usd_per_gpu_hour
    return Sized(
        flag,
        str(now),
        str(2 * now),
        (relief,),
        usd_per_hour_change=None if price is None else gpus * context.replicas * price,
    )


SIZINGS: Mapping[str, Sizing] = {
    "kv_memory": kv_memory,
    "kv_dtype": kv_dtype,
    "weights_format": weights_format,
    "weights_format_decode": weights_format_decode,
    "tensor_parallel": tensor_parallel,
}
