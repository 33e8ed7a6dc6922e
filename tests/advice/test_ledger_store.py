"""The ledger in a real warehouse: history and live refreshes fill it alike, and what was applied is measured."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import duckdb
import polars as pl
import pytest

from optiinfra_pipelines.analysis.ledger.effect import EARLY, EARLY_DUE, SETTLED, Scale
from optiinfra_pipelines.defs.recommendations import recommendation_assets
from optiinfra_pipelines.domain.fleet import Deployment, ModelShape
from optiinfra_pipelines.domain.models import known_model, shape_of
from optiinfra_pipelines.domain.recommendations import LedgerEvent, LedgerEventKind, LedgerState
from optiinfra_pipelines.sql.loader import load_models
from optiinfra_pipelines.sql.sources import raw_tables
from resources.advice.advisor import token_bytes
from resources.advice.store import AdviceStore
from resources.findings.waste import WasteStore
from resources.ledger.store import LedgerStore
from resources.ledger.windows import Reuse, read_effect_rows, read_reuse
from resources.model_runner import ModelRunner
from resources.warehouse import Warehouse
from tests.advice.ledger_cases import END, FLEET, READ, START, Clock, record


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The history, recorded once for all tests here."""
    root = tmp_path_factory.mktemp("ledger") / "warehouse"
    record(root)
    return root


def store(recorded: Path, folder: Path, clock: Clock) -> LedgerStore:
    shutil.copytree(recorded, folder)
    return LedgerStore(FLEET, Warehouse(folder, clock=clock), clock)


def tables(folder: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every row of the ledger's tables."""
    warehouse = Warehouse(folder, clock=Clock(END))
    names = (
        "recommendations",
        "recommendation_evidence",
        "recommendation_ledger",
        "recommendation_effects",
        "recommendation_abstentions",
        "fct_recommendation_accuracy",
        "recommendation_progress",
    )
    return {name: warehouse.read(f"select * from {name} order by all").rows() for name in names}


def test_an_advised_raise_is_opened_applied_and_verified_against_the_unchanged_replicas(
    recorded: Path, tmp_path: Path
) -> None:
    """The whole life from rows alone: seen in two windows, applied when 32 run, verified an hour after: -18 waiting."""
    ledger = store(recorded, tmp_path / "one", Clock(END))

    derived = ledger.refresh()

    [entry] = ledger.entries()
    assert derived.opened == (entry.recommendation,)
    assert entry.recommendation.made_at == START + timedelta(minutes=10)
    assert entry.recommendation.change_text.startswith("--max-num-seqs 16 -> --max-num-seqs 32")
    promised = entry.recommendation.effects[0]
    assert (promised.change_low, promised.change_high) == (pytest.approx(-40, abs=1), pytest.approx(-16))
    assert entry.state is LedgerState.VERIFIED
    assert entry.applied_at == START + timedelta(minutes=65)
    [row] = Warehouse(tmp_path / "one", clock=Clock(END)).read("select * from recommendation_effects").to_dicts()
    assert row["change_low"] < -18 < row["change_high"] < 0
    assert row["grade"].startswith("concurrent")
    [first] = (
        Warehouse(tmp_path / "one", clock=Clock(END))
        .read("select * from recommendation_ledger where kind = 'measured_early'")
        .to_dicts()
    )
    assert first["happened_at"] == entry.applied_at + EARLY_DUE
    assert first["state_after"] == "applied"
    seen = json.loads(first["detail"])
    assert seen["change_low"] < -18 < seen["change_high"] < 0
    everything = next(one for one in ledger.accuracy() if one.kind == "all")
    assert (everything.n, everything.right_sign_share_ratio, everything.coverage_share_ratio) == (1, 1.0, 1.0)
    assert everything.says == "too few to say how accurate: 1 of 20 measured changes"


def test_a_replay_fills_the_ledger_as_live_refreshes_did(recorded: Path, tmp_path: Path) -> None:
    """One look at the end, or one every 23 minutes: the same rows in every table, to the last column."""
    store(recorded, tmp_path / "once", Clock(END)).refresh()
    clock = Clock(START)
    live = store(recorded, tmp_path / "live", clock)
    while clock.now < END:
        clock.now = min(END, clock.now + timedelta(minutes=23))
        live.refresh()

    assert tables(tmp_path / "live") == tables(tmp_path / "once")


@pytest.mark.parametrize(("windows", "opened_after"), [(1, 5), (2, 10), (4, 20)])
def test_a_change_is_advised_once_it_stood_in_so_many_windows_in_a_row(
    recorded: Path, tmp_path: Path, windows: int, opened_after: int
) -> None:
    """advice_windows: one window of five minutes, two as shipped, four; whenever somebody looked."""
    shutil.copytree(recorded, tmp_path / "one")
    clock = Clock(START)
    fleet = FLEET.model_copy(update={"thresholds": {"advice_windows": windows}})
    ledger = LedgerStore(fleet, Warehouse(tmp_path / "one", clock=clock), clock)
    while clock.now < START + timedelta(minutes=30):
        clock.now += timedelta(minutes=7)
        ledger.refresh()

    [entry] = ledger.entries()
    assert entry.recommendation.made_at == START + timedelta(minutes=opened_after)


def test_a_second_refresh_at_the_same_time_changes_nothing(recorded: Path, tmp_path: Path) -> None:
    """Looking again is no event."""
    ledger = store(recorded, tmp_path / "one", Clock(END))
    ledger.refresh()
    before = tables(tmp_path / "one")

    assert ledger.refresh().windows == 0
    assert tables(tmp_path / "one") == before


def test_every_stored_evidence_query_gives_the_stored_value(recorded: Path, tmp_path: Path) -> None:
    """The SQL beside each signal fetches it again from the same warehouse."""
    store(recorded, tmp_path / "one", Clock(END)).refresh()
    warehouse = Warehouse(tmp_path / "one", clock=Clock(END))
    rows = warehouse.read("select value, sql from recommendation_evidence").rows()

    assert len(rows) >= 4
    for value, sql in rows:
        assert warehouse.read(sql).item() == pytest.approx(value)


def test_what_a_person_reports_moves_the_ledger_once(recorded: Path, tmp_path: Path) -> None:
    """Applied by hand is taken over; told twice it is refused with a reason; an unknown id is an error."""
    clock = Clock(START + timedelta(minutes=20))
    ledger = store(recorded, tmp_path / "one", clock)
    ledger.refresh()
    [entry] = ledger.entries(LedgerState.OPEN)
    told = LedgerEvent(
        recommendation_id=entry.recommendation.id, at=clock.now, kind=LedgerEventKind.APPLIED, reason="by hand"
    )

    assert ledger.report(told).refusal is None
    assert ledger.report(told).refusal is not None
    assert [one.state for one in ledger.entries()] == [LedgerState.APPLIED]
    with pytest.raises(ValueError, match="there is no recommendation"):
        ledger.report(told.model_copy(update={"recommendation_id": "f" * 16}))


def test_a_recommendation_becomes_the_change_of_a_rollout(recorded: Path, tmp_path: Path) -> None:
    """find_change hands over the flags and the knob group; an unknown id says where to look."""
    clock = Clock(START + timedelta(minutes=20))
    ledger = store(recorded, tmp_path / "one", clock)
    ledger.refresh()
    [found] = ledger.open_recommendations()

    change = ledger.find_change(found.id)

    assert (change.deployment, change.current, change.proposed) == (
        "chat",
        {"max-num-seqs": "16"},
        {"max-num-seqs": "32"},
    )
    with pytest.raises(ValueError, match="lists what there is"):
        ledger.find_change("0" * 16)


def test_a_quiet_day_frees_a_replica_at_its_end(tmp_path: Path) -> None:
    """A whole UTC day at 30 % KV and nothing waiting: at midnight one of four replicas is handed to scaling."""
    midnight = datetime(2026, 3, 2, tzinfo=UTC)
    warehouse = Warehouse(tmp_path / "day", clock=Clock(midnight + timedelta(minutes=6)))
    models = load_models()
    runner = ModelRunner(models, warehouse, Clock(midnight))
    for name in models:
        if name.startswith("stg_") or name in READ:
            runner.refresh(models[name])
    common = {"engine": "vllm", "vantage": "engine", "config_hash": "c0"}
    rows = [
        common | {"target": f"r{n}", "period_at": midnight - timedelta(minutes=5 * i)}
        for n in range(4)
        for i in range(1, 289)
    ]
    last = common | {"engine_rank": "0", "scraped_at": midnight - timedelta(minutes=2), "target": "r0"}
    warehouse.append("one", {"raw_engine_samples": raw_tables()["raw_engine_samples"].frame([last])})
    with warehouse.connect() as connection:
        connection.register("new_rows", pl.DataFrame(rows))
        connection.execute(
            "insert into fct_replica_load_5m by name select *, 0 as restart_count, 0.3 as kv_cache_usage_max_ratio, "
            "0.0 as requests_waiting_max, 0.0 as requests_waiting_mean, 4.0 as requests_running_mean from new_rows"
        )

    LedgerStore(FLEET, warehouse, Clock(midnight + timedelta(minutes=6))).refresh()

    [entry] = LedgerStore(FLEET, warehouse, Clock(midnight)).entries()
    assert (entry.recommendation.rule, entry.recommendation.made_at) == ("replicas_down", midnight)
    assert (entry.recommendation.current, entry.recommendation.proposed) == ({"replicas": "4"}, {"replicas": "3"})
    assert entry.recommendation.usd_per_hour_change == pytest.approx(-3.0)
    for signal in entry.recommendation.evidence:
        assert warehouse.read(signal.sql()).item() == pytest.approx(signal.value)


def test_an_empty_warehouse_has_no_recommendations(tmp_path: Path) -> None:
    """Nothing collected yet: no windows, no rows, no error."""
    warehouse = Warehouse(tmp_path / "empty", clock=Clock(END))
    models = load_models()
    runner = ModelRunner(models, warehouse, Clock(END))
    for name in ("stg_engine_samples", "stg_engine_configs"):
        runner.refresh(models[name])

    derived = LedgerStore(FLEET, warehouse, Clock(END)).refresh()

    assert (derived.windows, derived.opened, derived.standing) == (0, (), ())


def test_the_assets_show_what_to_change_and_what_was_declined(recorded: Path, tmp_path: Path) -> None:
    """One run of the real assets: the change with its flags, the reasons of the rest, waste without any GPU."""
    clock = Clock(START + timedelta(minutes=20))
    folder = tmp_path / "one"
    ledger = store(recorded, folder, clock)
    warehouse = Warehouse(folder, clock=clock)
    assets = recommendation_assets(ledger, WasteStore(FLEET, warehouse, clock), 5, rollouts=lambda: ())

    result = dg.materialize(assets)

    assert result.success
    shown = {
        event.asset_key.to_user_string(): event.step_materialization_data.materialization.metadata
        for event in result.get_asset_materialization_events()
        if event.asset_key is not None
    }
    assert "`--max-num-seqs 16 -> --max-num-seqs 32" in str(shown["recommendations"]["recommendations"].value)
    assert "too few to say" in str(shown["fct_recommendation_accuracy"]["accuracy"].value)
    assert "unknown" in str(shown["recommendations"]["declined"].value)
    assert shown["consolidation_plan"]["declined"].value == "no replica holds a GPU"
    costs = warehouse.read("select deployment, gpu_hours, usd from fct_deployment_costs").to_dicts()
    assert [cost["deployment"] for cost in costs] == ["chat"]
    assert costs[0]["usd"] == pytest.approx(3.0 * costs[0]["gpu_hours"])


def test_what_the_reuse_curve_pays_for_reaches_the_rules(tmp_path: Path) -> None:
    """The ceiling and the tiers that pay; a tier without a price leaves the question open; a week later it is stale."""
    warehouse = Warehouse(tmp_path / "one", clock=Clock(END))
    base = {"decided_at": END, "token_ceiling_ratio": 0.62, "size_bytes": 2**30, "reason": "r"}
    base |= {"hit_ratio_before": 0.2, "hit_ratio_after": 0.5}
    rows = [
        base | {"deployment": "chat", "tier": "cpu", "pays": True},
        base | {"deployment": "chat", "tier": "disk", "pays": False},
        base | {"deployment": "code", "tier": "cpu", "pays": None},
        {"deployment": "none", "decided_at": END, "reason": "no log of accesses"},
    ]
    with warehouse.connect() as connection:
        assert read_reuse(connection, END) == {}
    AdviceStore(warehouse).keep("kv_cache_recommendations", pl.DataFrame(rows, infer_schema_length=None))

    with warehouse.connect() as connection:
        found = read_reuse(connection, END)
        assert read_reuse(connection, END + timedelta(days=8)) == {}
        assert read_reuse(connection, END - timedelta(seconds=1)) == {}

    chat = found["chat"]
    assert chat.ceiling_ratio == 0.62
    assert chat.tiers is not None
    assert [(tier.tier, tier.size_bytes) for tier in chat.tiers] == [("cpu", 2**30)]
    assert found["code"] == Reuse(0.62, None)
    assert found["none"] == Reuse(None, None)


def test_a_shape_in_fleet_yaml_comes_before_a_published_one() -> None:
    """A fine-tune under a known name may have another shape; without either there is none."""
    own = ModelShape(layers=8, kv_heads=2, head_dim=64)
    known = "meta-llama/Llama-3.1-8B-Instruct"

    assert shape_of(Deployment(name="a", model=known, shape=own)) == own
    assert shape_of(Deployment(name="a", model=known)) == known_model(known)
    assert shape_of(Deployment(name="a", model="my-model")) is None
    assert shape_of(None) is None
    assert token_bytes(Deployment(name="a", model="my-model", shape=own)) == 4096.0
    assert token_bytes(Deployment(name="a", model="my-model")) is None


@pytest.mark.parametrize("scale", [SETTLED, EARLY], ids=["five minutes", "minutes"])
def test_load_is_what_came_and_not_what_an_overloaded_replica_managed(scale: Scale) -> None:
    """6.5 requests come a second; 5 are finished until the change, while the queue grows, and all of them after it."""
    seconds = scale.period.total_seconds()
    table, at = ("fct_replica_load_5m", "period_at") if scale is SETTLED else ("int_engine_minutes", "minute_at")
    rows = [
        {
            at: START + n * scale.period,
            "target": "r0",
            "requests_running_mean": 16.0,
            "requests_running_max": 16.0,
            "requests_waiting_mean": 1.5 * seconds * min(n, 9),
            "requests_finished": (5.0 if n < 10 else 6.5) * seconds,
            "prompt_tokens": 1.0,
            "generation_tokens": 1.0,
            "observed_seconds": seconds,
            "restart_count": 0,
        }
        for n in range(20)
    ]
    # A page that tells of no running requests: finished ones must not stand in for those that came.
    rows += [{**row, "target": "r1", "requests_running_mean": None} for row in rows]
    with duckdb.connect() as connection:
        connection.register("given", pl.DataFrame(rows).to_arrow())
        connection.execute(f"create table {table} as select * from given")
        window = (START, START + 20 * scale.period)
        read = read_effect_rows(connection, "requests_waiting_mean", ["r0", "r1"], ["r0"], window, scale)

    made, untold = (read.filter(pl.col("target") == target) for target in ("r0", "r1"))
    assert untold["arrivals_per_second"].null_count() == 20
    came = made.sort("period_at")["arrivals_per_second"].to_list()
    assert came[1:] == [pytest.approx(6.5)] * 19
