"""How large a KV cache is: bytes of a token, blocks of a memory, tokens an engine will report.

Pure arithmetic, exact to the token: the sizes agree with what vLLM prints and exposes (`kv_cache_size_tokens`). A
model whose shape is not known has no size here, and the error says what to provide. What memory is worth is
`kv_cache.sizing`, what to change is `recommendations.rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from optiinfra_pipelines.domain.fleet import ModelShape, WeightDtype

# Bytes of one stored number. vLLM and SGLang: plain types. llama.cpp (-ctk/-ctv): blocks of 32 numbers with scales
# (ggml-common.h: q8_0 34 bytes, q5_1 24, q5_0 22, q4_1 20, q4_0 18 for 32 numbers).
KV_DTYPE_BYTES: Mapping[str, Fraction] = {
    "float32": Fraction(4),
    "f32": Fraction(4),
    "bfloat16": Fraction(2),
    "float16": Fraction(2),
    "half": Fraction(2),
    "f16": Fraction(2),
    "bf16": Fraction(2),
    "fp8": Fraction(1),
    "fp8_e4m3": Fraction(1),
    "fp8_e5m2": Fraction(1),
    "fp8_inc": Fraction(1),
    "int8": Fraction(1),
    "q8_0": Fraction(34, 32),
    "q5_1": Fraction(24, 32),
    "q5_0": Fraction(22, 32),
    "q4_1": Fraction(20, 32),
    "q4_0": Fraction(18, 32),
}
# vLLM's packed format for MLA with DeepSeek's sizes: 512 fp8 numbers, 4 float32 scales, 64 bf16 numbers of position.
FP8_DS_MLA = "fp8_ds_mla"
FP8_DS_MLA_BYTES = 656
# vLLM V1 keeps one block back as the null block and still counts it in num_gpu_blocks; usage divides by the rest.
NULL_BLOCKS = 1


class UnknownShapeError(ValueError):
    """The model's shape is not known well enough to size its cache; the text says what to provide."""


@dataclass(frozen=True)
class KvCacheSize:
    """One rank's KV cache. `tokens` is what the engine reports; `usable_tokens` is without vLLM V1's null block."""

    bytes_per_token: Fraction
    block_bytes: int
    blocks: int
    block_size_tokens: int
    groups: int

    @property
    def tokens(self) -> int:
        return self.blocks // self.groups * self.block_size_tokens

    @property
    def usable_tokens(self) -> int:
        return max(0, self.blocks - NULL_BLOCKS) // self.groups * self.block_size_tokens

    @property
    def used_bytes(self) -> int:
        return self.blocks * self.block_bytes

    def max_concurrency(self, model_len_tokens: int) -> float:
        """How many requests of the largest length fit at once, as vLLM prints it (one cache group only)."""
        needed = ceil(Fraction(model_len_tokens, self.block_size_tokens)) * self.groups
        return self.blocks / needed


def bytes_per_token(
    shape: ModelShape,
    kv_dtype: str = "auto",
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    cache_parallel: int = 1,
) -> Fraction:
    """KV bytes of one token on one rank (the fullest pipeline stage), every layer counted as full attention.

    tensor_parallel divides the KV heads and, past their number, repeats them; it does not divide MLA's vector.
    cache_parallel (decode or prefill context parallel) shares a token's cache out over ranks.
    """
    if min(tensor_parallel, pipeline_parallel, cache_parallel) < 1:
        raise ValueError("parallel sizes are whole numbers from 1")
    layers = ceil(shape.layers / pipeline_parallel)
    return layers * bytes_per_token_and_layer(shape, kv_dtype, tensor_parallel) / cache_parallel


def bytes_per_token_and_layer(shape: ModelShape, kv_dtype: str, tensor_parallel: int = 1) -> Fraction:
    """KV bytes of one token in one layer on one rank."""
    if kv_dtype == FP8_DS_MLA:
        if (shape.attention, shape.kv_lora_rank, shape.qk_rope_head_dim) != ("mla", 512, 64):
            raise ValueError(f"{FP8_DS_MLA} packs 512 + 64 numbers of MLA; this model has no such vector")
        return Fraction(FP8_DS_MLA_BYTES)
    width = _number_bytes(shape.dtype, kv_dtype)
    if shape.attention == "mla":
        return (_known(shape.kv_lora_rank) + _known(shape.qk_rope_head_dim)) * width
    kv_heads, head_dim = _known(shape.kv_heads), _known(shape.head_dim)
    if kv_heads % tensor_parallel and tensor_parallel % kv_heads:
        raise ValueError(
            f"tensor_parallel {tensor_parallel} neither divides nor repeats {kv_heads} KV heads; use a divisor or a "
            "multiple of that number"
        )
    heads = max(1, kv_heads // tensor_parallel)
    return heads * (head_dim + (shape.value_head_dim or head_dim)) * width


def cache_size(
    shape: ModelShape,
    kv_bytes: float,
    *,
    block_size_tokens: int,
    kv_dtype: str = "auto",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    cache_parallel: int = 1,
    blocks_override: int | None = None,
    is_hybrid: bool = True,
) -> KvCacheSize:
    """The cache that `kv_bytes` of one rank hold, rounded down to whole blocks as the engine rounds.

    blocks_override: vLLM's --num-gpu-blocks-override, which replaces the count whatever the memory. is_hybrid: whether
    the engine keeps sliding-window layers in groups of their own (vLLM's hybrid cache manager); one group otherwise.
    """
    if block_size_tokens < 1:
        raise ValueError(f"block_size_tokens is {block_size_tokens}; it is at least 1")
    per_layer = bytes_per_token_and_layer(shape, kv_dtype, tensor_parallel)
    layers = ceil(shape.layers / pipeline_parallel)
    grouped, groups = layers, 1
    if is_hybrid and 0 < shape.sliding_layers < shape.layers:
        sliding = ceil(shape.sliding_layers / pipeline_parallel)
        grouped, groups = _groups(sliding, layers - sliding)
    block_bytes = ceil(grouped * per_layer * block_size_tokens)
    blocks = int(kv_bytes // block_bytes) if blocks_override is None else blocks_override
    return KvCacheSize(
        bytes_per_token=layers * per_layer / cache_parallel,
        block_bytes=block_bytes,
        blocks=blocks,
        block_size_tokens=block_size_tokens * cache_parallel,
        groups=groups,
    )


def _groups(sliding: int, full: int) -> tuple[int, int]:
    """Layers in a group, and groups: layers of one kind share a group, all groups the same size (vLLM V1).

    The size is that of the rarer kind, or of the other when it is less than a quarter larger.
    """
    few, many = sorted((sliding, full))
    size = many if many < 1.25 * few else few
    return size, ceil(sliding / size) + ceil(full / size)


def reported_tokens(settings: Mapping[str, str]) -> int | None:
    """The size of the cache that a vLLM configuration page tells, in tokens; None where it does not.

    `kv_cache_size_tokens` where it is (0.3x), else blocks times block size.
    """
    size = whole(settings.get("kv_cache_size_tokens"))
    if size is not None:
        return size
    blocks, block = whole(settings.get("num_gpu_blocks")), whole(settings.get("block_size"))
    return None if blocks is None or block is None else blocks * block


def implied_block_bytes(settings: Mapping[str, str]) -> tuple[float, float] | None:
    """Bounds of the bytes of a block, told by a page that names both memory and blocks; None when it cannot tell.

    blocks = floor(memory / block bytes) puts block bytes in (memory / (blocks + 1), memory / blocks]. With
    --num-gpu-blocks-override the count says nothing about the memory.
    """
    if whole(settings.get("num_gpu_blocks_override")) is not None:
        return None
    memory, blocks = whole(settings.get("kv_cache_memory_bytes")), whole(settings.get("num_gpu_blocks"))
    if not memory or not blocks:
        return None
    return memory / (blocks + 1), memory / blocks


def whole(text: str | None) -> int | None:
    """A whole number that a page prints, also as '4.0'; None for 'None', 'auto', nothing or anything else."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def shape_from_config(config: Mapping[str, object]) -> ModelShape:
    """The shape that a Hugging Face config.json (parsed) tells. UnknownShapeError names what is missing or not covered.

    A multi-modal model's text_config is read. State-space and linear-attention layers keep no KV of this kind and are
    refused, not guessed.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {**{key: value for key, value in config.items() if key in ("torch_dtype", "dtype")}, **text}
    kinds = config.get("layer_types")
    kinds = [str(kind) for kind in kinds] if isinstance(kinds, list | tuple) else []
    strange = sorted({kind for kind in kinds if kind not in ("full_attention", "sliding_attention")})
    if strange:
        raise UnknownShapeError(f"layers of type {', '.join(strange)} keep no KV cache that this arithmetic knows")
    layers = _integer(config, "num_hidden_layers", "n_layer", "num_layers")
    if layers is None:
        raise UnknownShapeError("config.json names no num_hidden_layers: give the model's own config.json")
    window = _integer(config, "sliding_window")
    sliding = kinds.count("sliding_attention")
    common = {
        "layers": layers,
        "dtype": _dtype(config),
        "max_position_tokens": _integer(config, "max_position_embeddings", "n_positions"),
        "sliding_layers": sliding if window else 0,
        "sliding_window_tokens": window if sliding else None,
    }
    rank, rope = _integer(config, "kv_lora_rank"), _integer(config, "qk_rope_head_dim")
    if rank and rope:
        return ModelShape.model_validate({**common, "attention": "mla", "kv_lora_rank": rank, "qk_rope_head_dim": rope})
    heads = _integer(config, "num_attention_heads", "n_head")
    hidden = _integer(config, "hidden_size", "n_embd")
    kv_heads = 1 if config.get("multi_query") is True else _integer(config, "num_key_value_heads", "num_kv_heads")
    head_dim = _integer(config, "head_dim") or (hidden // heads if hidden and heads else None)
    if heads is None and kv_heads is None:
        raise UnknownShapeError("config.json names no num_attention_heads: give the model's own config.json")
    if head_dim is None:
        raise UnknownShapeError("config.json names neither head_dim nor hidden_size with num_attention_heads")
    return ModelShape.model_validate({**common, "kv_heads": kv_heads or heads, "head_dim": head_dim})


def _number_bytes(model_dtype: WeightDtype, kv_dtype: str) -> Fraction:
    # KV of quantized weights is kept in the type of activations unless told otherwise.
    name = ("float32" if model_dtype == "float32" else "bfloat16") if kv_dtype == "auto" else kv_dtype
    if name not in KV_DTYPE_BYTES:
        raise UnknownShapeError(f"KV dtype {kv_dtype!r} has no known width; known: {', '.join(sorted(KV_DTYPE_BYTES))}")
    return KV_DTYPE_BYTES[name]


def _dtype(config: Mapping[str, object]) -> str:
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping):
        method = str(quantization.get("quant_method", ""))
        bits = quantization.get("bits")
        if method == "fp8":
            return "fp8"
        if bits in (4, 8):
            return f"int{bits}"
        if method == "awq":
            return "int4"
    name = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "bfloat16"


def _integer(config: Mapping[str, object], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _known(value: int | None) -> int:
    if value is None:
        raise UnknownShapeError("the model's shape is incomplete")
    return value
