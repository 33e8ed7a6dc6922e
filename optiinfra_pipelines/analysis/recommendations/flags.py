"""How each engine spells each knob: flag, since which version, where the page tells its value, its default.

Tables and looking up; which knob to turn and how far is `rules`. Names of vLLM 0.32, SGLang 0.5.23, TGI 3, TensorRT-LLM
(trtllm-serve), llama.cpp and LMCache. Flags are written without leading dashes, as rollouts take them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from optiinfra_pipelines.domain.base import Engine
from optiinfra_pipelines.domain.rollouts import KnobGroup

Knob = Literal[
    "kv_memory_share",
    "kv_memory_bytes",
    "kv_blocks",
    "kv_dtype",
    "kv_block_size",
    "prefix_caching",
    "kv_offload",
    "lmcache_size",
    "lmcache_min_retrieve",
    "max_sequences",
    "token_budget",
    "long_prefill",
    "chunked_prefill",
    "frontend_processes",
    "queue_limit",
    "weights_format",
    "tensor_parallel",
    "max_model_len",
    "routing",
    "replicas",
    "placement",
    "sm_clocks",
    "latency_buckets",
]


@dataclass(frozen=True)
class Flag:
    """One engine's flag for one knob. setting: key of raw_engine_configs that tells it. unit: of its value."""

    flag: str
    setting: str | None = None
    since: str | None = None
    unit: str = ""
    dashes: str = "--"


GROUPS: Mapping[Knob, KnobGroup] = {
    "kv_memory_share": KnobGroup.KV_CACHE,
    "kv_memory_bytes": KnobGroup.KV_CACHE,
    "kv_blocks": KnobGroup.KV_CACHE,
    "kv_block_size": KnobGroup.KV_CACHE,
    "prefix_caching": KnobGroup.KV_CACHE,
    "kv_dtype": KnobGroup.KV_CACHE_DTYPE,
    "kv_offload": KnobGroup.OFFLOAD,
    "lmcache_size": KnobGroup.OFFLOAD,
    "lmcache_min_retrieve": KnobGroup.OFFLOAD,
    "max_sequences": KnobGroup.BATCHING,
    "token_budget": KnobGroup.BATCHING,
    "long_prefill": KnobGroup.BATCHING,
    "chunked_prefill": KnobGroup.BATCHING,
    "queue_limit": KnobGroup.BATCHING,
    "frontend_processes": KnobGroup.OTHER,
    "weights_format": KnobGroup.QUANTIZATION,
    "tensor_parallel": KnobGroup.PARALLELISM,
    "max_model_len": KnobGroup.CONTEXT_LENGTH,
    "routing": KnobGroup.OTHER,
    "replicas": KnobGroup.OTHER,
    "placement": KnobGroup.OTHER,
    "sm_clocks": KnobGroup.OTHER,
    "latency_buckets": KnobGroup.OTHER,
}

FLAGS: Mapping[Engine, Mapping[Knob, Flag]] = {
    "vllm": {
        "kv_memory_share": Flag("gpu-memory-utilization", "gpu_memory_utilization"),
        "kv_memory_bytes": Flag("kv-cache-memory-bytes", "kv_cache_memory_bytes", since="0.10.2", unit="B"),
        "kv_blocks": Flag("num-gpu-blocks-override", "num_gpu_blocks_override", unit="blocks"),
        "kv_dtype": Flag("kv-cache-dtype", "cache_dtype"),
        "kv_block_size": Flag("block-size", "block_size", unit="tokens"),
        "prefix_caching": Flag("enable-prefix-caching", "enable_prefix_caching"),
        "kv_offload": Flag("kv-offloading-size", "kv_offloading_size", since="0.11.1", unit="GiB"),
        "max_sequences": Flag("max-num-seqs", unit="requests"),
        "token_budget": Flag("max-num-batched-tokens", unit="tokens"),
        "long_prefill": Flag("long-prefill-token-threshold", unit="tokens"),
        "chunked_prefill": Flag("enable-chunked-prefill"),
        "frontend_processes": Flag("api-server-count", since="0.10.0", unit="processes"),
        "queue_limit": Flag("max-num-queued-reqs", since="0.32", unit="requests"),
        "weights_format": Flag("quantization"),
        "tensor_parallel": Flag("tensor-parallel-size", unit="GPUs"),
        "max_model_len": Flag("max-model-len", unit="tokens"),
        "latency_buckets": Flag("custom-histogram-buckets", since="0.32"),
    },
    "sglang": {
        "kv_memory_share": Flag("mem-fraction-static", "mem_fraction_static"),
        "kv_blocks": Flag("max-total-tokens", unit="tokens"),
        "kv_dtype": Flag("kv-cache-dtype", "kv_cache_dtype"),
        "kv_block_size": Flag("page-size", "page_size", unit="tokens"),
        "prefix_caching": Flag("disable-radix-cache"),
        "kv_offload": Flag("hicache-size", unit="GB"),
        "max_sequences": Flag("max-running-requests", unit="requests"),
        "token_budget": Flag("chunked-prefill-size", unit="tokens"),
        "chunked_prefill": Flag("chunked-prefill-size", unit="tokens"),
        "frontend_processes": Flag("tokenizer-worker-num", since="0.5", unit="processes"),
        "queue_limit": Flag("max-queued-requests", unit="requests"),
        "weights_format": Flag("quantization"),
        "tensor_parallel": Flag("tp-size", unit="GPUs"),
        "max_model_len": Flag("context-length", "context_len", unit="tokens"),
    },
    "tgi": {
        "kv_memory_share": Flag("cuda-memory-fraction"),
        "kv_dtype": Flag("kv-cache-dtype", since="2.3"),
        "max_sequences": Flag("max-batch-size", unit="requests"),
        "token_budget": Flag("max-batch-prefill-tokens", unit="tokens"),
        "queue_limit": Flag("max-concurrent-requests", unit="requests"),
        "weights_format": Flag("quantize"),
        "tensor_parallel": Flag("num-shard", unit="GPUs"),
        "max_model_len": Flag("max-total-tokens", unit="tokens"),
    },
    "trtllm": {
        "kv_memory_share": Flag("kv_cache_free_gpu_memory_fraction"),
        "max_sequences": Flag("max_batch_size", unit="requests"),
        "token_budget": Flag("max_num_tokens", unit="tokens"),
        "tensor_parallel": Flag("tp_size", unit="GPUs"),
        "max_model_len": Flag("max_seq_len", unit="tokens"),
    },
    "llamacpp": {
        "max_sequences": Flag("parallel", unit="requests"),
        "kv_blocks": Flag("ctx-size", unit="tokens"),
        "kv_dtype": Flag("cache-type-k"),
        "token_budget": Flag("batch-size", unit="tokens"),
        "max_model_len": Flag("ctx-size", unit="tokens"),
    },
    "lmcache": {
        # Keys of the LMCache configuration file, not of a command line.
        "lmcache_size": Flag("max_local_cpu_size", unit="GB per rank", dashes=""),
        "lmcache_min_retrieve": Flag("min_retrieve_tokens", unit="tokens", dashes=""),
    },
    "lmcache_mp": {"lmcache_size": Flag("l1-size-gb", unit="GB")},
}

# What an FP8 KV cache is called.
KV_FP8: Mapping[Engine, str] = {"vllm": "fp8", "sglang": "fp8_e4m3", "tgi": "fp8_e4m3fn", "llamacpp": "q8_0"}


@dataclass(frozen=True)
class NoFlag:
    """Why a knob cannot be turned by a flag of this engine and version."""

    reason: str


def find_flag(engine: Engine | None, version: str | None, knob: Knob) -> Flag | NoFlag:
    """The flag of a knob. NoFlag when the engine has none, or when its version is known to be too old for it."""
    if engine is None:
        return NoFlag("the engine is not known, so its flags are not")
    flag = FLAGS.get(engine, {}).get(knob)
    if flag is None:
        return NoFlag(f"{engine} has no flag for {knob.replace('_', ' ')} that we know")
    if flag.since and version and _order(version) < _order(flag.since):
        return NoFlag(f"{flag.dashes}{flag.flag} came with {engine} {flag.since}, this is {version}")
    return flag


def declared_knobs(engine: Engine | None, flags: Mapping[str, str]) -> dict[Knob, str]:
    """Knobs whose value a person wrote down, from the engine's flags as they are typed ('_' for '-' is the same)."""
    written = {_spelled(flag): value for flag, value in flags.items()}
    known = FLAGS.get(engine, {}) if engine is not None else {}
    return {knob: written[_spelled(flag.flag)] for knob, flag in known.items() if _spelled(flag.flag) in written}


def unread_flags(engine: Engine | None, flags: Mapping[str, str]) -> list[str]:
    """Flags a person wrote down that stand for no knob of this engine; all of them where the engine is not known."""
    known = {_spelled(flag.flag) for flag in FLAGS.get(engine, {}).values()} if engine is not None else set()
    return sorted(flag for flag in flags if _spelled(flag) not in known)


def _spelled(flag: str) -> str:
    return flag.replace("_", "-")


def needs_version(flag: Flag, version: str | None) -> str:
    """What to add to a proposal whose flag is young when the page does not tell the version; '' otherwise."""
    return (
        f" (needs version {flag.since} or later; the page does not tell the version)"
        if flag.since and not version
        else ""
    )


def render(flag: Flag, value: str | None) -> str:
    """A flag with its value as one types it; what is absent says so."""
    if value is None:
        return f"{flag.dashes}{flag.flag} (not told)"
    separator = "=" if not flag.dashes else " "
    return f"{flag.dashes}{flag.flag}{separator}{value}" if value else f"{flag.dashes}{flag.flag}"


def _order(version: str) -> tuple[int, ...]:
    """'0.10.2.post1' -> (0, 10, 2): enough to tell releases apart."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
