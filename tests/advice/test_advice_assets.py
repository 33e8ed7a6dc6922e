"""The advice assets over a real warehouse: what a fleet's own minutes say, and what they refuse to say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import polars as pl
import pytest

from optiinfra_pipelines.analysis.kv_cache.rows import CacheQuestion
from optiinfra_pipelines.analysis.plots import MAX_BYTES
from optiinfra_pipelines.commands.replay_trace import materialize_advice
from optiinfra_pipelines.defs.forecast import forecast_assets
from optiinfra_pipelines.defs.kv_cache import kv_cache_assets
from optiinfra_pipelines.defs.scaling import scaling_assets, scaling_jobs
from optiinfra_pipelines.domain.fleet import Deployment, Fleet, Objective
from optiinfra_pipelines.domain.kv_cache import Memory
from optiinfra_pipelines.sql.loader import load_models
from optiinfra_pipelines.sql.refresh import refresh_all
from optiinfra_pipelines.sql.sources import raw_tables
from resources.advice.advisor import Advisor
from resources.advice.store import AdviceStore, advice_tables
from resources.traces.importer import ImportRefusedError, import_trace
from resources.warehouse import Warehouse

END = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
HOURS = 14
TOKENS_IN, TOKENS_OUT = 500.0, 50.0
FLEET = Fleet(
    deployments=(
        Deployment(
            name="chat",
            model="meta-llama/Llama-3.1-70B-Instruct",
            gpu="H100-80GB-SXM",
            gpus_per_replica=8,
            price_usd_per_gpu_hour=2.0,
            max_replicas=6,
            objectives=(Objective(kind="ttft", threshold_seconds=1.0, target_ratio=0.9),),
        ),
        Deployment(name="silent", model="unknown", price_usd_per_gpu_hour=None),
    )
)


def requests_in(minute: int) -> float:
    """What each of the two replicas gets in a minute: a wave of four hours between 60 and 180 requests."""
    return 120 + 60 * math.sin(2 * math.pi * minute / 240)


def store_fleet(warehouse: Warehouse) -> None:
    """Two engines of `chat`, scraped once a minute for HOURS; every request within a second but in busiest minutes."""
    first = END - timedelta(hours=HOURS)
    scrapes, samples, histograms = [], [], []
    total = good = 0.0
    for minute in range(HOURS * 60):
        at = first + timedelta(minutes=minute, seconds=30)
        count = requests_in(minute)
        total += count
        good += count * (0.8 if count > 175 else 1.0)
        for target in ("chat-0", "chat-1"):
            scrapes.append(
                {"scraped_at": at, "target": target, "deployment": "chat", "source": "live", "is_up": True,
                 "engine": "vllm", "vantage": "engine", "process_started_at": first - timedelta(days=1)}
            )  # fmt: skip
            samples.append(
                {"scraped_at": at, "target": target, "engine_rank": "0", "engine": "vllm", "vantage": "engine",
                 "model_name": "m", "config_hash": "c0ffee", "requests_running": 30.0, "max_running_requests": 32.0,
                 "requests_waiting": 0.0, "requests_finished_total": 1000 + total,
                 "prompt_tokens_total": total * TOKENS_IN, "generation_tokens_total": total * TOKENS_OUT}
            )  # fmt: skip
            histograms.append(
                {"scraped_at": at, "target": target, "engine_rank": "0", "vantage": "engine", "bounds_id": 7,
                 "metric": "time_to_first_token_seconds", "source_metric": "vllm:time_to_first_token_seconds",
                 "is_proxy": False, "bucket_counts": [good, total, total], "sum_value": total, "count_value": total}
            )  # fmt: skip
    rows: dict[str, list[dict[str, Any]]] = {
        "raw_scrapes": scrapes,
        "raw_engine_samples": samples,
        "raw_engine_histograms": histograms,
        "raw_histogram_bounds": [{"bounds_id": 7, "upper_bounds": [1.0, 2.0, math.inf]}],
    }
    warehouse.append("fleet", {table: raw_tables()[table].frame(found) for table, found in rows.items()})
    with warehouse.connect() as connection:
        refresh_all(connection, load_models(), END)


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    made = Warehouse(tmp_path_factory.mktemp("advice"), clock=lambda: END)
    store_fleet(made)
    return made


def assets(warehouse: Warehouse) -> list[dg.AssetsDefinition]:
    given = (warehouse, lambda: END, FLEET)
    return [*forecast_assets(*given), *scaling_assets(*given), *kv_cache_assets(*given)]


Run = tuple[Mapping[str, Mapping[str, Any]], AdviceStore]


@pytest.fixture(scope="module")
def run(warehouse: Warehouse) -> Run:
    """Every asset materialized: metadata by asset, and what is stored. Its rows are kept a second time, as is."""
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize(assets(warehouse), instance=instance)
    store = AdviceStore(warehouse)
    for table in advice_tables():
        store.keep(table, store.newest(table))
    metadata = {
        event.asset_key.to_user_string(): event.step_materialization_data.materialization.metadata
        for event in result.get_asset_materialization_events()
        if event.asset_key is not None
    }
    return metadata, store


def test_every_asset_stores_its_table_and_rows_kept_again_are_one_of_each(run: Run) -> None:
    """Rows of the same grain are replaced; the metadata counts what is stored."""
    metadata, store = run
    for name, table in advice_tables().items():
        rows = store.newest(name)
        assert rows.height == metadata[name]["dagster/row_count"].value > 0, name
        assert rows.select(table.grain).is_duplicated().sum() == 0, name
        assert rows.schema == table.polars_schema, name


def test_every_table_is_described_with_units(warehouse: Warehouse) -> None:
    """The column schema in the UI is that of the table; a number has a unit in its column's name or beside it."""
    shown = {asset.key.to_user_string(): asset.metadata_by_key[asset.key] for asset in assets(warehouse)}
    assert shown.keys() == advice_tables().keys()
    for name, table in advice_tables().items():
        columns = {column.name: column for column in shown[name]["dagster/column_schema"].columns}
        assert list(columns) == list(table.columns)
        for column in table.columns.values():
            assert column.description.endswith(".")
            assert column.unit or column.sql_type not in ("DOUBLE", "BIGINT") or "unit" in column.description, name


def test_a_forecast_states_skill_coverage_and_its_model(run: Run) -> None:
    """14 hours: enough origins to state an interval, too little to fit on, so it is the last value and says so."""
    rows = run[1].newest("load_forecast").filter(pl.col("measure") == "requests_per_second")
    assert set(rows["deployment"]) == {"chat"}  # silent has no load to forecast
    near = rows.filter(pl.col("horizon_seconds") == 600).row(0, named=True)

    assert near["model"] == "persistence"
    assert near["p10"] <= near["p50"] <= near["p90"]
    last_step = [2 * requests_in(minute) / 60 for minute in range(HOURS * 60 - 10, HOURS * 60)]
    assert near["p50"] == pytest.approx(sum(last_step) / 10, rel=0.05)
    assert (near["cold_start_seconds"], near["cold_start_origin"], near["is_cold_start"]) == (180.0, "default", True)


def test_capacity_is_what_busy_minutes_carried_within_the_objective(run: Run) -> None:
    """Minutes over 175 requests missed the objective: capacity lies under them, and over most of what was kept."""
    rows = run[1].newest("replica_capacity").rows_by_key("deployment", named=True, unique=True)
    tokens = TOKENS_IN + TOKENS_OUT
    kept = sorted(requests_in(minute) for minute in range(HOURS * 60) if requests_in(minute) <= 175)
    expected = kept[int(0.9 * len(kept))] * tokens / 60

    assert rows["chat"]["tokens_per_second"] == pytest.approx(expected, rel=0.03)
    assert rows["chat"]["tokens_per_second"] <= 175 * tokens / 60
    assert (rows["chat"]["origin"], rows["chat"]["config_hash"]) == ("history", "c0ffee")
    assert rows["chat"]["length_mix"] == "balanced"
    assert rows["silent"]["tokens_per_second"] is None
    assert "no minute" in rows["silent"]["reason"]


def test_a_recommendation_has_evidence_or_abstains(run: Run) -> None:
    """Two replicas run; what is said of them rests on numbers that can be asked for again."""
    rows = run[1].newest("scaling_recommendations").rows_by_key("deployment", named=True, unique=True)
    chat, silent = rows["chat"], rows["silent"]

    assert chat["current_replicas"] == 2
    assert chat["action"] in ("up", "down", "hold")
    evidence = json.loads(chat["evidence"])
    needed = max(evidence["load_p90_per_second"], evidence["load_present_per_second"]) / evidence["capacity_per_second"]
    if chat["action"] == "up":
        assert chat["proposed_replicas"] == min(math.ceil(needed / 0.95), 6)
    assert chat["usd_per_hour_change"] == (chat["proposed_replicas"] - 2) * 16.0
    assert (silent["action"], silent["proposed_replicas"]) == ("abstain", None)
    assert "not known" in silent["reason"]


def test_the_back_test_compares_what_ran_with_what_could_have(run: Run) -> None:
    """One row per policy and what was seen to run; the advised one can be applied, and its manifest is there."""
    rows = run[1].newest("scaling_backtest").filter(pl.col("deployment") == "chat")
    observed = rows.filter(pl.col("kind") == "observed").row(0, named=True)
    judged = rows.filter(pl.col("attainment_ratio").is_not_null())

    assert observed["replica_hours"] == pytest.approx(2 * HOURS, rel=0.01)
    assert set(judged["kind"]) == {
        "static", "hpa", "keda_waiting", "keda_load", "slo_ratio", "planner", "trend", "foresight"
    }  # fmt: skip
    assert all(peak <= 6 for peak in judged["peak_replicas"])
    advised = rows.filter(pl.col("is_advised"))
    assert advised.height <= 1
    for row in advised.iter_rows(named=True):
        assert row["attainment_ratio"] >= 0.999
        assert json.loads(row["manifest"])["kind"] in ("ScaledObject", "HorizontalPodAutoscaler", "Deployment")
    unknown = run[1].newest("scaling_backtest").filter(pl.col("deployment") == "silent")
    assert unknown["replica_hours"].to_list() == [None]


def test_an_engine_that_tells_no_blocks_has_no_curve_and_a_remedy(run: Run) -> None:
    """Hit counters say nothing of other sizes: the row abstains and names the command that helps."""
    for table in ("kv_reuse_curve", "kv_cache_recommendations"):
        rows = run[1].newest(table)
        assert set(rows["deployment"]) == {"chat", "silent"}
        assert all("optiinfra import-trace" in reason for reason in rows["reason"])


def test_pictures_in_the_metadata_are_small_and_real(run: Run) -> None:
    """PNG bytes inside Markdown, at most 25 kB each, as the UI shows them."""
    for asset, entry in (("load_forecast", "fan_chart"), ("scaling_backtest", "pareto")):
        text = run[0][asset][entry].value
        assert "data:image/png;base64,iVBORw0KGgo" in text
        assert len(text) < MAX_BYTES * 4 / 3 + 200


def test_the_back_test_job_takes_policies_as_data_and_names_what_is_none(warehouse: Warehouse) -> None:
    """A known kind is replayed with its parameters; an unknown one, or one out of range, fails with its name."""
    definitions = dg.Definitions(assets=assets(warehouse), jobs=scaling_jobs())
    job = definitions.resolve_job_def("backtest_scaling")

    def launch(config: dict[str, Any]) -> dg.ExecuteInProcessResult:
        return job.execute_in_process(
            run_config={"ops": {"scaling_backtest": {"config": config}}}, raise_on_error=False
        )

    only = {"kind": "keda_load", "target_ratio": 0.8}
    assert launch(
        {"policies": [only], "deployments": ["chat"], "present_policy": {"kind": "static", "replicas": 2}}
    ).success
    rows = AdviceStore(warehouse).newest("scaling_backtest")
    assert {"keda_load 0.8", "static 2 (present)"} <= set(rows["policy_name"])
    for config, said in (
        ({"policies": [{"kind": "magic"}]}, "magic"),
        ({"policies": [only | {"target_ratio": 7}]}, "target_ratio"),
        ({"deployments": ["nobody"]}, "nobody"),
    ):
        failed = launch(config)
        assert not failed.success
        [event] = [event for event in failed.all_events if event.is_step_failure]
        assert said in str(event.step_failure_data.error or "") + str(event.step_failure_data.user_failure_data)


def test_advice_on_an_imported_trace_is_made_by_the_same_assets(tmp_path: Path) -> None:
    """A trace with blocks: its reuse has a curve and a ceiling, its load is replayed, its replicas are unknown."""
    lines = [
        {
            "timestamp": place * 2000,
            "input_length": 1024,
            "output_length": 9,
            "hash_ids": [place % 50, 100 + place % 400],
        }
        for place in range(1200)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    home = tmp_path / "into"
    found = import_trace(
        tmp_path / "t.jsonl", "mooncake", home, live_home=tmp_path / "live", ends_at=END, deployment="chat"
    )
    advice = materialize_advice(home)
    sizes = advice["kv_cache_recommendations"].row(0, named=True)

    assert advice["kv_reuse_curve"]["token_hit_ratio"].max() == pytest.approx((2400 - 450) / 2400)
    assert sizes["token_ceiling_ratio"] == pytest.approx((2400 - 450) / 2400)
    assert "bytes_per_token" in sizes["reason"]
    replays = advice["scaling_backtest"]
    assert set(replays["capacity_origin"]) == {"assumed"}
    assert replays["attainment_ratio"].count() == 8
    assert advice["scaling_recommendations"]["action"].to_list() == ["abstain"]
    with duckdb.connect(str(home / "warehouse/read.duckdb"), read_only=True) as connection:
        [(curve,)] = connection.execute("select count(*) from kv_reuse_curve").fetchall()
    assert curve == advice["kv_reuse_curve"].height

    advisor = Advisor(Warehouse(home / "warehouse", clock=lambda: END), lambda: END, found.fleet)
    asked = CacheQuestion(bytes_per_token=1e5, tiers=[Memory(tier="gpu", max_bytes=1e11)], goal_hit_ratio=0.95)
    told = advisor.advise_cache(asked).row(0, named=True)
    assert told["refusal"] == (
        "95% is impossible on this workload: the ceiling is 81.2%, which an infinite cache would reach; "
        "450 of 2,400 block references are first uses"
    )
    assert told["tier"] == "gpu"
    assert told["size_bytes"] >= 450 * 512 * 1e5 * 0.9


def test_a_folder_without_a_trace_is_not_analyzed(tmp_path: Path) -> None:
    """An empty folder is an error with the command that fills it, not an empty report."""
    with pytest.raises(ImportRefusedError, match="import-trace"):
        materialize_advice(tmp_path)
