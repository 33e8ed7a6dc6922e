"""A trace that is damaged, of another format or out of order is refused with file, line and remedy."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.trace_order import Succession
from optiinfra_pipelines.analysis.traces import TraceError
from resources.traces import files as trace_files
from resources.traces.files import TraceFormat, read_requests, succession
from resources.traces.importer import import_trace

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens\n"
MOONCAKE = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
LOOKUP = {"timestamp": 1711929600.5, "seq_len": 512, "chunk_size": 256, "chunk_hashes": ["0xab", "0xcd"]}
BATCH = '{"seq": 4, "batch": [1.5, [], 0]}\n'


def moon(**fields: object) -> str:
    return json.dumps(MOONCAKE | fields) + "\n"


def lookup(**fields: object) -> str:
    return json.dumps(LOOKUP | fields) + "\n"


def azure(*rows: str) -> str:
    return AZURE + "".join(f"2023-11-16 18:0{row}\n" for row in rows)


FAULTS: list[tuple[TraceFormat, str, str]] = [
    ("mooncake", moon() + moon(input_length=-5), r"line 2 .*input_length is -5, under 0\. Correct the line, or drop"),
    ("mooncake", moon(output_length=1.5), "line 1 .*output_length is 1.5, not a whole number"),
    ("mooncake", moon(input_length=True), "line 1 .*input_length is True, not a whole number"),
    ("mooncake", moon(timestamp=10**30), "line 1 .*timestamp is 10+, too large"),
    ("mooncake", moon(hash_ids=[2**70]), "line 1 .*hash_ids is no list of whole numbers of 64 bits"),
    ("mooncake", moon(input_length=50), "line 1 .*2 blocks of 512 tokens, more than its 50 tokens fill"),
    ("mooncake", moon() + moon(timestamp=9)[:-20], "line 2 .*ends in the middle of it; fetch it again"),
    ("mooncake", moon(timestamp=60_000) + moon(timestamp=1_000), "line 2: .*59 s before .*Sort the file by time"),
    ("mooncake", moon() + "\n" + moon(), "line 3 is wholly the same .*--keep-duplicates"),
    ("mooncake", azure("0:00.0,1,1"), "line 1 .*--format azure"),
    ("mooncake", lookup(), "line 1 .*--format lmcache"),
    ("azure", moon() * 3, "line 1 .*--format mooncake"),
    ("azure", azure("0:00.0,-4,1"), "line 2 .*ContextTokens is '-4', not a whole number from 0"),
    ("azure", azure("0:00.0,4,inf"), "line 2 .*GeneratedTokens is 'inf'"),
    (
        "azure",
        azure("0:00.0,4,1") + "2023-11-16 18:00:01.0,7",
        r"line 3 .*GeneratedTokens is missing \(was the",
    ),
    ("azure", azure("5:00.0,1,1", "0:01.0,1,1"), "line 3: .*299 s before"),
    ("azure", azure("0:00.0,1,1", "0:01.0,1,1", "0:01.0,1,1"), "line 4 is wholly the same"),
    ("azure", azure("0:00.0,1,1,9"), "line 2 has 4 fields, the header 3"),
    ("azure", azure('0:00.0,1,"1', "0:00.5,1,1"), "line 2 opens a quote"),
    ("burstgpt", BURST + "5,m,1,1\n6,m,1,-1\n", "line 3 .*Response tokens is '-1'"),
    ("burstgpt", BURST + "500,m,1,1\n6,m,1,1\n", "line 3: .*494 s before"),
    ("burstgpt", BURST + "nan,m,1,1\n", "line 2 .*Timestamp is 'nan'"),
    ("lmcache", lookup(seq_len=-4), "line 1 .*seq_len is -4"),
    ("lmcache", lookup(chunk_size=0), "line 1 .*chunk_size is 0; it is a number of tokens"),
    ("lmcache", lookup(chunk_hashes="0xab"), "line 1 .*chunk_hashes is no list of hashes"),
    ("lmcache", lookup().replace("1711929600.5", "Infinity"), "line 1 .*timestamp is inf, no time"),
    ("lmcache", lookup(timestamp=1711929700) + lookup(), "line 2: .*99.5 s before"),
    ("kv_events", "", "holds no event"),
    ("kv_events", moon(), "line 1 .*--format mooncake"),
    ("kv_events", BATCH + '{"seq": 5, "ba', "line 2 .*ends in the middle"),
    ("kv_events", BATCH * 2, "line 2: sequence 4 comes twice"),
    ("kv_events", BATCH + BATCH.replace("4", "0"), "line 2: sequence 0 follows 4: the engine was started anew"),
    ("kv_events", BATCH.replace("1.5", "null"), "line 1 .*timestamp is None"),
    ("kv_events", "no recording\n", "message 1 is no KV event message"),
]


@pytest.mark.parametrize(("form", "text", "named"), FAULTS)
def test_a_fault_is_told_by_file_line_and_remedy(tmp_path: Path, form: TraceFormat, text: str, named: str) -> None:
    """The import stops at the first line that cannot be, and its folder does not pass for a trace."""
    (tmp_path / "trace.txt").write_text(text)
    with pytest.raises(TraceError, match=rf"(?s)trace\.txt.*{named}"):
        import_trace(
            tmp_path / "trace.txt", form, tmp_path / "into", live_home=tmp_path / "live", ends_at=NOW, deployment="chat"
        )
    assert (tmp_path / "into/imported_trace.json").read_text() == "unfinished\n"


FLEETS = [
    ({"chunk-0-trace.csv": "0,1,1\n600,-1,1\n"}, r"chunk-0-trace\.csv: line 2 .*a rate from 0"),
    ({"chunk-0-trace.csv": "0,1,1\n600,nan,1\n"}, r"chunk-0-trace\.csv: line 2 .*a rate from 0"),
    ({"chunk-0-trace.csv": "600,1,1\n0,1,1\n"}, "line 2 .*window 0 after 600: windows come once each, in order"),
    ({"chunk-0-trace.csv": "0,1,1\n0,1,1\n"}, "line 2 .*window 0 after 0"),
    ({"chunk-0-trace.csv": "0,1,1\n600,1"}, "line 2 .*cut short must be fetched again"),
    ({"chunk-0-trace.csv": "0,1,1\n600,1,1\n", "chunk-1-trace.csv": "0,1,1\n"}, "has 1 windows.*differ first at 600 s"),
    ({"chunk-0-trace.csv": "0,1,1\n450,1,1\n1000,1,1\n"}, r"windows \[450, 550\] s apart"),
    (
        {"chunk-0-trace.csv": "0,1,1\n600,1,1\n", "chunk-0-dataset.json": '{"0": {"input_tokens": "{-5: 1}"}}'},
        r"chunk-0-dataset\.json cannot be read: a length",
    ),
]


@pytest.mark.parametrize(("files", "named"), FLEETS)
def test_a_client_that_cannot_be_is_told_by_its_file(tmp_path: Path, files: dict[str, str], named: str) -> None:
    """One of hundreds of files: a window that is missing is not a quiet one."""
    (tmp_path / "fleet").mkdir()
    for name, text in files.items():
        (tmp_path / "fleet" / name).write_text(text)
    with pytest.raises(TraceError, match=named):
        import_trace(
            tmp_path / "fleet", "servegen", tmp_path / "into",
            live_home=tmp_path / "live", ends_at=NOW, deployment="chat",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("t.parquet", b"PAR1....", "a Parquet file; write it out as the format was published"),
        ("t.zip", b"PK\x03\x04..", "a zip archive; unpack it first"),
        ("t.jsonl.gz", b"plain text", "named .gz and is not gzip"),
        ("t.jsonl.gz", gzip.compress(moon().encode() * 99)[:-9], "was cut short.*fetch it again"),
    ],
)
def test_a_file_that_is_no_text_is_told_as_what_it_is(tmp_path: Path, name: str, data: bytes, named: str) -> None:
    """An archive or a table is not 'not JSON': the message says what to do with it."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TraceError, match=named):
        list(read_requests(tmp_path / name, "mooncake", lambda share: None))


def test_gzip_is_read_under_any_name(tmp_path: Path) -> None:
    """A download without its ending is the same trace."""
    (tmp_path / "trace").write_bytes(gzip.compress(moon().encode()))
    [frame] = read_requests(tmp_path / "trace", "mooncake", lambda share: None)
    assert frame["input_tokens"].to_list() == [600]


def test_requests_that_look_alike_are_kept_where_it_is_said(tmp_path: Path) -> None:
    """Nothing is dropped: with the flag all three count, and the import says that two were like the first."""
    (tmp_path / "t.jsonl").write_text(moon() * 3)
    found = import_trace(
        tmp_path / "t.jsonl", "mooncake", tmp_path / "into",
        live_home=tmp_path / "live", ends_at=NOW, deployment="chat", keep_duplicates=True,
    )  # fmt: skip
    assert (found.requests, found.accesses, found.repeated) == (3, 3, 2)


def test_a_clock_of_whole_seconds_tells_no_requests_apart(tmp_path: Path) -> None:
    """BurstGPT's: two equal lines are two requests, without any flag."""
    (tmp_path / "b.csv").write_text(BURST + "5,m,1,1\n5,m,1,1\n6,m,1,1\n")
    found = import_trace(
        tmp_path / "b.csv", "burstgpt", tmp_path / "into", live_home=tmp_path / "live", ends_at=NOW, deployment="chat"
    )
    assert (found.requests, found.repeated) == (3, 1)


def test_a_rotated_lookup_log_is_read_whole_and_in_order(tmp_path: Path) -> None:
    """The folder that LMCache writes; the file it still writes ends in half a line, which is left out and told."""
    log = tmp_path / "log"
    log.mkdir()
    (log / "lookup_hashes_20240401_000000_000001.jsonl").write_text(lookup(timestamp=1711929700.0) + lookup()[:30])
    (log / "lookup_hashes_20240331_230000_000000.jsonl").write_text(lookup())
    found = import_trace(log, "lmcache", tmp_path / "into", live_home=tmp_path / "l", ends_at=NOW, deployment="chat")
    assert (found.requests, found.accesses, found.unfinished) == (2, 2, 1)
    with pytest.raises(TraceError, match=r"holds no \.jsonl file"):
        list(read_requests(tmp_path / "into", "lmcache", lambda share: None))


def test_one_text_for_two_models_is_two_chunks(tmp_path: Path) -> None:
    """LMCache hashes tokens alone: what one model computed is of no use to another."""
    (tmp_path / "t.jsonl").write_text(lookup(model_name="a") + lookup(model_name="b") + lookup(model_name="a"))
    [frame] = read_requests(tmp_path / "t.jsonl", "lmcache", lambda share: None)
    one, other, again = frame["hash_ids"].to_list()
    assert one == again
    assert not {*one} & {*other}


def test_lookups_of_one_moment_may_change_places_in_their_log(tmp_path: Path) -> None:
    """A server's threads write within a second of each other: the order of the log stays, and time does not fall."""
    at = 1_711_929_600.0
    lines = [lookup(timestamp=at + late, seq_len=512 + place) for place, late in enumerate((0.5, 0.2, 0.6, 0.1, 2.0))]
    (tmp_path / "l.jsonl").write_text("".join(lines))
    [frame] = read_requests(tmp_path / "l.jsonl", "lmcache", lambda share: None, succession("lmcache"))
    assert frame["input_tokens"].to_list() == [512, 513, 514, 515, 516]
    assert (frame["timestamp_ms"] - round(at * 1000)).to_list() == [500, 500, 600, 600, 2000]


rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=rows, piece=st.integers(40, 400))
def test_order_and_repeats_do_not_depend_on_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: list[tuple[int, int]], piece: int
) -> None:
    """Counted the slow way over the whole file: the first line that falls back, or is one already seen at its time."""
    monkeypatch.setattr(trace_files, "PIECE_BYTES", piece)
    path = tmp_path / "t.jsonl"
    path.write_text("".join(moon(timestamp=at, output_length=tokens) for at, tokens in requests))
    bad = next(
        (
            number
            for number, row in enumerate(requests)
            if (number and row[0] < requests[number - 1][0]) or row in requests[:number]
        ),
        None,
    )
    if bad is None:
        list(read_requests(path, "mooncake", lambda share: None, succession("mooncake")))
    else:
        with pytest.raises(TraceError, match=rf"line {bad + 1}\b"):
            list(read_requests(path, "mooncake", lambda share: None, succession("mooncake")))
    kept = Succession(keeps_repeats=True)
    if requests == sorted(requests):
        frames = list(read_requests(path, "mooncake", lambda share: None, kept))
        assert kept.repeated == len(requests) - len({*requests})
        assert sum(map(len, frames), 0) == len(requests)


def test_a_frame_without_rows_breaks_no_order() -> None:
    """A piece of blank lines is nothing."""
    order = Succession(keeps_repeats=False)
    order.check(pl.Series([], dtype=pl.Int64), [], [])
    assert order.repeated == 0
