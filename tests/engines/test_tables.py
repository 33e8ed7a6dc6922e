"""The tables of all engines keep to the schema, and frames of many pages keep to it too."""

from __future__ import annotations

from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path

import polars as pl
import pytest

from optiinfra_pipelines.engines import DIALECTS, TABLES, normalize, to_frames
from optiinfra_pipelines.engines.catalog import _vocabulary
from optiinfra_pipelines.exposition import Reader
from optiinfra_pipelines.sql.sources import raw_tables

PAGES = (
    Path("vllm/0.32.0/small_llama_kv8k/06_drained_idle/1795187455068.prom"),
    Path("vllm/0.6.6.post1/v0_collectors_in_process/04_kv_pressure_preempt_c16.prom"),
    Path("sglang/0.5.23/collectors_in_process/02_light_c1.prom"),
    Path("llama.cpp/debian-1_0.7.0-b11669/small_np4_c8192/05_drained_idle/1795187601659.prom"),
    Path("dynamo/1.6.1/frontend_kv_router_mocker/04_overload_c64/1795187840228.prom"),
    Path("dynamo/1.6.1/frontend_kv_router_mocker/worker/1795187806775.prom"),
    Path("lmcache/0.5.6/mp_server_cpu/06_bench_evicting_1795188291646.prom"),
)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
def test_a_table_names_only_columns_and_metrics_that_exist(dialect):
    """Columns are raw_engine_samples', tiers raw_kv_tier_samples', metrics those that sources.yml lists."""
    listed = raw_tables()["raw_engine_histograms"].columns["metric"].description
    metrics = {word.strip(" .") for word in listed.partition(":")[2].split(",")}

    assert set(dialect.columns) <= set(raw_tables()["raw_engine_samples"].columns)
    assert {column for tier in dialect.tiers.values() for column in tier} <= set(
        raw_tables()["raw_kv_tier_samples"].columns
    )
    assert set(dialect.tiers) <= {"all", "l1", "l2", "remote"}
    assert {spec.metric for spec in (*dialect.histograms, *dialect.summaries)} <= metrics


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
def test_what_is_ignored_has_a_reason_and_hides_not_everything(dialect):
    """Every pattern keeps to the engine's prefix and says more than the prefix."""
    for ignored in dialect.ignored:
        assert ignored.reason
        for pattern in ignored.patterns:
            assert pattern.startswith(dialect.prefixes)
            assert not any(fnmatchcase(f"{prefix}never_heard_of", pattern) for prefix in dialect.prefixes)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
def test_every_family_read_is_under_the_engines_prefix(dialect):
    """A dialect reads its own families; process and HTTP counters are the only guests."""
    guests = {name for name in _vocabulary(dialect) if not name.startswith(dialect.prefixes)}

    assert guests <= {"http_requests"}


def test_frames_have_exactly_the_declared_schemas(recordings, normalized):
    """Rows of seven different pages, and of none, make frames that the warehouse takes as they are."""
    for pages in ([], [normalized(path, keep=("vllm:*", "sglang:token_usage")) for path in PAGES]):
        frames = to_frames(pages)

        assert tuple(frames) == TABLES
        assert {name: frame.schema for name, frame in frames.items()} == {
            name: raw_tables()[name].polars_schema for name in TABLES
        }


def test_frames_hold_the_rows_and_nothing_twice(normalized):
    """Each row of each page stands in its frame; bounds that pages share stand once; grains are unique."""
    pages = [normalized(path) for path in PAGES]
    pages = [
        normalize(
            Reader().read((Path(__file__).parent.parent / "fixtures/recordings" / path).read_text()),
            target=f"t{i}",
            scraped_at=pages[0].scraped_at + timedelta(seconds=i),
        )
        for i, path in enumerate(PAGES)
    ]
    frames = to_frames(pages)

    for name in TABLES:
        count = (
            len({row[0] for page in pages for row in page.rows[name]})
            if name == "raw_histogram_bounds"
            else sum(len(page.rows[name]) for page in pages)
        )
        assert frames[name].height == count
        if name != "raw_kept_samples":
            assert frames[name].select(raw_tables()[name].grain).is_unique().all()


def test_frames_keep_values_nulls_and_times(normalized):
    """Floats, missing buckets, settings and instants arrive as they were in the rows."""
    pages = [normalized(path, keep=("llamacpp:n_tokens_max",)) for path in PAGES]
    frames = to_frames(pages)
    histograms = frames["raw_engine_histograms"]
    rows = [row for page in pages for row in page.rows["raw_engine_histograms"]]

    assert histograms["bucket_counts"].to_list() == [None if row[8] is None else list(row[8]) for row in rows]
    assert histograms["scraped_at"].to_list() == [row[0] for row in rows]
    assert frames["raw_engine_samples"].rows() == [row for page in pages for row in page.rows["raw_engine_samples"]]
    settings = [dict(row[6]) for page in pages for row in page.rows["raw_engine_configs"]]
    assert [
        {entry["key"]: entry["value"] for entry in entries} for entries in frames["raw_engine_configs"]["settings"]
    ] == settings
    assert frames["raw_kept_samples"]["labels"].to_list() == [[]]


def test_a_summary_beside_histograms_has_no_buckets(normalized):
    """A NULL list among lists stays NULL and shifts nothing."""
    tgi = (
        'tgi_request_queue_duration_bucket{le="1"} 1\ntgi_request_queue_duration_bucket{le="+Inf"} 2\n'
        "tgi_request_queue_duration_sum 3\ntgi_request_queue_duration_count 2\n"
        'tgi_batch_inference_duration_sum{method="prefill"} 4\n'
    )
    frame = to_frames([normalized(tgi)])["raw_engine_histograms"]
    by_metric = dict(zip(frame["metric"], frame["bucket_counts"].to_list(), strict=True))

    assert by_metric == {"queue_seconds": [1.0, 2.0], "time_to_first_token_seconds": None}
    assert frame.filter(pl.col("metric") == "time_to_first_token_seconds")["sum_value"].item() == 7.0


def test_a_plan_is_made_once_per_layout(recordings):
    """Pages of one layout share the plan; the plan goes when the layout does."""
    import gc

    from optiinfra_pipelines.engines import plan as plans

    text = (recordings / PAGES[3]).read_text()
    gc.collect()  # what earlier tests left behind
    reader = Reader()
    layout = reader.read(text).layout
    first = plans.plan_for(layout)

    assert plans.plan_for(reader.read(text.replace("9324", "9325")).layout) is first
    before = len(plans._plans)
    del layout, reader, first
    gc.collect()
    assert len(plans._plans) == before - 1
