"""The report's assets, reader, file and command, on a real warehouse and through Dagster."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
from click import ClickException

from optiinfra_pipelines.analysis.insights.evidence import make_pack
from optiinfra_pipelines.analysis.report.html import to_html
from optiinfra_pipelines.analysis.report.sections import make_document
from optiinfra_pipelines.commands import report as command
from optiinfra_pipelines.defs.insights import insights_asset
from optiinfra_pipelines.defs.report import fleet_report_asset
from optiinfra_pipelines.domain.fleet import Fleet, Objective
from optiinfra_pipelines.domain.objectives import ObjectiveStatus
from optiinfra_pipelines.settings import Paths, find_paths
from resources.findings import objectives as objective_store
from resources.findings import store as findings_store
from resources.insights.store import InsightStore
from resources.insights.writer import InsightWriter
from resources.ledger import store as ledger_store
from resources.report.files import write_report
from resources.report.reader import read_report
from resources.warehouse import Warehouse
from tests.advice.insight_cases import NOW, abstention, finding, recommendation

PACK = make_pack([finding()], [recommendation()], [abstention()])


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    (tmp_path / "fleet.yaml").write_text("hosts: [{name: here, local: true}]\n")
    return find_paths({"OPTIINFRA_HOME": str(tmp_path / "state"), "OPTIINFRA_FLEET": str(tmp_path / "fleet.yaml")})


@pytest.fixture
def warehouse(paths: Paths) -> Warehouse:
    return Warehouse(paths.warehouse_dir, clock=lambda: datetime.now(UTC))


def test_a_report_can_be_had_before_anything_was_made(warehouse: Warehouse) -> None:
    """An empty warehouse gives a report whose parts are all not made yet, none of them an error."""
    data = read_report(warehouse, Fleet(), NOW - timedelta(hours=1), NOW)

    assert data.advice.findings is data.advice.objectives is data.advice.insight is None
    assert set(data.frames) == {"fleet", "latency", "load", "gpus", "hosts"}
    assert all(frame is None for frame in data.frames.values())


def test_stored_claims_come_back_as_they_were(warehouse: Warehouse) -> None:
    """Open findings and recommendations, what was declined, and how right past advice was, from the stores' tables."""
    found, advised, declined = finding(), recommendation(), abstention()
    ended = finding("old-1").model_copy(update={"until": NOW})
    status = ObjectiveStatus(
        deployment="chat-vllm",
        objective=Objective(kind="ttft", target_ratio=0.99, threshold_seconds=2.0),
        at=NOW,
        state="no_data",
        vantage=None,
        edge_seconds=None,
        good=None,
        total=None,
        good_ratio=None,
        remaining_ratio=None,
        covered_days=0.0,
        unseen_requests=None,
        burn_rates=(),
        notes=(),
    )
    with warehouse.connect() as connection:
        for tables in (findings_store._TABLES, objective_store._TABLES, ledger_store._TABLES):
            connection.execute(tables)
        for one in (found, ended):
            connection.execute(
                "insert into findings (id, since, until, document) values (?, ?, ?, ?)",
                [one.id, one.since, one.until, one.model_dump_json()],
            )
        connection.execute(
            "insert into finding_abstentions values (?, ?, ?, ?, ?)",
            [NOW, declined.subject.kind, declined.subject.name, declined.kind.value, declined.reason],
        )
        for moment, state in ((NOW - timedelta(hours=1), "met"), (NOW, "no_data")):
            connection.execute(
                "insert into objective_status (judged_at, deployment, objective, document) values (?, ?, ?, ?)",
                [moment, "chat-vllm", status.key, status.model_copy(update={"state": state}).model_dump_json()],
            )
        for state in ("open", "superseded"):
            connection.execute(
                "insert into recommendations (id, state, score, document) values (?, ?, ?, ?)",
                [advised.id, state, advised.score, advised.model_dump_json()],
            )
        connection.execute(
            "insert into recommendation_abstentions values (?, 'target', 'a', 'some_rule', null, 'too few')", [NOW]
        )
        connection.execute(
            "insert into fct_recommendation_accuracy (kind, rule, n, minimum_n, is_enough, concurrent_n, applied_n, "
            "unverifiable_n, says) values ('all', 'all', 0, 20, false, 0, 0, 0, 'nothing measured')"
        )

    advice = read_report(warehouse, Fleet(), NOW - timedelta(hours=1), NOW).advice

    assert advice.findings == [found]
    assert advice.abstentions == [declined]
    assert advice.objectives == [status]
    assert advice.recommendations == [advised]
    assert [(one.rule, one.kind) for one in advice.refusals or ()] == [("some_rule", None)]
    assert [one.right_sign_share_ratio for one in advice.accuracy or ()] == [None]


def test_waste_and_goals_are_told_with_what_says_more(warehouse: Warehouse) -> None:
    """A GPU that is busy nine tenths of the time and works a tenth of it reaches the goal; the report shows both."""
    day = NOW.date()
    with warehouse.connect() as connection:
        connection.execute(
            "create table fct_gpu_waste as "
            "select * replace (gpu_hours::double as gpu_hours, usd::double as usd) from (values "
            "($1::date, 'gpu-1', 'u1', 'active', 6.0, 18.0, 12.0, 24.0), "
            "($1::date, 'gpu-1', 'u1', 'idle_held', 2.0, 6.0, 4.0, 8.0), "
            "($1::date, 'gpu-2', 'u2', 'idle_free', 1.0, null, null, null), "
            "($1::date - 8, 'gpu-1', 'u1', 'active', 2.0, 6.0, 4.0, 8.0), "
            "($1::date - 8, 'gpu-1', 'u1', 'idle_held', 2.0, 6.0, 4.0, 8.0)) "
            "t(day, host, gpu_uuid, state, gpu_hours, usd, usd_low, usd_high)",
            [day],
        )
        connection.execute(
            "create table fct_deployment_costs as "
            "select 'chat' as deployment, 9.0::double as gpu_hours, 24.0::double as usd, "
            "1.5 as usd_per_million_tokens, 0.5 as usd_per_million_prompt_tokens, "
            "4.0 as usd_per_million_generation_tokens, null::double as joules_per_generation_token"
        )
        connection.execute(
            "create table fct_gpu_utilization_5m as select $1::timestamptz as period_at, 'gpu-1' as host, v.*, "
            "'' as mig_instance, 'live' as source, 0.1 as dram_active_mean_ratio, 1.0 as memory_used_max_bytes, "
            "1.0 as energy_joules from (values ('u1', 0.95, 0.1, 60), ('u2', 0.9, 0.1, 60), ('u3', 0.2, null, 60)) "
            "v(gpu_uuid, gpu_utilization_mean_ratio, sm_active_mean_ratio, sample_count)",
            [NOW - timedelta(minutes=30)],
        )
        connection.execute(
            "create table fct_host_utilization_5m as select $1::timestamptz as period_at, 'gpu-1' as host, "
            "'live' as source, 8 as cpu_count, 0.5 as cpu_busy_ratio, 0.1 as memory_used_max_ratio, "
            "0.02 as psi_cpu_some_ratio, 60 as sample_count",
            [NOW - timedelta(minutes=30)],
        )
        connection.execute(
            "create table stg_fleet_targets as select 'a' as target, 'gpu-1' as host, 'chat' as deployment"
        )

    data = read_report(warehouse, Fleet(), NOW - timedelta(hours=1), NOW)

    assert data.gpu_states is not None
    assert data.gpu_states.rows() == [
        ("gpu-1", "active", 6.0),
        ("gpu-1", "idle_held", 2.0),
        ("gpu-2", "idle_free", 1.0),
    ]
    by_state = data.waste["GPU-hours and dollars by deployment and state, UTC days of the window"].rows()
    assert ("chat", "idle_held", 2.0, 6.0) in by_state
    assert ("several or none", "idle_free", 1.0, None) in by_state
    goals = {
        row["goal"]: (row["reached_ratio"], row["honest_ratio"])
        for row in data.waste["Goals as they are stated, and what says more"].to_dicts()
    }
    assert goals["GPU over 80 %"] == (pytest.approx(2 / 3), pytest.approx(0.1))
    assert goals["CPU over 70 %"] == (0.0, pytest.approx(0.02))
    # Half of the known GPU time was idle, a third is: a third less, of the half that was to be reached.
    assert goals["idle GPU time halved"] == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    page = to_html(make_document(data))
    assert "mean SM activity" in page
    assert "What tokens cost, realized over the last 7 days" in page


def test_the_assets_show_the_insight_and_write_the_report(warehouse: Warehouse, paths: Paths) -> None:
    """Through Dagster: the insight that was written is in the report's file and in both assets' metadata."""
    writer = InsightWriter(InsightStore(warehouse), {}, lambda: NOW)
    made = dg.materialize(
        [
            insights_asset(writer, lambda: PACK, 2, deps=()),
            fleet_report_asset(
                lambda since, until: read_report(warehouse, Fleet(), since, until),
                paths.reports_dir,
                lambda: NOW,
                deps=("insights",),
            ),
        ]
    )
    insight = made.asset_materializations_for_node("insights")[0].metadata
    report = made.asset_materializations_for_node("fleet_report")[0].metadata

    assert insight["writer"].value == "template"
    assert insight["reason"].value == "GROQ_API_KEY is not set"
    assert "vllm-7 preempts requests" in str(insight["insight"].value)
    assert "vllm-7 preempts requests" in str(report["report"].value)
    assert "vllm-7 preempts requests" in (paths.reports_dir / "fleet_report.html").read_text(encoding="utf-8")


def test_the_command_says_what_to_do_before_the_first_refresh(paths: Paths) -> None:
    """Without a read copy there is nothing to report, and a way to get it."""
    with pytest.raises(ClickException, match=r"does not exist yet; start `optiinfra up`"):
        command.run(paths, {})


def test_the_command_prints_and_writes(
    paths: Paths, warehouse: Warehouse, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same claims in the terminal and in the file that --out names."""
    InsightWriter(InsightStore(warehouse), {}, lambda: NOW).write(PACK)
    warehouse.publish()
    command.run(paths, {}, out=tmp_path / "here" / "x.html")

    printed = capsys.readouterr().out
    assert "vllm-7 preempts requests" in printed
    assert f"{tmp_path}/here/x.html" in printed.replace("\n", "")
    assert "vllm-7 preempts requests" in (tmp_path / "here" / "x.html").read_text(encoding="utf-8")


def test_a_report_is_replaced_whole(tmp_path: Path) -> None:
    """Whoever has the old file open keeps it; nothing is left beside it; everybody may read it."""
    first = write_report(tmp_path, "<p>one</p>")
    with first.path.open() as open_file:
        second = write_report(tmp_path, "<p>two \ud800</p>")
        assert open_file.read() == "<p>one</p>"

    assert second.path.read_text() == "<p>two ?</p>"
    assert [path.name for path in tmp_path.iterdir()] == ["fleet_report.html"]
    assert second.path.stat().st_mode & 0o777 == 0o644


def test_a_place_that_cannot_be_written_is_named(paths: Paths, warehouse: Warehouse, tmp_path: Path) -> None:
    """A folder that is a file: the error names it, and the remedy."""
    warehouse.publish()
    (tmp_path / "file").write_text("x")

    with pytest.raises(ClickException, match=r"cannot be written: .*file.*--out"):
        command.run(paths, {}, out=tmp_path / "file" / "x.html")
