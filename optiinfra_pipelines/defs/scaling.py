"""The assets `replica_capacity`, `scaling_recommendations` and `scaling_backtest`, and the job `backtest_scaling`.

Names, dependencies, launchpad config and metadata only; the decisions are `analysis.scaling*` and `analysis.backtest*`.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import dagster as dg
import polars as pl
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from pydantic import Field, TypeAdapter, ValidationError

from optiinfra_pipelines.analysis.backtest.rows import BacktestQuestion
from optiinfra_pipelines.analysis.plots import as_markdown, pareto_plot
from optiinfra_pipelines.defs.advice import advice_asset, result
from optiinfra_pipelines.defs.schema import Metadata
from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.scaling import Policy
from resources.advice.advisor import Advisor
from resources.warehouse import Warehouse

_POLICY: TypeAdapter[Policy] = TypeAdapter(Policy)


class BacktestConfig(dg.Config):
    """What to replay. What is left out is taken from what is measured and from fleet.yaml."""

    window_days: float = Field(7.0, gt=0, le=14, description="Days of load to replay, back from now.")
    deployments: list[str] = Field(default_factory=list, description="Names of deployments; all when empty.")
    policies: list[dict[str, Any]] = Field(
        default_factory=list,
        description='Policies as data, such as {"kind": "keda_load", "target_ratio": 0.8}; each kind when empty.',
    )
    present_policy: dict[str, Any] = Field(
        default_factory=dict, description="What scales the fleet today, in the same form, to be compared with."
    )
    tune: bool = Field(True, description="Choose parameters on the first half of the window, from two days on.")
    aim_ratio: float = Field(0.999, gt=0, le=1, description="Share of the demand that must find a wait in the bound.")
    wait_bound_seconds: float = Field(10.0, gt=0, description="A wait within this keeps the objective.")
    cold_start_seconds: float = Field(0.0, ge=0, description="From order to ready; 0: as measured, else the default.")
    capacity_tokens_per_second: float = Field(0.0, ge=0, description="What a replica carries; 0: as measured.")
    replicas_at_peak: int = Field(0, ge=0, description="No capacity known: one with which the peak needs so many.")
    min_replicas: int = Field(1, ge=0, description="Fewest replicas; fleet.yaml's where it asks for more.")
    max_replicas: int = Field(0, ge=0, description="Most replicas; 0: fleet.yaml's.")

    def question(self) -> BacktestQuestion:
        """Raises dg.Failure that names the policy which is none."""
        return BacktestQuestion(
            cold_start_seconds=self.cold_start_seconds,
            capacity=None,
            capacity_tokens_per_second=self.capacity_tokens_per_second or None,
            replicas_at_peak=self.replicas_at_peak or None,
            present=_policy(self.present_policy) if self.present_policy else None,
            policies=[_policy(policy) for policy in self.policies],
            tune=self.tune,
            aim_ratio=self.aim_ratio,
            wait_bound_seconds=self.wait_bound_seconds,
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas or None,
        )


def scaling_assets(warehouse: Warehouse, clock: Callable[[], datetime], fleet: Fleet) -> list[dg.AssetsDefinition]:
    """Capacity and recommendations hourly, the back-test weekly."""
    advisor = Advisor(warehouse, clock, fleet)

    @advice_asset("replica_capacity", ["int_engine_minutes", "int_latency_minutes", "int_scrape_minutes"])
    def replica_capacity() -> dg.MaterializeResult[None]:
        rows = advisor.fit_capacity()
        return result(
            rows.sort(~pl.col("is_present").fill_null(False)),
            ["deployment", "length_mix", "tokens_per_second", "low_tokens_per_second", "high_tokens_per_second",
             "origin", "minutes", "reason"],
            known=rows["tokens_per_second"].count(),
            abstentions=rows["tokens_per_second"].null_count(),
        )  # fmt: skip

    @advice_asset("scaling_recommendations", ["load_forecast", "replica_capacity", "int_load_minutes"])
    def scaling_recommendations() -> dg.MaterializeResult[None]:
        rows = advisor.advise_scaling()
        counts: dict[str, Metadata] = {
            action: rows.filter(pl.col("action") == action).height for action in ("up", "down", "hold", "abstain")
        }
        return result(
            rows,
            ["deployment", "action", "current_replicas", "proposed_replicas", "breach_probability",
             "usd_per_hour_change", "reason"],
            **counts,
        )  # fmt: skip

    @advice_asset("scaling_backtest", ["int_load_minutes", "replica_capacity"], _weekly())
    def scaling_backtest(config: BacktestConfig) -> dg.MaterializeResult[None]:
        unknown = sorted(set(config.deployments) - set(advisor.deployments))
        if unknown:
            raise dg.Failure(
                f"no deployment is called {', '.join(unknown)}; these are: {', '.join(advisor.deployments)}"
            )
        rows = advisor.backtest(config.question(), window_days=config.window_days, deployments=config.deployments)
        advised = rows.filter(pl.col("is_advised"))
        return result(
            rows.sort(~pl.col("is_advised").fill_null(False)),
            ["deployment", "policy_name", "replica_hours", "cost_ratio", "attainment_ratio", "is_pareto", "is_advised",
             "reason"],
            replays=rows["attainment_ratio"].count(),
            advised=", ".join(f"{row['deployment']}: {row['policy_name']}" for row in advised.iter_rows(named=True))
            or "none keeps the aim and can be applied",
            pareto=dg.MetadataValue.md(_picture(rows)),
            manifest=dg.MetadataValue.md("\n".join(f"```json\n{text}\n```" for text in advised["manifest"]) or "none"),
        )  # fmt: skip

    return [replica_capacity, scaling_recommendations, scaling_backtest]


def scaling_jobs() -> list[UnresolvedAssetJobDefinition]:
    """`backtest_scaling`: the back-test on demand, with what to replay in the launchpad."""
    return [
        dg.define_asset_job(
            "backtest_scaling",
            selection=["scaling_backtest"],
            description="Replay the recorded load of deployments against scaling policies: cost, objective kept, "
            "regret against perfect knowledge, and the manifest that sets the cheapest that keeps the aim.",
        )
    ]


def _weekly() -> dg.AutomationCondition[Any]:
    """When never made, and on Mondays before the day begins."""
    never_made = dg.AutomationCondition.missing() & ~dg.AutomationCondition.execution_failed()
    due = dg.AutomationCondition.cron_tick_passed("40 3 * * 1").since(dg.AutomationCondition.newly_requested())
    return ((never_made | due) & ~dg.AutomationCondition.in_progress()).with_label("weekly")


def _policy(data: dict[str, Any]) -> Policy:
    try:
        return _POLICY.validate_python(data)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise dg.Failure(f"{data} is no policy: {faults}", allow_retries=False) from error


def _picture(rows: pl.DataFrame) -> str:
    """Each deployment's plot; at most three, for the event log keeps them."""
    known = rows.drop_nulls("attainment_ratio")
    names = known["deployment"].unique(maintain_order=True).to_list()[:3]
    pictures = [
        as_markdown(pareto_plot(known.filter(pl.col("deployment") == name), f"{name}: policies on its own load"), name)
        for name in names
    ]
    return "\n\n".join(pictures) or "nothing was replayed: the rows say why"
