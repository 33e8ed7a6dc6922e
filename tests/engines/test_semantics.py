"""What aliases, ranks, copies, odd values and broken histograms become, on the smallest pages that show it."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from optiinfra_pipelines.engines import DIALECTS, PORTS, UnknownEngineError, describe, identify, normalize
from optiinfra_pipelines.exposition import Reader


def histogram(name, labels="", counts=(("0.1", 1), ("+Inf", 2)), total=0.5, count=2):
    comma = "," if labels else ""
    buckets = "".join(f'{name}_bucket{{{labels}{comma}le="{le}"}} {n}\n' for le, n in counts)
    return f"# TYPE {name} histogram\n{buckets}{name}_sum{{{labels}}} {total}\n{name}_count{{{labels}}} {count}\n"


def test_aliases_go_by_precedence_and_are_never_added_up(normalized, rows):
    """vLLM 0.9 to 0.11 print both names of one counter and one gauge: the newer is taken."""
    (sample,) = rows(
        normalized(
            'vllm:gpu_prefix_cache_queries_total{engine="0"} 100\nvllm:prefix_cache_queries_total{engine="0"} 100\n'
            'vllm:gpu_prefix_cache_hits_total{engine="0"} 40\nvllm:prefix_cache_hits_total{engine="0"} 40\n'
            'vllm:gpu_cache_usage_perc{engine="0"} 0.5\nvllm:kv_cache_usage_perc{engine="0"} 0.25\n'
        )
    )

    assert sample["prefix_cache_queries_total"] == 100
    assert sample["prefix_cache_hits_total"] == 40
    assert sample["kv_cache_usage_ratio"] == 0.25


def test_a_declared_family_without_samples_is_no_alias(normalized, rows):
    """A TYPE line alone holds no value: the older name that has one is taken."""
    (sample,) = rows(
        normalized(
            "# TYPE vllm:kv_cache_usage_perc gauge\n"
            "# TYPE vllm:gpu_cache_usage_perc gauge\nvllm:gpu_cache_usage_perc 0.5\n"
        )
    )

    assert sample["kv_cache_usage_ratio"] == 0.5


@pytest.mark.parametrize("value", ["-1", "NaN", "+Inf", "-Inf"])
def test_a_value_that_says_nothing_is_unknown(normalized, rows, value):
    """V0's hit rate is -1 when prefix caching is off; NaN and infinity are no measurements either."""
    (sample,) = rows(normalized(f"vllm:num_requests_running 3\nvllm:gpu_prefix_cache_hit_rate {value}\n"))

    assert "prefix_cache_hit_ratio" not in sample
    assert sample["requests_running"] == 3


def test_each_data_parallel_rank_is_a_row(normalized, rows):
    """Ranks stay apart, in order of number; what has no rank label stands in the lowest rank's row only."""
    text = "".join(f'vllm:num_requests_running{{engine="{r}",model_name="m"}} {r}\n' for r in (10, 2, 0))
    text += 'vllm:admission_rejections_total{model_name="m",reason="max_num_queued_reqs"} 7\n'
    text += "process_resident_memory_bytes 1000\nprocess_start_time_seconds 1795186867.19\n"
    text += 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 5\n'
    found = rows(normalized(text))

    assert [(row["engine_rank"], row["requests_running"]) for row in found] == [("0", 0), ("2", 2), ("10", 10)]
    assert [row.get("requests_rejected_total") for row in found] == [7, None, None]
    assert [row.get("resident_memory_bytes") for row in found] == [1000, None, None]
    assert [row.get("http_requests_total") for row in found] == [5, None, None]
    assert {row["process_started_at"] for row in found} == {datetime(2026, 11, 20, 15, 1, 7, 190000, tzinfo=UTC)}


def test_ranks_of_one_configuration_share_its_hash(normalized, rows):
    """The rank label is no setting, so the same settings on two ranks are the same configuration."""
    found = normalized(
        "".join(f'vllm:cache_config_info{{engine="{r}",block_size="16",num_gpu_blocks="100"}} 1\n' for r in (0, 1))
        + 'vllm:num_requests_running{engine="0"} 0\nvllm:num_requests_running{engine="1"} 0\n'
    )

    assert len({row["config_hash"] for row in rows(found, "raw_engine_configs")}) == 1
    assert [row["kv_cache_capacity_tokens"] for row in rows(found)] == [1600, 1600]


def test_a_changed_setting_changes_the_hash(normalized, rows):
    """The hash covers every setting; the order of labels on the page does not matter."""
    first = rows(normalized('vllm:cache_config_info{block_size="16",cache_dtype="auto"} 1\n'))[0]
    again = rows(normalized('vllm:cache_config_info{cache_dtype="auto",block_size="16"} 1\n'))[0]
    other = rows(normalized('vllm:cache_config_info{block_size="16",cache_dtype="fp8"} 1\n'))[0]

    assert first["config_hash"] == again["config_hash"] != other["config_hash"]
    assert len(first["config_hash"]) == 16
    int(first["config_hash"], 16)


def test_a_capacity_that_is_not_printed_is_unknown(normalized, rows):
    """num_gpu_blocks="None" before profiling: no capacity, and the block size stands."""
    (sample,) = rows(normalized('vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1\n'))

    assert "kv_cache_capacity_tokens" not in sample
    assert sample["kv_cache_block_size_tokens"] == 16


def test_several_models_on_one_page_are_one_row(normalized, rows):
    """Counters of two models add up, and the row names both."""
    (sample,) = rows(
        normalized('vllm:prompt_tokens_total{model_name="b"} 2\nvllm:prompt_tokens_total{model_name="a"} 3\n')
    )

    assert sample["prompt_tokens_total"] == 5
    assert sample["model_name"] == "a, b"


def test_finish_reasons_become_outcomes(normalized, rows):
    """Stop, length, repetition and any reason to come are answers; abort and error are not."""
    counts = {"stop": 1, "length": 2, "abort": 4, "error": 8, "repetition": 16, "something_new": 32}
    (sample,) = rows(
        normalized("".join(f'vllm:request_success_total{{finished_reason="{k}"}} {v}\n' for k, v in counts.items()))
    )

    assert sample["requests_finished_total"] == 1 + 2 + 16 + 32
    assert sample["requests_length_total"] == 2
    assert sample["requests_aborted_total"] == 4
    assert sample["requests_failed_total"] == 8


def test_an_outcome_not_yet_seen_is_zero_only_beside_one_that_was(normalized, rows):
    """Children appear at their first event: beside a sibling none has happened; with no sibling nothing is known."""
    (beside,) = rows(normalized('vllm:request_success_total{finished_reason="stop"} 3\n'))
    (alone,) = rows(normalized("# TYPE vllm:request_success_total counter\nvllm:num_requests_running 0\n"))

    assert beside["requests_aborted_total"] == 0
    assert "requests_aborted_total" not in alone
    assert "requests_finished_total" not in alone


def test_a_sleeping_engine_says_so(normalized, rows):
    """engine_sleep_state{awake} at 0 is sleep."""
    (sample,) = rows(
        normalized(
            'vllm:engine_sleep_state{engine="0",sleep_state="awake"} 0\n'
            'vllm:engine_sleep_state{engine="0",sleep_state="discard_all"} 1\n'
        )
    )

    assert sample["is_sleeping"] is True


def test_cached_tokens_by_source_are_tiers(normalized, rows):
    """Device, host, disk, and the rest (another replica, an unnamed external tier) are four columns."""
    sources = {"device": 1, "host": 2, "p2p": 4, "disk": 8, "external_unspecified": 16}
    (sample,) = rows(
        normalized(
            "".join(f'vllm:prompt_tokens_cached_by_source_total{{source="{k}"}} {v}\n' for k, v in sources.items())
        )
    )

    tiers = [sample[f"cached_tokens_{tier}_total"] for tier in ("device", "host", "storage", "remote")]
    assert tiers == [1, 2, 8, 20]


def test_tensor_parallel_copies_of_sglang_count_once(normalized, rows):
    """Four tensor ranks print one queue: counters from the lowest rank, gauges the largest, nothing added up."""
    text = "# TYPE sglang:token_usage gauge\n# TYPE sglang:num_queue_reqs gauge\n"
    text += "# TYPE sglang:num_retracted_requests_total counter\n"
    for tp in (3, 1, 0, 2):
        text += f'sglang:token_usage{{tp_rank="{tp}",pp_rank="0"}} 0.{tp + 1}\n'
        text += f'sglang:num_queue_reqs{{tp_rank="{tp}",pp_rank="0"}} 6\n'
        text += f'sglang:num_retracted_requests_total{{tp_rank="{tp}",pp_rank="0"}} {10 + tp}\n'
    (sample,) = rows(normalized(text))

    assert sample["kv_cache_usage_ratio"] == 0.4
    assert sample["requests_waiting"] == 6
    assert sample["preemptions_total"] == 10


def test_sglangs_data_parallel_ranks_own_different_tensor_ranks(normalized, rows):
    """With data-parallel attention dp_rank 1 begins at tp_rank 2: the lowest of each dp_rank counts, in two rows."""
    text = "# TYPE sglang:num_running_reqs gauge\n# TYPE sglang:queue_time_seconds histogram\n"
    for tp, dp in ((0, 0), (1, 0), (2, 1), (3, 1)):
        labels = f'dp_rank="{dp}",tp_rank="{tp}"'
        text += f"sglang:num_running_reqs{{{labels}}} {10 * (dp + 1)}\n"
        text += histogram("sglang:queue_time_seconds", labels, count=2).partition("\n")[2]
    text += 'sglang:prompt_tokens_total{model_name="m"} 99\n'
    found = normalized(text)
    queues = rows(found, "raw_engine_histograms")

    assert [(r["engine_rank"], r["requests_running"]) for r in rows(found)] == [("0", 10), ("1", 20)]
    assert [r.get("prompt_tokens_total") for r in rows(found)] == [99, None]
    assert [(r["engine_rank"], r["count_value"], r["bucket_counts"]) for r in queues] == [
        ("0", 2, [1, 2]),
        ("1", 2, [1, 2]),
    ]


def test_sglangs_total_is_not_added_to_its_parts(normalized, rows):
    """With priorities on, priority="" is the total beside its parts; cache_source="total" is no source."""
    (sample,) = rows(
        normalized(
            "# TYPE sglang:num_running_reqs gauge\n"
            'sglang:num_running_reqs{priority=""} 5\nsglang:num_running_reqs{priority="1"} 2\n'
            'sglang:num_running_reqs{priority="2"} 3\n'
            'sglang:prompt_tokens_total 100\nsglang:cached_tokens_total{cache_source="total"} 30\n'
            'sglang:cached_tokens_total{cache_source="device"} 20\nsglang:cached_tokens_total{cache_source="host"} 10\n'
        )
    )

    assert sample["requests_running"] == 5
    assert sample["prefix_cache_hits_total"] == sample["cached_tokens_device_total"] == 20
    assert sample["cached_tokens_host_total"] == 10


def test_series_of_one_histogram_add_up(normalized, rows):
    """Streaming and other requests of one family are one histogram, bucket by bucket."""
    text = "# TYPE sglang:e2e_request_latency_seconds histogram\n"
    for streaming in ("true", "false"):
        text += histogram("sglang:e2e_request_latency_seconds", f'is_streaming="{streaming}"').partition("\n")[2]
    (row,) = rows(normalized(text), "raw_engine_histograms")

    assert row["bucket_counts"] == [2, 4]
    assert (row["sum_value"], row["count_value"]) == (1.0, 4)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (histogram("vllm:e2e_request_latency_seconds", counts=(("0.1", 3), ("1", 2), ("+Inf", 5))), "fall"),
        (histogram("vllm:e2e_request_latency_seconds", counts=(("0.1", 3), ("1", "NaN"), ("+Inf", 5))), "no numbers"),
        (histogram("vllm:e2e_request_latency_seconds", counts=(("0.1", 3), ("1", 4))), r"\+Inf"),
        (histogram("vllm:e2e_request_latency_seconds", counts=(("0.1", 3), ("abc", 4), ("+Inf", 5))), "numeric le"),
        (histogram("vllm:e2e_request_latency_seconds", counts=(("1", 3), ("1.0", 4), ("+Inf", 5))), "same bound"),
        (histogram("vllm:e2e_request_latency_seconds", counts=()), "without buckets"),
        (
            histogram("vllm:e2e_request_latency_seconds", 'model_name="a"')
            + histogram("vllm:e2e_request_latency_seconds", 'model_name="b"', (("0.2", 1), ("+Inf", 2))).partition(
                "\n"
            )[2],
            "different bounds",
        ),
    ],
)
def test_a_broken_histogram_is_dropped_and_named_alone(normalized, rows, broken, reason):
    """Falling, missing, double or unreadable buckets cost that histogram; the others and the samples stand."""
    found = normalized(broken + histogram("vllm:time_to_first_token_seconds") + "vllm:num_requests_running 1\n")
    (defect,) = found.defects

    assert [row["metric"] for row in rows(found, "raw_engine_histograms")] == ["time_to_first_token_seconds"]
    assert (defect.metric, defect.source_metric) == ("request_duration_seconds", "vllm:e2e_request_latency_seconds")
    assert re.search(reason, defect.reason)
    assert rows(found)[0]["requests_running"] == 1


def test_a_histogram_that_counted_nothing_stays_at_zero(normalized, rows):
    """Count 0 is what the page says; whether requests ended meanwhile is for the analysis to ask."""
    empty = histogram("vllm:time_to_first_token_seconds", counts=(("0.1", 0), ("+Inf", 0)), total=0, count=0)
    (row,) = rows(normalized(empty), "raw_engine_histograms")

    assert (row["bucket_counts"], row["sum_value"], row["count_value"]) == ([0, 0], 0, 0)


def test_equal_bounds_have_equal_ids_however_written(normalized, rows):
    """The id is of the numbers: '1' and '1.0', on any rank or page, are one row of bounds."""
    first = normalized(histogram("vllm:time_to_first_token_seconds", counts=(("1", 1), ("+Inf", 2))))
    other = normalized(histogram("vllm:e2e_request_latency_seconds", counts=(("1.0", 5), ("+Inf", 9))))
    (bounds,) = rows(first, "raw_histogram_bounds")

    assert rows(other, "raw_histogram_bounds") == [bounds]
    assert bounds["upper_bounds"] == (1.0, float("inf"))
    assert bounds["bounds_id"] == 14291487953079332725


def test_kept_families_are_kept_as_scraped(normalized, rows):
    """keep names families or samples, with wildcards; labels stay in page order and NaN stays NaN."""
    text = '# TYPE vllm:x gauge\nvllm:x{b="2",a="1"} NaN\nvllm:num_requests_running 1\npython_info{version="3"} 1\n'
    kept = rows(normalized(text + histogram("vllm:y"), keep=("vllm:x", "vllm:y", "python_*")), "raw_kept_samples")

    assert [row["name"] for row in kept] == [
        "vllm:x",
        "python_info",
        "vllm:y_bucket",
        "vllm:y_bucket",
        "vllm:y_sum",
        "vllm:y_count",
    ]
    assert list(kept[0]["labels"].items()) == [("b", "2"), ("a", "1")]
    assert kept[0]["value"] != kept[0]["value"]


def test_a_repeated_series_counts_once(normalized, rows):
    """Prometheus keeps the first of two samples of one series, and so do we."""
    (sample,) = rows(normalized('vllm:prompt_tokens_total{a="1"} 5\nvllm:prompt_tokens_total{a="1"} 7\n'))

    assert sample["prompt_tokens_total"] == 5


def test_a_page_of_no_engine_is_named_by_what_it_has():
    """identify says None; normalize names the families seen and the remedy."""
    page = Reader().read("# TYPE node_load1 gauge\nnode_load1 0.5\ngo_goroutines 7\n")

    assert identify(page.layout) is None
    with pytest.raises(UnknownEngineError, match=r"node_load1, go_goroutines.*turn the engine's metrics on") as refused:
        normalize(page, target="t", scraped_at=datetime(2026, 1, 1, tzinfo=UTC))
    assert refused.value.families == ("node_load1", "go_goroutines")


def test_an_empty_page_is_of_no_engine():
    """Nothing on the page, nothing known."""
    assert identify(Reader().read("").layout) is None


def test_the_operators_word_goes_before_the_names(normalized):
    """fleet.yaml's engine is believed: its families are then missing rather than the page unknown."""
    found = normalized("up 1\n", engine="vllm")

    assert found.identity.engine == "vllm"
    assert ("vllm:num_requests_running",) in [missing.families for missing in found.missing]


def test_lmcache_beside_vllm_fills_tiers_and_leaves_the_engine_its_page(normalized, rows):
    """The connector's families on vLLM's page: one identity, engine columns from vLLM, tiers from LMCache."""
    found = normalized(
        'vllm:num_requests_running{engine="0"} 2\nlmcache:num_lookup_tokens_total{model_name="m"} 100\n'
        'lmcache:num_lookup_hits_total{model_name="m"} 60\nlmcache:local_cache_usage{model_name="m"} 4096\n'
        "lmcache:lmcache_is_healthy 1\n" + histogram("lmcache:time_to_retrieve")
    )
    tiers = {row["tier"]: row for row in rows(found, "raw_kv_tier_samples")}
    (load,) = rows(found, "raw_engine_histograms")

    assert found.identity.dialects == ("vllm", "lmcache")
    assert rows(found)[0]["requests_running"] == 2
    assert (tiers["all"]["requested_tokens_total"], tiers["all"]["hit_tokens_total"]) == (100, 60)
    assert tiers["all"]["is_healthy"] is True
    assert tiers["l1"]["used_bytes"] == 4096
    assert (load["metric"], load["vantage"]) == ("cache_load_seconds", "cache")


def test_vllms_own_offload_is_a_tier_over_all_ranks(normalized, rows):
    """Bytes loaded and stored add up over ranks; the gauge of pinned blocks is not taken for fill."""
    found = normalized(
        "".join(f'vllm:kv_offload_load_bytes_total{{engine="{r}"}} 10\n' for r in (0, 1))
        + 'vllm:kv_offload_cpu_cache_usage_perc{engine="0"} 0.5\n'
    )
    (tier,) = rows(found, "raw_kv_tier_samples")

    assert (tier["tier"], tier["read_bytes_total"]) == ("l1", 20)
    assert "usage_ratio" not in tier
    assert found.unknown_families == ()


def test_an_impossible_start_time_is_unknown(normalized, rows):
    """A start at second 0 or in the far future is a broken gauge, not a start."""
    for start in ("0", "1e18", "NaN", "5"):
        (sample,) = rows(normalized(f"vllm:num_requests_running 1\nprocess_start_time_seconds {start}\n"))

        assert "process_started_at" not in sample


def test_the_doctor_gets_names_counts_and_flags(normalized):
    """describe tells engine, models, ranks, how much is understood, what is missing and which flag turns it on."""
    found = normalized('vllm:num_requests_running{engine="0",model_name="m"} 1\nvllm:brand_new{engine="0"} 1\n')
    told = describe(found.identity, found)

    assert (told.engine, told.models, told.ranks) == ("vllm", ("m",), ("0",))
    assert (told.understood, told.unknown) == (1, ("vllm:brand_new",))
    assert "--kv-cache-metrics (vLLM 0.12 and later)" in [missing.flag for missing in told.missing_optional]
    assert all(missing.is_required for missing in told.missing_required)


def test_llamacpp_without_the_cached_counter_does_not_know_its_prompts(normalized, rows):
    """Older builds count computed tokens only: that is prefill, and the whole prompt is unknown."""
    (sample,) = rows(normalized("llamacpp:prompt_tokens_total 50\nllamacpp:tokens_predicted_total 7\n"))

    assert sample["prefill_tokens_total"] == 50
    assert "prompt_tokens_total" not in sample
    assert sample["generation_tokens_total"] == 7


def test_a_frontend_that_measures_every_prompt_says_its_hit_counters(normalized, rows):
    """When prompts were observed as often as answers, prompt and cached tokens are whole."""
    text = 'dynamo_frontend_inflight_requests{model="m"} 0\n'
    for name, total in (("input_sequence_tokens", 42), ("output_sequence_tokens", 24), ("cached_tokens", 10)):
        text += f'dynamo_frontend_{name}_sum{{model="m"}} {total}\ndynamo_frontend_{name}_count{{model="m"}} 3\n'
    (sample,) = rows(normalized(text + 'dynamo_frontend_output_tokens_total{model="m"} 25\n'))

    assert (sample["prompt_tokens_total"], sample["generation_tokens_total"]) == (42, 24)
    assert (sample["prefix_cache_queries_total"], sample["prefix_cache_hits_total"]) == (42, 10)
    assert sample["realtime_tokens_total"] == 25


def test_page_paths_of_usual_ports_are_absolute():
    """The doctor joins them to http://127.0.0.1:<port>."""
    assert {port.engine for port in PORTS} == set(DIALECTS)
    assert all(Path(port.path).is_absolute() and 0 < port.port < 65536 for port in PORTS)
