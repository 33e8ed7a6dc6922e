"""Public trace formats become one shape; a line that does not fit is named and stops the import."""

from __future__ import annotations

import json
import os
from pathlib import Path

import polars as pl
import pytest

from optiinfra_pipelines.analysis.kv_cache.curve import measure_reuse
from optiinfra_pipelines.analysis.traces import (
    ACCESSES_SCHEMA,
    CLIENT_LOAD_SCHEMA,
    REQUESTS_SCHEMA,
    TraceError,
    read_azure,
    read_burstgpt,
    read_lmcache_lookups,
    read_mooncake,
    read_servegen_client,
)

MOONCAKE = {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2354]}
LOOKUP = {
    "timestamp": 1711929600.123,
    "request_id": "req-abc",
    "model_name": "DeepSeek-V3",
    "chunk_size": 256,
    "seq_len": 600,
    "dtypes": ["float8_e4m3fn"],
    "shapes": [[32, 256, 128]],
    "chunk_hashes": ["0xab", "0xfe01"],
}


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_mooncake_line_is_a_request_with_blocks_of_512_tokens() -> None:
    """Blank lines are nothing; the schema holds for an empty trace too."""
    frame = read_mooncake(lines(MOONCAKE) + b"\n")
    assert frame.schema == ACCESSES_SCHEMA == read_mooncake(b"").schema
    assert frame.row(0) == (27482, 6955, 52, 512, [46, 47, 2354], None)


def test_the_whole_mooncake_trace_survives_the_round_trip() -> None:
    """Written as the JSON lines it was published in and read back, the trace has the same reuse."""
    folder = os.environ.get("OPTIINFRA_DATA")
    if not folder:
        pytest.skip("OPTIINFRA_DATA is not set: the public traces are not part of the project")
    trace = pl.read_parquet(Path(folder) / "data/mooncake_conversation_blocks512.parquet")
    renamed = trace.rename(
        {"timestamp_ms": "timestamp", "input_tokens": "input_length", "output_tokens": "output_length"}
    )
    read = read_mooncake(renamed.write_ndjson().encode())
    assert read.select(trace.columns).equals(trace)
    assert measure_reuse(read).ceiling("token") == measure_reuse(trace).ceiling("token")


def test_azure_requests_count_from_the_first() -> None:
    """Timestamps have seven decimals and no zone; milliseconds from the first request are kept."""
    frame = read_azure(
        b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
        b"2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    assert frame.schema == REQUESTS_SCHEMA
    assert frame.rows() == [(0, 374, 44), (4314, 396, 109)]
    zoned = read_azure(b"TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n")
    assert zoned.rows() == [(0, 2162, 5)]


def test_burstgpt_keeps_failed_requests() -> None:
    """A response of 0 tokens failed, but it arrived; session columns of later files do not matter."""
    frame = read_burstgpt(
        b"Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        b"5,1,0.3,ChatGPT,472,18,490,Conversation log\n45.5,2,,GPT-4,1087,0,1087,API log\n"
    )
    assert frame.rows() == [(5000, 472, 18, "ChatGPT"), (45500, 1087, 0, "GPT-4")]


def test_a_servegen_client_has_the_lengths_of_its_six_hours() -> None:
    """Lengths are histograms written as Python dicts; a window without one has no length, an idle one no spread."""
    dataset = {"0": {"input_tokens": "{100: 0.25, 300: 0.75}", "output_tokens": "{}"}}
    frame = read_servegen_client(
        7, b"0,1.5,0.9,Gamma,1.0,2.0\n21000,0.0,0.0,,0,0\n21600,2.0,1.1,Weibull,1,1\n", json.dumps(dataset).encode()
    )
    assert frame.schema == CLIENT_LOAD_SCHEMA
    assert frame.rows() == [
        (7, 0, 1.5, 0.9, 250.0, None),
        (7, 21000, 0.0, None, 250.0, None),
        (7, 21600, 2.0, 1.1, None, None),
    ]


def test_lmcache_lookups_become_accesses_with_a_rest_that_cannot_hit() -> None:
    """Two chunks of 256 and 88 tokens more: hashes of any width become ids, the last 88 tokens never hit."""
    frame = read_lmcache_lookups(lines(LOOKUP, LOOKUP | {"chunk_hashes": ["0xAB", "0x" + "f" * 64]}))
    assert frame.schema == ACCESSES_SCHEMA
    first, second = frame["hash_ids"]
    assert first[0] == second[0]
    assert len({*first, *second}) == 3
    assert measure_reuse(frame).ceiling("token") == pytest.approx(256 / 1200)


def test_a_lookup_log_still_being_written_is_read_up_to_its_last_whole_line() -> None:
    """The last line of a live log may be half there; any other broken line is an error."""
    whole = lines(LOOKUP)
    assert read_lmcache_lookups(whole + whole[:40]).height == 1
    assert read_lmcache_lookups(whole + whole.rstrip()).height == 2
    with pytest.raises(TraceError, match="line 1"):
        read_lmcache_lookups(whole[:40] + b"\n" + whole)


@pytest.mark.parametrize(
    ("read", "data", "named"),
    [
        (read_mooncake, b"{}\n", "line 1 .* 'timestamp'"),
        (read_mooncake, lines(MOONCAKE, MOONCAKE | {"hash_ids": None}), "line 2"),
        (read_mooncake, b"[1]\n", "line 1 .* list, not an object"),
        (read_azure, b"a,b\n1,2\n", "no column .*TIMESTAMP"),
        (read_azure, b"TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2 .*'yesterday'"),
        (read_azure, b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.1,x,2\n", "line 2 .*'x'"),
        (read_burstgpt, b"", "BurstGPT trace is not CSV"),
        (read_lmcache_lookups, lines({"timestamp": 1}) * 2, "line 1 .*seq_len"),
    ],
)
def test_what_does_not_fit_is_named(read: object, data: bytes, named: str) -> None:
    """Format, line and value: enough to find it in the file."""
    assert callable(read)
    with pytest.raises(TraceError, match=named):
        read(data)


def test_a_broken_servegen_client_is_named() -> None:
    """One file of hundreds: the message says which client and which line."""
    with pytest.raises(TraceError, match="line 2 of client 3"):
        read_servegen_client(3, b"0,1,1,,0,0\nx,1,1\n")
    with pytest.raises(TraceError, match="client 3's ServeGen length file"):
        read_servegen_client(3, b"0,1,1,,0,0\n", b'{"0": {"input_tokens": "__import__(1)", "output_tokens": ""}}')
