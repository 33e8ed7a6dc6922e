"""The shapes of published models by name; fleet.yaml states that of any other (`domain.fleet.ModelShape`).

A table only. Bytes per token, cache sizes and reading a model's config.json are `analysis.kv_arithmetic`,
weights in other formats `analysis.quantization`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from optiinfra_pipelines.domain.fleet import Deployment, ModelShape


def _gqa(layers: int, kv_heads: int, head_dim: int, parameters: float, max_tokens: int) -> ModelShape:
    return ModelShape(
        layers=layers, kv_heads=kv_heads, head_dim=head_dim, parameters=parameters, max_position_tokens=max_tokens
    )


_DEEPSEEK_V3 = ModelShape(
    attention="mla",
    layers=61,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    dtype="fp8",
    parameters=671e9,
    max_position_tokens=163_840,
)

# From config.json on the models' own pages; parameters as those pages state them. Keys are the published names in
# lower case, without the organization. Anything else is unknown until its config.json is given.
KNOWN_MODELS: Mapping[str, ModelShape] = MappingProxyType(
    {
        "llama-3.1-8b-instruct": _gqa(32, 8, 128, 8.03e9, 131_072),
        "llama-3.1-70b-instruct": _gqa(80, 8, 128, 70.6e9, 131_072),
        "llama-3.3-70b-instruct": _gqa(80, 8, 128, 70.6e9, 131_072),
        "llama-3.1-405b-instruct": _gqa(126, 8, 128, 405.9e9, 131_072),
        "llama-3.2-1b-instruct": _gqa(16, 8, 64, 1.24e9, 131_072),
        "llama-3.2-3b-instruct": _gqa(28, 8, 128, 3.21e9, 131_072),
        "qwen2.5-7b-instruct": _gqa(28, 4, 128, 7.62e9, 32_768),
        "qwen2.5-72b-instruct": _gqa(80, 8, 128, 72.7e9, 32_768),
        "qwen3-8b": _gqa(36, 8, 128, 8.19e9, 40_960),
        "qwen3-32b": _gqa(64, 8, 128, 32.8e9, 40_960),
        "mistral-7b-instruct-v0.3": _gqa(32, 8, 128, 7.25e9, 32_768),
        "mixtral-8x7b-instruct-v0.1": _gqa(32, 8, 128, 46.7e9, 32_768),
        "deepseek-v3": _DEEPSEEK_V3,
        "deepseek-r1": _DEEPSEEK_V3,
    }
)


def shape_of(deployment: Deployment | None) -> ModelShape | None:
    """As fleet.yaml states it, else as published under the model's name; None when neither tells."""
    return (deployment.shape or known_model(deployment.model)) if deployment else None


def known_model(name: str) -> ModelShape | None:
    """The shape of a published model by the name it is served under; None for one that the table does not hold.

    Only the whole name after the organization counts: a fine-tune under another name may have another shape.
    """
    return KNOWN_MODELS.get(name.strip().rsplit("/", 1)[-1].lower())
