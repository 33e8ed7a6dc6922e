"""vLLM's KV events: what one replica's cache held, for how long, and what a larger one would have kept at the least.

Pure: decoded batches in, frames and nouns out; the ZMQ socket is the work of `resources`. Events tell of stores and
removals only: a hit emits nothing, so no hit ratio can be made of them. Both encodings are read: arrays (up to at
least vLLM 0.23) and maps with a "type" (from 0.26). Token ids are user text: they are dropped here, at the door, and
never reach a frame.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.kv_cache.stack import Ints
from optiinfra_pipelines.domain.kv_cache import GhostSize, WorkingSet

_COLUMNS: dict[str, pl.DataType | type[pl.DataType]] = {
    "sequence": pl.Int64,  # of the batch, per rank; gaps are batches never received
    "event_index": pl.Int64,  # of the event in its batch; an event of several blocks has several rows
    "emitted_at": pl.Datetime("us", "UTC"),
    "data_parallel_rank": pl.Int64,
    "event": pl.String,  # stored, removed, cleared, unknown; empty for a batch or event without blocks
    "block_hash": pl.UInt64,  # NULL for cleared, unknown and empty; one row per block
    "parent_hash": pl.UInt64,
    "block_size_tokens": pl.Int64,
    "medium": pl.String,  # GPU, CPU, STORAGE; NULL in versions that do not say
}
EVENTS_SCHEMA = pl.Schema(_COLUMNS)
_Held = tuple[int | None, str | None, int]  # rank, medium, block
_Row = tuple[str, int | None, int | None, int | None, str | None]  # event and the columns after it
# Field order of the array encoding, after the tag.
ARRAY_FIELDS: Mapping[str, tuple[str, ...]] = {
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium"),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}
EMPTY: _Row = ("empty", None, None, None, None)
UNKNOWN: _Row = ("unknown", None, None, None, None)
KINDS = {"BlockStored": "stored", "BlockRemoved": "removed", "AllBlocksCleared": "cleared"}


def decode_kv_frames(frames: Sequence[bytes]) -> tuple[int, list[Any]]:
    """One ZMQ message (topic, 8-byte big-endian sequence, msgpack) -> (sequence, batch [timestamp, events, rank]).

    ValueError names what is wrong with a message that is none.
    """
    if len(frames) != 3 or len(frames[1]) != 8:
        raise ValueError(f"a KV event message has 3 frames, the second of 8 bytes; got {[len(f) for f in frames]}")
    try:
        # msgpack ships no types.
        batch = msgpack.unpackb(frames[2], raw=False, strict_map_key=False)  # type: ignore[attr-defined,no-untyped-call]
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"the third frame of a KV event message is not msgpack: {error}") from error
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
        raise ValueError("a KV event batch is [timestamp, events, rank]; is this publisher a vLLM engine?")
    return int.from_bytes(frames[1], "big"), batch


def kv_event_frame(batches: Iterable[tuple[int, Sequence[Any]]]) -> pl.DataFrame:
    """Batches as (sequence, [timestamp, events, rank]) in order of arrival -> one row per event and block.

    An event of unknown type or shape is one `unknown` row, so that a new version is seen and does not stop the rest.
    """
    columns: dict[str, list[Any]] = {name: [] for name in EVENTS_SCHEMA}
    for sequence, batch in batches:
        rank = batch[2] if len(batch) > 2 else None
        for index, event in enumerate(batch[1]):
            for row in _rows(event):
                for name, value in zip(EVENTS_SCHEMA, (sequence, index, batch[0], rank, *row), strict=True):
                    columns[name].append(value)
        if not batch[1]:
            for name, value in zip(EVENTS_SCHEMA, (sequence, 0, batch[0], rank, *EMPTY), strict=True):
                columns[name].append(value)
    seconds = pl.Series(columns.pop("emitted_at"), dtype=pl.Float64)
    emitted = (seconds * 1e6).cast(pl.Int64).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    rest = pl.DataFrame(columns, schema={name: EVENTS_SCHEMA[name] for name in columns})
    return rest.with_columns(emitted.alias("emitted_at")).select(EVENTS_SCHEMA.names())


def _rows(event: Any) -> list[_Row]:
    if isinstance(event, Mapping):
        kind, fields = event.get("type"), dict(event)
    elif isinstance(event, Sequence) and not isinstance(event, str | bytes) and event:
        kind = event[0]
        fields = dict(zip(ARRAY_FIELDS.get(str(kind), ()), event[1:], strict=False))
    else:
        return [UNKNOWN]
    name = KINDS.get(str(kind))
    if name == "cleared":
        return [("cleared", None, None, None, None)]
    hashes = fields.get("block_hashes")
    if name is None or not isinstance(hashes, Sequence) or isinstance(hashes, str | bytes):
        return [UNKNOWN]
    medium, size = fields.get("medium"), fields.get("block_size")
    try:
        parent = None if fields.get("parent_block_hash") is None else _hash(fields["parent_block_hash"])
        blocks = [_hash(block) for block in hashes]
    except (TypeError, ValueError):
        return [UNKNOWN]
    if not isinstance(medium, str | None) or not isinstance(size, int | None):
        return [UNKNOWN]
    rows: list[_Row] = []
    for block in blocks:
        rows.append((name, block, parent, size, medium))
        parent = block if name == "stored" else None  # blocks of one event follow each other
    return rows or [EMPTY]


def _hash(value: Any) -> int:
    """A block hash as 64 bits: integers wrap (some versions sign them), digests keep their last 8 bytes.

    A digest is bytes, or their hex digits where it went through JSON.
    """
    if isinstance(value, str):
        value = bytes.fromhex(value)
    if isinstance(value, bytes):
        return int.from_bytes(value[-8:], "big")
    if not isinstance(value, int):
        raise TypeError(f"a block hash is a number or bytes, not {type(value).__name__}")
    return value & 0xFFFFFFFFFFFFFFFF


def working_set(events: pl.DataFrame) -> WorkingSet:
    """What the event stream of one replica (EVENTS_SCHEMA, in order) shows of its cache.

    Each data-parallel rank and each medium is a cache of its own: what one removes says nothing of another.
    """
    live: dict[_Held, float] = {}
    removed: set[_Held] = set()
    residencies: list[float] = []
    most = restored = restored_tokens = 0
    for event, block, size, medium, rank, at in events.select(
        "event", "block_hash", "block_size_tokens", "medium", "data_parallel_rank",
        pl.col("emitted_at").dt.epoch("us") / 1e6,
    ).iter_rows():  # fmt: skip
        key = (rank, medium, block)
        if event == "stored":
            if key in removed:
                restored += 1
                restored_tokens += size or 0
                removed.discard(key)
            live.setdefault(key, at)
            most = max(most, len(live))
        elif event == "removed":
            if key in live:
                residencies.append(at - live.pop(key))
            removed.add(key)
        elif event == "cleared":
            # Cleared by an operator, not for lack of room: a later store of these is no capacity miss.
            live = {held: since for held, since in live.items() if held[0] != rank}
            removed = {held for held in removed if held[0] != rank}
    batches = events.select("data_parallel_rank", "sequence").unique(maintain_order=True)
    steps = batches.select(pl.col("sequence").diff().over("data_parallel_rank"))["sequence"].drop_nulls()
    first = batches.group_by("data_parallel_rank").agg(pl.col("sequence").first())["sequence"]
    counts = dict(
        events.group_by("event").agg(pl.struct("data_parallel_rank", "sequence", "event_index").n_unique()).iter_rows()
    )
    return WorkingSet(
        batches=batches.height,
        stored_events=counts.get("stored", 0),
        removed_events=counts.get("removed", 0),
        cleared_events=counts.get("cleared", 0),
        unknown_events=counts.get("unknown", 0),
        stored_blocks=int((events["event"] == "stored").sum()),
        unique_blocks=events.filter(pl.col("event") == "stored")["block_hash"].n_unique(),
        max_live_blocks=most,
        median_residency_seconds=float(np.median(residencies)) if residencies else None,
        restored_blocks=restored,
        restored_tokens=restored_tokens,
        missing_batches=int((steps.filter(steps > 1) - 1).sum()),
        joined_late=bool((first > 0).any()),
    )


def ghost_distances(events: pl.DataFrame) -> Ints:
    """For each re-store of a removed block, how many other blocks were removed since its removal (and not restored).

    A cache larger by distance + 1 blocks would still have held it. Rank and medium are counted by themselves.
    """
    removed_as: dict[_Held, int] = {}  # block -> serial of its removal
    serials: dict[tuple[int | None, str | None], list[int]] = {}  # of each cache's blocks still removed, ascending
    found = []
    columns = ("event", "block_hash", "medium", "data_parallel_rank")
    for serial, (event, block, medium, rank) in enumerate(events.select(columns).iter_rows()):
        if event == "cleared":
            removed_as = {held: at for held, at in removed_as.items() if held[0] != rank}
            serials = {cache: out for cache, out in serials.items() if cache[0] != rank}
        if event not in ("removed", "stored"):
            continue
        key, out = (rank, medium, block), serials.setdefault((rank, medium), [])
        if key in removed_as:
            place = bisect_left(out, removed_as.pop(key))
            if event == "stored":
                found.append(len(out) - 1 - place)
            del out[place]
        if event == "removed":
            removed_as[key] = serial
            out.append(serial)
    return np.array(found, dtype=np.int64)


def gain_of_more_cache(events: pl.DataFrame, extra_blocks: Sequence[int]) -> tuple[GhostSize, ...]:
    """Stores that so many more blocks would have saved, at the least: hits past them leave no event and may add."""
    distances = ghost_distances(events)
    sizes = events.filter(pl.col("event") == "stored")["block_size_tokens"].drop_nulls()
    tokens = int(sizes[0]) if len(sizes) else 0
    rows = []
    for extra in extra_blocks:
        saved = int((distances < extra).sum())
        rows.append(GhostSize(extra_blocks=extra, saved_stores_at_least=saved, saved_tokens_at_least=saved * tokens))
    return tuple(rows)
