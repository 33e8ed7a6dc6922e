"""What holds for any page: order does not matter, strangers change nothing, a count is never made up."""

from __future__ import annotations

import random
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

PAGES = (
    Path("vllm/0.32.0/small_llama_kv8k/07_errors_aborts_admin/1795187534977_after_admin.prom"),
    Path("sglang/0.5.23/collectors_in_process/04_kv_pressure_preempt_c16.prom"),
    Path("dynamo/1.6.1/frontend_kv_router_mocker/worker/1795187806775.prom"),
    Path("llama.cpp/debian-1_0.7.0-b11669/small_np4_c8192/05_drained_idle/1795187601659.prom"),
    Path("lmcache/0.5.6/mp_server_cpu/06_bench_evicting_1795188291646.prom"),
)
# Fixtures hold no state between examples: a reader that only remembers shapes.
FEW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def said(found):
    """Everything of a page but the order of its rows."""
    return {
        "rows": {name: sorted(map(repr, rows)) for name, rows in found.rows.items()},
        "identity": found.identity,
        "unknown": set(found.unknown_families),
        "missing": set(found.missing),
        "defects": set(found.defects),
    }


def shuffled(text, seed):
    """The same samples in another order; types stay declared, wherever they stand."""
    lines = [line for line in text.splitlines() if line and not line.startswith("# HELP")]
    types = [line for line in lines if line.startswith("#")]
    samples = [line for line in lines if not line.startswith("#")]
    random.Random(seed).shuffle(samples)
    return "\n".join([*types, *samples]) + "\n"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parts[0])
@FEW
@given(seed=st.integers(0, 2**32))
def test_the_order_of_samples_changes_nothing(recordings, normalized, path, seed):
    """Shuffled, the page gives the same rows, bounds and hashes."""
    text = (recordings / path).read_text()

    assert said(normalized(shuffled(text, seed))) == said(normalized(text))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parts[0])
@FEW
@given(
    names=st.lists(st.from_regex(r"[a-z]{3,12}_zz", fullmatch=True), max_size=4, unique=True),
    value=st.floats(allow_nan=False, allow_infinity=False),
)
def test_strange_families_change_only_what_is_unknown(recordings, normalized, path, names, value):
    """New families under the engine's prefix are named; those of others are none of our business."""
    text = (recordings / path).read_text()
    prefix = {"vllm": "vllm:", "sglang": "sglang:", "dynamo": "dynamo_", "llama.cpp": "llamacpp:"}.get(
        path.parts[0], "lmcache_mp_"
    )
    before = said(normalized(text))
    after = said(normalized(text + "".join(f"{prefix}{n} {value!r}\nother_{n} {value!r}\n" for n in names)))

    assert after["unknown"] == {f"{prefix}{name}" for name in names}
    assert {**after, "unknown": before["unknown"]} == before


@FEW
@given(
    label=st.from_regex(r"[a-z]{2,8}_noise", fullmatch=True),
    value=st.text(st.characters(codec="utf-8", exclude_characters='"\\\n', exclude_categories=["Cs"]), max_size=12),
)
def test_labels_that_nobody_asked_for_change_nothing_but_kept_settings(recordings, normalized, label, value):
    """A label that relabeling put on every vLLM series adds up to the same samples and histograms."""
    text = (recordings / PAGES[0]).read_text()
    noisy = "\n".join(
        line.replace("{", f'{{{label}="{value}",', 1)
        if line.startswith("vllm:") and "cache_config_info" not in line
        else line
        for line in text.splitlines()
    )

    assert said(normalized(noisy + "\n")) == said(normalized(text))


@MANY
@given(counts=st.lists(st.integers(0, 10**9), min_size=1, max_size=12), falling=st.booleans())
def test_a_histogram_is_read_whole_or_dropped(normalized, rows, counts, falling):
    """Counts that never fall are read as they stand; any fall drops the histogram and names it."""
    counts = counts if falling else sorted(counts)
    bounds = [*map(str, range(1, len(counts))), "+Inf"]
    text = "".join(
        f'vllm:time_to_first_token_seconds_bucket{{le="{bound}"}} {count}\n'
        for bound, count in zip(bounds, counts, strict=True)
    )
    found = normalized(text)
    read = [row["bucket_counts"] for row in rows(found, "raw_engine_histograms")]

    if counts == sorted(counts):
        assert read == [counts]
        assert found.defects == ()
    else:
        assert read == []
        assert [defect.metric for defect in found.defects] == ["time_to_first_token_seconds"]


@MANY
@given(
    per_rank=st.dictionaries(st.integers(0, 300), st.integers(0, 10**6), min_size=1, max_size=12),
    loose=st.integers(0, 1000),
)
def test_ranks_are_neither_lost_nor_added_up(normalized, rows, per_rank, loose):
    """One row per rank with its own value, and a series without a rank once."""
    text = "".join(f'vllm:generation_tokens_total{{engine="{rank}"}} {n}\n' for rank, n in per_rank.items())
    found = rows(normalized(text + f"vllm:admission_rejections_total {loose}\n"))

    assert {int(row["engine_rank"]): row["generation_tokens_total"] for row in found} == per_rank
    assert [int(row["engine_rank"]) for row in found] == sorted(per_rank)
    assert [row["requests_rejected_total"] for row in found if "requests_rejected_total" in row] == [loose]


@MANY
@given(
    copies=st.integers(1, 8),
    value=st.floats(0, 1e6),
    name=st.sampled_from(["sglang:num_running_reqs", "sglang:num_retracted_requests_total", "sglang:gen_throughput"]),
)
def test_more_tensor_ranks_are_the_same_engine(normalized, rows, copies, value, name):
    """However many tensor ranks print one quantity, it is that quantity."""
    kind = "counter" if name.endswith("_total") else "gauge"
    text = f"# TYPE {name} {kind}\n" + "".join(f'{name}{{tp_rank="{rank}"}} {value!r}\n' for rank in range(copies))
    one = f'# TYPE {name} {kind}\n{name}{{tp_rank="0"}} {value!r}\n'

    assert rows(normalized(text)) == rows(normalized(one))
