"""What a recording says does not hang on how often it was read, from when to when, or what its page leaves out."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest

from optiinfra_pipelines.analysis.findings.diagnosis import diagnose
from optiinfra_pipelines.analysis.findings.update import update_findings
from optiinfra_pipelines.domain.findings import Finding, FindingKind
from tests.analysis.findings_recordings import RECORDINGS, frames, pages_of, scraped_at, window_of
from tests.analysis.test_findings_phases import DYNAMO, LLAMA, TRUTH, VALUES, VLLM, told

Timed = list[tuple[Path, datetime]]
KEPT = [folder for folder in TRUTH if pages_of(RECORDINGS / folder)]
TROUBLE = [folder for folder in KEPT if TRUTH[folder] and not folder.endswith("09_after_restart")]
QUIET = [folder for folder in KEPT if not TRUTH[folder] and len(pages_of(RECORDINGS / folder)) > 1]
# All phases of one process, and what it went through.
LIVES = {
    "vllm": (
        [f"{VLLM}/{name}" for name in ("01_idle", "02_light_c1", "03_loaded_shared_prefix_c8")]
        + [f"{VLLM}/{name}" for name in ("04_kv_pressure_preempt_c16", "05_overload_queue_c64_low_kv")]
        + [f"{VLLM}/06_drained_idle"],
        {("MEMORY_PRESSURE", "preemptions"), ("QUEUE_BUILDUP", "batch_slot_bound")},
    ),
    "llama.cpp": (
        [f"{LLAMA}/{name}" for name in ("01_idle", "02_light_c1", "03_shared_prefix_c4")]
        + [f"{LLAMA}/{name}" for name in ("04_overload_deferred_c24", "05_drained_idle")],
        {("QUEUE_BUILDUP", "batch_slot_bound")},
    ),
    "frontend": (
        [f"{DYNAMO}/{name}" for name in ("01_idle", "02_light_c1", "03_shared_prefix_c8")]
        + [f"{DYNAMO}/{name}" for name in ("04_overload_c64", "05_drained_idle")],
        {("QUEUE_BUILDUP", "workers_full")},
    ),
    "worker": ([f"{DYNAMO}/worker"], {("MEMORY_PRESSURE", "preemptions")}),
}


@cache
def timed(folder: str) -> Timed:
    return [(page, scraped_at(page, place)) for place, page in enumerate(pages_of(RECORDINGS / folder))]


def collected(pages: Timed, every_seconds: float, offset_seconds: float = 0.0) -> Timed:
    """What a collector would have read: at each of its times the page that stood there."""
    at, read = pages[0][1] + timedelta(seconds=offset_seconds), []
    while at <= pages[-1][1]:
        read.append(([page for page, since in pages if since <= at][-1], at))
        at += timedelta(seconds=every_seconds)
    return read


@pytest.mark.parametrize("folder", TROUBLE)
@pytest.mark.parametrize("count", [2, 4, 5, 6])
def test_fewer_scrapes_say_the_same_or_nothing_and_never_that_all_is_well(folder: str, count: int) -> None:
    """Four scrapes over a phase are enough; of two, which lie before and after it, nobody can tell."""
    pages = timed(folder)
    kept = [pages[round(i * (len(pages) - 1) / (count - 1))] for i in range(count)]

    diagnosis = diagnose(window_of(frames(kept)), VALUES)

    if count >= 4 and not folder.startswith("dynamo/1.6.1/mocker_"):
        assert told(diagnosis) == TRUTH[folder]
    kinds = {kind for kind, _ in told(diagnosis)}
    assert kinds <= {kind for kind, _ in TRUTH[folder]}
    assert kinds or not {FindingKind(kind) for kind, _ in TRUTH[folder]} <= diagnosis.judged


@pytest.mark.parametrize("folder", TROUBLE)
def test_a_window_that_was_blind_before_its_last_two_scrapes_is_not_called_well(folder: str) -> None:
    """The trouble was over when the target could be read again: what was before is not known."""
    pages = timed(folder)
    whole = window_of(frames(pages))
    is_kept = pl.col("scraped_at") >= pages[-2][1]
    up = (pl.col("is_up") & is_kept).alias("is_up")
    samples, histograms = whole.samples.filter(is_kept), whole.histograms.filter(is_kept)
    blind = replace(whole, scrapes=whole.scrapes.with_columns(up), samples=samples, histograms=histograms)

    diagnosis = diagnose(blind, VALUES)

    seconds = (pages[-2][1] - pages[0][1]).total_seconds()
    lost = {FindingKind(kind) for kind, _ in TRUTH[folder]} - {finding.kind for finding in diagnosis.findings}
    assert seconds <= VALUES["stale_after_seconds"] or not lost & diagnosis.judged


@pytest.mark.parametrize("folder", KEPT)
def test_the_pace_of_the_collector_changes_nothing(folder: str) -> None:
    """Read every 2, 5 and 10 s, from whenever on: the same finding, or none of a phase of seconds."""
    pages = timed(folder)
    seconds = (pages[-1][1] - pages[0][1]).total_seconds()
    for every in (2.0, 5.0, 10.0):
        if seconds < 4 * every or "lmcache" in folder:
            continue
        found = told(diagnose(window_of(frames(collected(pages, every, 0.3 * every))), VALUES))
        assert found == TRUTH[folder] or (found == set() and folder.endswith("09_after_restart")), every


@pytest.mark.parametrize("folder", [*TROUBLE, *QUIET])
def test_any_part_of_a_phase_gives_its_finding_or_none(folder: str) -> None:
    """Windows that start and end in mid-phase never show another trouble."""
    pages, draw = timed(folder), random.Random(folder)
    for _ in range(6):
        first = draw.randrange(len(pages) - 1)
        last = draw.randrange(first + 1, len(pages))
        found = told(diagnose(window_of(frames(pages[first : last + 1])), VALUES))
        assert {kind for kind, _ in found} <= {kind for kind, _ in TRUTH[folder]}, (first, last)


@pytest.mark.parametrize("folder", [folder for folder in TROUBLE if "mocker_" not in folder.split("/")[2]])
def test_a_family_that_is_not_there_never_makes_a_trouble_look_well(folder: str) -> None:
    """Take away any one column or histogram: the trouble is found, named by what is left of it, or left open."""
    tables = frames(timed(folder))
    samples, histograms = tables["raw_engine_samples"], tables["raw_engine_histograms"]
    told_columns = [c for c, kind in samples.schema.items() if kind == pl.Float64 and samples[c].count()]
    thinned = [
        tables | {"raw_engine_samples": samples.with_columns(pl.lit(None).cast(pl.Float64).alias(column))}
        for column in told_columns
    ]
    thinned += [
        tables | {"raw_engine_histograms": histograms.filter(pl.col("metric") != metric)}
        for metric in histograms["metric"].unique()
    ]
    truth = {FindingKind(kind) for kind, _ in TRUTH[folder]}
    for left in thinned:
        diagnosis = diagnose(window_of(left), VALUES)
        lost = truth - {finding.kind for finding in diagnosis.findings}
        assert not lost & diagnosis.judged
        assert {f.kind for f in diagnosis.findings} <= truth | {FindingKind.QUEUE_BUILDUP}


@pytest.mark.parametrize("folder", KEPT)
def test_a_fleet_of_another_size_is_judged_alike(folder: str) -> None:
    """Everything counted twenty times: shares, rates and times are what they were."""
    factor = 20
    tables = frames(timed(folder))
    samples = tables["raw_engine_samples"]
    counted = [c for c in samples.columns if c.endswith("_total") or c.startswith(("requests_", "max_"))]
    counted = [c for c in counted if samples.schema[c] == pl.Float64 and c != "cpu_seconds_total"]
    scaled = tables | {
        "raw_engine_samples": samples.with_columns(pl.col(c) * factor for c in counted),
        "raw_engine_histograms": tables["raw_engine_histograms"].with_columns(
            pl.col("sum_value") * factor,
            pl.col("count_value") * factor,
            pl.col("bucket_counts").list.eval(pl.element() * factor),
        ),
    }

    assert told(diagnose(window_of(scaled), VALUES)) == TRUTH[folder]


def findings_over(pages: Timed, every: timedelta, down: set[datetime]) -> dict[str, Finding]:
    """Every finding that refreshes on five-minute windows ever kept, by id; `down`: scrapes that failed."""
    tables = frames(pages)
    is_down = pl.col("scraped_at").is_in(list(down))
    tables |= {
        "raw_scrapes": tables["raw_scrapes"].with_columns(is_up=~is_down),
        "raw_engine_samples": tables["raw_engine_samples"].filter(~is_down),
        "raw_engine_histograms": tables["raw_engine_histograms"].filter(~is_down),
    }
    standing: tuple[Finding, ...] = ()
    kept: dict[str, Finding] = {}
    now = pages[0][1] + every
    while now <= pages[-1][1] + every:
        start = now - timedelta(minutes=5)
        seen = {
            name: frame.filter(pl.col("scraped_at").is_between(start, now)) if "scraped_at" in frame.columns else frame
            for name, frame in tables.items()
        }
        end = min(now, pages[-1][1])
        standing = update_findings(standing, [diagnose(window_of(seen, start=start, end=end), VALUES)], now, VALUES)
        kept |= {finding.id: finding for finding in standing}
        now += every
    return kept


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize(("seconds", "lost_ratio"), [(5, 0.0), (5, 0.3), (10, 0.1)])
def test_a_whole_life_gives_each_trouble_once(life: str, seconds: int, lost_ratio: float) -> None:
    """All phases of a process one after the other, a third of the scrapes lost: one finding for each trouble."""
    folders, truth = LIVES[life]
    pages = [page for folder in folders for page in timed(folder)]
    # Between two phases nothing was recorded for some seconds; longer pauses are cut to 20 s.
    gaps = [
        max(0.0, (late[1] - early[1]).total_seconds() - 20) * (late[1] - early[1] > timedelta(minutes=1))
        for early, late in pairwise(pages)
    ]
    moved = [(page, at - timedelta(seconds=sum(gaps[:place]))) for place, (page, at) in enumerate(pages)]
    read = collected(moved, seconds)
    draw = random.Random(life)
    down = {at for _, at in read[1:-1] if draw.random() < lost_ratio}

    found = findings_over(read, timedelta(seconds=30), down)

    assert sorted((one.kind.value, one.cause) for one in found.values()) == sorted(truth)


def restarted(starts: list[int], *, is_new: bool = False) -> set[tuple[str, str]]:
    """The verdict on a quiet vLLM page read every 5 s whose process started at these seconds; 0 is the first scrape."""
    pages = timed(f"{VLLM}/01_idle")
    begin = pages[0][1]
    read = [(pages[0][0], begin + timedelta(seconds=5 * n)) for n in range(len(starts))]
    tables = frames(read)
    told_starts = pl.Series([begin + timedelta(seconds=start) for start in starts]).cast(pl.Datetime("us", "UTC"))
    samples = tables["raw_engine_samples"].sort("scraped_at").with_columns(process_started_at=told_starts)
    return told(diagnose(window_of(tables | {"raw_engine_samples": samples}, is_new=is_new), VALUES))


def test_a_process_that_took_over_while_the_old_one_answered_is_told() -> None:
    """A page that stood in for a dead process, or a switched address: the younger process is there to stay."""
    assert restarted([-900] * 4 + [-200] * 4) == {("RESTARTED", "process_replaced")}


def test_replicas_that_answer_in_turns_are_no_restart() -> None:
    """Two processes behind one address: each comes back."""
    assert restarted([-900, -200, -900, -200, -200, -900, -200]) == set()
    assert restarted([-900, -900, -900, -200]) == set()


def test_a_target_that_was_never_read_before_has_not_restarted() -> None:
    """A replica that scaling added is young and has served nothing; so has one that came back, and that is told."""
    pages = timed(f"{VLLM}/09_after_restart")
    tables = frames(pages)

    assert told(diagnose(window_of(tables), VALUES)) == {("RESTARTED", "first_seen_fresh")}
    assert told(diagnose(window_of(tables, is_new=True), VALUES)) == set()
