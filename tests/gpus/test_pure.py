"""The pure parts of GPU collection: ring cursor, value decoding, names of bits, XIDs and profiles."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pynvml as nvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.domain.gpus import RECOVERY_ACTIONS, THROTTLING, XIDS, ClockEventReason, reason_names, xid
from resources.nvml.ask import DriverDownError, GpuGoneError, Ledger, ask, ask_first, nvml_error
from resources.nvml.buffers import Ring, RingCursor, decode
from resources.nvml.device import numa_node
from resources.nvml.gpm import mig_profile
from resources.nvml.metrics import fast_fields

STEP_US = 166_667


@given(
    gaps=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    start=st.integers(1, 2**60),
    ring_length=st.integers(60, 120),
)
def test_samples_are_taken_once_and_none_is_left_out(gaps: list[int], start: int, ring_length: int) -> None:
    """While no tick comes later than the ring is long, every sample after the first look is taken exactly once."""
    cursor, taken, tick = RingCursor(), 0, ring_length
    first_tick = tick
    for gap in [0, *gaps]:
        tick += gap
        stamps = [start + position * STEP_US for position in range(tick - ring_length + 1, tick + 1)]
        told = [stamp for stamp in stamps if stamp > cursor.ask_from]
        fresh = cursor.take(Ring(told, [50.0] * len(told)))
        if gap:
            taken += len(fresh)
    assert taken == tick - first_tick


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.floats(0, 2**32)), max_size=50))
def test_no_garbage_in_the_ring_becomes_a_ratio(samples: list[tuple[int, float]]) -> None:
    """Whatever the slots hold, what is taken is 0 to 100 %, and the cursor never asks from before it began."""
    cursor = RingCursor()

    ring = Ring([timestamp for timestamp, _ in samples], [value for _, value in samples])
    assert all(0 <= value <= 100 for value in cursor.take(ring))
    assert cursor.ask_from in (0, *(timestamp for timestamp, _ in samples))


def test_a_ring_that_repeats_itself_is_dry() -> None:
    """The same samples again are nothing new, and the next question is for the whole ring."""
    cursor = RingCursor()
    stamps = [position * STEP_US for position in range(1, 31)]

    assert len(cursor.take(Ring(stamps, [40.0] * 30))) == 30
    assert cursor.take(Ring(stamps, [40.0] * 30)) == []
    assert cursor.ask_from == 0
    assert cursor.take(Ring([*stamps, 31 * STEP_US], [40.0] * 30 + [80.0])) == [80.0]


@given(st.integers(0, 2**64 - 1))
def test_a_value_is_read_by_its_type(word: int) -> None:
    """The eight bytes of a value mean what C's union says, whatever the bytes that a short type leaves alone hold."""
    union = nvml.c_nvmlValue_t()
    union.ullVal = word
    members = {
        nvml.NVML_VALUE_TYPE_DOUBLE: union.dVal,
        nvml.NVML_VALUE_TYPE_UNSIGNED_INT: union.uiVal,
        nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: union.ullVal,
        nvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: union.sllVal,
        nvml.NVML_VALUE_TYPE_SIGNED_INT: union.siVal,
        nvml.NVML_VALUE_TYPE_UNSIGNED_SHORT: union.usVal,
    }
    for value_type, expected in members.items():
        assert decode(value_type, word) == pytest.approx(expected, nan_ok=True, rel=0)
    assert decode(99, word) is None
    assert ctypes.sizeof(nvml.c_nvmlValue_t) == 8


@given(st.integers(0, 2**64 - 1))
def test_every_bit_of_a_mask_has_one_name(mask: int) -> None:
    """A bit that a newer driver adds is named by its number, not dropped."""
    names = reason_names(mask)

    assert len(names) == mask.bit_count() == len(set(names))


def test_reasons_have_the_values_of_the_bindings() -> None:
    """The bits of nvml.h, and which of them mean that work was held back."""
    assert reason_names(0x48) == ("hw_slowdown", "hw_thermal_slowdown")
    assert nvml.nvmlClocksEventReasonSwPowerCap == ClockEventReason.SW_POWER_CAP
    assert nvml.nvmlClocksEventReasonHwPowerBrakeSlowdown == ClockEventReason.HW_POWER_BRAKE
    assert nvml.nvmlClocksEventReasonDisplayClockSetting == ClockEventReason.DISPLAY_CLOCK
    assert sum(ClockEventReason) == nvml.nvmlClocksEventReasonAll
    assert not THROTTLING & (ClockEventReason.GPU_IDLE | ClockEventReason.APPLICATION_CLOCKS)


def test_recovery_actions_are_those_of_the_bindings() -> None:
    """Every action of nvml.h 13 has a name."""
    known = {getattr(nvml, name) for name in dir(nvml) if name.startswith("NVML_GPU_RECOVERY_ACTION_")}

    assert set(RECOVERY_ACTIONS) == known
    assert RECOVERY_ACTIONS[nvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET] == "drain_and_reset"


def test_an_xid_is_known_or_says_where_to_look_it_up() -> None:
    """A GPU off the bus is critical; a crashed kernel is the application's; a new number is no silence."""
    assert xid(79).severity == "critical"
    assert (xid(31).origin, xid(31).severity) == ("application", "warning")
    assert "xid-errors" in xid(999).action
    assert all(entry.code == code and entry.source for code, entry in XIDS.items())


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "3g.40gb"),
        ("NVIDIA A100-SXM4-40GB MIG 1c.2g.10gb", "2g.10gb"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb+me", "1g.5gb+me"),
        ("NVIDIA H100 80GB HBM3", None),
        (None, None),
    ],
)
def test_a_profile_is_the_gpu_instances(name: str | None, profile: str | None) -> None:
    """Of a slice of a slice ('1c.2g.10gb') the row is that of the GPU instance."""
    assert mig_profile(name) == profile


def test_numa_is_unknown_where_the_kernel_says_minus_one(tmp_path: Path) -> None:
    """-1, a missing file and a malformed address are NULL, not node -1 or 0."""
    device = tmp_path / "bus/pci/devices/0001:0a:00.0"
    device.mkdir(parents=True)
    assert numa_node(tmp_path, "00000001:0A:00.0") is None
    (device / "numa_node").write_text("-1\n", encoding="ascii")
    assert numa_node(tmp_path, "00000001:0A:00.0") is None
    (device / "numa_node").write_text("1\n", encoding="ascii")
    assert numa_node(tmp_path, "00000001:0A:00.0") == 1
    assert numa_node(tmp_path, "") is None


def _raising(error: Exception, calls: list[int]) -> int:
    calls.append(1)
    raise error


@pytest.mark.parametrize("code", [3, 13, 25, 26])
def test_what_is_not_supported_is_not_asked_again(code: int) -> None:
    """NOT_SUPPORTED, FUNCTION_NOT_FOUND, ARGUMENT_VERSION_MISMATCH and DEPRECATED last as long as the driver."""
    ledger, calls = Ledger(), list[int]()
    for _ in range(3):
        assert ask(ledger, "fan", _raising, nvml_error(code), calls) is None
    assert len(calls) == 1
    assert ledger.error_count == 0


def test_a_library_mismatch_is_no_nvml_error_and_no_crash() -> None:
    """nvidia-ml-py raises it from calls whose newest form a driver lacks; it is not an NVMLError."""
    assert not issubclass(nvml.NVMLLibraryMismatchError, nvml.NVMLError)
    ledger, calls = Ledger(), list[int]()
    assert ask(ledger, "processes", _raising, nvml.NVMLLibraryMismatchError("old"), calls) is None
    assert ledger.unsupported == {"processes": "function_not_found"}


@pytest.mark.parametrize(("code", "health"), [(15, "lost"), (16, "reset_required")])
def test_a_code_about_the_gpu_ends_its_row(code: int, health: str) -> None:
    """GPU_IS_LOST and RESET_REQUIRED are not about the one value that was asked."""
    with pytest.raises(GpuGoneError, match=health):
        ask(Ledger(), "power", _raising, nvml_error(code), [])


@pytest.mark.parametrize("code", [1, 9, 12, 18])
def test_a_code_about_the_driver_ends_the_tick(code: int) -> None:
    """UNINITIALIZED, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, RM_VERSION_MISMATCH."""
    with pytest.raises(DriverDownError):
        ask(Ledger(), "power", _raising, nvml_error(code), [])


@pytest.mark.parametrize("code", [2, 7, 10, 14, 19, 999, 12345])
def test_any_other_code_fails_one_value_and_is_counted(code: int) -> None:
    """Even one that no header names."""
    ledger = Ledger()
    assert ask(ledger, "power", _raising, nvml_error(code), []) is None
    assert ledger.error_count == 1
    assert ledger.unsupported == {}


def test_older_calls_answer_where_newer_ones_are_missing() -> None:
    """The first call that the driver knows is found once; the ones before it are not tried again."""
    ledger, calls = Ledger(), list[int]()

    def newer(_handle: object) -> int:
        return _raising(nvml_error(13), calls)

    def older(_handle: object) -> int:
        return 41

    assert [ask_first(ledger, "temperature", (newer, older), None) for _ in range(3)] == [41, 41, 41]
    assert len(calls) == 1
    assert ask_first(ledger, "margin", (newer, newer), None) is None
    assert ledger.unsupported == {"margin": "function_not_found"}


@pytest.mark.parametrize(
    ("driver", "ids"),
    [
        ((595, 80), {269, 270, 271}),
        ((580, 82, 7), {269, 270, 271}),
        ((580, 65, 6), {251, 252, 253}),
        ((575, 51), {251, 252, 253}),
        ((570, 86), set()),
        ((), set()),
    ],
)
def test_ids_of_throttled_time_follow_the_driver(driver: tuple[int, ...], ids: set[int]) -> None:
    """An id that moved is asked for where this driver has it; a version that cannot be read is an old one."""
    asked = {each.field_id for each in fast_fields(driver)}

    assert {74, 75} <= asked
    assert asked & {251, 252, 253, 269, 270, 271} == ids
