"""Recorded KV events of vLLM as a stream of frames: JSON lines, or ZMQ messages as they came, one after the other.

Here: the two kinds of file. What an event means is `optiinfra_pipelines.analysis.kv_cache.events`, which drops the
token ids: they are user text, and no frame that leaves this module has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import polars as pl

from optiinfra_pipelines.analysis.kv_cache.events import decode_kv_frames, kv_event_frame
from optiinfra_pipelines.analysis.traces import TraceError, read_kv_batches
from resources.traces.files import Progress, numbered, opened, pieces, require_format

BATCHES = 5_000  # messages of one frame
_JSON_STARTS = (b"{", b" ", b"\r", b"\n", b"\t", b"\xef")
_Batch = tuple[int, list[Any]]


def read_event_frames(path: Path, progress: Progress) -> Iterator[pl.DataFrame]:
    """Events in the order of the file (EVENTS_SCHEMA), checked to be of one run of one engine.

    A file that begins with `{` holds JSON lines; any other is msgpack: arrays [topic, sequence, payload] of bytes, as
    the socket gave them. Either holds events in either encoding. TraceError names file, line and remedy.
    """
    try:
        with path.open("rb") as raw:
            is_json = opened(raw, path).read(1) in _JSON_STARTS
    except IsADirectoryError:
        raise TraceError(f"{path} is a folder; name the file that the events were recorded in") from None
    except (OSError, EOFError) as error:
        raise TraceError(f"{path} cannot be read: {error}") from error
    last: dict[Any, int] = {}
    for batches in _lines(path, progress) if is_json else _messages(path, progress):
        for place, (sequence, batch) in batches:
            rank = batch[2] if len(batch) > 2 else None
            if sequence <= last.get(rank, -1):
                what = "comes twice: drop one of them" if sequence == last[rank] else (
                    f"follows {last[rank]}: the engine was started anew, or the file is out of order. Import each run "
                    "of an engine by itself: what its cache held is not known across one"
                )  # fmt: skip
                raise TraceError(f"{path}: {place}: sequence {sequence} {what}")
            last[rank] = sequence
        yield kv_event_frame([batch for _, batch in batches])


def _lines(path: Path, progress: Progress) -> Iterator[list[tuple[str, _Batch]]]:
    for first_line, piece in pieces(path, progress):
        if first_line == 1:
            require_format(path, "kv_events", piece)
        found = numbered(read_kv_batches, piece, first_line - 1, path)
        yield [(f"line {first_line - 1 + line}", batch) for line, batch in found]


def _messages(path: Path, progress: Progress) -> Iterator[list[tuple[str, _Batch]]]:
    """Whole messages; a last one that was cut short is an error."""
    size = max(path.stat().st_size, 1)
    batches: list[tuple[str, _Batch]] = []
    number = 0
    with path.open("rb") as raw:
        stream = opened(raw, path)
        try:
            unpacker: Any = msgpack.Unpacker(stream, raw=True)  # type: ignore[attr-defined,no-untyped-call]
            for number, message in enumerate(unpacker, start=1):
                if not isinstance(message, list) or not all(isinstance(part, bytes) for part in message):
                    raise ValueError("it is not [topic, sequence, payload]")
                batches.append((f"message {number}", decode_kv_frames(message)))
                if len(batches) == BATCHES:
                    yield batches
                    batches = []
                    progress(min(raw.tell() / size, 1.0))
            if stream.tell() > unpacker.tell():
                number += 1
                raise ValueError("the file ends in the middle of it; fetch it again")
        except (ValueError, msgpack.UnpackException) as error:
            raise TraceError(
                f"{path}: message {max(number, 1)} is no KV event message: {error}. A recording is JSON lines of seq "
                "and batch, or the socket's messages in msgpack"
            ) from error
        except (OSError, EOFError) as error:
            raise TraceError(f"{path} cannot be read: {error}") from error
    if batches:
        yield batches
    progress(1.0)
