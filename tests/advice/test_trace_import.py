"""A public trace of any known format becomes load in a warehouse of its own; what cannot be read is named by line."""

from __future__ import annotations

import gzip
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.traces import TraceError
from optiinfra_pipelines.commands import sql
from resources.advice.load_history import LoadHistory
from resources.traces import files as trace_files
from resources.traces.files import TraceFormat, read_requests
from resources.traces.importer import ImportedTrace, ImportRefusedError, import_trace, read_marker, require_separate
from resources.warehouse import Warehouse

NOW = datetime(2026, 11, 20, 12, 34, 56, tzinfo=UTC)
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def azure(*requests: tuple[float, int, int]) -> str:
    """Lines of the Azure format: seconds after 18:00, tokens in, tokens out."""
    return AZURE + "".join(
        f"2023-11-16 18:{int(at // 60):02d}:{at % 60:010.7f},{tokens_in},{tokens_out}\n"
        for at, tokens_in, tokens_out in requests
    )


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def imported(source: Path, form: TraceFormat, home: Path) -> ImportedTrace:
    return import_trace(source, form, home, live_home=home.parent / "live", ends_at=NOW, deployment="chat")


def minutes(home: Path) -> pl.DataFrame:
    since = datetime(2026, 1, 1, tzinfo=UTC)
    return LoadHistory(Warehouse(home / "warehouse", clock=lambda: NOW)).minutes(since)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImportedTrace, Path]:
    """An import of four requests, and the folder it went into."""
    folder = tmp_path_factory.mktemp("once")
    source = write(folder, "a.csv", azure((0, 100, 10), (5.5, 200, 20), (59.9, 300, 0), (130, 40, 4)))
    return imported(source, "azure", folder / "into"), folder / "into"


def test_load_per_minute_is_what_the_trace_says(once: tuple[ImportedTrace, Path]) -> None:
    """Three requests in the first minute, none in the second, one in the third; it ends before now, on the grid."""
    found, home = once
    rows = minutes(home).drop_nulls("requests_per_second")

    assert read_marker(home) == found
    assert (found.requests, found.first_at.minute % 10, found.last_at <= NOW) == (4, 0, True)
    assert [round(rate * 60) for rate in rows["requests_per_second"]] == [3, 0, 1]
    assert [round(rate * 60) for rate in rows["prompt_tokens_per_second"]] == [600, 0, 40]
    assert [round(rate * 60) for rate in rows["generation_tokens_per_second"]] == [30, 0, 4]
    assert set(rows["source"]) == {"recorded"}
    assert rows["replica_count"].to_list() == [0, 0, 0]  # a trace tells nothing of replicas


def test_the_folder_answers_sql_by_itself(once: tuple[ImportedTrace, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The read copy is there when the import ends, as after a refresh of a live fleet."""
    sql.run(
        once[1] / "warehouse/read.duckdb",
        "select deployment, sum(requests_per_second * 60)::int as n from int_load_minutes group by 1",
        "json",
    )
    assert json.loads(capsys.readouterr().out) == [{"deployment": "chat", "n": 4}]


def test_block_ids_come_along_in_their_order(tmp_path: Path) -> None:
    """A Mooncake trace keeps what its requests share, at the place in time where its load is."""
    rows = [
        {"timestamp": at, "input_length": 600, "output_length": 5, "hash_ids": ids}
        for at, ids in ((3_000_000, [7, 8]), (3_000_000, [7, 9]), (3_090_000, [7, 8]))
    ]
    source = write(tmp_path, "m.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = imported(source, "mooncake", tmp_path / "into")
    accesses = LoadHistory(Warehouse(tmp_path / "into/warehouse", clock=lambda: NOW)).accesses()

    assert accesses is not None
    assert accesses["hash_ids"].to_list() == [[7, 8], [7, 9], [7, 8]]
    first = datetime.fromtimestamp(accesses["timestamp_ms"][0] / 1000, UTC)
    assert first == found.first_at
    assert accesses["timestamp_ms"][2] - accesses["timestamp_ms"][0] == 90_000


def test_lmcache_lookups_have_no_output_and_say_so(tmp_path: Path) -> None:
    """Output tokens are not in that log: the load of tokens is unknown, not zero."""
    row = {"timestamp": 1711929600.5, "seq_len": 512, "chunk_size": 256, "chunk_hashes": ["0xab", "0xcd"]}
    source = write(tmp_path, "l.jsonl", json.dumps(row) + "\n" + json.dumps(row | {"timestamp": 1711929700.0}) + "\n")
    imported(source, "lmcache", tmp_path / "into")
    rows = minutes(tmp_path / "into").drop_nulls("requests_per_second")

    assert rows["prompt_tokens_per_second"].drop_nulls().len() == rows.height
    assert rows["generation_tokens_per_second"].null_count() == rows.height
    assert rows["demand_tokens_per_second"].null_count() == rows.height


def test_burstgpt_counts_failed_requests_as_arrived(tmp_path: Path) -> None:
    """A response of 0 tokens came all the same."""
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    text += "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,0,1087,API log\n"
    imported(write(tmp_path, "b.csv", text), "burstgpt", tmp_path / "into")
    rows = minutes(tmp_path / "into").drop_nulls("requests_per_second")

    assert rows["requests_per_second"].to_list() == [pytest.approx(2 / 60)]


def test_a_servegen_fleet_is_the_sum_of_its_clients(tmp_path: Path) -> None:
    """A client without published lengths takes the fleet's mean; each client's load is kept beside the sum."""
    fleet = tmp_path / "fleet"
    fleet.mkdir()
    (fleet / "chunk-0-trace.csv").write_text("0,2.0,1.0,Gamma,1,1\n600,4.0,1.0,Gamma,1,1\n")
    (fleet / "chunk-7-trace.csv").write_text("0,1.0,1.0,Gamma,1,1\n600,0.0,0.0,Gamma,1,1\n")
    lengths = {"0": {"input_tokens": "{100: 1.0}", "output_tokens": "{10: 1.0}"}}
    (fleet / "chunk-0-dataset.json").write_text(json.dumps(lengths))
    found = imported(fleet, "servegen", tmp_path / "into")
    rows = minutes(tmp_path / "into").drop_nulls("requests_per_second")
    clients = LoadHistory(Warehouse(tmp_path / "into/warehouse", clock=lambda: NOW)).clients(found.first_at)

    assert (found.clients, found.requests) == (2, 3 * 600 + 4 * 600)
    assert rows["requests_per_second"].to_list() == pytest.approx([3.0] * 10 + [4.0] * 10)
    assert rows["demand_tokens_per_second"].to_list() == pytest.approx([330.0] * 10 + [440.0] * 10)
    assert clients is not None
    assert sorted(clients["requests_per_second"]) == [0.0, 1.0, 2.0, 4.0]


LIVE = ("live", "live/trace", ".", "link")


@pytest.mark.parametrize("into", LIVE)
def test_the_live_folder_is_refused_by_whatever_name(tmp_path: Path, into: str) -> None:
    """The folder itself, one inside it, one around it, and a link to it; nothing is written."""
    (tmp_path / "live").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "live")
    source = write(tmp_path, "a.csv", azure((0, 1, 1)))

    with pytest.raises(ImportRefusedError, match="folder of its own"):
        import_trace(source, "azure", tmp_path / into, live_home=tmp_path / "live", ends_at=NOW, deployment="chat")
    assert list((tmp_path / "live").iterdir()) == []


def test_a_folder_with_anything_in_it_is_refused(tmp_path: Path, once: tuple[ImportedTrace, Path]) -> None:
    """A trace, or somebody's files: nothing is mixed, nothing is overwritten."""
    with pytest.raises(ImportRefusedError, match=r"holds .*a\.csv already"):
        imported(Path(once[0].source), "azure", once[1])
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", "notes.txt", "mine")
    with pytest.raises(ImportRefusedError, match="not empty"):
        require_separate(tmp_path / "other", tmp_path / "live")


def test_an_import_that_stopped_does_not_pass_for_one(tmp_path: Path) -> None:
    """A bad line stops it with its number; the folder then says that it is unfinished, and is no trace to analyze."""
    source = write(tmp_path, "a.csv", azure((0, 1, 1), (1, 2, 2)) + "2023-11-16 18:00:02.0,many,3\n")
    with pytest.raises(TraceError, match=r"a\.csv: line 4 of the Azure trace: ContextTokens is 'many'"):
        imported(source, "azure", tmp_path / "into")

    assert read_marker(tmp_path / "into") is None
    with pytest.raises(ImportRefusedError, match="did not end"):
        imported(source, "azure", tmp_path / "into")


FAR_APART = "".join(
    json.dumps({"timestamp": at, "input_length": 1, "output_length": 1, "hash_ids": [1]}) + "\n"
    for at in (0, 1795187732090)
)


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("azure", AZURE, "holds no request"),
        ("azure", "", "holds no request"),
        ("mooncake", '{"timestamp": 1}\n', "line 1 of the Mooncake trace lacks"),
        ("burstgpt", AZURE + "x,1,1\n", "has no column"),
        ("servegen", "x", "is no folder"),
        ("mooncake", FAR_APART, "in the unit of"),
    ],
)  # fmt: skip
def test_what_is_no_trace_says_why(tmp_path: Path, form: TraceFormat, text: str, expected: str) -> None:
    """Empty, of another format, of another unit: the message says what was found."""
    with pytest.raises(TraceError, match=expected):
        imported(write(tmp_path, "x", text), form, tmp_path / "into")


def test_a_missing_file_and_a_cut_archive_are_named(tmp_path: Path) -> None:
    """A path that is not there, a folder, and a gzip file that ends too soon."""
    cut = tmp_path / "a.csv.gz"
    cut.write_bytes(gzip.compress(azure(*[(at, 1, 1) for at in range(500)]).encode())[:-40])
    for source in (tmp_path / "gone.csv", tmp_path, cut):
        with pytest.raises(TraceError, match=source.name):
            list(read_requests(source, "azure", lambda share: None))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    times=st.lists(st.floats(0, 3000), min_size=1, max_size=60),
    piece=st.integers(20, 400),
    packed=st.booleans(),
)
def test_the_size_of_a_piece_changes_nothing(tmp_path: Path, times: list[float], piece: int, packed: bool) -> None:
    """Cut anywhere, packed or plain, sorted or not: the same requests, counted from the file's first line."""
    text = azure(*[(round(at, 3), place, place) for place, at in enumerate(times)])
    path = tmp_path / ("t.csv.gz" if packed else "t.csv")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    whole = pl.concat(read_requests(path, "azure", lambda share: None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_files, "PIECE_BYTES", piece)
        pieces = pl.concat(read_requests(path, "azure", lambda share: None))

    assert pieces.equals(whole)
    assert pieces["input_tokens"].to_list() == list(range(len(times)))
    expected = [round((round(at, 3) - round(times[0], 3)) * 1000) for at in times]
    assert pieces["timestamp_ms"].to_list() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(("form", "bad"), [("azure", "bad,line,here"), ("mooncake", "{}"), ("burstgpt", "bad,m,1,1")])
def test_a_bad_line_far_into_a_file_has_its_own_number(tmp_path: Path, form: TraceFormat, bad: str) -> None:
    """Pieces are counted on: line 301 is line 301, not line 7 of the third piece."""
    good: dict[str, Any] = {
        "azure": [AZURE.strip(), *[f"2023-11-16 18:00:00.{place:07d},1,1" for place in range(299)]],
        "mooncake": ['{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [1]}'] * 300,
        "burstgpt": ["Timestamp,Model,Request tokens,Response tokens", *["1,m,2,3"] * 299],
    }
    path = write(tmp_path, "t", "\n".join([*good[form], bad]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_files, "PIECE_BYTES", 700)
        with pytest.raises(TraceError, match=r"\bline 301\b"):
            list(read_requests(path, form, lambda share: None))


def test_the_public_azure_trace_comes_in_whole(tmp_path: Path) -> None:
    """Every request and token of the real hour, written in the format it was published in."""
    folder = os.environ.get("OPTIINFRA_DATA")
    if not folder:
        pytest.skip("OPTIINFRA_DATA is not set: the public traces are not part of the project")
    trace = pl.read_parquet(Path(folder) / "data/azure_llm_2023_conv_requests.parquet")
    trace.select(
        TIMESTAMP=pl.col("timestamp").dt.strftime("%Y-%m-%d %H:%M:%S.%6f"),
        ContextTokens="input_tokens",
        GeneratedTokens="output_tokens",
    ).write_csv(tmp_path / "azure.csv")
    found = imported(tmp_path / "azure.csv", "azure", tmp_path / "into")
    rows = minutes(tmp_path / "into")

    assert found.requests == trace.height == 19_366
    tokens = float(trace.select((pl.col("input_tokens") + pl.col("output_tokens")).sum()).item())
    assert float(rows["demand_tokens_per_second"].sum()) * 60 == pytest.approx(tokens)
