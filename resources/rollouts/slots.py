"""Which targets of fleet.yaml are idle slots: places for candidates in which nothing runs, or is only being started.

Asked at every tick of the scraping sensor, so it reads a small file per deployment and nothing else. Which servers are
candidates is `targets.haproxy_roles`; targets that find their replicas by themselves have no slots.
"""

from __future__ import annotations

from pathlib import Path

from optiinfra_pipelines.domain.fleet import Fleet
from resources.rollouts.targets.base import TokenFile
from resources.rollouts.targets.build import haproxy_folder
from resources.rollouts.targets.haproxy_roles import roles_of, state_path


class IdleSlots:
    """Idle slots of a fleet. root: folder of the rollouts' state; it need not exist."""

    def __init__(self, fleet: Fleet, root: Path) -> None:
        self._named = {target.url: target.name for target in fleet.targets}
        self._backends = [
            (one.haproxy, TokenFile(state_path(haproxy_folder(root, one.deployment), one.haproxy)))
            for one in fleet.rollouts.deployments
            if one.haproxy is not None
        ]

    def __call__(self) -> frozenset[str]:
        """Names of targets that need not answer now. OSError or ValueError for a state that cannot be read."""
        found = set()
        for settings, state in self._backends:
            roles = roles_of(settings, state.read())
            idle = (one for one in roles.candidates if one not in roles.started or not roles.are_exposed)
            found |= {self._named[one.metrics] for one in idle if one.metrics in self._named}
        return frozenset(found)
