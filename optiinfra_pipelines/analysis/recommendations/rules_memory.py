"""The tuning rules about the KV cache's memory, as data: for preemptions, and for requests that wait for blocks.

What a rule is: `rule`. All the others are `rules`, which says what the letters of the sources mean.
"""

from __future__ import annotations

from optiinfra_pipelines.analysis.recommendations.rule import BELOW_CEILING, QUEUED, RESTART, UNDO, Condition, Rule
from optiinfra_pipelines.domain.findings import FindingKind
from optiinfra_pipelines.domain.recommendations import ChangeKind

# One event in a hundred requests is noise of a burst; the lower bound of the rate has to be above it.
_PREEMPTING = Condition("preemptions_per_request_low", ">", 0.01, "surely more than one preemption in 100 requests")
_KV_FULL = Condition("kv_usage_max_ratio", ">", 0.95, "no block left at the peak")
_KV_STAYS_FULL = Condition("kv_full_share_ratio", ">=", 0.5, "the cache is full in at least half the samples")
# What answers preemptions; where requests only wait for blocks, these have nothing to propose.
_PREEMPTION_RULES = ("kv_memory_up", "max_sequences_down", "kv_dtype_fp8", "weights_fp8", "tensor_parallel_up")

MEMORY_RULES: tuple[Rule, ...] = (
    Rule(
        name="kv_memory_up",
        kind=ChangeKind.KV_CACHE_SIZE,
        knob="kv_memory_share",
        sizing="kv_memory",
        direction="loosen",
        answers=(FindingKind.MEMORY_PRESSURE,),
        conditions=(_PREEMPTING, _KV_FULL),
        reason="Running requests are thrown out for lack of KV blocks and computed again; more blocks end it.",
        risk=f"Out of memory at the peak, or a start that fails. {RESTART}",
        risk_weight=2,
        verify="The page's cache size grows by the stated tokens; preemptions per request fall at equal load.",
        undo=UNDO,
        source="V; A starts at 0.98 and steps down to 0.90 until a start succeeds",
    ),
    Rule(
        name="max_sequences_down",
        kind=ChangeKind.MAX_SEQUENCES,
        knob="max_sequences",
        sizing="slots_to_fit",
        direction="tighten",
        answers=(FindingKind.MEMORY_PRESSURE,),
        conditions=(_PREEMPTING, _KV_FULL),
        reason="More requests run than the KV cache holds to their end; a batch that fits is computed once.",
        risk=f"The queue moves in front of the engine: time to first token rises for those who wait. {RESTART}",
        risk_weight=1,
        verify="Preemptions per request fall to nearly none; output tokens per second do not fall.",
        undo=UNDO,
        source="V",
        after=("kv_memory_up",),
    ),
    Rule(
        name="kv_dtype_fp8",
        kind=ChangeKind.KV_CACHE_DTYPE,
        knob="kv_dtype",
        sizing="kv_dtype",
        direction="loosen",
        answers=(FindingKind.MEMORY_PRESSURE,),
        conditions=(_PREEMPTING, _KV_FULL),
        reason="The same memory holds twice the tokens at one byte a number.",
        risk=f"Answers may get worse, and the attention backend must support it. {RESTART}",
        risk_weight=4,
        verify="The page's cache size doubles; preemptions per request fall; the quality gate holds.",
        undo=UNDO,
        source="J; vLLM docs/features/quantization/quantized_kvcache.md",
        after=("kv_memory_up", "max_sequences_down"),
    ),
    Rule(
        name="weights_fp8",
        kind=ChangeKind.QUANTIZATION,
        knob="weights_format",
        sizing="weights_format",
        direction="loosen",
        answers=(FindingKind.MEMORY_PRESSURE,),
        conditions=(_PREEMPTING, _KV_FULL),
        reason="Weights in fewer bits leave their memory to the KV cache.",
        risk=f"Another model to its users: answers may get worse. {RESTART}",
        risk_weight=5,
        verify="The page's cache size grows by the stated tokens; the quality gate holds.",
        undo="Serve the former weights again; keep the old replicas warm until the bake is over.",
        source="V; arXiv 2411.02355: FP8 first on Hopper and later, INT8 on Ampere, INT4 for low batch",
        after=("kv_memory_up", "max_sequences_down", "kv_dtype_fp8"),
    ),
    Rule(
        name="tensor_parallel_up",
        kind=ChangeKind.PARALLELISM,
        knob="tensor_parallel",
        sizing="tensor_parallel",
        direction="loosen",
        answers=(FindingKind.MEMORY_PRESSURE,),
        conditions=(_PREEMPTING, _KV_FULL),
        reason="Weights spread over twice the GPUs leave more of each to the KV cache.",
        risk=f"Twice the GPUs per replica, and communication in every layer. {RESTART}",
        risk_weight=5,
        verify="Cache size per replica grows by the stated tokens; output tokens per second and GPU do not fall.",
        undo=UNDO,
        source="V",
        after=_PREEMPTION_RULES[:-1],
    ),
    Rule(
        name="kv_memory_for_queue",
        kind=ChangeKind.KV_CACHE_SIZE,
        knob="kv_memory_share",
        sizing="kv_memory",
        direction="loosen",
        answers=(FindingKind.MEMORY_PRESSURE, FindingKind.QUEUE_BUILDUP),
        conditions=(QUEUED, _KV_STAYS_FULL, BELOW_CEILING),
        reason="Requests wait for KV blocks, not for slots: nothing is thrown out, and nothing more gets in either.",
        risk=f"Out of memory at the peak, or a start that fails. {RESTART}",
        risk_weight=2,
        verify="The page's cache size grows by the stated tokens; requests waiting fall at equal load.",
        undo=UNDO,
        source="J; V for the flags",
        after=_PREEMPTION_RULES,
    ),
    Rule(
        name="kv_dtype_for_queue",
        kind=ChangeKind.KV_CACHE_DTYPE,
        knob="kv_dtype",
        sizing="kv_dtype",
        direction="loosen",
        answers=(FindingKind.MEMORY_PRESSURE, FindingKind.QUEUE_BUILDUP),
        conditions=(QUEUED, _KV_STAYS_FULL, BELOW_CEILING),
        reason="Requests wait for KV blocks; the same memory holds twice the tokens at one byte a number.",
        risk=f"Answers may get worse, and the attention backend must support it. {RESTART}",
        risk_weight=4,
        verify="The page's cache size doubles; requests waiting fall at equal load; the quality gate holds.",
        undo=UNDO,
        source="J; vLLM docs/features/quantization/quantized_kvcache.md",
        after=(*_PREEMPTION_RULES, "kv_memory_for_queue"),
    ),
)
