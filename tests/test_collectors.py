"""What one tick hands out for a whole fleet."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from optiinfra_pipelines.domain.fleet import Deployment, Fleet, Target
from resources.collectors import Collectors
from resources.scrape.engine_scraper import REPEAT_AFTER
from resources.warehouse import DiskNearlyFullError, Warehouse
from tests.scrape.loopback import Loopback, page

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
VLLM = (Path(__file__).parent / "fixtures" / "exposition" / "vllm_0.32.0_loaded_1.prom").read_text()


@pytest.fixture
def collectors() -> Iterator[Collectors]:
    with Loopback({"/a": page(VLLM)}) as server:
        target = Target(name="a", url=server.url("/a"), deployment="d")
        fleet = Fleet(targets=(target,), deployments=(Deployment(name="d", model="m", price_usd_per_gpu_hour=2.0),))
        collectors = Collectors(fleet, lambda: NOW)
        yield collectors
        collectors.close()


def test_what_the_fleet_file_says_survives_a_disk_that_was_full_at_the_start(
    collectors: Collectors, tmp_path: Path
) -> None:
    """It is told with the first tick and seldom again, as the same rows: once stored, however often it is told."""
    free = [0]
    warehouse = Warehouse(tmp_path, clock=lambda: NOW, min_free_bytes=1, disk_free=lambda _: free[0])
    with pytest.raises(DiskNearlyFullError):
        warehouse.append("0", collectors.scrape_engines(NOW))
    free[0] = 2**40
    for number in range(1, 4):
        warehouse.append(str(number), collectors.scrape_engines(NOW + (REPEAT_AFTER + timedelta(seconds=5)) * number))
    warehouse.append("soon", collectors.scrape_engines(NOW + REPEAT_AFTER * 3 + timedelta(seconds=25)))

    assert warehouse.read("select target, deployment, loaded_at from raw_fleet_targets").rows() == [("a", "d", NOW)]
    assert warehouse.read("select deployment, model from raw_fleet_deployments").rows() == [("d", "m")]
    assert warehouse.read("select count(*) from raw_scrapes").item() == 4
