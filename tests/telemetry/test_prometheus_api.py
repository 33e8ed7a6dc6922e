"""What a Prometheus-compatible server answers, as recorded and as it may."""

import json
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.telemetry import dcgm
from optiinfra_pipelines.telemetry.prometheus_api import AnswerError, by_label, read_answer, selector, windows

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NAMES = ("gpu_memory_used_dcgm_fi_dev_fb_used", "gpu_power_draw_dcgm_fi_dev_power_usage")


def data(*parts: str) -> str:
    folder = os.environ.get("OPTIINFRA_DATA")
    if not folder:
        pytest.skip("OPTIINFRA_DATA names no folder of recordings")
    return Path(folder, "fixtures", *parts).read_text()


def answer(result: list[object], kind: str = "vector") -> str:
    return json.dumps({"status": "success", "data": {"resultType": kind, "result": result}})


def test_a_recorded_fleet_of_sixteen_gpus_is_told_apart_by_host() -> None:
    """Recorded from two 8-GPU nodes with one vLLM: the exporter's own pod is not the owner of the idle GPUs."""
    ((moment, samples),) = read_answer(data("dcgm", f"aicr_h100_vllm_prometheus_{NAMES[0]}.json")).items()
    hosts = by_label(samples, "Hostname")
    pages = {host: dcgm.read_gpus(own, host=host, sampled_at=moment) for host, own in hosts.items()}

    assert moment == datetime.fromtimestamp(1773114089.444, UTC)
    assert {host: page.gpu_count for host, page in pages.items()} == {"gpu-node-1": 8, "gpu-node-2": 8}
    rows = [row for page in pages.values() for row in page.rows]
    assert {row["owner"] for row in rows} == {None, "dynamo-workload/vllm-agg-0-vllmdecodeworker-s65j5"}
    (held,) = [row for row in rows if row["owner"]]
    assert held["memory_used_bytes"] == 74166 * 2**20


@pytest.mark.parametrize(
    "name", [*NAMES, "gpu_temperature_dcgm_fi_dev_gpu_temp", "gpu_utilization_dcgm_fi_dev_gpu_util"]
)
def test_every_recorded_answer_has_a_sample_per_gpu(name: str) -> None:
    """Values come as strings."""
    moments = read_answer(data("dcgm", f"aicr_h100_vllm_prometheus_{name}.json"))

    assert [len(samples) for samples in moments.values()] == [16]


def test_a_recorded_range_is_sorted_by_time() -> None:
    """Recorded from Prometheus 2.42: a matrix has many times, each with the series that have a point there."""
    moments = read_answer(data("node_exporter", "prometheus_query_range_node_cpu.json"))

    assert list(moments) == [EPOCH + timedelta(seconds=1795187110 + 10 * step) for step in range(4)]
    first = {(s.labels["cpu"], s.labels["mode"]): s.value for s in moments[EPOCH + timedelta(seconds=1795187110)]}
    assert first["0", "user"] == 0.5346432000000072


def test_no_series_is_no_moment_and_no_error() -> None:
    """An empty answer is a success."""
    assert read_answer(answer([])) == {}


def test_nan_and_infinity_are_left_out() -> None:
    """They come as strings; NaN is also the mark of a series that ended."""
    series = {"metric": {"__name__": "x"}, "values": [[1, "NaN"], [2, "+Inf"], [3, "1.5"]]}

    moments = read_answer(answer([series], "matrix"))

    assert [(at.timestamp(), samples[0].value) for at, samples in moments.items()] == [(3, 1.5)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<html>", "not JSON"),
        ("[]", "no status"),
        ('{"status":"error","errorType":"bad_data","error":"exceeded maximum resolution of 11,000 points"}', "11,000"),
        (answer([], "scalar"), "scalar"),
        ('{"status":"success","data":null}', "None"),
        ('{"status":"success","data":[]}', "None"),
        (answer([{"metric": {}}]), "malformed"),
        (answer([{"metric": {}, "value": [1]}]), "malformed"),
        (answer([{"metric": {}, "value": [1, "x"]}]), "malformed"),
        (answer([{"metric": {}, "value": [1e300, "1"]}]), "malformed"),
        (answer([5]), "malformed"),
    ],
)
def test_what_is_no_answer_says_why(body: str, reason: str) -> None:
    """The text reaches the person who reads raw_gpu_collections."""
    with pytest.raises(AnswerError, match=reason):
        read_answer(body)


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4))
def test_a_selector_matches_exactly_the_values_it_names(values: list[str]) -> None:
    """A host named `a.b|c` matches itself and nothing else; quotes and backslashes do not end the string."""
    found = re.fullmatch(r'\{__name__=~"F",host=~"(.*)"\}', selector("F", "host", values), re.DOTALL)
    assert found is not None
    pattern = re.compile(re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], found[1], flags=re.DOTALL))

    assert all(pattern.fullmatch(value) for value in values)
    assert not pattern.fullmatch("".join(values) + "!")
    assert not pattern.fullmatch("aXb") or "aXb" in values


@given(
    st.datetimes(min_value=datetime(2020, 1, 1), max_value=datetime(2030, 1, 1)),  # noqa: DTZ001 - made UTC below
    st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=2)),
)
def test_windows_cover_a_gap_once_and_oldest_first(start: datetime, gap: timedelta) -> None:
    """What was missed while we were away is read in pieces that touch and never overlap."""
    start = start.replace(tzinfo=UTC)
    reached = start
    for end, width in windows(start, start + gap):
        assert end - width == reached
        assert timedelta(0) < width <= timedelta(minutes=15)
        reached = end

    assert reached == start + gap
