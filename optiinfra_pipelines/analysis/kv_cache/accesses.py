"""A recorded workload as arrays for cache analysis: which blocks each request used, and what each is worth.

Checks and layout only; what a cache makes of it is `kv_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.kv_cache.stack import Floats, Ints, dense_ids
from optiinfra_pipelines.domain.kv_cache import Weight

# Block sizes that engines use: vLLM 16 (CPU 32-128), SGLang pages 1-64, LMCache 256, Mooncake 512.
KNOWN_BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class AccessError(ValueError):
    """The accesses cannot be what they say they are; the message names the request and the remedy."""


@dataclass(frozen=True)
class BlockTrace:
    """A workload as arrays: request r uses blocks ids[offsets[r]:offsets[r + 1]], each worth its weights."""

    dense: Ints
    ids: Ints
    offsets: Ints
    unique_blocks: int
    block_size: int | None
    weights: dict[Weight, Floats]  # what each reference counts for: 1, its tokens, 1 / blocks of its request
    totals: dict[Weight, float]  # what a trace that is all hits would count: references, input tokens, requests
    timestamp_ms: Ints | None

    @property
    def requests(self) -> int:
        return len(self.offsets) - 1

    def request_of_reference(self) -> Ints:
        return np.repeat(np.arange(self.requests, dtype=np.int64), np.diff(self.offsets))


def block_trace(accesses: pl.DataFrame, block_size: int | None = None) -> BlockTrace:
    """Check accesses and lay them out as arrays.

    accesses: one row per request in order of arrival; hash_ids List(Int64 or UInt64), NULL or [] for none;
    optional input_tokens, block_size (one value) and timestamp_ms (not falling). block_size in tokens: as given, else
    the column's, else the one known size that agrees with input_tokens, else unknown: then only blocks are counted.
    """
    if "hash_ids" not in accesses.columns:
        raise AccessError(f"accesses need a hash_ids column, a list of block ids per request; got {accesses.columns}")
    hash_ids = accesses["hash_ids"].fill_null(pl.Series([[]], dtype=accesses["hash_ids"].dtype))
    counts = hash_ids.list.len().cast(pl.Int64).to_numpy()
    flat = hash_ids.filter(hash_ids.list.len() > 0).explode()
    if flat.null_count():
        raise AccessError("a hash_ids list holds a null: drop it, or give the block an id")
    if not flat.dtype.is_integer() and len(flat):
        raise AccessError(f"hash_ids must be lists of integers, not {flat.dtype}; read_* in traces hash other ids")
    ids = (flat.to_numpy() if len(flat) else np.empty(0)).astype(np.int64, copy=False)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    size = _block_size(accesses, counts, block_size)
    dense, unique = dense_ids(np.ascontiguousarray(ids))
    weights, totals = _weights(accesses, counts, offsets, size)
    return BlockTrace(dense, ids, offsets, unique, size, weights, totals, _timestamps(accesses))


def _block_size(accesses: pl.DataFrame, counts: Ints, given: int | None) -> int | None:
    if given is not None:
        if given < 1:
            raise AccessError(f"block_size is {given}; it is a number of tokens, at least 1")
        return given
    if "block_size" in accesses.columns:
        sizes = accesses["block_size"].drop_nulls().unique().to_list()
        if len(sizes) > 1:
            raise AccessError(f"accesses mix block sizes {sorted(sizes)}; analyze one replica configuration at a time")
        if sizes:
            return int(sizes[0])
    if "input_tokens" not in accesses.columns or not counts.any():
        return None
    tokens = accesses["input_tokens"].fill_null(0).to_numpy()
    partial_last = [size for size in KNOWN_BLOCK_SIZES if np.array_equal(-(-tokens // size), counts)]
    full_only = [size for size in KNOWN_BLOCK_SIZES if np.array_equal(tokens // size, counts)]
    fitting = sorted({*partial_last, *full_only})
    if len(fitting) != 1:
        raise AccessError(
            f"the block size cannot be told from input_tokens ({fitting or 'no known size'} fit); pass block_size"
        )
    return fitting[0]


def _weights(
    accesses: pl.DataFrame, counts: Ints, offsets: Ints, size: int | None
) -> tuple[dict[Weight, Floats], dict[Weight, float]]:
    references = int(offsets[-1])
    weights: dict[Weight, Floats] = {
        "block": np.ones(references),
        "request": np.repeat(1.0 / np.maximum(counts, 1), counts),
    }
    totals: dict[Weight, float] = {"block": references, "request": len(counts)}
    if size is None:
        return weights, totals
    held = counts * size
    if "input_tokens" in accesses.columns and accesses["input_tokens"].null_count() == 0:
        tokens = accesses["input_tokens"].to_numpy().astype(np.int64)
        short = np.flatnonzero((counts > 0) & (tokens <= held - size))
        if len(short):
            row = int(short[0])
            raise AccessError(
                f"request {row} has {counts[row]} blocks of {size} tokens but {tokens[row]} input tokens; "
                "is block_size right?"
            )
    else:
        tokens = held
    in_block = np.full(references, float(size))
    partial = (counts > 0) & (tokens < held)
    in_block[offsets[1:][partial] - 1] = size - (held - tokens)[partial]
    return weights | {"token": in_block}, totals | {"token": int(tokens.sum())}


def _timestamps(accesses: pl.DataFrame) -> Ints | None:
    if "timestamp_ms" not in accesses.columns or accesses["timestamp_ms"].null_count():
        return None
    if not accesses["timestamp_ms"].is_sorted():
        raise AccessError("timestamp_ms falls: sort the accesses by arrival first; reuse depends on the order")
    return accesses["timestamp_ms"].to_numpy().astype(np.int64)
