"""Recorded phases of real engines give the finding of what really happened to them, and no other."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

import duckdb
import polars as pl
import pytest

from optiinfra_pipelines.analysis.findings.diagnosis import LOAD_KINDS, diagnose
from optiinfra_pipelines.analysis.findings.window import EngineWindow
from optiinfra_pipelines.domain.findings import Diagnosis, FindingKind
from optiinfra_pipelines.domain.thresholds import threshold_values
from optiinfra_pipelines.sql.loader import load_models
from optiinfra_pipelines.sql.models import Models
from tests.analysis.findings_recordings import (
    EPOCH,
    RECORDINGS,
    five_minutes,
    frames,
    going_on,
    pages_of,
    phase,
    scraped_at,
    window_of,
)

VALUES = threshold_values({})
VLLM = "vllm/0.32.0/small_llama_kv8k"
LLAMA = "llama.cpp/debian-1_0.7.0-b11669/small_np4_c8192"
DYNAMO = "dynamo/1.6.1/frontend_kv_router_mocker"
SNAPSHOTS = [f"vllm/{release}/v0_collectors_in_process" for release in ("0.6.6.post1", "0.7.3", "0.8.5")]
SNAPSHOTS.append("sglang/0.5.23/collectors_in_process")

# What really happened, as who recorded it says: (kind, cause) of every finding.
TRUTH: dict[str, set[tuple[str, str]]] = {
    f"{VLLM}/01_idle": set(),
    f"{VLLM}/02_light_c1": set(),
    f"{VLLM}/03_loaded_shared_prefix_c8": set(),
    f"{VLLM}/04_kv_pressure_preempt_c16": {("MEMORY_PRESSURE", "preemptions")},
    f"{VLLM}/05_overload_queue_c64_low_kv": {("QUEUE_BUILDUP", "batch_slot_bound")},
    f"{VLLM}/06_drained_idle": set(),
    # A prompt too long, an unknown model, a client that left: mistakes of clients, which every healthy server sees.
    f"{VLLM}/07_errors_aborts_admin": set(),
    f"{VLLM}/08_sigterm": set(),
    f"{VLLM}/09_after_restart": {("RESTARTED", "first_seen_fresh")},
    # Requests that a draining server refuses are the error objective's matter; the replica itself is at rest.
    f"{VLLM}/10_sigterm_shutdown_timeout20": set(),
    f"{LLAMA}/01_idle": set(),
    f"{LLAMA}/02_light_c1": set(),
    f"{LLAMA}/03_shared_prefix_c4": set(),
    f"{LLAMA}/04_overload_deferred_c24": {("QUEUE_BUILDUP", "batch_slot_bound")},
    f"{LLAMA}/05_drained_idle": set(),
    f"{DYNAMO}/01_idle": set(),
    f"{DYNAMO}/02_light_c1": set(),
    f"{DYNAMO}/03_shared_prefix_c8": set(),
    f"{DYNAMO}/04_overload_c64": {("QUEUE_BUILDUP", "workers_full")},
    f"{DYNAMO}/05_drained_idle": set(),
    f"{DYNAMO}/worker": {("MEMORY_PRESSURE", "preemptions")},
    "dynamo/1.6.1/mocker_vllm_kv/02_light_c1": set(),
    "dynamo/1.6.1/mocker_vllm_kv/04_kv_pressure": {("MEMORY_PRESSURE", "preemptions")},
    "dynamo/1.6.1/mocker_vllm_slots/03_shared_prefix_c6": set(),
    "dynamo/1.6.1/mocker_vllm_slots/05_overload_slots": {("QUEUE_BUILDUP", "batch_slot_bound")},
    "dynamo/1.6.1/mocker_vllm_dp2/05_overload_slots": {("QUEUE_BUILDUP", "batch_slot_bound")},
    # No KV usage on the page: that the blocks are what is short cannot be told.
    "dynamo/1.6.1/mocker_sglang_kv/04_kv_pressure": {("QUEUE_BUILDUP", "unattributed")},
    "dynamo/1.6.1/mocker_sglang_slots/05_overload_slots": {("QUEUE_BUILDUP", "batch_slot_bound")},
    "dynamo/1.6.1/mocker_trtllm_kv/03_shared_prefix_c6": set(),
    # Requests wait for blocks that are reserved and not yet used: usage and slots both look free.
    "dynamo/1.6.1/mocker_trtllm_kv/04_kv_pressure": {("QUEUE_BUILDUP", "unattributed")},
    "dynamo/1.6.1/mocker_trtllm_kv/06_drained_idle": set(),
    "dynamo/1.6.1/mocker_trtllm_slots/05_overload_slots": {("QUEUE_BUILDUP", "batch_slot_bound")},
    "dynamo/1.6.1/mocker_engine_type_sglang/overload_c48": {("QUEUE_BUILDUP", "workers_full")},
    # A cache at its watermark that evicts and answers as before is doing its work.
    "lmcache/0.5.6/mp_server_cpu": set(),
}


def recorded(folder: str) -> Path:
    """A recording of the project, or of the whole set, or a skip that says what to set."""
    if (RECORDINGS / folder).is_dir():
        return RECORDINGS / folder
    data = os.environ.get("OPTIINFRA_DATA")
    if not data:
        pytest.skip("OPTIINFRA_DATA is unset: it names the folder with the whole set of recordings")
    return Path(data) / "fixtures" / folder


def told(diagnosis: Diagnosis) -> set[tuple[str, str]]:
    return {(finding.kind.value, finding.cause) for finding in diagnosis.findings}


@pytest.mark.parametrize("folder", TRUTH)
def test_a_recorded_phase_gives_its_finding_and_no_other(folder: str) -> None:
    """The verdict on a whole phase is what whoever recorded it had done to the server."""
    assert told(diagnose(phase(recorded(folder)), VALUES)) == TRUTH[folder]


@pytest.mark.parametrize("folder", [f for f in TRUTH if f.startswith(VLLM)])
def test_the_whole_set_of_pages_gives_the_same(folder: str) -> None:
    """The project keeps some scrapes of each phase; the whole recording says the same."""
    data = os.environ.get("OPTIINFRA_DATA")
    if not data:
        pytest.skip("OPTIINFRA_DATA is unset: it names the folder with the whole set of recordings")

    assert told(diagnose(phase(Path(data) / "fixtures" / folder), VALUES)) == TRUTH[folder]


@pytest.mark.parametrize("folder", SNAPSHOTS)
@pytest.mark.parametrize(
    ("name", "truth"),
    [
        ("01_idle", set()),
        ("02_light_c1", set()),
        ("03_loaded_shared_prefix_c8", set()),
        ("04_kv_pressure_preempt_c16", {"MEMORY_PRESSURE"}),
        ("05_overload_queue_c64_low_kv", {"QUEUE_BUILDUP"}),
        ("06_drained_idle", set()),
    ],
)
def test_a_snapshot_and_the_one_before_are_enough(folder: str, name: str, truth: set[str]) -> None:
    """Older releases and SGLang are known from one page a phase: counters between two pages stand for duration."""
    data = os.environ.get("OPTIINFRA_DATA")
    root = Path(data) / "fixtures" / folder if data else RECORDINGS / folder
    pages = pages_of(root)
    places = [place for place, page in enumerate(pages) if page.stem == name]
    if not places or (places[0] == 0 and name != "01_idle") or len(pages) == 1:
        pytest.skip(f"{folder} has no {name} with a page before it here")
    pair = [(page, scraped_at(page, place)) for place, page in enumerate(pages) if places[0] - 1 <= place <= places[0]]

    assert {finding.kind.value for finding in diagnose(window_of(frames(pair)), VALUES).findings} == truth


def test_consequences_of_memory_pressure_are_named_in_it() -> None:
    """The queue of the KV-pressure phase waits for blocks: it is told inside the finding, with its evidence."""
    [finding] = diagnose(phase(RECORDINGS / VLLM / "04_kv_pressure_preempt_c16"), VALUES).findings

    assert [(effect.kind, effect.cause) for effect in finding.consequences] == [(FindingKind.QUEUE_BUILDUP, "kv_bound")]
    values = {signal.name: signal.value for signal in finding.evidence}
    assert values["preemptions"] == 14
    assert values["kv_cache_usage"] == 1.0
    queue_seconds = values["mean_queue_time"]
    assert queue_seconds is not None
    assert queue_seconds > VALUES["queue_wait_seconds"]


def test_two_troubles_at_different_times_are_two_findings() -> None:
    """A window over all phases holds the KV pressure and, after it, the queue for batch slots: both are told."""
    names = ("01_idle", "02_light_c1", "03_loaded_shared_prefix_c8", "04_kv_pressure_preempt_c16")
    folders = [RECORDINGS / VLLM / name for name in (*names, "05_overload_queue_c64_low_kv", "06_drained_idle")]

    found = diagnose(phase(*folders), VALUES).findings

    assert [finding.cause for finding in found] == ["preemptions", "batch_slot_bound"]
    assert found[0].until is not None
    assert found[0].until <= found[1].since


def test_a_restart_is_seen_across_it() -> None:
    """With the old process's last page before it, the new process is a restart at its own start time."""
    folders = [
        RECORDINGS / VLLM / name for name in ("06_drained_idle", "09_after_restart", "09_after_restart/light_c2")
    ]

    [finding] = diagnose(phase(*folders), VALUES).findings

    assert (finding.kind, finding.cause) == (FindingKind.RESTARTED, "process_restart")
    assert finding.since == datetime.fromisoformat("2026-11-20T15:15:30.390000+00:00")


QUIET = (
    *(f"{VLLM}/01_idle", f"{VLLM}/02_light_c1", f"{VLLM}/06_drained_idle"),
    *(f"{LLAMA}/01_idle", f"{LLAMA}/05_drained_idle"),
    *(f"{DYNAMO}/01_idle", f"{DYNAMO}/05_drained_idle"),
)


@pytest.mark.parametrize("folder", QUIET)
def test_half_an_hour_of_quiet_pages_gives_no_finding(folder: str) -> None:
    """Idle, light and drained pages, on and on for 30 minutes, judged every 2 minutes on 5: nothing is wrong."""
    tables = going_on(RECORDINGS / folder, timedelta(minutes=30))
    found = set()
    for minute in range(5, 31, 2):
        end = EPOCH + timedelta(minutes=minute)
        found |= told(diagnose(five_minutes(tables, end), VALUES))

    assert found == set()


def test_pages_that_go_on_keep_their_rate_and_show_no_restart() -> None:
    """Half an hour of the light phase makes tokens at the phase's own rate, and no counter ever falls."""
    once = frames([(page, scraped_at(page, 0)) for page in pages_of(RECORDINGS / VLLM / "02_light_c1")])
    tables = going_on(RECORDINGS / VLLM / "02_light_c1", timedelta(minutes=30))

    def rate(samples: pl.DataFrame) -> float:
        span = samples["scraped_at"][-1] - samples["scraped_at"][0]
        return float(samples["generation_tokens_total"][-1] - samples["generation_tokens_total"][0]) / float(
            span.total_seconds()
        )

    made = tables["raw_engine_samples"]
    assert rate(made) == pytest.approx(rate(once["raw_engine_samples"]), rel=0.02)
    assert made["generation_tokens_total"].is_sorted()
    assert tables["raw_engine_histograms"].filter(pl.col("metric") == "queue_seconds")["count_value"].is_sorted()


@pytest.mark.parametrize("folder", [f for f, truth in TRUTH.items() if truth])
def test_every_evidence_row_can_be_fetched_again(folder: str) -> None:
    """A finding's SQL, run over the stored rows, gives each of its values."""
    window = phase(recorded(folder))
    diagnosis = diagnose(window, VALUES)
    with stored(window) as connection:
        for finding in diagnosis.findings:
            assert finding.evidence
            for signal in finding.evidence:
                [(value,)] = connection.execute(signal.sql()).fetchall()
                assert value == pytest.approx(signal.value), signal.name


@cache
def _models() -> Models:
    return load_models()


def stored(window: EngineWindow) -> duckdb.DuckDBPyConnection:
    """A database with the rows of a window under the names that evidence gives."""
    connection = duckdb.connect()
    raw = {
        "raw_scrapes": window.scrapes,
        "raw_engine_samples": window.samples,
        "raw_engine_histograms": window.histograms,
        "raw_histogram_bounds": pl.DataFrame(
            {"bounds_id": list(window.bounds), "upper_bounds": [list(bounds) for bounds in window.bounds.values()]},
            schema={"bounds_id": pl.UInt64, "upper_bounds": pl.List(pl.Float64)},
        ),
    }
    models = _models()
    for name, frame in raw.items():
        connection.register("rows_", frame)
        connection.execute(f"create table {name} as select * from rows_")
        staged = name.replace("raw_", "stg_")
        connection.execute(f"create view {staged} as {models[staged].sql}")
    return connection


def test_one_page_alone_is_no_verdict() -> None:
    """From a single overloaded page no counter can be seen to move: every load kind abstains, none is declared fine."""
    page = pages_of(RECORDINGS / VLLM / "05_overload_queue_c64_low_kv")[3]

    diagnosis = diagnose(window_of(frames([(page, EPOCH)])), VALUES)

    assert diagnosis.findings == ()
    assert {abstention.kind for abstention in diagnosis.abstentions} >= set(LOAD_KINDS)
    assert not diagnosis.judged & set(LOAD_KINDS)


def test_a_target_that_went_silent_is_stale_and_nothing_else() -> None:
    """A minute after the last page of the overload, the only claim is that nothing is known."""
    window = phase(RECORDINGS / VLLM / "05_overload_queue_c64_low_kv")
    late = window_of(
        frames([(page, scraped_at(page, 0)) for page in pages_of(RECORDINGS / VLLM / "05_overload_queue_c64_low_kv")]),
        end=window.end + timedelta(seconds=61),
    )

    diagnosis = diagnose(late, VALUES)

    assert told(diagnosis) == {("STALE_OR_MISSING_DATA", "not_scraped")}
    assert not diagnosis.judged & set(LOAD_KINDS)


def test_a_page_that_hides_a_gauge_makes_an_abstention() -> None:
    """Without KV usage nobody can tell memory pressure; the queue of the phase is then not blamed on anything."""
    tables = frames([(p, scraped_at(p, 0)) for p in pages_of(RECORDINGS / VLLM / "05_overload_queue_c64_low_kv")])
    hidden = tables["raw_engine_samples"].with_columns(pl.lit(None, pl.Float64).alias("kv_cache_usage_ratio"))

    diagnosis = diagnose(window_of(tables | {"raw_engine_samples": hidden}), VALUES)

    assert told(diagnosis) == {("QUEUE_BUILDUP", "unattributed")}
    reasons = {abstention.kind: abstention.reason for abstention in diagnosis.abstentions}
    assert reasons[FindingKind.MEMORY_PRESSURE] == "KV-cache usage is not exposed"
