"""Public trace formats and engine logs -> frames of one shape: requests with their block ids, or load per window.

Pure: bytes in, frames out; fetching files is the caller's. Formats: Mooncake (JSON lines), Azure LLM inference 2023
(CSV), BurstGPT (CSV), ServeGen (one CSV and one JSON per client), LMCache lookup-hash logs (JSON lines) and recorded
vLLM KV events (JSON lines). A line that does not fit stops the import with its number: a trace with holes would
answer questions about reuse and load wrongly.
"""

from __future__ import annotations

import ast
import io
import json
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


class TraceError(ValueError):
    """A trace does not have the format it was said to have; the message names the line and what was expected."""


def _json_lines(data: bytes, format_name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TraceError(f"line {number} of the {format_name} trace is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise TraceError(f"line {number} of the {format_name} trace is a {type(row).__name__}, not an object")
        yield number, row


def read_mooncake(data: bytes) -> pl.DataFrame:
    """Mooncake JSON lines (timestamp in ms, input_length, output_length, hash_ids) -> ACCESSES_SCHEMA."""
    rows: list[dict[str, Any]] = []
    for number, row in _json_lines(data, "Mooncake"):
        try:
            rows.append(
                {
                    "timestamp_ms": int(row["timestamp"]),
                    "input_tokens": int(row["input_length"]),
                    "output_tokens": int(row["output_length"]),
                    "block_size": MOONCAKE_BLOCK_TOKENS,
                    "hash_ids": [int(block) for block in row["hash_ids"]],
                    "model": None,
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(
                f"line {number} of the Mooncake trace lacks or spoils {error}; "
                "expected timestamp, input_length, output_length, hash_ids"
            ) from error
    return pl.DataFrame(rows, schema=ACCESSES_SCHEMA)


def _csv(data: bytes, format_name: str, columns: tuple[str, ...]) -> pl.DataFrame:
    try:
        frame = pl.read_csv(io.BytesIO(data), infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise TraceError(f"the {format_name} trace is not CSV: {error}") from error
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise TraceError(f"the {format_name} trace has no column {missing}; it has {frame.columns}")
    return frame


def _numbers(frame: pl.DataFrame, format_name: str, **columns: str) -> pl.DataFrame:
    """The named columns as Float64; the first value that is no number is an error with its line."""
    out = frame.select(
        **{name: pl.col(source).str.strip_chars().cast(pl.Float64, strict=False) for name, source in columns.items()}
    )
    for name, source in columns.items():
        bad = out[name].is_null() | out[name].is_nan()
        if bad.any():
            row = int(bad.arg_true()[0])
            raise TraceError(f"line {row + 2} of the {format_name} trace: {source} is {frame[source][row]!r}")
    return out


def read_azure(data: bytes) -> pl.DataFrame:
    """Azure LLM inference trace 2023 (TIMESTAMP, ContextTokens, GeneratedTokens) -> REQUESTS_SCHEMA from 0 ms."""
    frame = _csv(data, "Azure", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
    text = frame["TIMESTAMP"].str.strip_chars().str.replace(r"\+00:00$", "")  # the 2024 files name the zone
    at = text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="ns", strict=False)
    if at.null_count():
        row = int(at.is_null().arg_true()[0])
        raise TraceError(f"line {row + 2} of the Azure trace: TIMESTAMP is {frame['TIMESTAMP'][row]!r}")
    tokens = _numbers(frame, "Azure", input_tokens="ContextTokens", output_tokens="GeneratedTokens")
    first = at.min()
    return tokens.with_columns(timestamp_ms=(at - first).dt.total_milliseconds()).select(
        pl.col(name).cast(dtype) for name, dtype in REQUESTS_SCHEMA.items()
    )


def read_burstgpt(data: bytes) -> pl.DataFrame:
    """BurstGPT (Timestamp in s, Request tokens, Response tokens) -> REQUESTS_SCHEMA plus model.

    A response of 0 tokens is a failed request and stays in: it arrived.
    """
    frame = _csv(data, "BurstGPT", ("Timestamp", "Model", "Request tokens", "Response tokens"))
    numbers = _numbers(
        frame, "BurstGPT", seconds="Timestamp", input_tokens="Request tokens", output_tokens="Response tokens"
    )
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
            raise TraceError(f"line {number} of client {client}'s ServeGen trace is {line!r}: {error}") from error
        window = int(start) // SERVEGEN_LENGTH_WINDOW_SECONDS * SERVEGEN_LENGTH_WINDOW_SECONDS
        mean_input, mean_output = lengths.get(window, (None, None))
        rows.append(
            {
                "client": client,
                "window_start_seconds": int(start),
                "requests_per_second": rate,
                "interarrival_cv": spread if rate > 0 else None,
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
        raise TraceError(f"client {client}'s ServeGen length file cannot be read: {error}") from error


def _histogram_mean(text: str | dict[str, float] | None) -> float | None:
    """Mean of a histogram written as a Python dict in a string, {length: share}; None when it is empty."""
    if not text:
        return None
    histogram = ast.literal_eval(text) if isinstance(text, str) else text
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
            rows.append(
                {
                    "timestamp_ms": int(float(row["timestamp"]) * 1000),
                    "input_tokens": int(row["seq_len"]),
                    "output_tokens": None,
                    "block_size": int(row["chunk_size"]),
                    "hash_ids": [_id_of(chunk) for chunk in row["chunk_hashes"]],
                    "model": str(row.get("model_name", "")) or None,
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(
                f"line {number} of the LMCache lookup log lacks or spoils {error}; "
                "expected timestamp, seq_len, chunk_size, chunk_hashes"
            ) from error
    return pl.DataFrame(rows, schema=ACCESSES_SCHEMA)


def _id_of(chunk: str | int) -> int:
    digest = blake2b(str(chunk).lower().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def read_kv_events(data: bytes) -> pl.DataFrame:
    """Recorded KV events, one {"seq": n, "batch": [timestamp, events, rank]} a line -> `kv_cache.events.EVENTS_SCHEMA`.

    Token ids are dropped.
    """
    batches = []
    for number, row in _json_lines(data, "KV event"):
        batch = row.get("batch")
        if not isinstance(row.get("seq"), int) or not isinstance(batch, list) or len(batch) < 2:
            raise TraceError(f"line {number} of the KV event trace needs seq and batch [timestamp, events, rank]")
        batches.append((int(row["seq"]), batch))
    return kv_event_frame(batches)
