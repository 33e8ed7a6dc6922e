"""Public trace formats and engine logs -> frames of one shape: requests with their block ids, or load per window.

Pure: bytes in, frames out; fetching files is the caller's. Formats: Mooncake (JSON lines), Azure LLM inference 2023
(CSV), BurstGPT (CSV), ServeGen (one CSV and one JSON per client), LMCache lookup-hash logs (JSON lines) and recorded
vLLM KV events (JSON lines). A line that does not fit stops the import with its number: a trace with holes would
answer questions about reuse and load wrongly. What must hold from line to line (time, repeats) is `trace_order`.
"""

from __future__ import annotations

import ast
import codecs
import io
import json
import math
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import polars as pl

from optiinfra_pipelines.analysis.kv_cache.events import kv_event_frame

REQUESTS_SCHEMA = pl.Schema(
    {
        "timestamp_ms": pl.Int64,  # from the first request, or from the trace's own zero
        "input_tokens": pl.Int64,
        "output_tokens": pl.Int64,
    }
)
ACCESSES_SCHEMA = pl.Schema(
    dict(REQUESTS_SCHEMA) | {"block_size": pl.Int64, "hash_ids": pl.List(pl.Int64), "model": pl.String}
)
CLIENT_LOAD_SCHEMA = pl.Schema(
    {
        "client": pl.Int64,
        "window_start_seconds": pl.Int64,
        "requests_per_second": pl.Float64,
        "interarrival_cv": pl.Float64,  # coefficient of variation inside the window; NULL when idle
        "mean_input_tokens": pl.Float64,  # NULL where the length file does not cover the window
        "mean_output_tokens": pl.Float64,
    }
)
MOONCAKE_BLOCK_TOKENS = 512
SERVEGEN_LENGTH_WINDOW_SECONDS = 21_600
# The largest whole number that a float holds exactly: no public trace has a count or a time of more.
MOST = 2**53


class TraceError(ValueError):
    """A trace does not have the format it was said to have; the message names the line and what was expected."""


def _json_lines(data: bytes, format_name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = data.removeprefix(codecs.BOM_UTF8).splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            is_cut = number == len(lines) and not data.endswith(b"\n")
            why = "the file ends in the middle of it; fetch it again, or drop this line" if is_cut else error
            raise TraceError(f"line {number} of the {format_name} trace is not JSON: {why}") from error
        if not isinstance(row, dict):
            raise TraceError(f"line {number} of the {format_name} trace is a {type(row).__name__}, not an object")
        yield number, row


def _count(row: dict[str, Any], name: str, most: int = MOST) -> int:
    """A count, from 0: ValueError names the field and its value. KeyError where there is none."""
    value = row[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int:  # True is an int to Python
        raise ValueError(f"{name} is {value!r}, not a whole number")
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {value}, {'under 0' if value < 0 else 'too large to be one'}")
    return value


def _block_ids(row: dict[str, Any], name: str, held: int, tokens: int) -> list[int]:
    """Ids of a request's blocks, as signed 64 bits. held: tokens of a block; tokens: of the request."""
    ids = row[name]
    if not isinstance(ids, list) or not all(type(one) is int and -(2**63) <= one < 2**64 for one in ids):
        raise ValueError(f"{name} is no list of whole numbers of 64 bits")
    _require_room(name, len(ids), held, tokens)
    return [one if one < 2**63 else one - 2**64 for one in ids]


def _require_room(name: str, blocks: int, held: int, tokens: int) -> None:
    if (blocks - 1) * held >= tokens and blocks:
        raise ValueError(f"{name} names {blocks} blocks of {held} tokens, more than its {tokens} tokens fill")


def _spoiled(error: Exception, number: int, what: str, expected: str) -> TraceError:
    lacks = f"lacks {error}; expected {expected}" if isinstance(error, KeyError) else f"is spoiled: {error}"
    return TraceError(f"line {number} of the {what} {lacks}. Correct the line, or drop it")


def read_mooncake(data: bytes) -> pl.DataFrame:
    """Mooncake JSON lines (timestamp in ms, input_length, output_length, hash_ids) -> ACCESSES_SCHEMA."""
    rows: list[dict[str, Any]] = []
    for number, row in _json_lines(data, "Mooncake"):
        try:
            at, tokens = _count(row, "timestamp"), _count(row, "input_length")
            rows.append(
                {
                    "timestamp_ms": at,
                    "input_tokens": tokens,
                    "output_tokens": _count(row, "output_length"),
                    "block_size": MOONCAKE_BLOCK_TOKENS,
                    "hash_ids": _block_ids(row, "hash_ids", MOONCAKE_BLOCK_TOKENS, tokens),
                    "model": None,
                }
            )
        except (KeyError, ValueError) as error:
            expected = "timestamp, input_length, output_length, hash_ids"
            raise _spoiled(error, number, "Mooncake trace", expected) from error
    return pl.DataFrame(rows, schema=ACCESSES_SCHEMA)


def _csv(data: bytes, format_name: str, columns: tuple[str, ...]) -> pl.DataFrame:
    try:
        frame = pl.read_csv(io.BytesIO(data.rstrip()), infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise TraceError(f"the {format_name} trace is not CSV: {_csv_fault(data) or error}") from error
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise TraceError(f"the {format_name} trace has no column {missing}; it has {frame.columns}")
    return frame


def _csv_fault(data: bytes) -> str | None:
    """The first line that is none of this table; None when each looks like one."""
    lines = data.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            fields = line.decode("utf-8").count(",") + 1
        except UnicodeDecodeError:
            return f"line {number} is not text in UTF-8"
        if line.count(b'"') % 2:
            return f"line {number} opens a quote that it does not close"
        if fields > lines[0].count(b",") + 1:
            return f"line {number} has {fields} fields, the header {lines[0].count(b',') + 1}"
    return None


def _numbers(frame: pl.DataFrame, format_name: str, whole: tuple[str, ...], **columns: str) -> pl.DataFrame:
    """The named columns as Float64, none under 0; the first value that is no such number is an error with its line.

    whole: those of the columns that count something.
    """
    out = frame.select(
        **{name: pl.col(source).str.strip_chars().cast(pl.Float64, strict=False) for name, source in columns.items()}
    )
    for name, source in columns.items():
        value = out[name]
        is_number = value.is_between(0, MOST).fill_null(False)
        bad = ~is_number | ((value != value.floor()).fill_null(True) if name in whole else False)
        if bad.any():
            row = int(bad.arg_true()[0])
            given = frame[source][row]
            what = "missing (was the line cut short?)" if given is None else f"{given!r}, not a number from 0"
            what = what if given is None or name not in whole else f"{given!r}, not a whole number from 0"
            raise TraceError(f"line {row + 2} of the {format_name} trace: {source} is {what}. Correct it or drop it")
    return out


def read_azure(data: bytes) -> pl.DataFrame:
    """Azure LLM inference trace 2023 (TIMESTAMP, ContextTokens, GeneratedTokens) -> REQUESTS_SCHEMA from 0 ms."""
    frame = _csv(data, "Azure", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
    text = frame["TIMESTAMP"].str.strip_chars().str.replace(r"\+00:00$", "")  # the 2024 files name the zone
    at = text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="ns", strict=False)
    if at.null_count():
        row = int(at.is_null().arg_true()[0])
        given = frame["TIMESTAMP"][row]
        what = "missing" if given is None else f"{given!r}, not such as 2023-11-16 18:15:46.6805900"
        raise TraceError(f"line {row + 2} of the Azure trace: TIMESTAMP is {what}. Correct the line or drop it")
    counts = {"input_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"}
    tokens = _numbers(frame, "Azure", tuple(counts), **counts)
    first = at.min()
    return tokens.with_columns(timestamp_ms=(at - first).dt.total_milliseconds()).select(
        pl.col(name).cast(dtype) for name, dtype in REQUESTS_SCHEMA.items()
    )


def read_burstgpt(data: bytes) -> pl.DataFrame:
    """BurstGPT (Timestamp in s, Request tokens, Response tokens) -> REQUESTS_SCHEMA plus model.

    A response of 0 tokens is a failed request and stays in: it arrived.
    """
    frame = _csv(data, "BurstGPT", ("Timestamp", "Model", "Request tokens", "Response tokens"))
    counts = {"input_tokens": "Request tokens", "output_tokens": "Response tokens"}
    numbers = _numbers(frame, "BurstGPT", tuple(counts), seconds="Timestamp", **counts)
    out = numbers.with_columns(timestamp_ms=pl.col("seconds") * 1000, model=frame["Model"])
    return out.select(*(pl.col(name).cast(dtype) for name, dtype in REQUESTS_SCHEMA.items()), "model")


def read_servegen_client(client: int, trace_csv: bytes, dataset_json: bytes | None = None) -> pl.DataFrame:
    """One client of ServeGen -> CLIENT_LOAD_SCHEMA, one row per window.

    trace_csv has no header: window start in s, requests/s, coefficient of variation, distribution and its two
    parameters. dataset_json: length histograms per 6-hour window, {"<start s>": {"input_tokens": "{length: share}"}}.
    """
    rows: list[dict[str, Any]] = []
    lengths = _servegen_lengths(client, dataset_json) if dataset_json is not None else {}
    for number, line in enumerate(trace_csv.decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split(",")
        try:
            start, rate, spread = float(fields[0]), float(fields[1]), float(fields[2])
        except (IndexError, ValueError) as error:
            raise TraceError(
                f"line {number} of client {client}'s ServeGen trace is {line!r}: {error}; expected window start, "
                "requests/s, coefficient of variation. A file that was cut short must be fetched again"
            ) from error
        if not (0 <= start <= MOST and start.is_integer() and 0 <= rate < math.inf):
            raise TraceError(
                f"line {number} of client {client}'s ServeGen trace is {line!r}: a window starts at a whole second "
                "from 0 and has a rate from 0. Correct it, or leave the client's file out"
            )
        if rows and start <= rows[-1]["window_start_seconds"]:
            before = rows[-1]["window_start_seconds"]
            raise TraceError(
                f"line {number} of client {client}'s ServeGen trace has window {int(start)} after {before}: "
                "windows come once each, in order. Sort the file and drop what is there twice"
            )
        window = int(start) // SERVEGEN_LENGTH_WINDOW_SECONDS * SERVEGEN_LENGTH_WINDOW_SECONDS
        mean_input, mean_output = lengths.get(window, (None, None))
        rows.append(
            {
                "client": client,
                "window_start_seconds": int(start),
                "requests_per_second": rate,
                "interarrival_cv": spread if rate > 0 and 0 <= spread < math.inf else None,
                "mean_input_tokens": mean_input,
                "mean_output_tokens": mean_output,
            }
        )
    return pl.DataFrame(rows, schema=CLIENT_LOAD_SCHEMA)


def _servegen_lengths(client: int, data: bytes) -> dict[int, tuple[float | None, float | None]]:
    try:
        windows = json.loads(data)
        return {
            int(float(start)): (
                _histogram_mean(window.get("input_tokens")),
                _histogram_mean(window.get("output_tokens")),
            )
            for start, window in windows.items()
        }
    except (ValueError, SyntaxError, AttributeError, TypeError) as error:
        raise TraceError(
            f"client {client}'s ServeGen length file chunk-{client}-dataset.json cannot be read: {error}; fetch it "
            "again, or delete it: without it the client's lengths are unknown"
        ) from error


def _histogram_mean(text: str | dict[str, float] | None) -> float | None:
    """Mean of a histogram written as a Python dict in a string, {length: share}; None when it is empty."""
    if not text:
        return None
    histogram = ast.literal_eval(text) if isinstance(text, str) else text
    if any(not 0 <= float(number) < math.inf for pair in histogram.items() for number in pair):
        raise ValueError("a length or its share is no number from 0")
    total = sum(float(share) for share in histogram.values())
    return sum(float(length) * float(share) for length, share in histogram.items()) / total if total > 0 else None


def read_lmcache_lookups(data: bytes) -> pl.DataFrame:
    """LMCache's lookup-hash log (chunk_hashes, chunk_size, seq_len, model_name, timestamp) -> ACCESSES_SCHEMA.

    Chunk hashes of any width become 64-bit ids; output_tokens are not in the log and NULL. A last line cut short by
    rotation or a running writer is left out.
    """
    lines = data.splitlines()
    if lines and not data.endswith(b"\n"):
        lines = lines[:-1] if not lines[-1].rstrip().endswith(b"}") else lines
    rows: list[dict[str, Any]] = []
    for number, row in _json_lines(b"\n".join(lines), "LMCache lookup"):
        try:
            tokens, size = _count(row, "seq_len"), _count(row, "chunk_size")
            model = str(row.get("model_name", ""))
            rows.append(
                {
                    "timestamp_ms": round(_seconds(row, "timestamp") * 1000),
                    "input_tokens": tokens,
                    "output_tokens": None,
                    "block_size": size,
                    "hash_ids": _chunk_ids(row, "chunk_hashes", size, tokens, model),
                    "model": model or None,
                }
            )
        except (KeyError, ValueError) as error:
            expected = "timestamp, seq_len, chunk_size, chunk_hashes"
            raise _spoiled(error, number, "LMCache lookup log", expected) from error
    return pl.DataFrame(rows, schema=ACCESSES_SCHEMA)


def _seconds(row: dict[str, Any], name: str) -> float:
    value = row[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= MOST / 1e6:
        raise ValueError(f"{name} is {value!r}, no time in seconds")
    return float(value)


def _chunk_ids(row: dict[str, Any], name: str, held: int, tokens: int, model: str) -> list[int]:
    """Ids of a request's chunks. The hashes are of tokens alone; the same text is another chunk for another model."""
    chunks = row[name]
    if not isinstance(chunks, list) or not all(isinstance(chunk, str) or type(chunk) is int for chunk in chunks):
        raise ValueError(f"{name} is no list of hashes")
    if held == 0:
        raise ValueError("chunk_size is 0; it is a number of tokens, at least 1")
    _require_room(name, len(chunks), held, tokens)
    return [_id_of(chunk, model) for chunk in chunks]


def _id_of(chunk: str | int, model: str) -> int:
    digest = blake2b(f"{model}\0{str(chunk).lower()}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def read_kv_events(data: bytes) -> pl.DataFrame:
    """Recorded KV events, one {"seq": n, "batch": [timestamp, events, rank]} a line -> `kv_cache.events.EVENTS_SCHEMA`.

    Token ids are dropped.
    """
    return kv_event_frame([batch for _, batch in read_kv_batches(data)])


def read_kv_batches(data: bytes) -> list[tuple[int, tuple[int, list[Any]]]]:
    """The same lines as (line, (sequence, batch)), events undecoded: with token ids, so not to be kept."""
    batches = []
    for number, row in _json_lines(data, "KV event"):
        try:
            batches.append((number, (_count(row, "seq"), _kv_batch(row["batch"]))))
        except (KeyError, ValueError) as error:
            raise _spoiled(error, number, "KV event trace", "seq and batch [timestamp, events, rank]") from error
    return batches


def _kv_batch(batch: Any) -> list[Any]:
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
        raise ValueError("batch is not [timestamp, events, rank]")
    _seconds({"the batch's timestamp": batch[0]}, "the batch's timestamp")
    return batch
