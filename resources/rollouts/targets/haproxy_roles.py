"""Which servers of an HAProxy backend are stable, which may be candidates, and which of these a rollout has started.

From the settings and what the target remembers beside its fencing token; nothing is asked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optiinfra_pipelines.domain.rollout_policy import HaproxyServer, HaproxySettings


@dataclass(frozen=True)
class Roles:
    """started: the candidates that should run now, none once their rollout has been completed or taken back.

    are_exposed: whether they have had a share of traffic. Until then one that does not answer is being started, which
    takes minutes for a real engine and is the rollout's own business.
    """

    stable: tuple[HaproxyServer, ...]
    candidates: tuple[HaproxyServer, ...]
    started: tuple[HaproxyServer, ...]
    are_exposed: bool


def roles_of(settings: HaproxySettings, state: Mapping[str, Any]) -> Roles:
    """The roles now: as in the settings, exchanged with every rollout that completes."""
    pools = (settings.stable, settings.candidates)
    stable, candidates = reversed(pools) if state.get("are_swapped") else pools
    # After a completed rollout the count is that of its candidates, which are the stable ones now.
    is_over = "promoted" in state and state["promoted"] == state.get("rollout_id")
    count = 0 if is_over else int(state.get("started", 0))
    return Roles(stable, candidates, candidates[:count], state.get("exposed") == state.get("rollout_id"))


def state_path(folder: Path, settings: HaproxySettings) -> Path:
    """The file in which the target remembers."""
    return Path(folder) / f"{settings.backend}.haproxy.json"
