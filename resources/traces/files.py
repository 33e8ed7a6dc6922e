"""Public trace files, however large, as a stream of frames: Mooncake, Azure, BurstGPT, LMCache lookups, ServeGen.

Here: reading in pieces of whole lines, plain or gzip, and line numbers of the whole file in errors. What a line means
is `optiinfra_pipelines.analysis.traces`; vLLM's KV events are `kv_events`; where the rows go is `importer`.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Literal, TypeVar

import polars as pl

from optiinfra_pipelines.analysis.trace_order import COARSE_CLOCKS, SLACK_MS, Succession
from optiinfra_pipelines.analysis.traces import (
    CLIENT_LOAD_SCHEMA,
    TraceError,
    read_azure,
    read_burstgpt,
    read_lmcache_lookups,
    read_mooncake,
    read_servegen_client,
)

TraceFormat = Literal["mooncake", "azure", "burstgpt", "lmcache", "servegen", "kv_events"]
# A piece is held as bytes, as Python rows and as a frame: some 20 times this much memory at the peak.
PIECE_BYTES = 8 * 2**20
# A line longer than this is no line of a trace (the longest Mooncake prompts take some 10 kB).
MAX_LINE_BYTES = 64 * 2**20
_JSON_READERS: dict[str, Callable[[bytes], pl.DataFrame]] = {
    "mooncake": read_mooncake,
    "lmcache": read_lmcache_lookups,
}
_LINE = re.compile(r"\bline (\d+)\b")
_CLIENT_FILE = re.compile(r"chunk-(\d+)-trace\.csv$")
# Files that are no text: their first bytes, and what to do with them.
_KINDS = {
    b"PAR1": "a Parquet file; write it out as the format was published, such as polars' read_parquet and write_ndjson",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first, or compress it with gzip",
    b"BZh": "compressed with bzip2; unpack it first, or compress it with gzip",
    b"\xfd7zXZ": "compressed with xz; unpack it first, or compress it with gzip",
}
_GZIP = b"\x1f\x8b"
# What the first line of a format holds and no other's does.
_MARKS: dict[TraceFormat, bytes] = {
    "azure": b"ContextTokens",
    "burstgpt": b"Request tokens",
    "mooncake": b'"hash_ids"',
    "lmcache": b'"chunk_hashes"',
    "kv_events": b'"batch"',
}

Progress = Callable[[float], None]
_Read = TypeVar("_Read")


def succession(form: TraceFormat, *, keep_duplicates: bool = False) -> Succession:
    """What to check a trace of this format with."""
    return Succession(keeps_repeats=keep_duplicates or form in COARSE_CLOCKS, slack_ms=SLACK_MS.get(form, 0))


def read_requests(
    path: Path, form: TraceFormat, progress: Progress, order: Succession | None = None
) -> Iterator[pl.DataFrame]:
    """The requests of a trace in the order of the file, a piece at a time.

    path: a file; for lmcache also the folder of a rotated log. Columns timestamp_ms (of the file's own zero; Azure:
    from its first line), input_tokens, output_tokens, and block_size and hash_ids where the format has them.
    progress: called with the share read, 0 to 1. order: checks that time does not fall and no line comes twice; None:
    not asked. TraceError names file, line and remedy.
    """
    files = _rotated(path) if form == "lmcache" and path.is_dir() else [path]
    for place, file in enumerate(files):
        yield from _file(file, form, partial(_of_many, progress, place, len(files)), order)


def _of_many(progress: Progress, place: int, files: int, share: float) -> None:
    progress((place + share) / files)


def _rotated(folder: Path) -> list[Path]:
    """The files of a log in the order they were begun: their names carry the time."""
    found = sorted(path for path in folder.iterdir() if re.search(r"\.jsonl(\.gz)?$", path.name))
    if not found:
        raise TraceError(f"{folder} holds no .jsonl file; name the folder that --lookup-hash-log-dir names, or a file")
    return found


def _file(path: Path, form: TraceFormat, progress: Progress, order: Succession | None) -> Iterator[pl.DataFrame]:
    header = b""
    anchor = b""
    for first_line, piece in pieces(path, progress):
        if first_line == 1:
            require_format(path, form, piece)
        try:
            if form in _JSON_READERS:
                frame = numbered(_JSON_READERS[form], piece, first_line - 1, path)
                yield _in_order(order, frame, piece, first_line, path)
                continue
            rows, at = piece, first_line
            if not header:
                header, _, rows = piece.partition(b"\n")
                header, at = header + b"\n", 2
            if not rows.strip():
                continue
            if form == "burstgpt":
                frame = numbered(read_burstgpt, header + rows, at - 2, path)
            elif not anchor:
                anchor = rows.lstrip(b"\r\n").partition(b"\n")[0] + b"\n"
                frame = numbered(read_azure, header + rows, at - 2, path)
                frame = frame.with_columns(pl.col("timestamp_ms") - frame["timestamp_ms"][0])
            else:
                # The reader counts from its earliest row: with the file's first row before the piece, that is known.
                frame = numbered(read_azure, header + anchor + rows, at - 3, path)
                frame = frame[1:].with_columns(pl.col("timestamp_ms") - frame["timestamp_ms"][0])
            yield _in_order(order, frame, rows, at, path)
        except pl.exceptions.PolarsError as error:
            raise TraceError(f"{path} near line {first_line} is not a {form} trace: {error}") from error


def require_format(path: Path, form: TraceFormat, piece: bytes) -> None:
    """TraceError where the first line is plainly of another format."""
    first = piece.partition(b"\n")[0]
    if _MARKS.get(form, b"") not in first:
        for other, mark in _MARKS.items():
            if mark in first:
                raise TraceError(
                    f"{path}: line 1 has no column of {form} but one of {other}: import it with --format {other}"
                )


def _in_order(order: Succession | None, frame: pl.DataFrame, piece: bytes, first_line: int, path: Path) -> pl.DataFrame:
    """A frame has one row for each line that is not blank; a last one that a writer had not ended is left out."""
    if order is None:
        return frame
    lines = [(number, line) for number, line in enumerate(piece.splitlines(), first_line) if line.strip()]
    numbers, texts = [number for number, _ in lines], [line for _, line in lines]
    try:
        order.unfinished += len(texts) - frame.height
        return frame.with_columns(order.check(frame["timestamp_ms"], texts[: frame.height], numbers))
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error


def numbered(reader: Callable[[bytes], _Read], data: bytes, lines_before: int, path: Path) -> _Read:
    """What the reader made of the piece; its TraceError with the file and the line of the file."""
    try:
        return reader(data)
    except TraceError as error:
        message = _LINE.sub(lambda found: f"line {int(found.group(1)) + lines_before}", str(error), count=1)
        raise TraceError(f"{path}: {message}") from error


def pieces(path: Path, progress: Progress) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, whole lines) until the file ends. TraceError for what cannot be read or is no text."""
    try:
        size = max(path.stat().st_size, 1)
        with path.open("rb") as raw:
            line, rest = 1, b""
            stream = opened(raw, path)
            while True:
                read = stream.read(PIECE_BYTES)
                if not read:
                    break
                whole, newline, tail = (rest + read).rpartition(b"\n")
                if not newline:
                    rest = tail
                    if len(rest) > MAX_LINE_BYTES:
                        raise TraceError(f"{path}: line {line} is over {MAX_LINE_BYTES} bytes; is it a trace in text?")
                    continue
                rest = tail
                yield line, whole + newline
                line += whole.count(b"\n") + 1
                progress(min(raw.tell() / size, 1.0))
            if rest:
                yield line, rest
    except IsADirectoryError:
        raise TraceError(f"{path} is a folder; name the trace's file (a folder is for servegen and lmcache)") from None
    except EOFError as error:
        raise TraceError(f"{path} was cut short: {error}; fetch it again") from error
    except (OSError, gzip.BadGzipFile) as error:
        raise TraceError(f"{path} cannot be read: {error}") from error
    progress(1.0)


def opened(raw: IO[bytes], path: Path) -> IO[bytes]:
    """The file's content, unpacked if it is gzip. TraceError for other archives, with what to do."""
    begin = raw.read(6)
    raw.seek(0)
    for mark, what in _KINDS.items():
        if begin.startswith(mark):
            raise TraceError(f"{path} is {what}")
    if begin.startswith(_GZIP):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.suffix == ".gz" and begin:
        raise TraceError(f"{path} is named .gz and is not gzip; fetch it again, or name it as what it is")
    return raw


def read_client_loads(folder: Path, progress: Progress) -> pl.DataFrame:
    """A ServeGen folder (chunk-<client>-trace.csv with chunk-<client>-dataset.json) -> CLIENT_LOAD_SCHEMA.

    Every client has the same windows, as published; one that lacks some was cut short, and is an error.
    """
    if not folder.is_dir():
        raise TraceError(f"{folder} is no folder; a ServeGen fleet is a folder of chunk-<client>-trace.csv files")
    named = ((_CLIENT_FILE.search(path.name), path) for path in folder.iterdir())
    found = sorted((int(match.group(1)), path) for match, path in named if match)
    if not found:
        raise TraceError(f"{folder} holds no chunk-<client>-trace.csv; name a fleet's folder, such as language/m-large")
    frames = []
    for place, (client, path) in enumerate(found, start=1):
        lengths = path.with_name(f"chunk-{client}-dataset.json")
        try:
            dataset = lengths.read_bytes() if lengths.is_file() else None
            data = path.read_bytes()
        except OSError as error:
            raise TraceError(f"{path} cannot be read: {error}") from error
        reader = partial(_client, client, dataset)
        frames.append(numbered(reader, data, 0, path))
        progress(place / len(found))
    windows = max(frames, key=lambda frame: frame.height)["window_start_seconds"]
    for (_, path), frame in zip(found, frames, strict=True):
        own = frame["window_start_seconds"]
        if not own.equals(windows):
            lacking = sorted({*windows.to_list()} ^ {*own.to_list()})
            raise TraceError(
                f"{path} has {len(own)} windows, the longest file of the folder {len(windows)}; they differ first at "
                f"{lacking[0]} s. Fetch it again, or leave this client out by moving its file away"
            )
    return pl.concat([pl.DataFrame(schema=CLIENT_LOAD_SCHEMA), *frames])


def _client(client: int, dataset: bytes | None, data: bytes) -> pl.DataFrame:
    return read_servegen_client(client, data, dataset)
