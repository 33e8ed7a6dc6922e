"""Import a public trace into a warehouse of its own, as if its load had been scraped: never into the live one.

Here: the refusal, the rows, the models over them. Reading the files is `files`; analysis runs on the result as
on any other history. What is made: one target of one deployment, scraped once a minute, with its arrivals and tokens as
counters (source `recorded`, vantage `frontend`), ending at `ends_at`; beside it the block ids of every request
(`trace_accesses`) and the load of every client (`trace_clients`) where the format has them. KV events tell of no
request: they are kept as they are (`trace_kv_events`, without token ids), and of load nothing is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.trace_order import Succession
from optiinfra_pipelines.analysis.traces import TraceError
from optiinfra_pipelines.domain.base import Frozen
from optiinfra_pipelines.domain.fleet import Deployment, Fleet
from optiinfra_pipelines.sql.loader import load_models
from optiinfra_pipelines.sql.refresh import refresh_all
from optiinfra_pipelines.sql.sources import raw_tables
from resources.collectors import fleet_frames
from resources.traces.files import Progress, TraceFormat, read_client_loads, read_requests, succession
from resources.traces.kv_events import read_event_frames
from resources.warehouse import Warehouse

MARKER = "imported_trace.json"
MINUTE_MS = 60_000
BATCH_MINUTES = 2_000  # rows of one append: some 2 MB of frames
# The grid that load is forecast on; a trace that starts on it has no half-filled first step.
GRID = timedelta(minutes=10)
# Longer than any public trace of requests is; more is a timestamp of another kind (seconds for milliseconds, say).
MAX_DAYS = 400
_TABLES = """
create table if not exists trace_accesses (
    deployment varchar, request_at timestamptz, input_tokens bigint, output_tokens bigint, block_size bigint,
    hash_ids bigint[], place bigint);
create table if not exists trace_clients (
    deployment varchar, client bigint, period_at timestamptz, step_seconds double, requests_per_second double,
    demand_tokens_per_second double);
create table if not exists trace_kv_events (
    deployment varchar, place bigint, sequence bigint, event_index bigint, emitted_at timestamptz,
    data_parallel_rank bigint, event varchar, block_hash ubigint, parent_hash ubigint, block_size_tokens bigint,
    medium varchar);
"""


class ImportRefusedError(ValueError):
    """The folder is not one a trace may be put into; the message names it and the remedy."""


class ImportedTrace(Frozen):
    """What an import made; kept as JSON beside the warehouse. first_at to last_at: the load, in its new place."""

    source: str
    form: TraceFormat
    deployment: str
    model: str
    requests: int
    accesses: int
    clients: int
    kv_events: int = 0  # rows, one per event and block
    repeated: int = 0  # lines wholly the same as an earlier one of their time, kept
    unfinished: int = 0  # last lines of a log that its writer had not ended, left out
    first_at: datetime
    last_at: datetime

    @property
    def fleet(self) -> Fleet:
        return Fleet(deployments=(Deployment(name=self.deployment, model=self.model, price_usd_per_gpu_hour=None),))


@dataclass(frozen=True)
class _Minutes:
    """Load per minute from the first one on; requests are whole but for ServeGen, which has rates."""

    requests: np.ndarray[tuple[int], np.dtype[np.float64]]
    input_tokens: np.ndarray[tuple[int], np.dtype[np.float64]]
    output_tokens: np.ndarray[tuple[int], np.dtype[np.float64]] | None  # None where the format does not tell


def read_marker(home: Path) -> ImportedTrace | None:
    """What a folder holds; None when no import ended there."""
    try:
        return ImportedTrace.model_validate_json((home / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def require_separate(home: Path, live_home: Path) -> None:
    """Refuse the live state folder, one in or around it, and any folder that holds something already."""
    into, live = home.expanduser().resolve(), live_home.expanduser().resolve()
    if into == live or live in into.parents or into in live.parents:
        raise ImportRefusedError(
            f"{home} is, holds or lies in the live state folder {live_home}: a trace must not mix with a fleet's "
            "history; name a folder of its own"
        )
    if (into / MARKER).exists():
        held = read_marker(into)
        what = f"holds {held.source} already" if held else "holds an import that did not end"
        raise ImportRefusedError(f"{home} {what}; name another folder, or delete this one first")
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ImportRefusedError(f"{home} is not empty and no import of ours; name a new folder")


def import_trace(
    source: Path,
    form: TraceFormat,
    home: Path,
    *,
    live_home: Path,
    ends_at: datetime,
    deployment: str,
    model: str = "unknown",
    keep_duplicates: bool = False,
    progress: Progress = lambda share: None,
) -> ImportedTrace:
    """Read a trace into a new folder and bring its models up to date.

    ends_at: when the trace's last minute shall have ended (its length and shape are kept, its dates are not).
    model: as fleet.yaml would name it; a known one gives cache sizes in bytes. keep_duplicates: lines that are wholly
    the same are requests that look alike, not an error. Raises ImportRefusedError before anything is written,
    TraceError with file and line; then the folder is unfinished and says so.
    """
    require_separate(home, live_home)
    home.mkdir(parents=True, exist_ok=True)
    (home / MARKER).write_text("unfinished\n", encoding="utf-8")
    warehouse = Warehouse(home / "warehouse", clock=lambda: ends_at)
    with warehouse.connect() as connection:
        connection.execute(_TABLES)
    order = succession(form, keep_duplicates=keep_duplicates)
    minutes: _Minutes | None = None
    accesses = clients = kv_events = 0
    if form == "kv_events":
        first_at, last_at, kv_events = _kv_events(warehouse, source, deployment, ends_at, progress)
    elif form == "servegen":
        minutes, first_at, clients = _servegen(warehouse, source, deployment, ends_at, progress)
    else:
        minutes, first_at, accesses = _requests(warehouse, source, form, deployment, ends_at, order, progress)
    imported = ImportedTrace(
        source=str(source),
        form=form,
        deployment=deployment,
        model=model,
        requests=0 if minutes is None else round(float(minutes.requests.sum())),
        accesses=accesses,
        clients=clients,
        kv_events=kv_events,
        repeated=order.repeated,
        unfinished=order.unfinished,
        first_at=first_at,
        last_at=last_at if minutes is None else first_at + timedelta(minutes=len(minutes.requests)),
    )
    if minutes is not None:
        _append(warehouse, imported, minutes)
    warehouse.append("trace-fleet", fleet_frames(imported.fleet, imported.first_at))
    refresh_models(warehouse, imported.last_at)
    (home / MARKER).write_text(imported.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return imported


def refresh_models(warehouse: Warehouse, now: datetime) -> None:
    """Every model brought up to the end of the trace, and the read copy. Nothing else waits for this warehouse, so
    one connection does it all; and no row is put under retention: a trace is kept as long as its folder.
    """
    models = load_models()
    with warehouse.connect() as connection:
        refresh_all(connection, models, now)
    warehouse.publish()


def _start(ends_at: datetime, minutes: int) -> datetime:
    """The latest start on the grid from which so many minutes end by ends_at."""
    begun = ends_at.astimezone(UTC) - timedelta(minutes=minutes)
    epoch = datetime.fromtimestamp(0, UTC)
    return epoch + (begun - epoch) // GRID * GRID


def _kv_events(
    warehouse: Warehouse, source: Path, deployment: str, ends_at: datetime, progress: Progress
) -> tuple[datetime, datetime, int]:
    """KV events at their distance from the first one: begin and end in their new place, and how many rows."""
    rows = 0
    first = last = None
    for frame in read_event_frames(source, progress):
        if frame.is_empty():
            continue
        begun, ended = frame["emitted_at"].min(), frame["emitted_at"].max()
        assert isinstance(begun, datetime)
        assert isinstance(ended, datetime)
        first, last = min(first or begun, begun), max(last or ended, ended)
        with warehouse.connect() as connection:
            connection.register("events", frame.with_columns(place=pl.int_range(rows, rows + frame.height)))
            connection.execute("insert into trace_kv_events by name select ? deployment, * from events", [deployment])
            connection.unregister("events")
        rows += frame.height
    if first is None or last is None:
        raise TraceError(f"{source} holds no event; was anything published while it was recorded?")
    _require_span(source, "kv_events", (last - first).total_seconds() / 60)
    first_at = _start(ends_at, int((last - first).total_seconds() // 60) + 1)
    with warehouse.connect() as connection:
        connection.execute("update trace_kv_events set emitted_at = emitted_at + ?", [first_at - first])
    return first_at, last + (first_at - first), rows


def _require_span(source: Path, form: TraceFormat, minutes: float) -> None:
    if minutes > MAX_DAYS * 1440:
        raise TraceError(f"{source} spans {minutes // 1440:.0f} days; are its times in the unit of the {form} format?")


def _requests(
    warehouse: Warehouse,
    source: Path,
    form: TraceFormat,
    deployment: str,
    ends_at: datetime,
    order: Succession,
    progress: Progress,
) -> tuple[_Minutes, datetime, int]:
    """Load per minute of a trace of requests; their block ids go into the warehouse as they are read."""
    sums: list[pl.DataFrame] = []
    accesses = 0
    knows_output = True
    for frame in read_requests(source, form, progress, order):
        if frame.is_empty():
            continue
        knows_output &= frame["output_tokens"].null_count() == 0
        sums.append(
            frame.group_by(minute=pl.col("timestamp_ms") // MINUTE_MS).agg(
                requests=pl.len(), input=pl.col("input_tokens").sum(), output=pl.col("output_tokens").sum()
            )
        )
        if "hash_ids" in frame.columns:
            _keep_accesses(warehouse, frame, deployment, accesses)
            accesses += frame.height
    if not sums:
        raise TraceError(f"{source} holds no request; is it the whole file?")
    loads = pl.concat(sums).group_by("minute").agg(pl.col("requests", "input", "output").sum()).sort("minute")
    first, last = int(loads["minute"][0]), int(loads["minute"][-1])
    count = last - first + 1
    _require_span(source, form, count)
    place = (loads["minute"] - first).to_numpy()
    arrays = [np.zeros(count) for _ in range(3)]
    for array, name in zip(arrays, ("requests", "input", "output"), strict=True):
        array[place] = loads[name].cast(pl.Float64).to_numpy()
    first_at = _start(ends_at, count)
    with warehouse.connect() as connection:  # until now relative to the file's own zero
        connection.execute(
            "update trace_accesses set request_at = request_at + to_microseconds(?)",
            [round((first_at.timestamp() - first * 60) * 1e6)],
        )
    return _Minutes(arrays[0], arrays[1], arrays[2] if knows_output else None), first_at, accesses


def _keep_accesses(warehouse: Warehouse, frame: pl.DataFrame, deployment: str, before: int) -> None:
    rows = frame.with_columns(place=pl.int_range(before, before + frame.height))
    with warehouse.connect() as connection:
        connection.register("accesses", rows)
        connection.execute(
            "insert into trace_accesses select ?, make_timestamptz(timestamp_ms * 1000), input_tokens, output_tokens, "
            "block_size, hash_ids, place from accesses",
            [deployment],
        )
        connection.unregister("accesses")


def _servegen(
    warehouse: Warehouse, source: Path, deployment: str, ends_at: datetime, progress: Progress
) -> tuple[_Minutes, datetime, int]:
    """A fleet of rates per window as load per minute. Clients whose lengths are not published take the fleet's mean."""
    loads = read_client_loads(source, progress)
    starts = loads["window_start_seconds"].unique().sort()
    if len(starts) < 2:
        raise TraceError(f"{source} has {len(starts)} windows; a load needs at least two")
    steps = (starts - starts.shift(1)).drop_nulls()
    step = int(steps[0])
    if steps.n_unique() > 1 or step % 60:
        raise TraceError(
            f"{source} has windows {sorted(steps.unique().to_list())[:3]} s apart; they must follow each other at one "
            "step of whole minutes. A window that is missing is not a quiet one: fetch the fleet again"
        )
    weight, rate = pl.col("requests_per_second"), pl.col("requests_per_second").sum()
    filled = loads.with_columns(
        (
            pl.col(name)
            .fill_nan(None)
            .fill_null((pl.col(name).fill_nan(None) * weight).sum() / weight.filter(pl.col(name).is_not_nan()).sum())
        ).alias(name)
        for name in ("mean_input_tokens", "mean_output_tokens")
    )
    fleet = (
        filled.group_by("window_start_seconds")
        .agg(
            requests=rate,
            input=(weight * pl.col("mean_input_tokens")).sum(),
            output=(weight * pl.col("mean_output_tokens")).sum(),
        )
        .sort("window_start_seconds")
    )
    first = int(starts[0])
    windows = (int(starts[-1]) - first) // step + 1
    per_window = step // 60
    first_at = _start(ends_at, windows * per_window)
    arrays = [np.zeros(windows) for _ in range(3)]
    place = ((fleet["window_start_seconds"] - first) // step).to_numpy()
    for array, name in zip(arrays, ("requests", "input", "output"), strict=True):
        array[place] = fleet[name].to_numpy() * 60
    with warehouse.connect() as connection:
        connection.register(
            "clients",
            filled.select(
                "client",
                seconds=pl.col("window_start_seconds") - first,
                rate=weight,
                tokens=weight * (pl.col("mean_input_tokens") + pl.col("mean_output_tokens")),
            ),
        )
        connection.execute(
            "insert into trace_clients select ?, client, ?::timestamptz + to_seconds(seconds), ?, rate, tokens "
            "from clients",
            [deployment, first_at, float(step)],
        )
        connection.unregister("clients")
    requests, tokens_in, tokens_out = (np.repeat(array, per_window) for array in arrays)
    return _Minutes(requests, tokens_in, tokens_out), first_at, loads["client"].n_unique()


def _append(warehouse: Warehouse, imported: ImportedTrace, minutes: _Minutes) -> None:
    """The load as raw rows: a scrape half a second before each minute's end, its counters at the sum until then."""
    count = len(minutes.requests)
    half = timedelta(milliseconds=500)
    for start in range(0, count + 1, BATCH_MINUTES):
        places = range(start, min(start + BATCH_MINUTES, count + 1))
        at = [imported.first_at + timedelta(minutes=place) - half for place in places]
        totals = {
            name: np.concatenate([[0.0], np.cumsum(values)])[places.start : places.stop]
            for name, values in (
                ("requests_started_total", minutes.requests),
                ("prompt_tokens_total", minutes.input_tokens),
                ("generation_tokens_total", minutes.output_tokens),
            )
            if values is not None
        }
        common = {"scraped_at": at, "target": "trace", "engine": "trace", "vantage": "frontend"}
        scrapes = pl.DataFrame(
            common | {"deployment": imported.deployment, "source": "recorded", "is_up": True, "attempt": 0},
            schema_overrides=_types("raw_scrapes", (*common, "deployment", "source", "is_up", "attempt")),
        )
        samples = pl.DataFrame(
            common | {"engine_rank": "0", "model_name": imported.model} | totals,
            schema_overrides=_types("raw_engine_samples", (*common, "engine_rank", "model_name", *totals)),
        )
        warehouse.append(f"trace-{start}", {"raw_scrapes": scrapes, "raw_engine_samples": samples})


def _types(table: str, columns: tuple[str, ...]) -> dict[str, pl.DataType | type[pl.DataType]]:
    return {name: raw_tables()[table].columns[name].polars_type for name in columns}
