"""Every recorded page maps whole, and its counters are what the clients saw."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

VLLM = Path("vllm/0.32.0/small_llama_kv8k")
LLAMA = Path("llama.cpp/debian-1_0.7.0-b11669/small_np4_c8192")
DYNAMO = Path("dynamo/1.6.1/frontend_kv_router_mocker")
ENGINES = ("vllm", "sglang", "llama.cpp", "dynamo", "lmcache")


def phase(recordings, folder, normalized, rows):
    """First and last engine row of a phase."""
    pages = sorted((recordings / folder).glob("*.prom"))
    return [rows(normalized(folder / page.name))[0] for page in (pages[0], pages[-1])]


def growth(first, last, column):
    return last[column] - first[column]


def test_every_page_is_understood_whole(recordings, normalized):
    """No family of the engine's own prefix is unknown and no histogram is dropped, on any page in the project."""
    pages = sorted(recordings.rglob("*.prom"))
    strange = {
        str(page): (found.unknown_families, found.defects)
        for page in pages
        if (found := normalized(page.relative_to(recordings))).unknown_families or found.defects
    }

    assert len(pages) > 100
    assert strange == {}


def test_every_page_of_the_whole_set_is_understood(all_recordings, normalized):
    """The same over the whole set of recordings, of which the project holds a selection."""
    pages = [page for engine in ENGINES for page in sorted((all_recordings / engine).rglob("*.prom"))]
    strange = {
        str(page): (found.unknown_families, found.defects)
        for page in pages
        if (found := normalized(page.read_text())).unknown_families or found.defects
    }

    assert len(pages) > 180
    assert strange == {}


@pytest.mark.parametrize(
    ("page", "engine", "vantage", "dialects"),
    [
        (VLLM / "01_idle/1795187151413.prom", "vllm", "engine", ("vllm",)),
        (
            Path("vllm/0.6.6.post1/v0_collectors_in_process/04_kv_pressure_preempt_c16.prom"),
            "vllm",
            "engine",
            ("vllm",),
        ),
        (Path("sglang/0.5.23/collectors_in_process/01_idle.prom"), "sglang", "engine", ("sglang",)),
        (LLAMA / "01_idle/1795187449685.prom", "llamacpp", "engine", ("llamacpp",)),
        (DYNAMO / "01_idle/1795187732090.prom", "dynamo_frontend", "frontend", ("dynamo_frontend",)),
        (DYNAMO / "worker/1795187730714.prom", "dynamo_worker", "engine", ("dynamo_worker",)),
        (DYNAMO / "worker/1795187806775.prom", "dynamo_worker", "engine", ("dynamo_worker", "vllm")),
        (
            Path("dynamo/1.6.1/mocker_engine_type_sglang/worker_02_loaded.prom"),
            "dynamo_worker",
            "engine",
            ("dynamo_worker", "sglang"),
        ),
        (Path("lmcache/0.5.6/mp_server_cpu/05_after_first_bench.prom"), "lmcache_mp", "cache", ("lmcache_mp",)),
    ],
)
def test_a_page_tells_its_engine(normalized, page, engine, vantage, dialects):
    """The families alone say who printed the page, from where, and which other dialects speak on it."""
    identity = normalized(page).identity

    assert (identity.engine, identity.vantage, identity.dialects) == (engine, vantage, dialects)


@pytest.mark.parametrize(
    "folder", [VLLM / "02_light_c1", VLLM / "03_loaded_shared_prefix_c8", VLLM / "09_after_restart/light_c2"]
)
def test_vllm_counts_what_its_clients_counted(recordings, normalized, rows, folder):
    """Tokens and requests of a phase are the clients' own sums, exactly."""
    first, last = phase(recordings, folder, normalized, rows)
    seen = json.loads((recordings / folder / "client.json").read_text())["summary"]

    assert growth(first, last, "prompt_tokens_total") == seen["prompt_tokens"]
    assert growth(first, last, "generation_tokens_total") == seen["completion_tokens"]
    assert growth(first, last, "requests_finished_total") == seen["ok"]
    assert growth(first, last, "prefix_cache_queries_total") == seen["prompt_tokens"]


def test_shared_prefixes_were_found_in_the_cache(recordings, normalized, rows):
    """79.5 % of the prompt tokens of phase 03 came from the prefix cache, all of them from the device."""
    first, last = phase(recordings, VLLM / "03_loaded_shared_prefix_c8", normalized, rows)
    hits = growth(first, last, "prefix_cache_hits_total")

    assert round(hits / growth(first, last, "prefix_cache_queries_total"), 3) == 0.795
    assert growth(first, last, "cached_tokens_device_total") == hits
    assert growth(first, last, "cached_tokens_host_total") == 0


def test_kv_pressure_shows_in_usage_waiting_and_preemptions(recordings, normalized, rows):
    """Phase 04 fills the KV cache: 14 preemptions, 8,491 output tokens, usage 1, requests waiting for capacity."""
    folder = VLLM / "04_kv_pressure_preempt_c16"
    first, last = phase(recordings, folder, normalized, rows)
    pages = [rows(normalized(folder / p.name))[0] for p in sorted((recordings / folder).glob("*.prom"))]

    assert growth(first, last, "preemptions_total") == 14
    assert growth(first, last, "generation_tokens_total") == 8491
    assert max(page["kv_cache_usage_ratio"] for page in pages) == pytest.approx(1.0, abs=0.01)
    assert all(p["requests_waiting"] == p["requests_waiting_capacity"] + p["requests_waiting_deferred"] for p in pages)
    assert max(page["requests_waiting"] for page in pages) >= 5


def test_a_queue_can_grow_on_an_empty_kv_cache(recordings, normalized, rows):
    """Phase 05 is bound by the number of sequences: many wait while KV usage stays under 0.2, and none is preempted."""
    folder = VLLM / "05_overload_queue_c64_low_kv"
    first, last = phase(recordings, folder, normalized, rows)
    pages = [rows(normalized(folder / p.name))[0] for p in sorted((recordings / folder).glob("*.prom"))]

    assert growth(first, last, "generation_tokens_total") == 17936
    assert growth(first, last, "requests_finished_total") == 395
    assert growth(first, last, "preemptions_total") == 0
    assert max(page["requests_waiting"] for page in pages) >= 45
    assert max(page["kv_cache_usage_ratio"] for page in pages) < 0.2
    assert max(page["requests_running"] for page in pages) == 16


def test_errors_stand_in_http_columns_and_admin_routes_do_not(normalized, rows):
    """A prompt too long and an unknown model are two 4xx; metrics, sleep and wake-up are no inference requests."""
    before = rows(normalized(VLLM / "07_errors_aborts_admin/1795187524994_before.prom"))[0]
    errors = rows(normalized(VLLM / "07_errors_aborts_admin/1795187529585_after_errors_abort.prom"))[0]
    admin = rows(normalized(VLLM / "07_errors_aborts_admin/1795187534977_after_admin.prom"))[0]

    assert growth(before, errors, "http_4xx_total") == 2
    assert growth(before, errors, "http_5xx_total") == 0
    assert growth(errors, admin, "http_requests_total") == 0
    assert admin["is_sleeping"] is False


def test_a_restart_is_a_new_process_with_counters_from_zero(normalized, rows):
    """After phase 09's restart the process start moved and the counters fell; the settings and their hash did not."""
    old = rows(normalized(VLLM / "06_drained_idle/1795187455068.prom"))[0]
    new = rows(normalized(VLLM / "09_after_restart/1795187905337.prom"))[0]

    assert old["process_started_at"] == datetime(2026, 11, 20, 15, 1, 7, 190000, tzinfo=UTC)
    assert new["process_started_at"] > old["process_started_at"]
    assert old["generation_tokens_total"] > 0
    assert new["generation_tokens_total"] == 0
    assert new["config_hash"] == old["config_hash"]


def test_a_configuration_is_what_the_page_prints(normalized, rows):
    """cache_config_info becomes settings, a stable hash and the KV columns; the rank label is no setting."""
    found = normalized(VLLM / "01_idle/1795187151413.prom")
    (config,) = rows(found, "raw_engine_configs")
    (sample,) = rows(found)

    assert config["settings"]["num_gpu_blocks"] == "256"
    assert config["settings"]["gpu_memory_utilization"] == "0.92"
    assert not {"engine", "model_name"} & set(config["settings"])
    assert sample["config_hash"] == config["config_hash"] == "2ddd1f4c01936e3e"
    assert sample["kv_cache_capacity_tokens"] == 8192
    assert sample["kv_cache_block_size_tokens"] == 32


def test_mfu_counters_at_zero_are_unknown_and_named_with_their_flag(normalized, rows):
    """vLLM prints estimated FLOPs as 0 for ever unless asked to estimate: that is no zero."""
    found = normalized(VLLM / "06_drained_idle/1795187455068.prom")

    assert "estimated_flops_total" not in rows(found)[0]
    assert [missing.flag for missing in found.missing] == ["--enable-mfu-metrics (vLLM 0.17 and later)"]
    assert not found.missing[0].is_required


@pytest.mark.parametrize("name", ["02_light_c1", "03_shared_prefix_c4", "04_overload_deferred_c24"])
def test_llamacpp_prompt_tokens_include_the_cached_ones(recordings, normalized, rows, name):
    """llama.cpp counts computed tokens only; with the cached added back the sum is the clients' own."""
    first, last = phase(recordings, LLAMA / name, normalized, rows)
    seen = json.loads((recordings / LLAMA / name / "client.json").read_text())["summary"]

    assert growth(first, last, "prompt_tokens_total") == seen["prompt_tokens"]
    assert growth(first, last, "generation_tokens_total") == seen["completion_tokens"]
    cached = growth(first, last, "cached_tokens_device_total")
    assert growth(first, last, "prefill_tokens_total") == seen["prompt_tokens"] - cached


@pytest.mark.parametrize("name", ["03_shared_prefix_c8", "04_overload_c64"])
def test_a_dynamo_frontend_counts_what_its_clients_counted(recordings, normalized, rows, name):
    """Finished requests and their output tokens are exact, also of prompts that the frontend did not tokenize."""
    first, last = phase(recordings, DYNAMO / name, normalized, rows)
    seen = json.loads((recordings / DYNAMO / name / "client.json").read_text())["summary"]

    assert growth(first, last, "requests_finished_total") == seen["ok"]
    assert growth(first, last, "generation_tokens_total") == seen["completion_tokens"]


def test_a_frontend_that_measured_no_prompt_says_nothing_about_prompts(normalized, rows):
    """Prompts of token ids are not measured: prompt tokens, live tokens and hit counters are unknown, never 0."""
    found = normalized(DYNAMO / "04_overload_c64/1795187840228.prom")
    (sample,) = rows(found)
    histograms = {row["metric"]: row for row in rows(found, "raw_engine_histograms")}

    assert sample["requests_finished_total"] > 0
    assert not {"prompt_tokens_total", "realtime_tokens_total", "prefix_cache_queries_total"} & set(sample)
    assert "prefix_cache_hits_total" not in sample
    assert histograms["time_to_first_token_seconds"]["count_value"] == 0
    assert any("count 0 while requests end is unknown" in note for note in found.notes)


def test_a_frontend_prints_its_workers_limits_as_configuration(normalized, rows):
    """Dynamo's model gauges are settings: a change of them is a change of the hash."""
    found = normalized(DYNAMO / "02_light_c1/1795187758445.prom")
    (sample,) = rows(found)
    (config,) = rows(found, "raw_engine_configs")

    assert config["settings"]["frontend_model_total_kv_blocks"] == "256"
    assert sample["kv_cache_capacity_tokens"] == 8192
    assert (sample["max_running_requests"], sample["max_batched_tokens"]) == (16, 1024)
    assert sample["vantage"] == "frontend"


def test_a_workers_engine_columns_are_its_engines(normalized, rows):
    """Beside dynamo_component_* the worker's vllm:* families say what runs; Dynamo adds what they leave open."""
    (sample,) = rows(normalized(DYNAMO / "worker/1795187806775.prom"))

    assert (sample["requests_running"], sample["requests_waiting"]) == (14, 50)
    assert sample["kv_cache_usage_ratio"] == 0.9921875
    assert sample["preemptions_total"] == 12
    assert sample["requests_started_total"] == 341
    assert "process_started_at" not in sample


def test_the_cache_server_fills_tiers_and_no_engine_row(normalized, rows):
    """LMCache's server is a cache: tiers with sizes, hits and evictions, reuse histograms, no engine sample."""
    found = normalized(Path("lmcache/0.5.6/mp_server_cpu/06_bench_evicting_1795188291646.prom"))
    tiers = {row["tier"]: row for row in rows(found, "raw_kv_tier_samples")}
    histograms = {row["metric"]: row for row in rows(found, "raw_engine_histograms")}

    assert rows(found) == []
    assert tiers["l1"]["capacity_bytes"] == 256 * 2**20
    assert tiers["l1"]["evicted_chunks_total"] == 1509
    assert tiers["all"]["hit_tokens_total"] / tiers["all"]["requested_tokens_total"] == 0.5
    assert tiers["l1"]["hit_tokens_total"] + tiers["l2"]["hit_tokens_total"] == tiers["all"]["hit_tokens_total"]
    assert histograms["kv_block_reuse_distance_blocks"]["vantage"] == "cache"
    assert histograms["kv_block_reuse_distance_blocks"]["count_value"] == 32


def test_v0_vllm_speaks_other_names_of_the_same_things(normalized, rows):
    """V0's usage, hit-rate gauge and TPOT-named ITL land in the columns that V1's names land in."""
    for release in ("0.6.6.post1", "0.7.3", "0.8.5"):
        found = normalized(Path(f"vllm/{release}/v0_collectors_in_process/04_kv_pressure_preempt_c16.prom"))
        (sample,) = rows(found)
        histograms = {row["metric"]: row for row in rows(found, "raw_engine_histograms")}

        assert sample["engine_rank"] == "0"
        assert (sample["requests_running"], sample["requests_swapped"]) == (10, 2)
        assert sample["kv_cache_usage_ratio"] == 1.0
        assert sample["prefix_cache_hit_ratio"] == 0.3
        assert "prefix_cache_queries_total" not in sample
        assert sample["kv_cache_capacity_tokens"] == 8192
        assert (sample["requests_finished_total"], sample["requests_aborted_total"]) == (152, 0)
        assert histograms["inter_token_latency_seconds"]["source_metric"] == "vllm:time_per_output_token_seconds"
        assert "time_per_output_token_seconds" not in histograms
        assert found.identity.generation == "V0 names (0.8 and before)"


def test_sglang_counts_cached_tokens_as_looked_up_and_found(normalized, rows):
    """SGLang's prompt and cached counters are queries and hits; retractions are preemptions; NaN gauges are unknown."""
    found = normalized(Path("sglang/0.5.23/collectors_in_process/04_kv_pressure_preempt_c16.prom"))
    (sample,) = rows(found)

    assert sample["prefix_cache_queries_total"] == sample["prompt_tokens_total"] == 42985
    assert sample["prefix_cache_hits_total"] == 21760
    assert sample["preemptions_total"] == 2
    assert sample["kv_cache_usage_ratio"] == 0.99
    assert "process_started_at" not in sample


def test_sglang_before_any_hit_knows_no_hit_ratio(normalized, rows):
    """cached_tokens_total appears at the first hit: until then neither queries nor hits are said."""
    (sample,) = rows(normalized(Path("sglang/0.5.23/collectors_in_process/01_idle.prom")))

    assert "prefix_cache_queries_total" not in sample
    assert "prefix_cache_hits_total" not in sample
