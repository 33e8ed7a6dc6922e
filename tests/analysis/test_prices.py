"""Prices: dated, sourced, by the names that drivers print; an operator's own goes first, unknown is no zero."""

from __future__ import annotations

import re
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.domain.prices import PRICES, gpu_model, price_of
from tests.sql.harness import recordings


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("H100-80GB-SXM", "H100-SXM"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_a_gpu_is_priced_by_its_own_name_or_not_at_all(name: str, model: str | None) -> None:
    """A card whose price we do not have gets none rather than that of its cousin."""
    assert gpu_model(name) == model
    assert (price_of(name) is None) == (model is None)


def test_the_names_in_real_nvidia_smi_captures_are_known() -> None:
    """H100, H200 and L40S as the driver prints them have a price."""
    captures = [path for path in (recordings() / "nvidia_smi").glob("*.txt") if "mig" not in path.name]
    assert captures
    for path in captures:
        found = re.search(r"Product Name\s+: (.+)", path.read_text(errors="replace"))
        assert found is not None
        assert price_of(found.group(1)) is not None, found.group(1)


def test_every_price_is_dated_sourced_and_a_range() -> None:
    """A row without a date or source could not be checked by anyone."""
    for row in PRICES:
        assert row.low_usd_per_hour <= row.high_usd_per_hour
        assert row.source
        assert date(2024, 1, 1) <= row.as_of <= date(2027, 1, 1)
        assert gpu_model(row.gpu) == row.gpu
    assert len({(row.gpu, row.seller) for row in PRICES}) == len(PRICES)


@given(st.floats(0, 1000))
def test_an_operators_price_goes_first(usd: float) -> None:
    """fleet.yaml's figure is exact and its own range, for any GPU; 0 is a price."""
    price = price_of("unheard-of", usd)
    assert price is not None
    assert (price.usd_per_gpu_hour, price.low_usd_per_hour, price.is_override) == (usd, usd, True)


def test_a_listed_price_lies_in_the_range_of_all_sellers() -> None:
    """The figure is the middle of one kind of seller; the range beside it is of all."""
    price = price_of("NVIDIA H100 80GB HBM3")
    assert price is not None
    assert (price.usd_per_gpu_hour, price.low_usd_per_hour, price.high_usd_per_hour) == (3.0, 1.99, 6.88)
    assert price.as_of == date(2026, 5, 1)
