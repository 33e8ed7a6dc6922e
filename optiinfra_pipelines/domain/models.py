"""What the arithmetic of memory needs to know of a model: its attention, its layers, its weights; and known ones.

Nouns and a table only. Bytes per token, cache sizes and reading a model's config.json are `analysis.kv_arithmetic`,
weights in other formats `analysis.quantization`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from optiinfra_pipelines.domain.fleet import Frozen, Positive

Count = Annotated[int, Field(ge=1)]
WeightDtype = Literal["float32", "bfloat16", "float16", "fp8", "int8", "int4"]


class ModelShape(Frozen):
    """The numbers of a model's config.json that decide its KV cache.

    `gqa` (MHA is the case kv_heads = heads, MQA kv_heads = 1) keeps keys and values of every KV head; `mla` keeps one
    compressed vector of kv_lora_rank + qk_rope_head_dim a token and layer. sliding_layers of the layers look back
    sliding_window_tokens only.
    """

    attention: Literal["gqa", "mla"] = "gqa"
    layers: Count
    kv_heads: Count | None = None
    head_dim: Count | None = None
    value_head_dim: Count | None = Field(default=None, description="Where values are of another size than keys.")
    kv_lora_rank: Count | None = None
    qk_rope_head_dim: Count | None = None
    sliding_layers: Annotated[int, Field(ge=0)] = 0
    sliding_window_tokens: Count | None = None
    dtype: WeightDtype = Field(default="bfloat16", description="Of the weights as published; KV 'auto' follows it.")
    parameters: Positive | None = Field(default=None, description="Weights in all, embeddings included.")
    max_position_tokens: Count | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"gqa": ("kv_heads", "head_dim"), "mla": ("kv_lora_rank", "qk_rope_head_dim")}[self.attention]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"{self.attention} attention needs {', '.join(missing)}")
        if self.sliding_layers > self.layers:
            raise ValueError(f"{self.sliding_layers} sliding layers of {self.layers} layers")
        if self.sliding_layers and self.sliding_window_tokens is None:
            raise ValueError("sliding_layers need sliding_window_tokens")
        return self


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


def known_model(name: str) -> ModelShape | None:
    """The shape of a published model by the name it is served under; None for one that the table does not hold.

    Only the whole name after the organization counts: a fine-tune under another name may have another shape.
    """
    return KNOWN_MODELS.get(name.strip().rsplit("/", 1)[-1].lower())
