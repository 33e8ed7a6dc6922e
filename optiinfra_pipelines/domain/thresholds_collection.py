"""What a threshold is, and those of collection: when data are stale, when a disk is full, when to stop asking.

All groups together, with their values, are `optiinfra_pipelines.domain.thresholds`.
"""

from __future__ import annotations

from pydantic import Field

from optiinfra_pipelines.domain.base import Frozen


class Threshold(Frozen):
    """One number that decides. `minimum` and `maximum` bound what fleet.yaml may set, both included."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    default: float
    unit: str
    minimum: float
    maximum: float
    reason: str
    source: str


COLLECTION: tuple[Threshold, ...] = (
    Threshold(
        name="stale_after_seconds",
        default=30.0,
        unit="s",
        minimum=10.0,
        maximum=3_600.0,
        reason="Six missed scrapes at the 5 s cadence: two can be a restart or a slow tick, six are an absence. "
        "Numbers older than this are shown as stale and decide nothing.",
        source="Our cadence; Prometheus calls a series stale after 5 min, made for cadences of 15 to 60 s.",
    ),
    Threshold(
        name="disk_free_minimum_bytes",
        default=1_073_741_824.0,
        unit="B",
        minimum=104_857_600.0,
        maximum=1_099_511_627_776.0,
        reason="Collection stops below it, so that a full disk never tears a database file: 1 GiB holds the hourly "
        "move (it writes the new files before the old rows go) of a fleet of a few hundred replicas.",
        source="Our storage layout: hot rows of an hour and their compressed copy exist side by side.",
    ),
    Threshold(
        name="disk_free_minimum_ratio",
        default=0.02,
        unit="ratio",
        minimum=0.0,
        maximum=0.5,
        reason="The same for large disks, where file systems slow down when nearly full; the larger one rules.",
        source="ext4 reserves 5 % for root by default; 2 % on top of it is ours.",
    ),
    Threshold(
        name="clock_skew_seconds",
        default=5.0,
        unit="s",
        minimum=1.0,
        maximum=3_600.0,
        reason="A Date header counts whole seconds and crosses a network: under 2 s nothing can be told, and at one "
        "tick's length a target's own timestamps no longer line up with the tick they were read in.",
        source="RFC 9110 section 6.6.1 (resolution of Date); our cadence.",
    ),
    Threshold(
        name="breaker_failures_to_open",
        default=3.0,
        unit="failures",
        minimum=1.0,
        maximum=100.0,
        reason="One failure is a lost packet and two a restart in progress; from the third in a row on, asking every "
        "tick only costs deadlines.",
        source="Our judgment; at the 5 s cadence it opens after 10 to 15 s.",
    ),
    Threshold(
        name="breaker_first_backoff_seconds",
        default=10.0,
        unit="s",
        minimum=1.0,
        maximum=600.0,
        reason="The first pause skips one tick; it doubles with every failed probe.",
        source="Our cadence.",
    ),
    Threshold(
        name="breaker_max_backoff_seconds",
        default=60.0,
        unit="s",
        minimum=5.0,
        maximum=3_600.0,
        reason="An engine that has come back (loading weights takes minutes) must be seen again within about a minute.",
        source="Measured engine starts of 1 to 5 minutes; longer waits would hide the start of the load.",
    ),
)
