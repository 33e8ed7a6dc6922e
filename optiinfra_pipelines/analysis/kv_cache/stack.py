"""Kernels of cache analysis: stack distances of a block trace under LRU, and hits of the offline optimum.

Arrays in, arrays out; what they mean for a cache is `kv_cache`. Each kernel is written once in plain Python and run
in one of two ways: compiled by numba for real traces, interpreted on lists for tiny ones, so that a sensor or a short
test never pays numba's import (about 0.5 s) or first compilation (seconds; cached on disk afterwards).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from heapq import heappop, heappush
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Up to here interpreting takes under 0.1 s (about 3 us a reference), less than importing numba does.
INTERPRETED_REFERENCES = 20_000
COLD = -1  # the distance of a block never seen before


def _dense_ids(ids: Any, table: Any, dense: Any) -> int:
    """Number ids by first appearance into `dense`; `table` is 2^k slots of -1, at least twice the ids. -> how many."""
    mask = len(table) - 1
    unique = 0
    first_at = table  # slot -> index of the id's first reference
    for index in range(len(ids)):
        key = ids[index]
        # Fibonacci hashing on the low 32 bits folded with the high ones: consecutive ids spread over the table.
        slot = (((key ^ (key >> 32)) & 0xFFFFFFFF) * 2654435769 >> 7) & mask
        while first_at[slot] >= 0 and ids[first_at[slot]] != key:
            slot = (slot + 1) & mask
        if first_at[slot] < 0:
            first_at[slot] = index
            dense[index] = unique
            unique += 1
        else:
            dense[index] = dense[first_at[slot]]
    return unique


def _stack_distances(dense: Any, offsets: Any, last: Any, tree: Any, distances: Any) -> None:
    """LRU stack distance of every reference in blocks, COLD where the block is new.

    Request r owns dense[offsets[r]:offsets[r + 1]]. All its blocks are looked up at arrival, then touched tail first,
    as vLLM frees them: the head of a prefix is the most recent. `last`: -1 per block; `tree`: references + 1 zeros,
    a Fenwick tree over touches that marks the latest touch of each block.
    """
    size = len(tree) - 1
    touches = 0
    live = 0
    for request in range(len(offsets) - 1):
        start = offsets[request]
        end = offsets[request + 1]
        for index in range(start, end):
            position = last[dense[index]]
            if position < 0:
                distances[index] = -1
            else:
                older = 0
                node = position + 1
                while node > 0:
                    older += tree[node]
                    node -= node & -node
                distances[index] = live - older
        for index in range(end - 1, start - 1, -1):
            block = dense[index]
            position = last[block]
            if position >= 0:
                node = position + 1
                while node <= size:
                    tree[node] -= 1
                    node += node & -node
            else:
                live += 1
            last[block] = touches
            touches += 1
            node = touches
            while node <= size:
                tree[node] += 1
                node += node & -node


def _sampled_distances(
    dense: Any,
    offsets: Any,
    kind: Any,
    recent: int,
    last: Any,
    mark: Any,
    once_at: Any,
    owner: Any,
    tree: Any,
    distances: Any,
    once: Any,
) -> None:
    """Stack distances from a bounded set of blocks: the `recent` last used, kept exactly, and the sampled ones.

    kind[block]: 0 for a block used only once in the trace. Such blocks are never tracked: how many lie between two
    uses is the difference of one running count, once[i]. 1: tracked while recent. 2: sampled, tracked always.
    distances[i], over the blocks used more than once: exact where the block is among the `recent`; else, for a
    sampled block seen before, -2 - (sampled blocks used since); else -1. `mark` is what a block stands for in the
    tree: 1 while recent, 2^32 if sampled. `owner` and `tree` are a window of touches that is compacted when full, so
    the state is a few times the blocks tracked, however long the trace.
    """
    sample_mark = 1 << 32
    size = len(owner)
    touches = 0
    oldest = 0  # every recent block was last touched at or after here
    live = 0
    used_once = 0
    for request in range(len(offsets) - 1):
        start = offsets[request]
        end = offsets[request + 1]
        for index in range(start, end):
            block = dense[index]
            if last[block] < 0:
                distances[index] = -1
                continue
            once[index] = used_once - once_at[block]
            older = 0
            node = last[block] + 1
            while node > 0:
                older += tree[node]
                node -= node & -node
            newer = live - older
            if mark[block] % sample_mark == 1:
                distances[index] = newer % sample_mark
            else:
                distances[index] = -2 - newer // sample_mark
        for index in range(end - 1, start - 1, -1):
            block = dense[index]
            if kind[block] == 0:
                used_once += 1
                continue
            once_at[block] = used_once
            if touches == size:
                kept = 0
                for slot in range(size):
                    if owner[slot] >= 0 and last[owner[slot]] == slot:
                        owner[kept] = owner[slot]
                        last[owner[slot]] = kept
                        kept += 1
                for slot in range(kept, size):
                    owner[slot] = -1
                for node in range(size + 1):
                    tree[node] = 0
                for slot in range(kept):
                    tree[slot + 1] = mark[owner[slot]]
                for node in range(1, size + 1):
                    parent = node + (node & -node)
                    if parent <= size:
                        tree[parent] += tree[node]
                touches = kept
                oldest = 0
            if last[block] >= 0:
                live -= mark[block]
                node = last[block] + 1
                while node <= size:
                    tree[node] -= mark[block]
                    node += node & -node
            mark[block] = 1 + (sample_mark if kind[block] == 2 else 0)
            live += mark[block]
            last[block] = touches
            owner[touches] = block
            touches += 1
            node = touches
            while node <= size:
                tree[node] += mark[block]
                node += node & -node
            while live % sample_mark > recent:
                aged = owner[oldest]
                if aged >= 0 and last[aged] == oldest and mark[aged] % sample_mark == 1:
                    node = oldest + 1
                    while node <= size:
                        tree[node] -= 1
                        node += node & -node
                    mark[aged] -= 1
                    live -= 1
                    if mark[aged] == 0:
                        last[aged] = -1
                oldest += 1


def _optimal_hits(dense: Any, offsets: Any, next_request: Any, capacity: int, kept_until: Any, hits: Any) -> None:
    """Mark in `hits` what Belady's rule serves from `capacity` blocks: keep what is needed again soonest.

    next_request: for each reference the next request that uses its block, -1 for never. kept_until: -1 per block.
    Bypass is allowed (a block needed later than all others is not kept), so no real policy can do better.
    """
    heap = [(0, 0)]
    heap.pop()
    kept = 0
    for request in range(len(offsets) - 1):
        start = offsets[request]
        end = offsets[request + 1]
        for index in range(start, end):
            hits[index] = kept_until[dense[index]] == request
        for index in range(start, end):
            block = dense[index]
            if kept_until[block] == request:
                kept_until[block] = -1
                kept -= 1
            if next_request[index] > request and kept_until[block] < 0:
                kept_until[block] = next_request[index]
                kept += 1
                heappush(heap, (-next_request[index], block))
        while kept > capacity:
            until, block = heappop(heap)
            if kept_until[block] == -until:  # an older entry of a block renewed since is skipped
                kept_until[block] = -1
                kept -= 1


@cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    import numba  # here, not above: importing it costs what a tiny analysis must not pay

    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True)(kernel)
    except RuntimeError:  # nowhere to keep the compiled code: a read-only installation without a home
        compiled = numba.njit(nogil=True)(kernel)
    return compiled


def dense_ids(ids: Ints) -> tuple[Ints, int]:
    """Block ids -> the same blocks numbered 0.. by first appearance, and how many there are."""
    dense = np.empty(len(ids), dtype=np.int64)
    slots = 1 << max(4, int(2 * len(ids) - 1).bit_length() if len(ids) else 4)
    if len(ids) <= INTERPRETED_REFERENCES:
        first: dict[int, int] = {}
        dense[:] = [first.setdefault(block, len(first)) for block in ids.tolist()]
        return dense, len(first)
    return dense, int(_compiled(_dense_ids)(ids, np.full(slots, -1, dtype=np.int32), dense))


def stack_distances(dense: Ints, offsets: Ints, blocks: int) -> Ints:
    """LRU stack distance of each reference in blocks (a hit at capacity C if under C), COLD for a first use."""
    distances = np.empty(len(dense), dtype=np.int64)
    if len(dense) <= INTERPRETED_REFERENCES:
        found = distances.tolist()
        _stack_distances(dense.tolist(), offsets.tolist(), [-1] * blocks, [0] * (len(dense) + 1), found)
        return np.array(found, dtype=np.int64)
    tree = np.zeros(len(dense) + 1, dtype=np.int32)
    _compiled(_stack_distances)(dense, offsets, np.full(blocks, -1, dtype=np.int64), tree, distances)
    return distances


def sampled_distances(dense: Ints, offsets: Ints, kind: Ints, recent: int) -> tuple[Ints, Ints]:
    """Stack distances from the `recent` last used blocks and the sampled ones, among blocks used more than once.

    kind: per block 0 (used once), 1 (tracked while recent), 2 (sampled). -> (distance, used once in between): distance
    is exact where >= 0, -2 - n for a sampled block no longer recent with n sampled blocks used since, -1 not known.
    """
    blocks = len(kind)
    window = 4 * (recent + int((kind == 2).sum())) + 16  # compacted at most once per 3/4 of a window of touches
    distances = np.empty(len(dense), dtype=np.int64)
    once = np.zeros(len(dense), dtype=np.int64)
    last, owner = np.full(blocks, -1, dtype=np.int64), np.full(window, -1, dtype=np.int64)
    mark, once_at = np.zeros(blocks, dtype=np.int64), np.zeros(blocks, dtype=np.int64)
    tree = np.zeros(window + 1, dtype=np.int64)
    if len(dense) <= INTERPRETED_REFERENCES:
        given = (dense.tolist(), offsets.tolist(), kind.tolist(), recent)
        state = (last.tolist(), mark.tolist(), once_at.tolist(), owner.tolist(), tree.tolist())
        found, between = distances.tolist(), once.tolist()
        _sampled_distances(*given, *state, found, between)
        return np.array(found, dtype=np.int64), np.array(between, dtype=np.int64)
    _compiled(_sampled_distances)(dense, offsets, kind, recent, last, mark, once_at, owner, tree, distances, once)
    return distances, once


def optimal_hits(dense: Ints, offsets: Ints, blocks: int, capacity: int) -> npt.NDArray[np.bool_]:
    """Which references the offline optimum (Belady 1966) serves from `capacity` blocks."""
    request = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))
    order = np.argsort(dense, kind="stable")
    following = np.full(len(dense), -1, dtype=np.int64)
    same = dense[order[1:]] == dense[order[:-1]]
    following[order[:-1][same]] = request[order[1:][same]]
    hits = np.zeros(len(dense), dtype=np.bool_)
    if len(dense) <= INTERPRETED_REFERENCES:
        found = hits.tolist()
        _optimal_hits(dense.tolist(), offsets.tolist(), following.tolist(), capacity, [-1] * blocks, found)
        return np.array(found, dtype=np.bool_)
    kept_until = np.full(blocks, -1, dtype=np.int64)
    _compiled(_optimal_hits)(dense, offsets, following, capacity, kept_until, hits)
    return hits
