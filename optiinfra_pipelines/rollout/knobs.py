"""Which engine flags act on which thing: vLLM's, SGLang's and TGI's names of the knobs that a rollout may turn.

Names as of vLLM 0.32, SGLang 0.5.23 and TGI 3, without dashes and with underscores. A table, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from optiinfra_pipelines.domain.rollouts import KnobGroup

_GROUPS: Mapping[KnobGroup, str] = {
    KnobGroup.KV_CACHE: "gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override block_size page_size "
    "enable_prefix_caching no_enable_prefix_caching disable_radix_cache mem_fraction_static max_total_tokens "
    "cuda_memory_fraction prefix_caching swap_space",
    KnobGroup.KV_CACHE_DTYPE: "kv_cache_dtype calculate_kv_scales",
    KnobGroup.BATCHING: "max_num_seqs max_num_batched_tokens enable_chunked_prefill no_enable_chunked_prefill "
    "max_num_partial_prefills long_prefill_token_threshold chunked_prefill_size max_running_requests "
    "max_prefill_tokens prefill_max_requests max_batch_total_tokens max_batch_prefill_tokens max_batch_size "
    "max_concurrent_requests waiting_served_ratio max_waiting_tokens cuda_graph_max_bs",
    KnobGroup.QUANTIZATION: "quantization quantize dtype load_format torchao_config model revision",
    KnobGroup.PARALLELISM: "tensor_parallel_size pipeline_parallel_size data_parallel_size tp_size pp_size dp_size "
    "tp pp dp enable_expert_parallel ep_size num_shard sharded",
    KnobGroup.CONTEXT_LENGTH: "max_model_len context_length max_total_tokens_per_request max_input_tokens "
    "max_input_length rope_scaling",
    KnobGroup.OFFLOAD: "cpu_offload_gb kv_transfer_config kv_offloading_size kv_offloading_backend "
    "enable_hierarchical_cache hicache_ratio hicache_size enable_lmcache",
    KnobGroup.SPECULATION: "speculative_config speculative_algorithm speculative_num_steps speculative_eagle_topk "
    "speculative_num_draft_tokens speculate",
    KnobGroup.SCHEDULING: "scheduling_policy schedule_policy schedule_conservativeness async_scheduling "
    "enable_mixed_chunk",
}

# Which port, which name and which certificate a replica has is the target's business, and never a rollout's.
NOT_A_KNOB = frozenset(
    [
        "host",
        "port",
        "api_key",
        "served_model_name",
        "ssl_keyfile",
        "ssl_certfile",
        "root_path",
        "uvicorn_log_level",
        "trust_remote_code",
    ]
)

GROUP_OF: Mapping[str, KnobGroup] = MappingProxyType(
    {flag: group for group, flags in _GROUPS.items() for flag in flags.split()}
)


def plain(flag: str) -> str:
    """A flag's name as the tables have it."""
    return flag.lstrip("-").replace("-", "_")


def group_of(flag: str) -> KnobGroup | None:
    """The group of a flag in any spelling; None for one that the tables do not know."""
    return GROUP_OF.get(plain(flag))
