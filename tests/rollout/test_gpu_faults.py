"""Faults of the GPU under a candidate: what began since, what makes the card unfit, and whose fault it may be."""

import pytest

from optiinfra_pipelines.rollout.gpu_faults import GpuSince, gpu_fault

GPU = GpuSince("GPU-1", health="ok", xid_events=0.0, ecc_uncorrected=0.0)


@pytest.mark.parametrize(
    ("gpu", "why"),
    [
        (GpuSince("GPU-1", health="lost"), "GPU GPU-1 is lost"),
        (GpuSince("GPU-1", ecc_uncorrected=1.0), "1 memory errors could not be corrected"),
        (GpuSince("GPU-1", xid_last=79, xid_events=1.0), "XID 79: The GPU has fallen off the bus"),
        (GpuSince("GPU-1", xid_first=31, xid_last=48), "XID 48: Double-bit ECC error"),
    ],
)
def test_what_makes_a_gpu_unfit_counts_whoever_shares_it(gpu: GpuSince, why: str) -> None:
    for is_shared in (False, True):
        found = gpu_fault([GPU, gpu], None, is_shared=is_shared)
        assert found is not None
        assert why in found


def test_a_process_fault_counts_only_where_no_stable_replica_could_have_made_it() -> None:
    """XID 31 is a page fault of some process; so is a kill for lack of memory."""
    faulted = GpuSince("GPU-1", xid_first=None, xid_last=31)

    assert "XID 31" in str(gpu_fault([faulted], None, is_shared=False))
    assert gpu_fault([faulted], None, is_shared=True) is None
    assert "2 processes" in str(gpu_fault([], 2.0, is_shared=False))
    assert gpu_fault([], 2.0, is_shared=True) is None


def test_old_news_harmless_numbers_and_silence_are_no_fault() -> None:
    """An XID from before, XID 45 (channels removed at a process' end), and a host that tells nothing."""
    for gpus in (
        [GpuSince("GPU-1", xid_first=79, xid_last=79, xid_events=0.0)],
        [GpuSince("G", xid_last=45)],
        [GPU],
        [],
    ):
        assert gpu_fault(gpus, None, is_shared=False) is None
    assert gpu_fault([GpuSince("G", xid_first=31, xid_last=31, xid_events=2.0)], 0.0, is_shared=False) is not None
