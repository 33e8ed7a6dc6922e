"""The launchpad's jobs do what they say on real rows, and refuse what they cannot do."""

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from optiinfra_pipelines.definitions import assemble
from optiinfra_pipelines.domain.fleet import Fleet, Host, Target
from optiinfra_pipelines.settings import Paths
from optiinfra_pipelines.sql.loader import load_models
from resources.collectors import Collectors
from resources.dagster_home.stack import prepare_home
from resources.model_runner import ModelRunner
from resources.warehouse import Warehouse

FLEET = Fleet(hosts=(Host(name="here", local=True),), targets=(Target(name="gone", url="http://127.0.0.1:1/metrics"),))
# Rows of three hours ago: their hour is closed.
THEN = (datetime.now(UTC) - timedelta(hours=3)).replace(minute=30, second=0, microsecond=0)


class Product:
    """One fleet's definitions over a warehouse that holds ten ticks, 15 s apart, of three hours ago."""

    def __init__(self, home: Path) -> None:
        self.paths = Paths(
            home=home,
            warehouse_dir=home / "warehouse",
            dagster_home=home / "dagster",
            reports_dir=home / "reports",
            rollouts_dir=home / "rollouts",
            fleet_file=home / "fleet.yaml",
        )
        prepare_home(self.paths.dagster_home)
        self.warehouse = Warehouse(self.paths.warehouse_dir, clock=lambda: datetime.now(UTC))
        collectors = Collectors(FLEET, lambda: THEN)
        for i in range(10):
            at = THEN + i * timedelta(seconds=15)
            self.warehouse.append(f"engines-{i}", collectors.scrape_engines(at))
            self.warehouse.append(f"hosts-{i}", collectors.sample_hosts(at))
        collectors.close()
        logging.getLogger("dagster").setLevel(logging.WARNING)
        self.definitions = assemble(FLEET, self.paths)

    def run(
        self, job: str, config: dict[str, object] | None = None, *, in_memory: bool = False
    ) -> dg.ExecuteInProcessResult:
        """In memory: Dagster's own record of hundreds of checks is not what is under test."""
        on_disk = dg.DagsterInstance.from_config
        with dg.DagsterInstance.ephemeral() if in_memory else on_disk(str(self.paths.dagster_home)) as instance:
            return self.definitions.resolve_job_def(job).execute_in_process(
                instance=instance, run_config={"ops": config or {}}, raise_on_error=False
            )

    def build(self) -> None:
        """Every model once, without the cost of a run."""
        runner = ModelRunner(load_models(), self.warehouse, lambda: datetime.now(UTC))
        for model in runner.models.values():
            runner.refresh(model)

    def count(self, table: str) -> int:
        return int(self.warehouse.read(f"select count(*) as n from {table}")["n"].item())


@pytest.fixture
def product(tmp_path: Path) -> Product:
    return Product(tmp_path)


def test_a_past_window_is_computed_anew(product: Product) -> None:
    """Minutes that were lost come back from the raw rows, exactly as they were; the first one, of which the raw rows
    may not hold all, is left as it is."""
    product.build()
    before = product.warehouse.read("select * from int_scrape_minutes order by all")
    with product.warehouse.connect() as connection:
        connection.execute(
            "delete from int_scrape_minutes where minute_at > (select min(minute_at) from int_scrape_minutes)"
        )
    window = {"start": (THEN - timedelta(hours=1)).isoformat(), "end": (THEN + timedelta(hours=1)).isoformat()}

    done = product.run(
        "rebuild_window", {"rebuild_models": {"config": window | {"models": ["int_scrape_minutes"]}}}, in_memory=True
    )

    assert done.success
    assert before.height == 3
    assert product.warehouse.read("select * from int_scrape_minutes order by all").equals(before)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"start": "yesterday", "end": "2026-11-20T00:00:00"}, "'yesterday' is no time"),
        ({"start": "2026-11-19", "end": "2026-11-20", "models": ["stg_scrapes"]}, "no incremental model"),
        ({"start": "2026-11-21", "end": "2026-11-20"}, "before its start"),
    ],
)
def test_a_window_that_makes_no_sense_is_refused_in_words(
    product: Product, config: dict[str, object], told: str
) -> None:
    done = product.run("rebuild_window", {"rebuild_models": {"config": config}}, in_memory=True)

    assert not done.success
    failures = [event.step_failure_data.error for event in done.all_events if event.is_step_failure]
    assert told in str(failures[0])


def test_maintenance_moves_closed_hours_and_readers_see_the_same_rows(product: Product) -> None:
    before = product.count("raw_scrapes"), product.count("raw_host_samples")

    assert product.run("maintain_warehouse").success

    assert list((product.paths.warehouse_dir / "cold").rglob("*.parquet"))
    assert product.count("hot.raw_scrapes") == 0
    assert (product.count("raw_scrapes"), product.count("raw_host_samples")) == before == (10, 10)


def test_all_data_tests_run_and_only_freshness_finds_fault_with_old_rows(product: Product) -> None:
    product.build()

    done = product.run("test_models", in_memory=True)

    evaluations = done.get_asset_check_evaluations()
    assert done.success
    assert len(evaluations) > 50
    # The rows are three hours old, and the freshness tests say so.
    failed = {check.check_name for check in evaluations if not check.passed}
    assert failed == {"freshness"}


def test_pruning_is_a_job_with_defaults(product: Product) -> None:
    assert product.run("prune_dagster_storage").success
