"""What an operator allows rollouts to do: freeze windows, blast radius, approvers, and the target of each deployment.

Nouns only; judging a rollout by them is `rollout.gate`. Never editable from the launchpad.
"""

from __future__ import annotations

from datetime import datetime, time
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator, model_validator

from optiinfra_pipelines.domain.base import Frozen, Name, Positive
from optiinfra_pipelines.domain.rollout_targets import KubernetesSettings, OrchestratorSettings
from optiinfra_pipelines.domain.rollouts import Percent

Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
WEEKDAYS: tuple[Weekday, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class FreezeWindow(Frozen):
    """A stretch of every such day in which nothing starts and no share grows. `until` before `since` is past midnight.

    time_zone: IANA name, such as Europe/Berlin. The window belongs to the day it begins on.
    """

    name: str
    days: tuple[Weekday, ...] = WEEKDAYS
    since: time
    until: time
    time_zone: str = "UTC"

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError):
            raise ValueError(f"{value!r} is no IANA time zone; write one such as Europe/Berlin or UTC") from None
        return value

    def holds(self, at: datetime) -> bool:
        """Whether a moment (timezone-aware) lies in the window; its end does not."""
        local = at.astimezone(ZoneInfo(self.time_zone))
        today, yesterday = WEEKDAYS[local.weekday()], WEEKDAYS[local.weekday() - 1]
        clock = local.time().replace(tzinfo=None)
        if self.since < self.until:
            return today in self.days and self.since <= clock < self.until
        begins_today = today in self.days and clock >= self.since
        return begins_today or (yesterday in self.days and clock < self.until)


class BlastRadius(Frozen):
    """How much one rollout, and all together, may put at risk."""

    # Google's and Argo's usual first canary: what can go wrong at first sight goes wrong for one request in ten.
    max_first_percent: Percent = 10.0
    max_increase_percent: Percent = 50.0
    max_candidate_replicas: Annotated[int, Field(ge=1)] = 8
    max_concurrent_rollouts: Annotated[int, Field(ge=1)] = 1


class HaproxyServer(Frozen):
    """One replica behind HAProxy: its server name in the backend and where it answers."""

    server: Name
    url: str = Field(pattern=r"^https?://", description="Root of its API, such as http://10.0.0.5:8000.")
    metrics_url: str | None = Field(default=None, description="Its metrics page; url + /metrics when absent.")
    unit: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9:_.@\\-]{1,200}\.service$",
        description="Its own systemd unit, such as vllm@8000.service, which a completed rollout stops.",
    )

    @property
    def metrics(self) -> str:
        return self.metrics_url or f"{self.url.rstrip('/')}/metrics"


class HaproxySettings(Frozen):
    """One backend of one HAProxy, reached by its runtime socket. Candidates are its servers too, at weight 0.

    state_file: where `show servers state` is kept, so that a restart of HAProxy comes up with the weights in force.
    launch: command of one candidate; {port}, {url} and {flags} are filled in. None: something else starts it.
    """

    socket: str
    backend: Name
    state_file: str
    stable: Annotated[tuple[HaproxyServer, ...], Field(min_length=1)]
    candidates: Annotated[tuple[HaproxyServer, ...], Field(min_length=1)]
    launch: tuple[str, ...] | None = None
    launcher: Literal["process", "systemd", "systemd_user"] = Field(
        default="process", description="Candidates as local processes, or as transient units of systemd."
    )
    drain_seconds: Positive = 60.0

    @model_validator(mode="after")
    def _distinct(self) -> HaproxySettings:
        names = [server.server for server in (*self.stable, *self.candidates)]
        if len(set(names)) != len(names):
            raise ValueError(f"backend {self.backend}: a server stands twice in stable and candidates: {names}")
        return self


class DryRunSettings(Frozen):
    """A rehearsal: actions are written down, traffic is SIMULATED, and the clock runs as fast as it can.

    latency_factor, error_ratio: what the simulated candidate does; 1.0 and 0.002 are those of the stable replicas.
    """

    requests_per_second: Positive = 20.0
    stable_replicas: Annotated[int, Field(ge=1)] = 9
    latency_factor: Positive = 1.0
    error_ratio: Annotated[float, Field(ge=0, le=1)] = 0.002
    seed: int = 1


class DeploymentRollouts(Frozen):
    """What rollouts of one deployment act on."""

    deployment: Name
    haproxy: HaproxySettings | None = None
    kubernetes: KubernetesSettings | None = None
    orchestrator: OrchestratorSettings | None = None
    dry_run: DryRunSettings = DryRunSettings()
    quality_prompts: str | None = Field(default=None, description="JSON lines file with prompts of known answers.")
    load_generator: Literal["auto", "aiperf", "vllm", "own"] = Field(
        default="auto", description="What sends the compared load of a staging test; auto: aiperf or vllm if installed."
    )
    tokenizer: str | None = Field(
        default=None, description="Tokenizer for aiperf and vllm, a name or a folder; the model's name when absent."
    )


class RolloutPolicy(Frozen):
    """All of it. The defaults rehearse only: no deployment has a target that could be changed."""

    approval_hours: Positive = 24.0
    freeze_windows: tuple[FreezeWindow, ...] = ()
    blast_radius: BlastRadius = BlastRadius()
    approvers: tuple[str, ...] = Field(default=(), description="Who may approve; anybody but the requester if empty.")
    must_prove_approver: bool = Field(
        default=False, description="Refuse approvers without a secret in the environment."
    )
    lease_seconds: Positive = 30.0
    max_gap_seconds: Positive = Field(default=30.0, description="Traffic that nobody judged for longer is taken off.")
    look_seconds: Positive = 5.0
    deployments: tuple[DeploymentRollouts, ...] = ()

    def of(self, deployment: str) -> DeploymentRollouts:
        """The settings of a deployment; those of a rehearsal when it has none."""
        for one in self.deployments:
            if one.deployment == deployment:
                return one
        return DeploymentRollouts(deployment=deployment)
