"""How a deployment keeps its promises: the state of an objective, its error budget and burn rates; defaults by model.

Nouns and one table only. Counting good requests is `analysis.objectives`, burn rates are `analysis.burn_rate`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from optiinfra_pipelines.domain.base import Frozen, Ratio
from optiinfra_pipelines.domain.fleet import Objective

State = Literal["met", "burning", "exhausted", "no_data"]


class BurnPair(Frozen):
    """Both windows must burn faster than `factor` times the rate that just uses up the budget."""

    name: str
    long_minutes: Annotated[float, Field(gt=0)]
    short_minutes: Annotated[float, Field(gt=0)]
    factor: Annotated[float, Field(gt=0)]
    severity: Literal["page", "ticket"]


class BurnRate(Frozen):
    """One pair at one moment. A rate is None without enough requests in its window; is_firing is then None, too."""

    pair: BurnPair
    long_rate: float | None
    short_rate: float | None
    is_firing: bool | None
    reason: str | None = None


class VantageCount(Frozen):
    """Requests as one vantage saw them: those it can call good, and all."""

    vantage: Literal["engine", "frontend"]
    good: float
    total: float


class ObjectiveStatus(Frozen):
    """One objective of one deployment at one moment.

    edge_seconds: the bucket edge that was judged instead of the threshold, rounded down. good, total: requests of the
    window at the vantage judged. unseen_requests: seen by the frontend and not by its engines. remaining_ratio: what is
    left of the error budget, below 0 when overspent. covered_days: how much of the window has data.
    """

    deployment: str
    objective: Objective
    at: datetime
    state: State
    vantage: Literal["engine", "frontend"] | None
    edge_seconds: float | None
    good: float | None
    total: float | None
    good_ratio: float | None
    remaining_ratio: float | None
    covered_days: float
    unseen_requests: float | None
    burn_rates: tuple[BurnRate, ...]
    notes: tuple[str, ...]

    @property
    def key(self) -> str:
        """Stable name within the deployment, such as ttft<=2s@0.99."""
        threshold = self.objective.threshold_seconds
        bound = "" if threshold is None else f"<={threshold:g}s"
        return f"{self.objective.kind}{bound}@{self.objective.target_ratio:g}"


class GoodputBounds(Frozen):
    """Share of requests that keep all latency objectives at once: separate histograms give no more than its bounds."""

    kinds: tuple[str, ...]
    lower: Ratio
    upper: Ratio


class ModelClass(Frozen):
    """Latencies that MLPerf asks of a class of models, as p99. interactive: its tighter scenario, where it has one."""

    name: str
    ttft_seconds: float
    tpot_seconds: float
    interactive_ttft_seconds: float | None = None
    interactive_tpot_seconds: float | None = None
    source: str


_MLPERF = "MLPerf Inference policies of 2026-07-23, {}, server or conversational scenario, p99"


def _class(name: str, example: str, served: tuple[int, int], tight: tuple[int, int] | None = None) -> ModelClass:
    """served, tight: TTFT and TPOT in milliseconds."""
    return ModelClass(
        name=name,
        ttft_seconds=served[0] / 1000,
        tpot_seconds=served[1] / 1000,
        interactive_ttft_seconds=tight[0] / 1000 if tight else None,
        interactive_tpot_seconds=tight[1] / 1000 if tight else None,
        source=_MLPERF.format(example),
    )


MODEL_CLASSES: dict[str, ModelClass] = {
    one.name: one
    for one in (
        _class("up_to_13b", "Llama 3.1 8B", (2000, 100), (500, 30)),
        _class("up_to_80b", "Llama 2 70B", (2000, 200), (450, 40)),
        _class("mixture", "Mixtral 8x7B", (2000, 200)),
        _class("from_400b", "Llama 3.1 405B", (6000, 175), (4500, 80)),
        _class("reasoning", "DeepSeek-R1", (2000, 80), (1500, 15)),
        _class("gpt_oss_120b", "GPT-OSS-120B", (3000, 80), (2000, 20)),
    )
}
