"""Findings of a stored fleet: read from a real warehouse, kept in it, fetched again from it."""

from __future__ import annotations

import shutil
from datetime import datetime, timedelta
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from optiinfra_pipelines.defs.findings import finding_assets
from optiinfra_pipelines.domain.findings import FindingKind
from optiinfra_pipelines.domain.fleet import Deployment, Fleet, Host, Objective, Target
from optiinfra_pipelines.domain.thresholds import threshold_values
from optiinfra_pipelines.sql.loader import load_models
from resources.advice.store import AdviceStore
from resources.demo.fleet import RECORDINGS
from resources.findings.objectives import ObjectiveStore
from resources.findings.reader import read_windows
from resources.findings.store import FindingsStore
from resources.model_runner import ModelRunner
from resources.warehouse import Warehouse
from tests.analysis.findings_recordings import frames, pages_of, scraped_at

VLLM = RECORDINGS / "vllm/0.32.0/small_llama_kv8k"
PHASES = ("03_loaded_shared_prefix_c8", "04_kv_pressure_preempt_c16")


class Clock:
    """A clock that stands where the test puts it."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(
        targets=(
            Target(name="replica-1", url="http://127.0.0.1:1/metrics", deployment="chat", source="recorded"),
            Target(name="replica-2", url="http://127.0.0.1:2/metrics", deployment="chat", source="recorded"),
        ),
        deployments=(Deployment(name="chat", model="small-llama"),),
        hosts=(Host(name="here", local=True),),
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, datetime]:
    """A state directory with the KV-pressure recording as replica-1, models refreshed, and its time."""
    root = tmp_path_factory.mktemp("recorded") / "warehouse"
    timed = [(page, scraped_at(page, 0)) for phase in PHASES for page in pages_of(VLLM / phase)]
    clock = Clock(timed[-1][1] + timedelta(seconds=1))
    warehouse = Warehouse(root, clock=clock)
    warehouse.append("recorded", {name: rows for name, rows in frames(timed, "replica-1").items() if rows.height})
    runner = ModelRunner(load_models(), warehouse, clock)
    for model in runner.models.values():
        runner.refresh(model)
    return root, clock.now


@pytest.fixture
def clock(recorded: tuple[Path, datetime]) -> Clock:
    return Clock(recorded[1])


@pytest.fixture
def warehouse(recorded: tuple[Path, datetime], tmp_path: Path, clock: Clock) -> Warehouse:
    """A copy of the recorded warehouse, for one test to write to."""
    shutil.copytree(recorded[0], tmp_path / "warehouse")
    return Warehouse(tmp_path / "warehouse", clock=clock)


def test_a_fleet_is_judged_from_its_tables_and_every_evidence_row_is_there(
    warehouse: Warehouse, clock: Clock, fleet: Fleet
) -> None:
    """The recorded replica is short of KV memory, the silent one is stale; the stored SQL gives the stored values."""
    store = FindingsStore(fleet, warehouse, clock)

    refreshed = store.refresh()

    found = {(one.subject.name, one.kind) for one in refreshed.findings}
    assert found == {
        ("replica-1", FindingKind.MEMORY_PRESSURE),
        ("replica-2", FindingKind.STALE_OR_MISSING_DATA),
        ("here", FindingKind.STALE_OR_MISSING_DATA),
    }
    evidence = warehouse.read("select finding_id, value, sql from finding_evidence order by finding_id, place")
    assert evidence.height == sum(len(one.evidence) for one in refreshed.findings)
    for _, value, sql in evidence.iter_rows():
        assert warehouse.read(sql)["value"][0] == pytest.approx(value)


def test_a_finding_keeps_its_id_and_ends_when_it_was_not_seen_for_a_while(
    warehouse: Warehouse, clock: Clock, fleet: Fleet
) -> None:
    """Two refreshes are one finding; past the close time, judged on idle pages, it is over and stays in the table."""
    store = FindingsStore(fleet, warehouse, clock)
    first = {one.kind: one.id for one in store.refresh().findings}
    clock.now += timedelta(seconds=20)
    second = {one.kind: one.id for one in store.refresh().findings}
    assert second[FindingKind.MEMORY_PRESSURE] == first[FindingKind.MEMORY_PRESSURE]

    idle = [
        (page, clock.now + n * timedelta(seconds=40)) for n, page in enumerate(pages_of(VLLM / "06_drained_idle") * 3)
    ]
    clock.now = idle[-1][1]
    warehouse.append(
        "idle", {n: f for n, f in frames(idle, "replica-1").items() if n in ("raw_scrapes", "raw_engine_samples")}
    )
    store.refresh()

    assert FindingKind.MEMORY_PRESSURE not in {one.kind for one in store.open_findings()}
    kept = warehouse.read("select kind, until from findings where kind = 'MEMORY_PRESSURE'")
    assert kept.height == 1
    assert kept["until"][0] is not None


def test_what_could_not_be_judged_is_a_row_with_its_reason(warehouse: Warehouse, clock: Clock, fleet: Fleet) -> None:
    """The silent replica and the lone one leave abstentions, which the next refresh replaces."""
    store = FindingsStore(fleet, warehouse, clock)
    store.refresh()
    refreshed = store.refresh()

    told = {(one.subject.name, one.kind): one.reason for one in refreshed.abstentions}
    assert told["replica-2", FindingKind.MEMORY_PRESSURE] == "there are no fresh data"
    assert told["replica-1", FindingKind.HIGH_LATENCY] == "the deployment has no latency objective"
    assert told["chat", FindingKind.IMBALANCE].startswith("1 engine replicas")


def test_objectives_are_counted_from_the_tables(warehouse: Warehouse, clock: Clock, fleet: Fleet) -> None:
    """TTFT of the KV-pressure phase misses 1 s at an exact edge, no request failed, and goodput has bounds."""
    promised = (
        Objective(kind="ttft", threshold_seconds=1.0, target_ratio=0.9),
        Objective(kind="tpot", threshold_seconds=0.5, target_ratio=0.9),
        Objective(kind="error_ratio", target_ratio=0.999),
    )
    own = fleet.deployments[0].model_copy(update={"objectives": promised})
    store = ObjectiveStore(fleet.model_copy(update={"deployments": (own,)}), warehouse, clock)

    judged = {one.objective.kind: one for one in store.refresh().statuses}

    assert (judged["ttft"].edge_seconds, judged["ttft"].vantage) == (1.0, "engine")
    pages = frames([(page, scraped_at(page, 0)) for phase in PHASES for page in pages_of(VLLM / phase)], "replica-1")
    counted = pages["raw_engine_histograms"].filter(pl.col("metric") == "time_to_first_token_seconds")
    grown = counted.sort("scraped_at")["count_value"]
    assert judged["ttft"].total == grown[-1] - grown[0]
    assert judged["ttft"].state == "exhausted"
    assert judged["error_ratio"].good == judged["error_ratio"].total
    bounds = warehouse.read("select lower_ratio, upper_ratio from goodput_bounds")
    assert 0 <= bounds["lower_ratio"][0] <= bounds["upper_ratio"][0] <= 1
    assert warehouse.read("select count(*) as n from objective_status")["n"][0] == 3


def test_the_assets_store_what_they_judged(warehouse: Warehouse, clock: Clock, fleet: Fleet) -> None:
    """Both assets materialize in process, and the UI shows the open findings in words."""
    stores = FindingsStore(fleet, warehouse, clock), ObjectiveStore(fleet, warehouse, clock)

    result = dg.materialize(finding_assets(*stores, refresh_minutes=2))

    [shown] = result.asset_materializations_for_node("findings")
    assert "MEMORY_PRESSURE (preemptions)" in str(shown.metadata["findings"].value)
    assert warehouse.read("select count(*) as n from findings where until is null")["n"][0] == 3


def test_a_replicas_hits_are_held_against_what_its_own_cache_size_allows(
    warehouse: Warehouse, clock: Clock, fleet: Fleet
) -> None:
    """8,192 tokens of KV: the curve at that size counts, not its ceiling; without a curve nothing is attainable."""
    curve = pl.DataFrame(
        {
            "measured_at": [clock.now - timedelta(hours=1)] * 3,
            "deployment": ["chat"] * 3,
            "capacity_blocks": [8, 16, 4000],
            "capacity_tokens": [4096, 8192, 2_048_000],
            "token_hit_ratio": [0.3, 0.6, 0.9],
        }
    )

    def attainable() -> list[float | None]:
        with warehouse.connect() as connection:
            engines = read_windows(connection, fleet, clock.now, threshold_values({})).engines
        return [engine.hits.attainable_ratio for engine in engines]

    assert attainable() == [None, None]
    AdviceStore(warehouse).keep("kv_reuse_curve", curve)
    assert attainable() == [0.6, None]
    clock.now += timedelta(days=8)
    assert attainable() == [None, None]
