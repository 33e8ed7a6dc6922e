"""KV cache sizes against what real engines reported, and what the arithmetic refuses."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.kv_arithmetic import (
    UnknownShapeError,
    bytes_per_token,
    cache_size,
    implied_block_bytes,
    reported_tokens,
    shape_from_config,
)
from optiinfra_pipelines.domain.fleet import ModelShape
from optiinfra_pipelines.domain.models import KNOWN_MODELS, known_model
from optiinfra_pipelines.engines import normalize
from optiinfra_pipelines.exposition import Reader
from tests.engines.conftest import RECORDINGS, SCRAPED_AT
from tests.sql.harness import recordings

GIB = 1024**3
VLLM = Path("vllm/0.32.0/small_llama_kv8k")
# The config.json of the recorded model: tools/make_tiny_model.py with 8 512 8 2 512 4096.
SMALL_LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
powers = st.sampled_from([1, 2, 4, 8])


def page_settings(page: Path) -> dict[str, str]:
    found = normalize(Reader().read(page.read_text()), target="t", scraped_at=SCRAPED_AT)
    [row] = found.rows["raw_engine_configs"]
    [settings] = [value for value in row if isinstance(value, dict)]
    return settings


def test_the_size_in_the_recorded_servers_log_is_reproduced_to_the_token() -> None:
    """vLLM 0.32 printed 8,192 tokens and 4.00x for 2,048 tokens per request; so does the arithmetic."""
    log = (recordings() / VLLM / "server.log").read_text()
    found = re.search(
        r"KV cache size: ([\d,]+) tokens, Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x", log
    )
    assert found is not None
    tokens, length, times = (float(text.replace(",", "")) for text in found.groups())

    size = cache_size(shape_from_config(SMALL_LLAMA), GIB, block_size_tokens=32, blocks_override=256)

    assert (size.tokens, round(size.max_concurrency(int(length)), 2)) == (tokens, times)
    assert size.bytes_per_token == 4096


def test_the_size_on_every_recorded_page_is_reproduced_to_the_token() -> None:
    """kv_cache_size_tokens, num_gpu_blocks and kv_cache_max_concurrency of the page agree with the arithmetic."""
    pages = sorted((RECORDINGS / VLLM).rglob("*.prom"))
    assert pages
    for page in pages[:: max(1, len(pages) // 5)]:
        settings = page_settings(page)
        size = cache_size(
            shape_from_config(SMALL_LLAMA),
            float(settings["kv_cache_memory_bytes"]),
            block_size_tokens=int(settings["block_size"]),
            kv_dtype=settings["cache_dtype"],
            blocks_override=int(settings["num_gpu_blocks_override"]),
        )
        assert size.tokens == int(settings["kv_cache_size_tokens"]) == reported_tokens(settings)
        assert size.max_concurrency(2048) == float(settings["kv_cache_max_concurrency"])
        assert implied_block_bytes(settings) is None


def test_a_cache_without_an_override_is_what_the_log_of_a_two_layer_model_said() -> None:
    """2 layers, 2 KV heads of 32, bf16, 1 GiB: 2,097,152 tokens and 1024.00x, as vLLM printed."""
    size = cache_size(ModelShape(layers=2, kv_heads=2, head_dim=32), GIB, block_size_tokens=128)

    assert (size.tokens, size.max_concurrency(2048), size.bytes_per_token) == (2_097_152, 1024.0, 512)


@pytest.mark.parametrize(
    ("model", "dtype", "parallel", "expected"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "auto", 1, 131_072),
        ("meta-llama/Llama-3.1-70B-Instruct", "auto", 1, 327_680),
        ("meta-llama/Llama-3.1-70B-Instruct", "auto", 8, 40_960),
        ("meta-llama/Llama-3.1-70B-Instruct", "auto", 16, 40_960),  # 8 KV heads are repeated, not halved again
        ("meta-llama/Llama-3.1-70B-Instruct", "fp8", 4, 40_960),
        ("deepseek-ai/DeepSeek-V3", "auto", 1, 70_272),
        ("deepseek-ai/DeepSeek-V3", "auto", 8, 70_272),  # MLA's vector is not divided
        ("deepseek-ai/DeepSeek-V3", "fp8_ds_mla", 8, 61 * 656),
    ],
)
def test_bytes_of_a_token_follow_the_attention(model: str, dtype: str, parallel: int, expected: int) -> None:
    """GQA divides by tensor parallelism until heads run out; MLA does not; fp8_ds_mla is 656 bytes a layer."""
    shape = known_model(model)
    assert shape is not None
    assert bytes_per_token(shape, dtype, tensor_parallel=parallel) == expected


def test_the_recorded_lmcache_chunk_holds_its_tokens() -> None:
    """LMCache: 64 tokens of 4,096 bytes are a chunk of 256 KiB, and 256 MiB hold 1,024 of them."""
    size = cache_size(shape_from_config(SMALL_LLAMA), 256 * 1024**2, block_size_tokens=64)

    assert (size.block_bytes, size.blocks) == (256 * 1024, 1024)


def test_sliding_layers_share_blocks_in_groups() -> None:
    """Half sliding, half full: two groups of 18 layers share the blocks, and tokens are counted once."""
    config = {**SMALL_LLAMA, "num_hidden_layers": 36, "sliding_window": 128}
    config["layer_types"] = ["sliding_attention", "full_attention"] * 18
    shape = shape_from_config(config)

    size = cache_size(shape, GIB, block_size_tokens=16)

    assert (size.groups, size.block_bytes) == (2, 18 * 2 * 2 * 64 * 2 * 16)
    assert size.tokens == size.blocks // 2 * 16
    assert cache_size(shape, GIB, block_size_tokens=16, is_hybrid=False).groups == 1


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "num_hidden_layers"),
        ({"num_hidden_layers": 8}, "num_attention_heads"),
        ({"num_hidden_layers": 8, "num_attention_heads": 8}, "head_dim"),
        ({**SMALL_LLAMA, "layer_types": ["linear_attention"] * 8}, "linear_attention"),
    ],
)
def test_a_config_that_does_not_tell_the_shape_is_refused(config: dict[str, object], says: str) -> None:
    """What is missing or not covered is named; nothing is guessed."""
    with pytest.raises(UnknownShapeError, match=says):
        shape_from_config(config)


def test_a_fine_tune_under_another_name_is_unknown() -> None:
    """Only the published name counts: another one may hide another shape."""
    assert known_model("my-llama-3.1-8b-instruct-ft") is None
    assert set(KNOWN_MODELS) == {name.lower() for name in KNOWN_MODELS}


def test_a_dtype_without_a_width_is_refused() -> None:
    """A KV dtype the table lacks has no size; fp8_ds_mla fits MLA of one size only."""
    shape = ModelShape(layers=2, kv_heads=2, head_dim=32)
    with pytest.raises(UnknownShapeError, match="fp3"):
        bytes_per_token(shape, "fp3")
    with pytest.raises(ValueError, match="MLA"):
        bytes_per_token(shape, "fp8_ds_mla")
    with pytest.raises(ValueError, match="neither divides"):
        bytes_per_token(ModelShape(layers=2, kv_heads=6, head_dim=32), tensor_parallel=4)


@given(
    layers=st.integers(1, 128),
    heads=powers,
    head_dim=st.sampled_from([32, 64, 96, 128, 256]),
    block=st.sampled_from([1, 16, 32, 128]),
    kv_bytes=st.integers(0, 2**40),
)
def test_blocks_fill_the_memory_and_never_more(
    layers: int, heads: int, head_dim: int, block: int, kv_bytes: int
) -> None:
    """Rounding down to whole blocks: they fit, one more would not, and tokens are whole blocks."""
    size = cache_size(ModelShape(layers=layers, kv_heads=heads, head_dim=head_dim), kv_bytes, block_size_tokens=block)

    assert size.used_bytes <= kv_bytes < size.used_bytes + size.block_bytes
    assert size.tokens == size.blocks * block
    assert size.tokens * size.bytes_per_token == size.used_bytes


@given(heads=powers, parallel=powers, dtype=st.sampled_from(["auto", "fp8", "q8_0", "float32"]))
def test_tensor_parallel_never_makes_a_token_dearer_nor_free(heads: int, parallel: int, dtype: str) -> None:
    """All ranks together hold at least one copy of every head, and each at least one head."""
    shape = ModelShape(layers=4, kv_heads=heads, head_dim=64)
    one, many = bytes_per_token(shape, dtype), bytes_per_token(shape, dtype, tensor_parallel=parallel)

    assert one / parallel <= many <= one
    assert many * heads >= one


@given(st.integers(1, 10**6), st.integers(1, 10**12))
def test_a_page_that_tells_memory_and_blocks_bounds_the_bytes_of_a_block(blocks: int, block_bytes: int) -> None:
    """floor(memory / block bytes) = blocks puts the true block bytes inside the bounds."""
    memory = blocks * block_bytes + block_bytes // 2
    bounds = implied_block_bytes({"kv_cache_memory_bytes": str(memory), "num_gpu_blocks": str(blocks)})

    assert bounds is not None
    assert bounds[0] < block_bytes <= bounds[1] * (1 + 1e-12)


def test_bytes_are_exact_fractions() -> None:
    """llama.cpp's q8_0 spends 34 bytes on 32 numbers: an exact fraction, not a rounded float."""
    assert bytes_per_token(ModelShape(layers=1, kv_heads=1, head_dim=16), "q8_0") == Fraction(34)
