"""The target with real replicas that a deployment's settings describe, for executors and dead-man processes alike.

A target's module is imported when it is made: a dead-man process of HAProxy must be up before httpx and polars are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts, HaproxySettings
from optiinfra_pipelines.domain.rollouts import TargetKind
from resources.rollouts.local_launcher import Launcher, LocalLauncher
from resources.rollouts.systemd_launcher import SystemdLauncher
from resources.rollouts.targets.base import Replica, ServedTarget, TargetError
from resources.rollouts.targets.haproxy import HaproxyTarget

# Requests in flight at some replicas by their own pages; None: they do not tell.
InFlight = Callable[[Sequence[Replica]], int | None]


# Folder of the replicas that are started here, within a deployment's own.
REPLICAS = "replicas"


def served_target(
    kind: TargetKind,
    settings: DeploymentRollouts,
    root: Path,
    environ: Mapping[str, str],
    in_flight: InFlight = lambda _: None,
) -> ServedTarget:
    """Make it. root: folder of the rollouts' state. TargetError when the deployment has no settings of this kind."""
    if kind == "haproxy" and settings.haproxy is not None:
        folder = haproxy_folder(root, settings.deployment)
        return HaproxyTarget(settings.haproxy, folder, _launcher(settings.haproxy, folder / REPLICAS))
    if kind == "kubernetes" and settings.kubernetes is not None:
        from resources.rollouts.targets.kubernetes.api import KubeApi
        from resources.rollouts.targets.kubernetes.target import KubernetesTarget

        return KubernetesTarget(settings.kubernetes, KubeApi(settings.kubernetes), in_flight)
    if kind == "orchestrator" and settings.orchestrator is not None:
        from resources.rollouts.targets.orchestrator.client import OrchestratorClient
        from resources.rollouts.targets.orchestrator.target import OrchestratorTarget

        name = settings.orchestrator.deployment or settings.deployment
        return OrchestratorTarget(settings.orchestrator, name, OrchestratorClient(settings.orchestrator, environ))
    raise TargetError(f"deployment {settings.deployment} has no {kind} settings; describe it there, or use dry_run")


def haproxy_folder(root: Path, deployment: str) -> Path:
    """Where one deployment's state is: server and backend names are unique within one deployment's settings only."""
    return Path(root) / "haproxy" / deployment


def _launcher(settings: HaproxySettings, folder: Path) -> Launcher:
    if settings.launcher == "process":
        return LocalLauncher(folder)
    units = {one.server: one.unit for one in (*settings.stable, *settings.candidates) if one.unit is not None}
    return SystemdLauncher(folder, settings.backend, units, is_user=settings.launcher == "systemd_user")
