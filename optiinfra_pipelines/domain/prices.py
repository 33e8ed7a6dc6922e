"""What a GPU costs an hour: a dated, sourced table to edit, and how an operator's own price goes before it.

Prices on demand vary by a factor of 2.5 to 3.8 between sellers and go stale within months: each row says from when it
is, and `price_of` always returns the range beside the figure. Multiplying with hours is `analysis.waste`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Literal

from pydantic import Field

from optiinfra_pipelines.domain.base import Frozen, Positive

Seller = Literal["hyperscaler", "specialist", "long_tail", "reserved_block"]


class ListPrice(Frozen):
    """What one kind of seller asked for one GPU-hour, on demand unless `reserved_block`."""

    gpu: str = Field(description="Model as `gpu_model` names it.")
    seller: Seller
    low_usd_per_hour: Positive
    high_usd_per_hour: Positive
    as_of: date = Field(description="The month for which the source states it, as its first day.")
    source: str
    is_verified: bool = Field(default=True, description="False where one undated or secondary page says so.")


class GpuPrice(Frozen):
    """The price used for one GPU-hour: a figure, the range it stands in, from when and from whom."""

    usd_per_gpu_hour: float = Field(ge=0)
    low_usd_per_hour: float = Field(ge=0)
    high_usd_per_hour: float = Field(ge=0)
    as_of: date | None = Field(description="None for an operator's own price.")
    source: str
    is_override: bool


_MERCATUS = "mercatus-ai.com/blog/cloud-gpu-pricing"
_BLOCKS = "AWS Capacity Blocks for ML, price list of end 2024"


def _row(gpu: str, seller: Seller, low: float, high: float, as_of: date, source: str, ok: bool = True) -> ListPrice:
    return ListPrice(
        gpu=gpu,
        seller=seller,
        low_usd_per_hour=low,
        high_usd_per_hour=high,
        as_of=as_of,
        source=source,
        is_verified=ok,
    )


_MAY_2026 = date(2026, 5, 1)
_END_2024 = date(2024, 12, 1)

# One row per GPU model and kind of seller. Edit it here; what you really pay goes into fleet.yaml.
PRICES: tuple[ListPrice, ...] = (
    _row("A100-80GB", "hyperscaler", 1.50, 3.00, _MAY_2026, _MERCATUS),
    _row("A100-80GB", "specialist", 1.10, 1.50, _MAY_2026, _MERCATUS),
    _row("A100-80GB", "long_tail", 0.80, 1.10, _MAY_2026, _MERCATUS),
    _row("A100-40GB", "reserved_block", 1.844, 1.844, _END_2024, _BLOCKS),
    _row("H100-SXM", "hyperscaler", 3.50, 6.88, _MAY_2026, f"{_MERCATUS}; AWS at the upper end"),
    _row("H100-SXM", "specialist", 2.50, 3.50, _MAY_2026, _MERCATUS),
    _row("H100-SXM", "long_tail", 1.99, 2.50, _MAY_2026, _MERCATUS),
    _row("H100-SXM", "reserved_block", 4.916, 4.916, _END_2024, _BLOCKS),
    _row("H200", "hyperscaler", 4.50, 7.00, _MAY_2026, _MERCATUS),
    _row("H200", "specialist", 3.50, 4.50, _MAY_2026, _MERCATUS),
    _row("H200", "long_tail", 2.50, 3.50, _MAY_2026, _MERCATUS),
    _row("H200", "reserved_block", 5.408, 5.408, _END_2024, _BLOCKS),
    _row("B200", "hyperscaler", 14.0, 14.0, _MAY_2026, "AWS p6, secondary page", ok=False),
    _row("B200", "specialist", 5.60, 5.60, _MAY_2026, "packet.ai banner, bare metal, undated", ok=False),
    _row("L40S", "hyperscaler", 1.86, 1.86, _MAY_2026, "AWS g6e.xlarge, secondary page", ok=False),
    _row("L40S", "specialist", 2.15, 2.99, _MAY_2026, "RunComfy, platform included"),
    _row("L4", "hyperscaler", 0.71, 0.80, _MAY_2026, "GCP and AWS g6.xlarge, secondary pages", ok=False),
)

# Whose middle is the figure: what a fleet of rented GPUs pays more often than either extreme.
_PREFERRED: tuple[Seller, ...] = ("specialist", "hyperscaler", "long_tail", "reserved_block")

# Names as drivers, exporters and people write them -> model. The first that matches; H100 without SXM or HBM3 (PCIe,
# NVL) and MIG slices have no row, and get no price rather than a wrong one.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"\bMIG\b", ""),
    (r"\bGH200\b|\bGB\d+", ""),
    (r"\bH100\b.*\b(PCIE|NVL)\b", ""),
    (r"\bH100\b", "H100-SXM"),
    (r"\bH200\b.*\bNVL\b", ""),
    (r"\bH200\b", "H200"),
    (r"\bB200\b", "B200"),
    (r"\bA100\b.*\b80\s?GB?\b", "A100-80GB"),
    (r"\bA100\b.*\b40\s?GB?\b", "A100-40GB"),
    (r"\bL40S\b", "L40S"),
    (r"\bL4\b", "L4"),
)


def gpu_model(name: str) -> str | None:
    """The table's name of a GPU ("NVIDIA H100 80GB HBM3", "H100-80GB-SXM" -> "H100-SXM"); None for one it lacks."""
    text = re.sub(r"[-_/]", " ", name.upper())
    for pattern, model in _NAMES:
        if re.search(pattern, text):
            return model or None
    return None


def price_of(
    gpu: str | None, override_usd_per_hour: float | None = None, table: Sequence[ListPrice] = PRICES
) -> GpuPrice | None:
    """The price of one hour of one GPU; None when neither fleet.yaml nor the table tells, which is not zero.

    override_usd_per_hour: price_usd_per_gpu_hour of the deployment; 0 is a price (owned and written off).
    """
    if override_usd_per_hour is not None:
        return GpuPrice(
            usd_per_gpu_hour=override_usd_per_hour,
            low_usd_per_hour=override_usd_per_hour,
            high_usd_per_hour=override_usd_per_hour,
            as_of=None,
            source="fleet.yaml",
            is_override=True,
        )
    model = None if gpu is None else gpu_model(gpu)
    rows: Mapping[Seller, ListPrice] = {row.seller: row for row in table if row.gpu == model}
    chosen = next((rows[seller] for seller in _PREFERRED if seller in rows), None)
    if chosen is None:
        return None
    return GpuPrice(
        usd_per_gpu_hour=(chosen.low_usd_per_hour + chosen.high_usd_per_hour) / 2,
        low_usd_per_hour=min(row.low_usd_per_hour for row in rows.values()),
        high_usd_per_hour=max(row.high_usd_per_hour for row in rows.values()),
        as_of=chosen.as_of,
        source=f"{chosen.source} ({chosen.seller})" + ("" if chosen.is_verified else ", unverified"),
        is_override=False,
    )
