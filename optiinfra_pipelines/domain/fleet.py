"""The fleet as its operator describes it: targets, deployments, hosts, objectives, thresholds, retention, cadence.

Nouns only: frozen, closed (an unknown key is an error), units in the names. What rollouts may do is
`domain.rollout_policy`; reading fleet.yaml, `${NAME}` and errors with file and line are `optiinfra_pipelines.settings`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, model_validator

from optiinfra_pipelines.domain.base import Engine, Frozen, Name, Positive, Source
from optiinfra_pipelines.domain.rollout_policy import RolloutPolicy

Count = Annotated[int, Field(ge=1)]
WeightDtype = Literal["float32", "bfloat16", "float16", "fp8", "int8", "int4"]


class Target(Frozen):
    """One endpoint that serves metrics in Prometheus text."""

    name: Name
    url: str = Field(
        pattern=r"^https?://", description="Full URL of the metrics page, such as http://10.0.0.5:8000/metrics."
    )
    deployment: Name | None = Field(default=None, description="Deployment this replica belongs to.")
    host: Name | None = Field(default=None, description="Host it runs on, to join GPU and host telemetry.")
    engine: Engine | None = Field(
        default=None, description="Engine, where the page alone cannot tell; detected when absent."
    )
    source: Source = Field(
        default="live", description="What stands behind the URL; shown wherever its numbers are shown."
    )
    headers: dict[str, SecretStr] = Field(default_factory=dict, description="Request headers; secrets as ${NAME}.")
    keep: tuple[str, ...] = Field(
        default=(), description="Families to keep in raw_kept_samples; * and ? are wildcards."
    )


class Objective(Frozen):
    """A promise about one deployment: at least `target_ratio` of requests good over `window_days`."""

    kind: Literal["ttft", "tpot", "itl", "e2e", "error_ratio", "availability", "goodput"] = Field(
        description="goodput: all latency objectives of the deployment kept at once; known as bounds only."
    )
    target_ratio: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    threshold_seconds: Positive | None = Field(
        default=None, description="Bound of a latency objective; none for the others."
    )
    window_days: Positive = 30.0


class ModelShape(Frozen):
    """The numbers of a model's config.json that decide its KV cache.

    `gqa` (MHA is the case kv_heads = heads, MQA kv_heads = 1) keeps keys and values of every KV head; `mla` keeps one
    compressed vector of kv_lora_rank + qk_rope_head_dim a token and layer. sliding_layers of the layers look back
    sliding_window_tokens only.
    """

    attention: Literal["gqa", "mla"] = "gqa"
    layers: Count
    kv_heads: Count | None = None
    head_dim: Count | None = None
    value_head_dim: Count | None = Field(default=None, description="Where values are of another size than keys.")
    kv_lora_rank: Count | None = None
    qk_rope_head_dim: Count | None = None
    sliding_layers: Annotated[int, Field(ge=0)] = 0
    sliding_window_tokens: Count | None = None
    dtype: WeightDtype = Field(default="bfloat16", description="Of the weights as published; KV 'auto' follows it.")
    parameters: Positive | None = Field(default=None, description="Weights in all, embeddings included.")
    max_position_tokens: Count | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"gqa": ("kv_heads", "head_dim"), "mla": ("kv_lora_rank", "qk_rope_head_dim")}[self.attention]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"{self.attention} attention needs {', '.join(missing)}")
        if self.sliding_layers > self.layers:
            raise ValueError(f"{self.sliding_layers} sliding layers of {self.layers} layers")
        if self.sliding_layers and self.sliding_window_tokens is None:
            raise ValueError("sliding_layers need sliding_window_tokens")
        return self


class Deployment(Frozen):
    """Replicas that share a model and a configuration."""

    name: Name
    model: str
    shape: ModelShape | None = Field(
        default=None, description="From the model's config.json, where no published name tells it; sizes its KV cache."
    )
    engine: Engine | None = None
    gpu: str | None = Field(default=None, description="GPU type, such as H100-80GB-SXM.")
    gpus_per_replica: Annotated[int, Field(ge=0)] = 0
    price_usd_per_gpu_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="What one GPU costs you; the price table's figure when absent."
    )
    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    objectives: tuple[Objective, ...] = ()
    flags: dict[str, str] = Field(
        default_factory=dict,
        description="Engine flags it runs with that its page does not tell, without leading dashes; the page wins.",
    )


class Series(Frozen):
    """The series of a Prometheus server that are one host's: those where `label` is `value`."""

    label: str = Field(description="Such as instance or Hostname.")
    value: str = Field(description="Such as gpu-node-1:9400.")


class PrometheusServer(Frozen):
    """A Prometheus-compatible server that already scrapes the hosts' exporters."""

    url: str = Field(pattern=r"^https?://", description="Its root, such as http://prometheus:9090.")
    headers: dict[str, SecretStr] = Field(default_factory=dict, description="Request headers; secrets as ${NAME}.")


class Host(Frozen):
    """A machine: this one (`local`), one read through its exporters, or one that the Prometheus server knows."""

    name: Name
    local: bool = False
    dcgm_exporter: str | None = Field(default=None, pattern=r"^https?://")
    node_exporter: str | None = Field(default=None, pattern=r"^https?://")
    gpu_series: Series | None = Field(default=None, description="Its dcgm-exporter series in the Prometheus server.")
    node_series: Series | None = Field(default=None, description="Its node_exporter series in the Prometheus server.")
    source: Source = "live"


class Cadence(Frozen):
    """How often. Collection follows Dagster's daemon, which cannot look more often than every 5 s."""

    collect_seconds: Annotated[int, Field(ge=5, le=300)] = 5
    refresh_minutes: Annotated[int, Field(ge=1, le=1440)] = 5
    scrape_deadline_seconds: Annotated[float, Field(gt=0, le=30, allow_inf_nan=False)] = 2.5
    scrape_concurrency: Annotated[int, Field(ge=1, le=1000)] = 100


class Retention(Frozen):
    """How long each layer lives."""

    raw_hours: Annotated[int, Field(ge=2)] = 48
    minute_days: Annotated[int, Field(ge=1)] = 14
    five_minute_days: Annotated[int, Field(ge=1)] = 90
    hour_days: Annotated[int, Field(ge=1)] = 730


class Alerts(Frozen):
    """Where alerts go beside the log and the UI."""

    webhook: SecretStr | None = Field(
        default=None, description="URL that takes Slack-compatible JSON, as ${NAME}: whoever has it can post."
    )


class Fleet(Frozen):
    """A whole fleet.yaml. Names are unique within their list; references resolve (checked by settings)."""

    targets: tuple[Target, ...] = ()
    deployments: tuple[Deployment, ...] = ()
    hosts: tuple[Host, ...] = ()
    prometheus: PrometheusServer | None = None
    alerts: Alerts = Alerts()
    keep: tuple[str, ...] = Field(default=(), description="Families to keep verbatim from every target.")
    cadence: Cadence = Cadence()
    retention: Retention = Retention()
    rollouts: RolloutPolicy = RolloutPolicy()
    thresholds: dict[str, float] = Field(default_factory=dict, description="Overrides of analysis thresholds by name.")
