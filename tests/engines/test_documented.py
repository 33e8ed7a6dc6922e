"""Engines of which no page was recorded: TGI, trtllm-serve, Triton, and LMCache's connector in part.

Every page here was WRITTEN FROM DOCUMENTATION OR SOURCE, NOT RECORDED: TGI's router at its last commit, TensorRT-LLM's
metrics/collector.py, Triton's metrics guide and the README of its TensorRT-LLM backend.
"""

from __future__ import annotations

import pytest

TGI = """\
# TYPE tgi_request_count counter
tgi_request_count 110
# TYPE tgi_request_success counter
tgi_request_success 100
# TYPE tgi_request_failure counter
tgi_request_failure{err="overloaded"} 4
tgi_request_failure{err="validation"} 3
tgi_request_failure{err="dropped"} 2
tgi_request_failure{err="generation"} 1
# TYPE tgi_queue_size gauge
tgi_queue_size 5
# TYPE tgi_batch_current_size gauge
tgi_batch_current_size 12
# TYPE tgi_batch_current_max_tokens gauge
tgi_batch_current_max_tokens 24000
# TYPE tgi_batch_max_total_tokens gauge
tgi_batch_max_total_tokens 96000
# TYPE tgi_request_queue_duration histogram
tgi_request_queue_duration_bucket{le="0.00015000000000000001"} 40
tgi_request_queue_duration_bucket{le="0.0225"} 90
tgi_request_queue_duration_bucket{le="+Inf"} 100
tgi_request_queue_duration_sum 20.0
tgi_request_queue_duration_count 100
# TYPE tgi_batch_inference_duration histogram
tgi_batch_inference_duration_bucket{method="prefill",le="0.1"} 30
tgi_batch_inference_duration_bucket{method="prefill",le="+Inf"} 50
tgi_batch_inference_duration_sum{method="prefill"} 10.0
tgi_batch_inference_duration_count{method="prefill"} 50
tgi_batch_inference_duration_bucket{method="decode",le="0.1"} 900
tgi_batch_inference_duration_bucket{method="decode",le="+Inf"} 1000
tgi_batch_inference_duration_sum{method="decode"} 33.0
tgi_batch_inference_duration_count{method="decode"} 1000
# TYPE tgi_batch_inference_count counter
tgi_batch_inference_count{method="prefill"} 50
tgi_batch_inference_count{method="decode"} 1000
# TYPE tgi_request_duration histogram
tgi_request_duration_bucket{le="1"} 80
tgi_request_duration_bucket{le="+Inf"} 100
tgi_request_duration_sum 90.0
tgi_request_duration_count 100
# TYPE tgi_request_mean_time_per_token_duration histogram
tgi_request_mean_time_per_token_duration_bucket{le="0.05"} 60
tgi_request_mean_time_per_token_duration_bucket{le="+Inf"} 100
tgi_request_mean_time_per_token_duration_sum 4.0
tgi_request_mean_time_per_token_duration_count 100
# TYPE tgi_request_input_length histogram
tgi_request_input_length_bucket{le="1024"} 103
tgi_request_input_length_bucket{le="+Inf"} 107
tgi_request_input_length_sum 51000
tgi_request_input_length_count 107
# TYPE tgi_request_generated_tokens histogram
tgi_request_generated_tokens_bucket{le="+Inf"} 100
tgi_request_generated_tokens_sum 12000
tgi_request_generated_tokens_count 100
# TYPE tgi_request_skipped_tokens summary
tgi_request_skipped_tokens{quantile="0.5"} 2
tgi_request_skipped_tokens_sum 640
tgi_request_skipped_tokens_count 300
# TYPE tgi_request_validation_duration histogram
tgi_request_validation_duration_bucket{le="+Inf"} 107
tgi_request_validation_duration_sum 0.4
tgi_request_validation_duration_count 107
# TYPE tgi_batch_concat counter
tgi_batch_concat{reason="backpressure"} 3
"""

TRTLLM = """\
# TYPE trtllm_request_success_total counter
trtllm_request_success_total{engine_type="trtllm",finished_reason="length",model_name="m"} 7
trtllm_request_success_total{engine_type="trtllm",finished_reason="stop",model_name="m"} 3
trtllm_request_success_total{engine_type="trtllm",finished_reason="cancelled",model_name="m"} 2
# TYPE trtllm_request_error_total counter
trtllm_request_error_total{engine_type="trtllm",http_code="400",model_name="m"} 4
trtllm_request_error_total{engine_type="trtllm",http_code="429",model_name="m"} 5
trtllm_request_error_total{engine_type="trtllm",http_code="500",model_name="m"} 6
# TYPE trtllm_num_requests_running gauge
trtllm_num_requests_running{engine_type="trtllm",model_name="m"} 9
# TYPE trtllm_num_requests_waiting gauge
trtllm_num_requests_waiting{engine_type="trtllm",model_name="m"} 1
# TYPE trtllm_kv_cache_utilization gauge
trtllm_kv_cache_utilization{engine_type="trtllm",model_name="m"} 0.5
# TYPE trtllm_kv_cache_hit_rate gauge
trtllm_kv_cache_hit_rate{engine_type="trtllm",model_name="m"} 0.25
# TYPE trtllm_kv_cache_max_blocks gauge
trtllm_kv_cache_max_blocks{engine_type="trtllm",model_name="m"} 1000
# TYPE trtllm_kv_cache_used_blocks gauge
trtllm_kv_cache_used_blocks{engine_type="trtllm",model_name="m"} 500
# TYPE trtllm_kv_cache_tokens_per_block gauge
trtllm_kv_cache_tokens_per_block{engine_type="trtllm",model_name="m"} 32
# TYPE trtllm_max_batch_size_runtime gauge
trtllm_max_batch_size_runtime{engine_type="trtllm",model_name="m"} 64
# TYPE trtllm_max_batch_size_static gauge
trtllm_max_batch_size_static{engine_type="trtllm",model_name="m"} 128
# TYPE trtllm_prompt_tokens_total counter
trtllm_prompt_tokens_total{engine_type="trtllm",model_name="m"} 5000
# TYPE trtllm_generation_tokens_total counter
trtllm_generation_tokens_total{engine_type="trtllm",model_name="m"} 900
# TYPE trtllm_prompt_cached_tokens_total counter
trtllm_prompt_cached_tokens_total{engine_type="trtllm",model_name="m"} 1200
# TYPE trtllm_prompt_cache_hit_tokens_total counter
trtllm_prompt_cache_hit_tokens_total{cache_level="0",cache_tier="gpu",engine_type="trtllm",model_name="m"} 1000
trtllm_prompt_cache_hit_tokens_total{cache_level="1",cache_tier="host",engine_type="trtllm",model_name="m"} 200
# TYPE trtllm_time_to_first_token_seconds histogram
trtllm_time_to_first_token_seconds_bucket{engine_type="trtllm",le="0.1",model_name="m"} 4
trtllm_time_to_first_token_seconds_bucket{engine_type="trtllm",le="+Inf",model_name="m"} 12
trtllm_time_to_first_token_seconds_sum{engine_type="trtllm",model_name="m"} 3.0
trtllm_time_to_first_token_seconds_count{engine_type="trtllm",model_name="m"} 12
# TYPE trtllm_kv_cache_config_info gauge
trtllm_kv_cache_config_info{enable_block_reuse="True",engine_type="trtllm",model_name="m",page_size="32"} 1
# TYPE trtllm_kv_cache_reused_blocks_total counter
trtllm_kv_cache_reused_blocks_total{engine_type="trtllm",model_name="m"} 38
# TYPE trtllm_iteration_latency_seconds gauge
trtllm_iteration_latency_seconds{engine_type="trtllm",model_name="m"} 0.02
"""

TRITON = """\
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="ensemble",version="1"} 100
nv_inference_request_success{model="preprocessing",version="1"} 100
nv_inference_request_success{model="tensorrt_llm",version="1"} 100
# TYPE nv_inference_request_failure counter
nv_inference_request_failure{model="tensorrt_llm",reason="OTHER",version="1"} 3
nv_inference_request_failure{model="tensorrt_llm",reason="REJECTED",version="1"} 2
nv_inference_request_failure{model="tensorrt_llm",reason="CANCELED",version="1"} 1
# TYPE nv_inference_request_duration_us counter
nv_inference_request_duration_us{model="ensemble",version="1"} 260000000
nv_inference_request_duration_us{model="tensorrt_llm",version="1"} 250000000
# TYPE nv_inference_queue_duration_us counter
nv_inference_queue_duration_us{model="tensorrt_llm",version="1"} 1500000
# TYPE nv_inference_first_response_histogram_ms histogram
nv_inference_first_response_histogram_ms_bucket{le="100",model="tensorrt_llm",version="1"} 60
nv_inference_first_response_histogram_ms_bucket{le="+Inf",model="tensorrt_llm",version="1"} 100
nv_inference_first_response_histogram_ms_sum{model="tensorrt_llm",version="1"} 12000
nv_inference_first_response_histogram_ms_count{model="tensorrt_llm",version="1"} 100
# TYPE nv_inference_compute_infer_duration_us counter
nv_inference_compute_infer_duration_us{model="tensorrt_llm",version="1"} 240000000
# TYPE nv_trt_llm_request_metrics gauge
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 6
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="context",version="1"} 1
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 4
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 512
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 10
# TYPE nv_trt_llm_kv_cache_block_metrics gauge
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="tensorrt_llm",version="1"} 0.4875
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 64
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 3042
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="free",model="tensorrt_llm",version="1"} 6239
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 6239
# TYPE nv_trt_llm_general_metrics gauge
nv_trt_llm_general_metrics{general_type="iteration_counter",model="tensorrt_llm",version="1"} 4000
nv_trt_llm_general_metrics{general_type="timestamp",model="tensorrt_llm",version="1"} 1700074049
# TYPE nv_trt_llm_runtime_memory_metrics gauge
nv_trt_llm_runtime_memory_metrics{memory_type="gpu",model="tensorrt_llm",version="1"} 1610236
# TYPE nv_gpu_utilization gauge
nv_gpu_utilization{gpu_uuid="GPU-0"} 0.9
"""


@pytest.mark.parametrize(("page", "engine"), [(TGI, "tgi"), (TRTLLM, "trtllm"), (TRITON, "triton")])
def test_written_pages_are_understood_whole(normalized, page, engine):
    """Detection and tables agree with the documented names (written from documentation, not recorded)."""
    found = normalized(page)

    assert found.identity.engine == engine
    assert found.unknown_families == ()
    assert found.defects == ()


def test_tgi_outcomes_load_and_tokens(normalized, rows):
    """Overloaded is rejected, validation invalid, dropped aborted; lengths give tokens; the v3 budget a reserve."""
    (sample,) = rows(normalized(TGI))

    assert (sample["requests_running"], sample["requests_waiting"]) == (12, 5)
    assert sample["requests_started_total"] == 110
    outcomes = ("finished", "rejected", "invalid", "aborted", "failed")
    assert [sample[f"requests_{outcome}_total"] for outcome in outcomes] == [100, 4, 3, 2, 1]
    assert (sample["prompt_tokens_total"], sample["generation_tokens_total"]) == (51000, 12000)
    assert sample["kv_cache_reserved_ratio"] == 0.25
    assert "kv_cache_usage_ratio" not in sample
    assert sample["steps_total"] == 1050
    assert sample["spec_accepted_tokens_total"] == 640


def test_tgis_first_token_is_a_proxy_and_says_so(normalized, rows):
    """Queue plus prefill batches over requests: a sum and a count without buckets, marked, and noted as a bound."""
    found = normalized(TGI)
    histograms = {row["metric"]: row for row in rows(found, "raw_engine_histograms")}
    first_token = histograms["time_to_first_token_seconds"]

    assert first_token["is_proxy"] is True
    assert "bucket_counts" not in first_token
    assert (first_token["sum_value"], first_token["count_value"]) == (30.0, 100)
    assert histograms["time_per_output_token_seconds"]["is_proxy"] is True
    assert histograms["queue_seconds"]["is_proxy"] is False
    assert histograms["step_seconds"]["count_value"] == 1000
    assert any("lower bound" in note for note in found.notes)


def test_trtllm_outcomes_cache_and_configuration(normalized, rows):
    """Cancelled is aborted; 429 is rejected, other 4xx invalid, 5xx failed; blocks become tokens; info is settings."""
    found = normalized(TRTLLM)
    (sample,) = rows(found)
    (config,) = rows(found, "raw_engine_configs")

    outcomes = ("finished", "length", "aborted", "rejected", "invalid", "failed")
    assert [sample[f"requests_{outcome}_total"] for outcome in outcomes] == [10, 7, 2, 5, 4, 6]
    assert (sample["kv_cache_capacity_tokens"], sample["kv_cache_used_tokens"]) == (32000, 16000)
    assert (sample["cached_tokens_device_total"], sample["cached_tokens_host_total"]) == (1000, 200)
    assert (sample["prefix_cache_queries_total"], sample["prefix_cache_hits_total"]) == (5000, 1200)
    assert sample["max_running_requests"] == 64
    assert config["settings"] == {
        "enable_block_reuse": "True",
        "engine_type": "trtllm",
        "kv_cache_max_blocks": "1000",
        "kv_cache_tokens_per_block": "32",
        "max_batch_size_static": "128",
        "page_size": "32",
    }


def test_trtllm_speaks_the_same_under_dynamos_prefix(normalized, rows):
    """Dynamo 0.7 and its mocker print `trtllm:`; the rows differ in their sources only."""
    plain, prefixed = normalized(TRTLLM), normalized(TRTLLM.replace("trtllm_", "trtllm:"))

    assert rows(prefixed)[0] == rows(plain)[0]
    assert prefixed.unknown_families == ()


def test_triton_counts_a_request_once_though_every_model_of_an_ensemble_does(normalized, rows):
    """The generic counters are read of the models that TensorRT-LLM serves; microseconds become seconds."""
    found = normalized(TRITON)
    (sample,) = rows(found)
    histograms = {row["metric"]: row for row in rows(found, "raw_engine_histograms")}

    assert sample["requests_finished_total"] == 100
    assert [sample[f"requests_{o}_total"] for o in ("failed", "rejected", "aborted")] == [3, 2, 1]
    assert sample["queue_seconds_total"] == pytest.approx(1.5)
    assert histograms["request_duration_seconds"]["sum_value"] == pytest.approx(250.0)
    assert "bucket_counts" not in histograms["request_duration_seconds"]
    assert sample["steps_total"] == 4000


def test_tritons_blocks_and_slots(normalized, rows):
    """Usage is the fraction that the backend prints; blocks times tokens per block are tokens."""
    (sample,) = rows(normalized(TRITON))

    assert (sample["requests_running"], sample["requests_waiting"], sample["max_running_requests"]) == (4, 6, 512)
    assert sample["kv_cache_usage_ratio"] == 0.4875
    assert (sample["kv_cache_capacity_tokens"], sample["kv_cache_used_tokens"]) == (6239 * 64, 3042 * 64)


def test_tritons_used_blocks_are_a_share_only_when_they_can_be(normalized, rows):
    """Without the fraction it is used over max; above 1 the gauges disagree and usage is unknown."""
    block = 'nv_trt_llm_kv_cache_block_metrics{{kv_cache_block_type="{}",model="m"}} {}\n'
    (half,) = rows(normalized(block.format("used", 50) + block.format("max", 100)))
    (beyond,) = rows(normalized(block.format("used", 150) + block.format("max", 100)))

    assert half["kv_cache_usage_ratio"] == 0.5
    assert "kv_cache_usage_ratio" not in beyond


def test_tritons_milliseconds_become_seconds(normalized, rows):
    """Bounds and sum of the first-response histogram are scaled alike."""
    found = normalized(TRITON)
    (first_token,) = [
        row for row in rows(found, "raw_engine_histograms") if row["metric"] == "time_to_first_token_seconds"
    ]
    bounds = {row["bounds_id"]: row["upper_bounds"] for row in rows(found, "raw_histogram_bounds")}

    assert bounds[first_token["bounds_id"]] == pytest.approx((0.1, float("inf")))
    assert first_token["sum_value"] == pytest.approx(12.0)
