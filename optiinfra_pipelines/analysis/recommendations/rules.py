"""The tuning rules as data: what must be seen, what is turned, what can go wrong, how to check and undo, who says so.

A rule holds when all its conditions do; one unknown measure and it abstains. How far a knob is turned is
`sizing`, the measures are `measures`, the order of proposals is `derive`, those about memory are `rules_memory`.
Sources: V = vLLM docs/configuration/optimization.md; A = vLLM benchmarks/auto_tune/auto_tune.sh; J = our judgment.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from optiinfra_pipelines.analysis.recommendations.rule import BELOW_CEILING, QUEUED, RESTART, UNDO, Condition, Rule
from optiinfra_pipelines.analysis.recommendations.rules_memory import MEMORY_RULES
from optiinfra_pipelines.domain.findings import FindingKind
from optiinfra_pipelines.domain.recommendations import ChangeKind

_KV_SPARE = Condition("kv_usage_max_ratio", "<", 0.7, "KV cache left over while they wait")
_AT_CEILING = Condition("at_ceiling_ratio", ">=", 0.9, "the same number runs whenever something waits: a ceiling")

RULES: tuple[Rule, ...] = (
    *MEMORY_RULES,
    Rule(
        name="max_sequences_up",
        kind=ChangeKind.MAX_SEQUENCES,
        knob="max_sequences",
        sizing="slots_up",
        direction="loosen",
        answers=(FindingKind.QUEUE_BUILDUP, FindingKind.HIGH_LATENCY),
        conditions=(QUEUED, _KV_SPARE, _AT_CEILING),
        reason="Every batch slot is taken while KV cache stands empty: the slots hold requests back, not memory.",
        risk=f"Each token takes longer in a larger batch; past the KV cache preemptions begin. {RESTART}",
        risk_weight=1,
        verify="Requests waiting and time to first token fall; inter-token latency stays within its objective; no "
        "preemptions.",
        undo=UNDO,
        source="A, J",
    ),
    Rule(
        name="token_budget_up",
        kind=ChangeKind.TOKEN_BUDGET,
        knob="token_budget",
        sizing="token_budget_up",
        direction="loosen",
        answers=(FindingKind.QUEUE_BUILDUP, FindingKind.HIGH_LATENCY),
        conditions=(QUEUED, _KV_SPARE, BELOW_CEILING, Condition("budget_use_ratio", ">=", 0.9, "steps are full")),
        reason="Steps are as full as the token budget allows while slots and KV cache are free.",
        risk=f"Longer steps: inter-token latency rises while prompts are computed; less memory for KV. {RESTART}",
        risk_weight=2,
        verify="Requests waiting and time to first token fall; inter-token latency stays within its objective.",
        undo=UNDO,
        source="V: above 8192 for throughput",
    ),
    Rule(
        name="frontend_processes_up",
        kind=ChangeKind.FRONTEND,
        knob="frontend_processes",
        sizing="frontend_processes",
        direction="loosen",
        answers=(FindingKind.QUEUE_BUILDUP, FindingKind.HOST_BOUND),
        conditions=(
            QUEUED,
            _KV_SPARE,
            BELOW_CEILING,
            Condition("cpu_cores_busy", ">=", 0.9, "the serving process fills a core"),
        ),
        reason="The process that tokenizes and answers fills its core while the engine has room.",
        risk="More processes on the host; metrics of several processes on one page.",
        risk_weight=2,
        verify="Requests waiting fall; CPU of each serving process falls below one core.",
        undo=UNDO,
        source="V (api-server-count)",
    ),
    Rule(
        name="connector_slow",
        kind=ChangeKind.OFFLOAD_TIER,
        knob="kv_offload",
        sizing="look_first",
        direction="neutral",
        answers=(FindingKind.QUEUE_BUILDUP,),
        conditions=(
            QUEUED,
            Condition("deferred_share_ratio", ">", 0.5, "most of those waiting wait for something other than capacity"),
        ),
        reason="Requests wait for KV to be loaded: look at the connector's latency, timeouts and remote store.",
        risk="None: this is a look, not a change.",
        risk_weight=1,
        verify="Deferred requests fall once the tier answers.",
        undo="Nothing to undo.",
        source="J",
    ),
    Rule(
        name="replicas_up",
        kind=ChangeKind.REPLICAS,
        knob="replicas",
        sizing="replicas_up",
        direction="loosen",
        answers=(FindingKind.QUEUE_BUILDUP, FindingKind.HIGH_LATENCY),
        conditions=(
            QUEUED,
            Condition("waiting_mean", ">", 1.0, "more than a request waits on average"),
            Condition("queue_share_ratio", ">", 0.5, "waiting is most of the time to the first token"),
        ),
        reason="Requests wait although no flag holds them back: the deployment is short of replicas.",
        risk="Costs GPUs for as long as they run; hand it to the scaling policy, which knows the cold start.",
        risk_weight=3,
        verify="Requests waiting per replica and time to first token fall once the replicas are ready.",
        undo="Scale back; drain before stopping.",
        source="J",
        after=(
            *("max_sequences_up", "token_budget_up", "frontend_processes_up"),
            *("kv_memory_up", "max_sequences_down", "kv_memory_for_queue"),
        ),
    ),
    Rule(
        name="token_budget_down",
        kind=ChangeKind.TOKEN_BUDGET,
        knob="token_budget",
        sizing="token_budget_down",
        direction="tighten",
        answers=(FindingKind.HIGH_LATENCY,),
        conditions=(
            Condition("itl_burn", ">", 1.0, "inter-token latency misses its objective"),
            Condition("ttft_burn", "<=", 1.0, "time to first token keeps its own"),
        ),
        reason="Prompts computed in large pieces hold the tokens of running requests up.",
        risk=f"Prompts take more steps: time to first token rises. {RESTART}",
        risk_weight=2,
        verify="Inter-token latency falls; time to first token stays within its objective.",
        undo=UNDO,
        source="V: 2048 for better inter-token latency",
    ),
    Rule(
        name="prefix_caching_on",
        kind=ChangeKind.PREFIX_CACHING,
        knob="prefix_caching",
        sizing="prefix_caching_on",
        direction="loosen",
        answers=(FindingKind.CACHE_INEFFICIENCY,),
        conditions=(Condition("prefix_caching_off", ">=", 1.0, "the page says that prefix caching is off"),),
        reason="Prompts share prefixes that are computed again each time.",
        risk=f"Nearly none in V1; V0 spends a little on hashing. {RESTART}",
        risk_weight=1,
        verify="The prefix hit ratio rises towards the workload's ceiling; prefill time per request falls.",
        undo=UNDO,
        source="V",
    ),
    Rule(
        name="offload_tier",
        kind=ChangeKind.OFFLOAD_TIER,
        knob="kv_offload",
        sizing="offload_tier",
        direction="loosen",
        answers=(FindingKind.CACHE_INEFFICIENCY,),
        conditions=(Condition("cache_advice_bytes", ">", 0.0, "the reuse curve pays for a tier behind the GPU"),),
        reason="Prefixes come back after the GPU has dropped them; a tier behind it keeps them.",
        risk=f"Host memory and PCIe time; slower than computing again on small models. {RESTART}",
        risk_weight=2,
        verify="External hits grow; time to first token falls; loading a token stays cheaper than computing it.",
        undo=UNDO,
        source="J; own reuse curve",
    ),
    Rule(
        name="prefix_routing",
        kind=ChangeKind.ROUTING,
        knob="routing",
        sizing="prefix_routing",
        direction="neutral",
        answers=(FindingKind.CACHE_INEFFICIENCY,),
        conditions=(
            Condition("prefix_hit_ratio", "<", 0.1, "almost nothing is found"),
            Condition("reuse_ceiling_ratio", ">", 0.3, "although the workload shares prefixes"),
        ),
        reason="Requests that share a prefix land on different replicas, or differ in salt, order or hash seed.",
        risk="Hot spots on the replicas that hold popular prefixes.",
        risk_weight=2,
        verify="The prefix hit ratio rises towards the ceiling; load stays even over replicas.",
        undo="Route by load again.",
        source="J",
    ),
    Rule(
        name="weights_fp8_decode",
        kind=ChangeKind.QUANTIZATION,
        knob="weights_format",
        sizing="weights_format_decode",
        direction="loosen",
        answers=(FindingKind.LOW_THROUGHPUT, FindingKind.HIGH_LATENCY),
        conditions=(
            Condition("dram_active_p95_ratio", ">=", 0.6, "memory bandwidth is what decode spends"),
            Condition("tensor_active_p95_ratio", "<", 0.3, "and the tensor cores are idle beside it"),
            Condition("itl_burn", ">", 1.0, "inter-token latency misses its objective"),
        ),
        reason="Decode is bound by reading weights; half the bytes are read in half the time.",
        risk=f"Another model to its users: answers may get worse. {RESTART}",
        risk_weight=5,
        verify="Inter-token latency falls at equal batch size; the quality gate holds.",
        undo="Serve the former weights again; keep the old replicas warm until the bake is over.",
        source="J; arXiv 2411.02355",
    ),
    Rule(
        name="sm_clock_lock",
        kind=ChangeKind.CLOCKS,
        knob="sm_clocks",
        sizing="sm_clock_lock",
        direction="tighten",
        answers=(),
        conditions=(
            Condition("dram_active_p95_ratio", ">=", 0.6, "decode is bound by memory bandwidth"),
            Condition("tensor_active_p95_ratio", "<", 0.3, "and not by the clock"),
            Condition("power_share_ratio", "<", 0.6, "a power cap would never trigger"),
            Condition("itl_burn", "<=", 0.5, "inter-token latency has room"),
            Condition("ttft_burn", "<=", 0.5, "time to first token has room"),
        ),
        reason="Memory-bound decode runs as fast at lower SM clocks and draws less; a power cap would do nothing.",
        risk="Prefill slows down with the clock; try it on one replica.",
        risk_weight=2,
        verify="Joules per output token fall; time to first token and inter-token latency keep their objectives.",
        undo="nvidia-smi --reset-gpu-clocks",
        source="arXiv 2605.11999 (H200, decode)",
    ),
    Rule(
        name="replicas_down",
        kind=ChangeKind.REPLICAS,
        knob="replicas",
        sizing="replicas_down",
        direction="tighten",
        answers=(FindingKind.IDLE_HELD,),
        conditions=(
            Condition("kv_usage_max_ratio", "<", 0.4, "KV cache mostly empty even at the peak of the day"),
            Condition("waiting_max", "<=", 0.0, "nothing waited all day"),
        ),
        reason="A whole day, its peak included, needed less than half of what runs.",
        risk="Less room for a burst and for a lost replica; hand it to the scaling policy, drain before stopping.",
        risk_weight=3,
        verify="Nothing waits at the next peak; objectives hold.",
        undo="Scale back up; a cold start takes minutes.",
        source="J; hysteresis as dynamo#9294, aibrix#593",
        min_window_seconds=20 * 3600.0,
    ),
)

# Rules about a whole day and its peak; the others look at one window of minutes.
DAILY = tuple(rule for rule in RULES if rule.min_window_seconds > 3600)
BY_NAME: Mapping[str, Rule] = MappingProxyType({rule.name: rule for rule in RULES})
