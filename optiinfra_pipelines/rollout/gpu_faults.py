"""What a host's GPU and kernel counters say against a candidate that runs there.

Pure: rows since the candidate began in, words out. Reading the rows is the work of `resources.rollouts.gpu_watch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optiinfra_pipelines.domain.gpus import xid


@dataclass(frozen=True)
class GpuSince:
    """One GPU since a moment. xid_first, xid_last: the driver's last XID then and now. Unknown is None.

    xid_events, ecc_uncorrected: growth of their counters.
    """

    gpu_uuid: str
    health: str | None = None
    xid_first: int | None = None
    xid_last: int | None = None
    xid_events: float | None = None
    ecc_uncorrected: float | None = None


def gpu_fault(gpus: Sequence[GpuSince], oom_kills: float | None, *, is_shared: bool) -> str | None:
    """The first fault that began since then, in words; None when none did or nothing is known.

    is_shared: stable replicas run on the same host. Then only what makes the GPU itself unfit counts: a fault of a
    process (and a kill for lack of memory) may be a neighbor's, and the candidate's own death is seen by other guards.
    """
    for gpu in gpus:
        if gpu.health in ("lost", "reset_required"):
            return f"GPU {gpu.gpu_uuid} is {gpu.health}"
        if (gpu.ecc_uncorrected or 0) >= 1:
            return f"GPU {gpu.gpu_uuid}: {gpu.ecc_uncorrected:g} memory errors could not be corrected"
        is_new = (gpu.xid_events or 0) >= 1 or gpu.xid_last != gpu.xid_first
        if gpu.xid_last is None or not is_new:
            continue
        meaning = xid(gpu.xid_last)
        if meaning.severity == "critical" or (meaning.severity == "warning" and not is_shared):
            return f"GPU {gpu.gpu_uuid}: XID {meaning.code}: {meaning.meaning}"
    if oom_kills and not is_shared:
        return f"the kernel ended {oom_kills:g} processes for lack of memory"
    return None
