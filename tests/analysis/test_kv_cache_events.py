"""KV events of a real engine: both encodings, the working set, and the least that more cache would have saved."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgpack
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.kv_cache.events import (
    EVENTS_SCHEMA,
    decode_kv_frames,
    gain_of_more_cache,
    ghost_distances,
    kv_event_frame,
    working_set,
)
from optiinfra_pipelines.analysis.traces import TraceError, read_kv_events


@pytest.fixture(scope="module")
def recorded() -> bytes:
    folder = os.environ.get("OPTIINFRA_DATA")
    if not folder:
        pytest.skip("OPTIINFRA_DATA is not set: the recording is too large for the project")
    return (Path(folder) / "fixtures/vllm/0.32.0/small_llama_kv8k/kv_events.jsonl").read_bytes()


def stored(*blocks: int, size: int = 16) -> dict[str, object]:
    return {"type": "BlockStored", "block_hashes": list(blocks), "parent_block_hash": None, "block_size": size,
            "token_ids": [5] * size, "medium": "GPU"}  # fmt: skip


def removed(*blocks: int) -> dict[str, object]:
    return {"type": "BlockRemoved", "block_hashes": list(blocks), "medium": "GPU"}


def frame(*events: object) -> pl.DataFrame:
    return kv_event_frame([(number, [float(number), [event], 0]) for number, event in enumerate(events)])


def test_the_recorded_engine_shows_what_its_log_shows(recorded: bytes) -> None:
    """vLLM 0.32 under pressure: 1051 stores, 1076 removals, 3 clears, at most 248 of 255 blocks live, 35 re-stores."""
    found = working_set(read_kv_events(recorded))

    assert (found.stored_events, found.removed_events, found.cleared_events) == (1051, 1076, 3)
    assert (found.unique_blocks, found.restored_blocks, found.max_live_blocks) == (1083, 35, 248)
    assert (found.missing_batches, found.joined_late, found.unknown_events) == (0, True, 0)
    assert found.restored_tokens == 35 * 32


def test_forty_more_blocks_would_have_saved_every_recorded_restore(recorded: bytes) -> None:
    """The recorded re-stores came back within 40 removals; fewer blocks save some of them."""
    events = read_kv_events(recorded)
    few, enough = gain_of_more_cache(events, [16, 40])

    assert (few.saved_stores_at_least, enough.saved_stores_at_least) == (17, 35)
    assert enough.saved_tokens_at_least == 35 * 32


def test_token_ids_never_reach_a_frame(recorded: bytes) -> None:
    """Token ids are the users' text: no column holds them."""
    events = read_kv_events(recorded)
    assert events.schema == EVENTS_SCHEMA
    assert not any("token_ids" in name or dtype == pl.List for name, dtype in events.schema.items())


def test_both_encodings_of_one_event_are_one_row(recorded: bytes) -> None:
    """Events were arrays up to vLLM 0.23 and are maps with a type from 0.26 on; they say the same."""
    as_maps, as_arrays = [], []
    for line in recorded.splitlines()[:300]:
        row = json.loads(line)
        at, events, rank = row["batch"]
        as_maps.append((row["seq"], [at, events, rank]))
        arrays = []
        for event in events:
            if event["type"] == "BlockStored":
                names = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium")
            else:
                names = ("block_hashes", "medium") if event["type"] == "BlockRemoved" else ()
            arrays.append([event["type"], *(event[name] for name in names)])
        as_arrays.append((row["seq"], [at, arrays, rank]))

    assert kv_event_frame(as_maps).equals(kv_event_frame(as_arrays))


def test_a_zmq_message_is_topic_sequence_and_msgpack() -> None:
    """The sequence is 8 bytes big-endian; anything else is named as what it is not."""
    batch = [1.5, [stored(7)], 0]
    assert decode_kv_frames([b"kv", (258).to_bytes(8, "big"), msgpack.packb(batch)]) == (258, batch)
    for bad, reason in (
        ([b"kv", b"\x00" * 8], "3 frames"),
        ([b"kv", b"\x00" * 4, b""], "8 bytes"),
        ([b"kv", b"\x00" * 8, b"\xc1"], "not msgpack"),
        ([b"kv", b"\x00" * 8, msgpack.packb("hello")], "is this publisher a vLLM engine"),
    ):
        with pytest.raises(ValueError, match=reason):
            decode_kv_frames(bad)


@pytest.mark.parametrize("event", [{"type": "BlockMoved"}, ["BlockStored", 7], 5, "BlockStored", {}, [], None])
def test_an_event_of_an_unknown_kind_is_counted_and_skipped(event: object) -> None:
    """A newer engine's events do not stop the ones that are understood."""
    found = working_set(frame(event, stored(1)))
    assert (found.unknown_events, found.stored_events) == (1, 1)


def test_a_lost_batch_is_counted_and_an_empty_one_is_not_lost() -> None:
    """Sequence numbers tell: a gap is a batch never received; a batch without events is none."""
    events = kv_event_frame([(0, [0.0, [stored(1)], 0]), (1, [1.0, [], 0]), (5, [2.0, [removed(1)], 0])])
    found = working_set(events)
    assert (found.missing_batches, found.batches, found.joined_late) == (3, 3, False)


def test_a_block_stored_again_after_a_clear_is_no_capacity_miss() -> None:
    """An operator who resets the prefix cache did not run out of it."""
    events = frame(stored(1), removed(1), {"type": "AllBlocksCleared"}, stored(1))
    assert working_set(events).restored_blocks == 0
    assert len(ghost_distances(events)) == 0


def test_blocks_of_one_event_follow_each_other() -> None:
    """The event names the parent of its first block only; the others' parents are their neighbors."""
    event = stored(11, 12, 13) | {"parent_block_hash": 10}
    assert frame(event)["parent_hash"].to_list() == [10, 11, 12]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=60))
def test_a_ghost_distance_is_the_number_of_blocks_removed_since(steps: list[tuple[bool, int]]) -> None:
    """Counted the slow way: the other blocks that were removed later and are still out."""
    out: list[int] = []
    expected = []
    for is_store, block in steps:
        if is_store and block in out:
            expected.append(len(out) - 1 - out.index(block))
        if block in out:
            out.remove(block)
        if not is_store:
            out.append(block)
    events = frame(*(stored(block) if is_store else removed(block) for is_store, block in steps))
    assert ghost_distances(events).tolist() == expected


def test_a_line_that_is_no_batch_is_named() -> None:
    """An import stops at the line that does not fit."""
    with pytest.raises(TraceError, match="line 2"):
        read_kv_events(b'{"seq": 0, "batch": [1.0, [], 0]}\n{"seq": 1}\n')
