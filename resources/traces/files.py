"""Public trace files, however large, as a stream of frames: Mooncake, Azure, BurstGPT, LMCache lookups, ServeGen.

Here: reading in pieces of whole lines, plain or gzip, and line numbers of the whole file in errors. What a line means
is `optiinfra_pipelines.analysis.traces`; where the rows go is `importer`.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Literal

import polars as pl

from optiinfra_pipelines.analysis.traces import (
    CLIENT_LOAD_SCHEMA,
    TraceError,
    read_azure,
    read_burstgpt,
    read_lmcache_lookups,
    read_mooncake,
    read_servegen_client,
)

TraceFormat = Literal["mooncake", "azure", "burstgpt", "lmcache", "servegen"]
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

Progress = Callable[[float], None]


def read_requests(path: Path, form: TraceFormat, progress: Progress) -> Iterator[pl.DataFrame]:
    """The requests of a trace in the order of the file, a piece at a time.

    Columns timestamp_ms (of the file's own zero; Azure: from its first line), input_tokens, output_tokens, and
    block_size and hash_ids where the format has them. progress: called with the share read, 0 to 1. TraceError names
    file and line.
    """
    header = b""
    anchor = b""
    for first_line, piece in _pieces(path, progress):
        try:
            if form in _JSON_READERS:
                yield _numbered(_JSON_READERS[form], piece, first_line - 1, path)
                continue
            rows, at = piece, first_line
            if not header:
                header, _, rows = piece.partition(b"\n")
                header, at = header + b"\n", 2
            if not rows.strip():
                continue
            if form == "burstgpt":
                yield _numbered(read_burstgpt, header + rows, at - 2, path)
                continue
            # The reader counts from its earliest row: with the file's first row before every piece, that is known.
            anchor = anchor or rows.lstrip(b"\r\n").partition(b"\n")[0] + b"\n"
            frame = _numbered(read_azure, header + anchor + rows, at - 3, path)
            yield frame[1:].with_columns(pl.col("timestamp_ms") - frame["timestamp_ms"][0])
        except pl.exceptions.PolarsError as error:
            raise TraceError(f"{path} near line {first_line} is not a {form} trace: {error}") from error


def _numbered(reader: Callable[[bytes], pl.DataFrame], data: bytes, lines_before: int, path: Path) -> pl.DataFrame:
    try:
        return reader(data)
    except TraceError as error:
        message = _LINE.sub(lambda found: f"line {int(found.group(1)) + lines_before}", str(error), count=1)
        raise TraceError(f"{path}: {message}") from error


def _pieces(path: Path, progress: Progress) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, whole lines) until the file ends."""
    try:
        size = max(path.stat().st_size, 1)
        with path.open("rb") as raw:
            stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw  # type: ignore[assignment]
            line, rest = 1, b""
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
        raise TraceError(f"{path} is a folder; name the trace's file (a folder is for servegen)") from None
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        raise TraceError(f"{path} cannot be read: {error}") from error
    progress(1.0)


def read_client_loads(folder: Path, progress: Progress) -> pl.DataFrame:
    """A ServeGen folder (chunk-<client>-trace.csv with chunk-<client>-dataset.json) -> CLIENT_LOAD_SCHEMA."""
    if not folder.is_dir():
        raise TraceError(f"{folder} is no folder; a ServeGen fleet is a folder of chunk-<client>-trace.csv files")
    named = ((_CLIENT_FILE.search(path.name), path) for path in folder.iterdir())
    found = sorted((int(match.group(1)), path) for match, path in named if match)
    if not found:
        raise TraceError(f"{folder} holds no chunk-<client>-trace.csv; name a fleet's folder, such as language/m-large")
    frames = [pl.DataFrame(schema=CLIENT_LOAD_SCHEMA)]
    for place, (client, path) in enumerate(found, start=1):
        lengths = path.with_name(f"chunk-{client}-dataset.json")
        try:
            dataset = lengths.read_bytes() if lengths.is_file() else None
            data = path.read_bytes()
        except OSError as error:
            raise TraceError(f"{path} cannot be read: {error}") from error
        reader = partial(_client, client, dataset)
        frames.append(_numbered(reader, data, 0, path))
        progress(place / len(found))
    return pl.concat(frames)


def _client(client: int, dataset: bytes | None, data: bytes) -> pl.DataFrame:
    return read_servegen_client(client, data, dataset)
