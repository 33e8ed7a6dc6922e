"""What one rollout is executed with, put together: target, counts, staging, executor.

Apart from the desk because it imports the judge with its numerical libraries: only a process that executes a rollout
does. Nothing is touched here before the executor's `begin`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import polars as pl

from optiinfra_pipelines.domain.fleet import Fleet, Target
from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts
from optiinfra_pipelines.domain.rollouts import NEEDS_QUALITY_GATE, Rollout
from optiinfra_pipelines.rollout.quality import read_prompts
from optiinfra_pipelines.rollout.staging_load import LoadMix
from resources.rollouts.executor import Executor
from resources.rollouts.feed import ScrapeFeed, requests_in_flight
from resources.rollouts.generators import find_generator
from resources.rollouts.gpu_watch import GpuWatch
from resources.rollouts.history import StableHistory
from resources.rollouts.ports import Feed, Staging
from resources.rollouts.rehearsal import SimulatedFeed, SimulatedStaging
from resources.rollouts.staging import HttpStaging
from resources.rollouts.store import RolloutError
from resources.rollouts.targets import RolloutTarget, TargetError
from resources.rollouts.targets.base import Replica, ServedTarget
from resources.rollouts.targets.build import served_target
from resources.rollouts.targets.dry_run import DryRunTarget
from resources.scrape.breaker import Policy
from resources.scrape.engine_scraper import EngineScraper
from resources.scrape.metrics_endpoint import MetricsEndpoints

if TYPE_CHECKING:
    from resources.rollouts.desk import Rollouts

_NEVER = 1_000_000


@dataclass(frozen=True)
class Parts:
    """What one rollout is executed with."""

    target: RolloutTarget
    feed: Feed
    staging: Staging


def make_executor(rollouts: Rollouts, row: Rollout, owner: str, run_id: str | None) -> Executor:
    """A new executor of a rollout. RolloutError when its target is not available here."""
    parts = make_parts(rollouts, row)
    return Executor(
        rollouts.store,
        row.rollout_id,
        owner=owner,
        target=parts.target,
        feed=parts.feed,
        staging=parts.staging,
        policy=rollouts.policy,
        stamp=rollouts.clock,
        run_id=run_id,
        may_not_start=rollouts.budget_refusal,
    )


def make_parts(rollouts: Rollouts, row: Rollout) -> Parts:
    """Target, counts and staging of a rollout. RolloutError when its target is not available here."""
    settings = rollouts.policy.of(row.deployment)
    if row.proposal.target == "dry_run":
        dry = DryRunTarget(row.deployment, settings.dry_run, rollouts.root / "dry_run")
        return Parts(dry, SimulatedFeed(dry, settings.dry_run), SimulatedStaging())
    try:
        return _served(rollouts, row, settings)
    except TargetError as error:
        raise RolloutError(f"rollout {row.rollout_id} has no target: {error}") from error


def _served(rollouts: Rollouts, row: Rollout, settings: DeploymentRollouts) -> Parts:
    # No breaker: a rollout asks a handful of servers, and one that comes up must be seen at the next look.
    endpoints = MetricsEndpoints(policy=Policy(failures_to_open=_NEVER))
    scraper = EngineScraper(Fleet(), endpoints)

    def scrape(wanted: Sequence[Replica], at: datetime) -> Mapping[str, pl.DataFrame]:
        asked = [Target(name=one.server, url=one.metrics) for one in wanted]
        return scraper.frames_of(endpoints.scrape(asked, at))

    def in_flight(wanted: Sequence[Replica]) -> int | None:
        # A scraper of its own: what one hands out once, such as bounds, the feed must not miss.
        asked = [Target(name=one.server, url=one.metrics) for one in wanted]
        frames = EngineScraper(Fleet(), endpoints).frames_of(endpoints.scrape(asked, rollouts.clock().at))
        return requests_in_flight(frames, wanted)

    fleet = rollouts.fleet
    target = served_target(row.proposal.target, settings, rollouts.root, rollouts.environ, in_flight)
    stored = _stored_targets(rollouts, target)
    history = None
    if rollouts.read_history is not None and stored:
        history = StableHistory(rollouts.read_history, stored, fleet.cadence.collect_seconds)
    gpus = None
    if rollouts.read_live is not None:
        gpus = GpuWatch(rollouts.read_live, lambda replica: host_of(fleet, replica))
    signals = row.proposal.plan.latency_signals
    feed = ScrapeFeed(target, scrape, signals, rollouts.policy.look_seconds, history, gpus)
    model = next((one.model for one in fleet.deployments if one.name == row.deployment), row.deployment)
    file = settings.quality_prompts
    prompts = read_prompts(Path(file).read_text(encoding="utf-8")) if file else []
    needs_prompts = row.proposal.change.knob_group in NEEDS_QUALITY_GATE

    def kv_tokens(replica: Replica) -> float | None:
        found = scrape([replica], rollouts.clock().at)["raw_engine_samples"]["kv_cache_capacity_tokens"].to_list()
        # Of several ranks the smallest: each holds requests of its own.
        return min((float(tokens) for tokens in found if tokens is not None), default=None)

    staging = HttpStaging(
        target,
        model=model,
        prompts=prompts if needs_prompts else (),
        generator=find_generator(settings.load_generator, settings.tokenizer, rollouts.environ),
        mix=lambda: history.load_mix(rollouts.clock().at) if history is not None else LoadMix(),
        kv_tokens=kv_tokens,
        expected_kv_tokens=row.proposal.plan.expected_kv_tokens,
    )
    return Parts(target, feed, staging)


def _stored_targets(rollouts: Rollouts, target: ServedTarget) -> list[str]:
    """Targets of fleet.yaml whose stored history is that of the stable replicas."""
    if rollouts.read_history is None:
        return []
    named = {one.url: one.name for one in rollouts.fleet.targets}
    try:
        return [named[one.metrics] for one in target.stable_arm() if one.metrics in named]
    except TargetError:
        # Making things safe must not wait for a list of replicas.
        return []


def host_of(fleet: Fleet, replica: Replica) -> str | None:
    """The host of fleet.yaml that a replica runs on: as its target says, else this one for a loopback address."""
    named = {one.url: one.host for one in fleet.targets if one.host is not None}
    is_here = urlsplit(replica.url).hostname in ("127.0.0.1", "localhost", "::1")
    here = next((one.name for one in fleet.hosts if one.local), None)
    return named.get(replica.metrics) or (here if is_here else None)
