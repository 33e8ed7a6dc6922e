"""KV events come into a warehouse of their own, in either encoding, and without a trace of the users' text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import msgpack
import polars as pl
import pytest

from optiinfra_pipelines.analysis.kv_cache.events import ARRAY_FIELDS
from optiinfra_pipelines.analysis.kv_cache.rows import working_set_rows
from optiinfra_pipelines.analysis.traces import TraceError
from optiinfra_pipelines.commands.replay_trace import show
from optiinfra_pipelines.defs.traces import analyze_trace
from resources.advice.load_history import LoadHistory
from resources.traces.importer import ImportedTrace, import_trace
from resources.traces.kv_events import read_event_frames
from resources.warehouse import Warehouse

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
# Token ids that nothing else in a warehouse looks like: 30 bits each, no two alike.
SECRET = [987_654_321 + 7_919 * number for number in range(16)]
LORA = "adapter-of-a-customer"


def stored(block: object, medium: str | None = "GPU") -> dict[str, Any]:
    return {"type": "BlockStored", "block_hashes": [block], "parent_block_hash": None, "token_ids": SECRET,
            "block_size": 16, "lora_id": 1, "lora_name": LORA, "medium": medium, "extra_keys": [[LORA]]}  # fmt: skip


def removed(block: object, medium: str | None = "GPU") -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": [block], "medium": medium}


def as_array(event: dict[str, Any]) -> list[Any]:
    return [event["type"], *(event.get(name) for name in ARRAY_FIELDS[event["type"]])]


# Three blocks through a cache of two; the first comes back, its digest once as a number and once as bytes.
EVENTS = [stored(1), stored(2), removed(1), stored(3), removed(2), stored(1), {"type": "AllBlocksCleared"}]


def json_lines(events: list[Any]) -> bytes:
    return b"".join(
        json.dumps({"recv": 1.0, "topic": "kv", "seq": place, "batch": [1e9 + place, [event], 0]}).encode() + b"\n"
        for place, event in enumerate(events)
    )


def packed(value: list[Any]) -> bytes:
    pack: Any = msgpack.packb  # it ships no types
    return bytes(pack(value))


def messages(events: list[Any]) -> bytes:
    """What the socket gave, one message after the other."""
    return b"".join(
        packed([b"kv", place.to_bytes(8, "big"), packed([1e9 + place, [event], 0])])
        for place, event in enumerate(events)
    )


def imported(source: Path, home: Path) -> ImportedTrace:
    return import_trace(source, "kv_events", home, live_home=home.parent / "live", ends_at=NOW, deployment="chat")


RECORDINGS = {
    "maps as JSON lines": json_lines(EVENTS),
    "arrays as JSON lines": json_lines([as_array(event) for event in EVENTS]),
    "maps as msgpack": messages(EVENTS),
    "arrays as msgpack": messages([as_array(event) for event in EVENTS]),
}


@pytest.mark.parametrize("recording", RECORDINGS)
def test_every_encoding_is_the_same_events(tmp_path: Path, recording: str) -> None:
    """vLLM's events were arrays until 0.23 and are maps from 0.26 on; either comes as JSON lines or as it was sent."""
    (tmp_path / "kv").write_bytes(RECORDINGS[recording])
    (tmp_path / "lines").write_bytes(RECORDINGS["maps as JSON lines"])
    [frame] = read_event_frames(tmp_path / "kv", lambda share: None)
    [expected] = read_event_frames(tmp_path / "lines", lambda share: None)
    assert frame.equals(expected)
    assert frame["event"].to_list() == ["stored", "stored", "removed", "stored", "removed", "stored", "cleared"]


@pytest.mark.parametrize("recording", RECORDINGS)
def test_no_token_id_reaches_the_warehouse(tmp_path: Path, recording: str) -> None:
    """Every file that an import and its analysis wrote, byte by byte, and every cell of every table: none is there."""
    assert all(str(SECRET[0]).encode() in RECORDINGS[name] for name in RECORDINGS if "JSON" in name)
    (tmp_path / "kv").write_bytes(RECORDINGS[recording])
    home = tmp_path / "into"
    imported(tmp_path / "kv", home)
    analyze_trace(home)

    wanted = [LORA.encode(), b"token_ids"]
    for token in SECRET:
        wanted += [str(token).encode(), token.to_bytes(4, "little"), token.to_bytes(4, "big")]
    files = [path for path in home.rglob("*") if path.is_file()]
    assert any(path.name == "read.duckdb" for path in files)
    for path in files:
        data = path.read_bytes()
        assert not [one for one in wanted if one in data], path
    cells = 0
    for file in (path for path in files if path.suffix == ".duckdb"):
        with duckdb.connect(str(file), read_only=True) as connection:
            tables = connection.execute("select schema_name, table_name from duckdb_tables() where not internal")
            for schema, table in tables.fetchall():
                text = str(connection.execute(f'select * from "{schema}"."{table}"').fetchall())
                assert not [token for token in SECRET if str(token) in text], table
                assert LORA not in text
                cells += len(text)
    assert cells > 1000


def test_the_working_set_and_the_least_gain_are_rows(tmp_path: Path) -> None:
    """Three blocks stored, one of them again after two removals: two blocks more would have kept it."""
    (tmp_path / "kv").write_bytes(RECORDINGS["maps as msgpack"])
    found = imported(tmp_path / "kv", tmp_path / "into")
    advice = analyze_trace(tmp_path / "into").tables
    row = advice["kv_working_set"].row(0, named=True)

    assert (found.kv_events, found.requests, found.accesses) == (7, 0, 0)
    assert (row["medium"], row["stored_blocks"], row["unique_blocks"], row["max_live_blocks"]) == ("GPU", 4, 3, 2)
    assert (row["restored_blocks"], row["restored_tokens"], row["extra_blocks_for_all"]) == (1, 16, 2)
    assert row["median_residency_seconds"] == pytest.approx(2.5)
    assert row["window_end_at"] - row["window_start_at"] == found.last_at - found.first_at
    assert "no hit ratio is known" in row["reason"]
    assert "kv_working_set" in advice["kv_reuse_curve"]["reason"][0]
    assert advice["load_forecast"].is_empty()


def test_a_deployment_without_events_abstains_with_the_command() -> None:
    """Nothing recorded is not an empty cache."""
    [row] = working_set_rows("chat", None, NOW).to_dicts()
    assert set(row) == {"measured_at", "deployment", "reason"}
    assert "--format kv_events" in row["reason"]


def test_each_medium_and_rank_is_a_cache_of_its_own(tmp_path: Path) -> None:
    """A block that leaves the GPU for the host is stored there for the first time; a rank's removals are its own."""
    events = [stored(1), removed(1), stored(1, "CPU"), stored(1), removed(7, "CPU"), stored(7, "CPU")]
    (tmp_path / "kv").write_bytes(json_lines(events))
    [frame] = read_event_frames(tmp_path / "kv", lambda share: None)
    rows = {row["medium"]: row for row in working_set_rows("chat", frame, NOW).to_dicts()}
    assert (rows["GPU"]["restored_blocks"], rows["GPU"]["extra_blocks_for_all"]) == (1, 1)
    assert (rows["CPU"]["restored_blocks"], rows["CPU"]["unique_blocks"]) == (1, 2)
    assert rows["GPU"]["missing_batches"] == rows["CPU"]["missing_batches"] == 0

    other = frame.with_columns(data_parallel_rank=pl.when(pl.col("event") == "stored").then(1).otherwise(0))
    assert working_set_rows("chat", other, NOW)["restored_blocks"].to_list() == [0, 0]


def test_digests_are_one_block_as_bytes_and_as_hex(tmp_path: Path) -> None:
    """Hashes of 32 bytes go through JSON as hex; what is no hash at all is an event of an unknown kind."""
    digest = bytes(range(32))
    (tmp_path / "packed").write_bytes(messages([stored(digest), stored(None)]))
    (tmp_path / "lines").write_bytes(json_lines([stored(digest.hex()), stored("no hash")]))
    for name in ("packed", "lines"):
        [frame] = read_event_frames(tmp_path / name, lambda share: None)
        assert frame["block_hash"].to_list() == [int.from_bytes(digest[-8:], "big"), None]
        assert frame["event"].to_list() == ["stored", "unknown"]


def test_a_recording_of_messages_cut_short_is_told(tmp_path: Path) -> None:
    """The last message ends in its middle: an error with its number, not the messages before it."""
    (tmp_path / "kv").write_bytes(RECORDINGS["maps as msgpack"][:-5])
    with pytest.raises(TraceError, match=r"kv: message 7 .*ends in the middle of it; fetch it again"):
        list(read_event_frames(tmp_path / "kv", lambda share: None))


def test_the_recorded_engine_comes_in_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM 0.32 under pressure: the counts of its recording, from the warehouse, and as a person sees them."""
    folder = os.environ.get("OPTIINFRA_DATA")
    if not folder:
        pytest.skip("OPTIINFRA_DATA is not set: the recording is too large for the project")
    source = Path(folder) / "fixtures/vllm/0.32.0/small_llama_kv8k/kv_events.jsonl"
    found = imported(source, tmp_path / "into")
    advice = analyze_trace(tmp_path / "into").tables
    row = advice["kv_working_set"].row(0, named=True)
    stored_events = LoadHistory(Warehouse(tmp_path / "into/warehouse", clock=lambda: NOW)).kv_events()

    assert stored_events is not None
    assert stored_events.height == found.kv_events == 2177
    assert (row["stored_events"], row["removed_events"], row["cleared_events"]) == (1051, 1076, 3)
    assert (row["unique_blocks"], row["max_live_blocks"], row["restored_blocks"]) == (1083, 248, 35)
    assert (row["extra_blocks_for_all"], row["missing_batches"]) == (40, 0)
    assert "began late" in row["reason"]
    show(advice)
    assert "35 of 1098 stores were of blocks removed before" in " ".join(capsys.readouterr().out.split())


def test_the_recipe_of_the_docs_records_what_a_socket_publishes(tmp_path: Path) -> None:
    """The page's own lines, against a real publisher: every message comes back, each as it was sent."""
    zmq: Any = pytest.importorskip("zmq", reason="pyzmq is in the group `live`")
    text = (Path(__file__).parents[2] / "docs/kv-events.md").read_text()
    [recipe] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with zmq.Context() as context, context.socket(zmq.XPUB) as publisher:
        publisher.setsockopt(zmq.LINGER, 10_000)
        publisher.setsockopt(zmq.RCVTIMEO, 60_000)
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        code = recipe.replace(":5557", f":{port}").replace("while True:", f"for _ in range({len(EVENTS)}):")
        recorder = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
        publisher.recv()  # the recorder has subscribed
        for sequence, event in enumerate(EVENTS):
            publisher.send_multipart([b"kv", sequence.to_bytes(8, "big"), packed([1e9 + sequence, [event], 0])])
        assert recorder.wait(60) == 0
    assert (tmp_path / "kv.msgpack").read_bytes() == RECORDINGS["maps as msgpack"]
