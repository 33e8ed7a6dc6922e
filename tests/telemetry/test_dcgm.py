"""dcgm-exporter pages become GPU rows: recorded ones, and the traps that no recording shows."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.exposition import ExpositionError, Reader
from optiinfra_pipelines.sql.sources import raw_tables
from optiinfra_pipelines.telemetry import dcgm
from optiinfra_pipelines.telemetry.advice import missing_from_dcgm
from optiinfra_pipelines.telemetry.dcgm import GpuPage
from optiinfra_pipelines.telemetry.samples import Row, Sample, Selection

NOW = datetime(2026, 11, 20, 15, 0, tzinfo=UTC)
GPU = {"gpu": "0", "UUID": "GPU-1", "modelName": "NVIDIA H100", "Hostname": "n1"}


def recorded(name: str) -> GpuPage:
    folder = os.environ.get("OPTIINFRA_DATA")
    if not folder:
        pytest.skip("OPTIINFRA_DATA names no folder of recordings")
    page = Reader().read((Path(folder) / "fixtures" / "dcgm" / name).read_text())
    return dcgm.read_gpus(Selection(lambda _: True).of(page), host="n1", sampled_at=NOW)


def read(*samples: tuple[str, float], labels: dict[str, str] = GPU) -> GpuPage:
    """A page of one GPU: field names without DCGM_FI_, values."""
    made = [Sample(f"DCGM_FI_{name}", labels, value) for name, value in samples]
    return dcgm.read_gpus(made, host="n1", sampled_at=NOW)


def only(page: GpuPage) -> Row:
    assert len(page.rows) == 1
    return page.rows[0]


def test_a_working_t4_reads_as_its_page_says() -> None:
    """Recorded, T4, driver 590: percent to ratios, MiB to bytes, mJ to J; what it does not tell is not there."""
    row = only(recorded("k8saiconf_ericsson-ccd.prom"))

    assert row["name"] == "Tesla T4"
    assert row["driver_version"] == "590.48.01"
    assert row["gpu_uuid"] == "GPU-6d5c0ac5-74d7-3130-46f1-e93ed57f469a"
    assert row["pci_bus_id"] == "00000000:37:00.0"
    assert row["gpu_utilization_ratio"] == pytest.approx(0.91)
    assert row["memory_bandwidth_utilization_ratio"] == pytest.approx(0.73)
    assert row["graphics_active_ratio"] == 0.156205
    assert row["tensor_active_ratio"] == 0.005822
    assert row["dram_active_ratio"] == 0.092781
    assert row["memory_used_bytes"] == 5120 * 2**20
    assert row["memory_total_bytes"] == (9791 + 5120 + 447) * 2**20
    assert row["temperature_celsius"] == 74
    assert row["power_watts"] == 68.244
    assert row["energy_joules_total"] == pytest.approx(15152422.938)
    assert row["pcie_tx_bytes_per_second"] == 4791810
    assert row["memory_temperature_celsius"] is None, "a T4 has no such sensor and prints 0"
    assert "sm_active_ratio" not in row
    assert "xid_last" not in row


def test_eight_h100_and_the_pod_that_holds_one() -> None:
    """Recorded, 8x H100 with one vLLM pod: a GPU without a pod label has no owner."""
    page = recorded("aicr_h100_vllm_metrics_excerpt.prom")
    owners = {row["gpu_index"]: row["owner"] for row in page.rows}

    assert page.gpu_count == 8
    assert owners == {0: "dynamo-workload/vllm-agg-0-vllmdecodeworker-s65j5"} | dict.fromkeys(range(1, 8))
    assert {row["gpu_index"]: row["power_watts"] for row in page.rows}[0] == 113.611
    assert all("memory_total_bytes" not in row for row in page.rows), "the excerpt has no frame buffer series"


@pytest.mark.parametrize(
    ("name", "model", "total_mib"),
    [
        ("k8saiconf_kops.prom", "NVIDIA L4", 22563 + 0 + 470),
        ("k8saiconf_upcloud.prom", "NVIDIA L40S", 45459 + 0 + 608),
        ("k8saiconf_rafay.prom", "Tesla T4", 14912 + 0 + 447),
    ],
)
def test_the_frame_buffer_is_the_sum_of_its_parts(name: str, model: str, total_mib: int) -> None:
    """Recorded pages have no FB_TOTAL: used, free and reserved make it."""
    row = only(recorded(name))

    assert (row["name"], row["memory_total_bytes"]) == (model, total_mib * 2**20)
    raw_tables()["raw_gpu_samples"].frame([row])


def test_two_parts_of_the_frame_buffer_make_no_total() -> None:
    """Without the reserved part the size is not known, and is not made up."""
    assert "memory_total_bytes" not in only(read(("DEV_FB_USED", 10), ("DEV_FB_FREE", 20)))
    assert only(read(("DEV_FB_TOTAL", 40), ("DEV_FB_USED", 10)))["memory_total_bytes"] == 40 * 2**20


def test_an_abridged_page_is_refused_with_its_line() -> None:
    """Recorded from documentation, labels shortened to dots: no number of it is to be trusted."""
    with pytest.raises(ExpositionError) as refused:
        recorded("k8saiconf_viettel-ai-platform.prom")

    assert refused.value.line_number == 3


def test_both_generations_of_names_give_the_same_row() -> None:
    """DCGM 4.6 renamed the fields; a csv may ask for either spelling."""
    old = [("PROF_SM_ACTIVE", 0.5), ("PROF_PIPE_TENSOR_ACTIVE", 0.2), ("DEV_POWER_USAGE", 300.0), ("DEV_PSTATE", 2.0)]
    new = [
        ("PROF_SM_UTIL_RATIO", 0.5),
        ("PROF_TENSOR_UTIL_RATIO", 0.2),
        ("DEV_BOARD_POWER_WATTS", 300.0),
        ("DEV_GPU_PSTATE", 2.0),
    ]

    assert read(*old).rows == read(*new).rows
    assert only(read(*old, *new)) == only(read(*old)), "aliases are chosen from, never added up"


@pytest.mark.parametrize(
    "blank", [0x7FFFFFFFFFFFFFF0, 0x7FFFFFFFFFFFFFF2, 0x7FFFFFF0, 0x7FFFFFF3, 140737488355328, 140737488355331]
)
def test_a_blank_is_not_a_value(blank: int) -> None:
    """DCGM prints huge numbers for "not supported" and its peers."""
    row = only(
        read(("DEV_GPU_TEMP", 40), ("DEV_TOTAL_ENERGY_CONSUMPTION", float(blank)), ("DEV_FAN_SPEED", float(blank)))
    )

    assert "energy_joules_total" not in row
    assert "fan_speed_ratio" not in row


@pytest.mark.parametrize("value", [0x7FFFFFEF, 0x7FFFFFF4, 140737488355327, 140737488355332, 9.2e18])
def test_a_large_counter_beside_the_blanks_is_a_value(value: float) -> None:
    """2^47 nanoseconds are 39 hours of throttling: only DCGM's own numbers are blanks."""
    assert only(read(("DEV_POWER_VIOLATION", float(value))))["power_throttle_seconds_total"] == pytest.approx(
        value * 1e-9
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_null(value: float) -> None:
    """NaN of one series leaves the others alone."""
    row = only(read(("PROF_SM_ACTIVE", value), ("DEV_GPU_TEMP", 40)))

    assert "sm_active_ratio" not in row
    assert row["temperature_celsius"] == 40


@pytest.mark.parametrize(
    "labels",
    [
        {"gpu": "3", "UUID": "GPU-9", "modelName": "X", "Hostname": "n1"},
        {"gpu": "3", "uuid": "GPU-9", "modelName": "X", "hostname": "n1"},
        {"gpu": "3", "gpu_uuid": "GPU-9", "model_name": "X", "hostname": "n1"},
    ],
)
def test_labels_are_the_same_in_any_case(labels: dict[str, str]) -> None:
    """The exporter changed Hostname to hostname, and has UUID, uuid and gpu_uuid."""
    row = only(read(("DEV_GPU_TEMP", 40), labels=labels))

    assert (row["gpu_uuid"], row["gpu_index"], row["name"]) == ("GPU-9", 3, "X")


def test_a_sample_without_a_uuid_is_counted_not_guessed() -> None:
    """The index is not an identity."""
    page = read(("DEV_GPU_TEMP", 40), labels={"gpu": "0"})

    assert (page.rows, page.nameless_sample_count) == ([], 1)


def test_mig_slices_have_their_own_rows_and_the_board_its_own() -> None:
    """Each slice's series repeat the board's power: the sum over rows must not count it twice."""
    samples = []
    for instance, active in (("1", 0.9), ("2", 0.1)):
        labels = GPU | {"GPU_I_ID": instance, "GPU_I_PROFILE": "3g.40gb"}
        samples += [
            Sample("DCGM_FI_PROF_GR_ENGINE_ACTIVE", labels, active),
            Sample("DCGM_FI_DEV_FB_USED", labels, 1000.0),
            Sample("DCGM_FI_DEV_POWER_USAGE", labels, 400.0),
        ]
    page = dcgm.read_gpus(samples, host="n1", sampled_at=NOW)
    rows = {row["mig_instance"]: row for row in page.rows}

    assert page.gpu_count == 1
    assert sum(float(str(row.get("power_watts", 0))) for row in page.rows) == 400
    assert {key: row.get("graphics_active_ratio") for key, row in rows.items()} == {"": None, "1": 0.9, "2": 0.1}
    assert rows["1"]["mig_profile"] == "3g.40gb"
    assert rows[""]["mig_profile"] is None
    assert rows[""]["power_watts"] == 400
    raw_tables()["raw_gpu_samples"].frame(page.rows)


def test_a_gpu_shared_by_pods_is_one_row_with_both_owners() -> None:
    """Time slicing prints each series once per pod."""
    samples = [Sample("DCGM_FI_DEV_POWER_USAGE", GPU | {"namespace": "prod", "pod": pod}, 300.0) for pod in ("b", "a")]
    row = only(dcgm.read_gpus(samples, host="n1", sampled_at=NOW))

    assert (row["owner"], row["power_watts"]) == ("prod/a, prod/b", 300)


def test_exported_labels_name_the_holder() -> None:
    """A Prometheus that does not honor labels renames the exporter's; its own name the exporter's pod."""
    labels = GPU | {
        "pod": "dcgm-x",
        "namespace": "gpu-operator",
        "exported_pod": "vllm-0",
        "exported_namespace": "prod",
    }

    assert only(read(("DEV_GPU_TEMP", 40), labels=labels))["owner"] == "prod/vllm-0"
    idle = labels | {"exported_pod": "", "exported_namespace": ""}
    assert only(read(("DEV_GPU_TEMP", 40), labels=idle))["owner"] is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([87.0, 0.0], [0.87, 0.0]),
        ([0.87, 1.0], [0.87, 1.0]),
        ([1.0, 55.0], [0.01, 0.55]),
        ([1.0, 0.0], [None, 0.0]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_a_ratio_that_may_be_a_percentage(values: list[float], expected: list[float | None]) -> None:
    """DEV_GPU_UTIL_RATIO is a percentage in one DCGM release and a ratio in the next; a lone 1 tells nothing."""
    samples = [
        Sample("DCGM_FI_DEV_GPU_UTIL_RATIO", {"UUID": f"GPU-{place}"}, value) for place, value in enumerate(values)
    ]
    page = dcgm.read_gpus(samples, host="n1", sampled_at=NOW)

    assert [row.get("gpu_utilization_ratio") for row in page.rows] == pytest.approx(expected)


def test_an_xid_is_the_last_code_and_zero_is_none() -> None:
    """XID_ERRORS is no count, and the windowed count of DCGM_EXP is no counter."""
    assert only(read(("DEV_XID_ERRORS", 79)))["xid_last"] == 79
    assert only(read(("DEV_XID_ERRORS", 0)))["xid_last"] is None
    counted = Sample("DCGM_EXP_XID_ERRORS_COUNT", GPU | {"xid": "79"}, 4.0)
    assert dcgm.read_gpus([counted], host="n1", sampled_at=NOW).rows == []


def test_throttling_time_prefers_the_fields_whose_unit_is_in_their_name() -> None:
    """Both parts of heat or none: half a sum is no sum. The older field steps in."""
    both = read(
        ("DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN_NS", 2e9),
        ("DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN_NS", 1e9),
        ("DEV_THERMAL_VIOLATION", 9e9),
    )
    half = read(("DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN_NS", 2e9), ("DEV_THERMAL_VIOLATION", 9e9))

    assert only(both)["thermal_throttle_seconds_total"] == pytest.approx(3)
    assert only(half)["thermal_throttle_seconds_total"] == pytest.approx(9)
    assert "hardware_slowdown_seconds_total" not in only(half)


def test_nvlink_rates_are_rates_although_typed_counter() -> None:
    """One unit of DEV_NVLINK_BANDWIDTH_TOTAL is 1000 KiB/s; the profiling fields are bytes per second each way."""
    assert only(read(("DEV_NVLINK_BANDWIDTH_TOTAL", 5)))["nvlink_bytes_per_second"] == 5 * 1000 * 1024
    told = read(("PROF_NVLINK_TX_BYTES", 30), ("PROF_NVLINK_RX_BYTES", 12), ("DEV_NVLINK_BANDWIDTH_TOTAL", 5))
    assert only(told)["nvlink_bytes_per_second"] == 42
    per_link = Sample("DCGM_FI_PROF_NVLINK_TX_BYTES", GPU | {"nvlink": "3"}, 7.0)
    assert dcgm.read_gpus([per_link], host="n1", sampled_at=NOW).rows == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(dcgm._KNOWN_FIELDS)),
            st.sampled_from(["", "1", "2"]),
            st.floats(allow_nan=True, allow_infinity=True),
        ),
        max_size=40,
    )
)
def test_any_values_make_rows_that_the_table_takes(samples: list[tuple[str, str, float]]) -> None:
    """Whatever numbers a page brings, the rows fit the schema and no infinity gets in."""
    made = [
        Sample(f"DCGM_FI_{name}", GPU | ({"GPU_I_ID": instance} if instance else {}), value)
        for name, instance, value in samples
    ]
    frame = raw_tables()["raw_gpu_samples"].frame(dcgm.read_gpus(made, host="n1", sampled_at=NOW).rows)

    assert frame.n_unique(["gpu_uuid", "mig_instance"]) == frame.height
    for column in frame.select("power_watts", "memory_total_bytes", "nvlink_errors_total").iter_columns():
        assert column.is_finite().all()


def test_the_doctor_names_the_line_that_turns_a_field_on() -> None:
    """Recorded pages are of the default csv, which leaves SM activity out."""
    missing = {wish.column: wish.remedy for wish in missing_from_dcgm(recorded("k8saiconf_kops.prom").fields)}

    assert "DCGM_FI_PROF_SM_ACTIVE, gauge," in missing["sm_active_ratio"]
    assert "dram_active_ratio" not in missing
    assert missing_from_dcgm(read(("PROF_SM_UTIL_RATIO", 0.1)).fields)[0].column != "sm_active_ratio"
