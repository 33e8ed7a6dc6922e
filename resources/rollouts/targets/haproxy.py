"""Traffic of one HAProxy backend between stable and candidate servers, by weights through the runtime socket.

Candidates are servers of the same backend that the configuration file starts at weight 0. After every change the
state file is written too: without it a restart of HAProxy silently returns to the configured weights. Pools exchange
their roles when a rollout completes; which is which is remembered beside the fencing token.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from optiinfra_pipelines.domain.rollout_policy import HaproxyServer, HaproxySettings
from optiinfra_pipelines.rollout.knobs import plain
from resources.rollouts.local_launcher import Launcher, LauncherError
from resources.rollouts.targets.base import Actual, ArmCounts, Counted, Flags, TargetError, TokenFile
from resources.rollouts.targets.haproxy_roles import Roles, roles_of, state_path
from resources.rollouts.targets.haproxy_socket import RuntimeSocket, ServerStatus

# HAProxy's weights are whole and end at 256.
MAX_WEIGHT = 256
# It has drained before; what is left is the engine's own shutdown. Less than the lease, which waits for it.
STOP_SECONDS = 15.0
# One that dies right after its start is not helped by another: three in ten minutes, then it is left to a person.
MAX_REVIVALS, REVIVAL_SECONDS = 3, 600.0


class HaproxyTarget:
    """One backend. launcher: starts and stops candidates on this host; unused without `launch` in the settings."""

    kind = "haproxy"
    is_simulated = False
    counts_errors = True

    def __init__(self, settings: HaproxySettings, folder: Path, launcher: Launcher) -> None:
        self._settings = settings
        self._socket = RuntimeSocket(settings.socket)
        self._state = TokenFile(state_path(folder, settings))
        self._launcher = launcher
        self.drain_seconds = settings.drain_seconds

    # --- roles ---------------------------------------------------------------------------------------

    @property
    def stable_servers(self) -> tuple[HaproxyServer, ...]:
        """The servers that serve now: those of the settings until a rollout completed, then its candidates."""
        return self._roles.stable

    @property
    def candidate_servers(self) -> tuple[HaproxyServer, ...]:
        """The servers that a candidate may use."""
        return self._roles.candidates

    def started_servers(self) -> tuple[HaproxyServer, ...]:
        """The candidates that the rollout has started so far."""
        return self._roles.started

    @property
    def _roles(self) -> Roles:
        return roles_of(self._settings, self._state.read())

    @property
    def completed_by(self) -> str | None:
        """The rollout that completed last; None before any."""
        promoted: str | None = self._state.read().get("promoted")
        return promoted

    def _are_swapped(self) -> bool:
        return bool(self._state.read().get("are_swapped", False))

    # --- reading ---------------------------------------------------------------------------------------

    def observe(self) -> Actual:
        """Shares by the weights in force, whether or not a server is up: what was set, not what a crash made of it."""
        servers = self._socket.servers(self._settings.backend)
        candidates, stable = self._of(self.candidate_servers, servers), self._of(self.stable_servers, servers)
        total = sum(server.weight for server in (*candidates, *stable))
        ours = sum(server.weight for server in candidates)
        detail: dict[str, Any] = {
            "weights": {server.server: server.weight for server in (*candidates, *stable)},
            "status": {server.server: server.status for server in (*candidates, *stable)},
        }
        percent = 100 * ours / total if total else 0.0
        # What something else starts and stops is not ours to count.
        is_ours = self._settings.launch is not None
        running = sum(self._launcher.is_alive(one.server) for one in self.candidate_servers) if is_ours else None
        up = sum(1 for server in stable if server.is_up)
        return Actual(percent, running, up, sum(server.in_flight for server in candidates), detail)

    def stable_replicas(self) -> int:
        return len(self.stable_servers)

    def candidate_slots(self) -> int:
        return len(self.candidate_servers)

    def started_arm(self) -> tuple[HaproxyServer, ...]:
        return self.started_servers()

    def not_started(self) -> str | None:
        return None

    def stable_arm(self) -> tuple[HaproxyServer, ...]:
        return self.stable_servers

    def arm_counts(self) -> ArmCounts:
        servers = self._socket.servers(self._settings.backend)

        def counted(arm: Iterable[HaproxyServer]) -> dict[str, Counted]:
            return {one.server: Counted(one.requests, one.failed) for one in self._of(arm, servers)}

        return ArmCounts(counted(self.started_servers()), counted(self.stable_servers))

    def is_alive(self, server: str) -> bool | None:
        return self._launcher.is_alive(server) if self._settings.launch is not None else None

    def gateway_counts(self) -> dict[str, ServerStatus]:
        """HAProxy's own counters by server: what clients saw, also of a replica that is gone."""
        return self._socket.servers(self._settings.backend)

    # --- acting ----------------------------------------------------------------------------------------

    def claim(self, rollout_id: str, token: int) -> None:
        backend = self._settings.backend
        with self._state.held(token) as state:
            if state.get("rollout_id") == rollout_id:
                return
            taken = [one.server for one in self.candidate_servers if self._socket.weight(backend, one.server)[0]]
            if taken:
                raise TargetError(f"{', '.join(taken)} of {backend} have traffic already; set their weight to 0 first")
            self._refuse_unsafe_restart()
            weights = {one.server: self._socket.weight(backend, one.server)[0] for one in self.stable_servers}
            if not any(weights.values()):
                raise TargetError(f"all stable servers of {backend} have weight 0; give them their weights first")
            state.update(rollout_id=rollout_id, stable_weights=weights, started=0)

    def start_candidates(self, count: int, flags: Flags, token: int) -> None:
        servers = self.candidate_servers[:count]
        if len(servers) < count:
            raise TargetError(f"{count} candidates, but the backend has {len(servers)} servers for them")
        with self._state.held(token) as state:
            # Written before anything starts: a candidate that runs while the gateway is away must not be nobody's.
            state["started"] = count
            # Over what completed rollouts left: a change of one flag must not take the others back.
            given = state["candidate_flags"] = _over(state.get("stable_flags", {}), flags)
        with self._state.held(token):
            for server in servers:
                if self._settings.launch is not None:
                    try:
                        self._launcher.start(server.server, self._settings.launch, server.url, given)
                    except LauncherError as error:
                        raise TargetError(str(error)) from error
                # Weight 0 keeps requests away; `ready` ends the drain of an earlier rollout.
                self._socket.set_state(self._settings.backend, server.server, "ready")
            self._keep()

    def set_share(self, percent: float, token: int) -> None:
        with self._state.held(token) as state:
            original = {name: int(weight) for name, weight in state.get("stable_weights", {}).items()}
            wanted = self._weights(percent, original)
            if percent > 0:
                state["exposed"] = state.get("rollout_id")
                for server in self.started_servers():
                    # It may have been started while the gateway was away, and still drain from an earlier rollout.
                    self._socket.set_state(self._settings.backend, server.server, "ready")
            present = self._socket.servers(self._settings.backend)
            # Up before down: at no moment is every weight 0, and a share falls or rises without overshooting.
            changes = sorted(wanted.items(), key=lambda item: item[1] < present[item[0]].weight)
            for name, weight in changes:
                self._socket.set_weight(self._settings.backend, name, weight)
            self._keep()

    def drain(self, token: int) -> bool:
        with self._state.held(token):
            for server in self.candidate_servers:
                self._socket.set_state(self._settings.backend, server.server, "drain")
            self._keep()
        servers = self._socket.servers(self._settings.backend)
        return not any(server.in_flight for server in self._of(self.candidate_servers, servers))

    def stop_candidates(self, token: int) -> None:
        with self._state.held(token) as state:
            state["started"] = 0
            self._stop(self.candidate_servers)

    def promote(self, rollout_id: str, token: int) -> bool:
        with self._state.held(token) as state:
            if state.get("promoted") == rollout_id:
                return True
            backend = self._settings.backend
            old = self.stable_servers
            for server in old:
                self._socket.set_weight(backend, server.server, 0)
                self._socket.set_state(backend, server.server, "drain")
            servers = self._socket.servers(backend)
            in_flight = sum(server.in_flight for server in self._of(old, servers))
            if in_flight:
                return False
            self._stop(old)
            weights = {one.server: self._socket.weight(backend, one.server)[0] for one in self.candidate_servers}
            state.update(promoted=rollout_id, are_swapped=not state.get("are_swapped", False), stable_weights=weights)
            state["stable_flags"] = state.get("candidate_flags", {})
            self._keep()
            return True

    # --- parts -----------------------------------------------------------------------------------------

    def revive_stable(self, now: datetime) -> list[str]:
        """Start stable replicas of ours that are gone, a crash or a reboot, with the flags they had; their names.

        Only once a rollout has completed: before, the stable replicas are the operator's. TargetError for one that
        died too often, and StaleTokenError when a rollout took the target meanwhile.
        """
        state = self._state.read()
        if self._settings.launch is None or "promoted" not in state:
            return []
        revived = []
        with self._state.held(int(state.get("token", 0))) as state:
            for one in roles_of(self._settings, state).stable:
                since = now.timestamp() - REVIVAL_SECONDS
                lately = [at for at in state.get("revivals", {}).get(one.server, []) if at > since]
                if len(lately) >= MAX_REVIVALS and not self._launcher.is_alive(one.server):
                    raise TargetError(
                        f"{one.server} was started {len(lately)} times in {REVIVAL_SECONDS / 60:.0f} minutes and is "
                        "gone again; see its log"
                    )
                if self._launcher.revive(one.server):
                    state.setdefault("revivals", {})[one.server] = [*lately, now.timestamp()]
                    revived.append(one.server)
        return revived

    def _weights(self, percent: float, original: Mapping[str, int]) -> dict[str, int]:
        """Weight of every server for a share; the stable ones keep their proportions."""
        candidates = [server.server for server in self.candidate_servers]
        if percent <= 0:
            return {**original, **dict.fromkeys(candidates, 0)}
        started = [server.server for server in self.started_servers()]
        ready = [name for name in started if self._is_running(name)]
        if not ready:
            raise TargetError("no candidate runs; nothing can take a share")
        rest = dict.fromkeys([name for name in candidates if name not in ready], 0)
        if percent >= 100:
            return {**dict.fromkeys(original, 0), **rest, **dict.fromkeys(ready, MAX_WEIGHT // 2)}
        stable, weight = closest_weights(percent, original, len(ready))
        return {**stable, **rest, **dict.fromkeys(ready, weight)}

    def _refuse_unsafe_restart(self) -> None:
        """A restart that finds no state file goes back to the configured weights: a candidate's must be 0 there.

        Once pools exchanged their roles the configuration names the old ones, and only the state file knows better.
        """
        if self._are_swapped():
            return
        backend = self._settings.backend
        weighty = [one.server for one in self.candidate_servers if self._socket.weight(backend, one.server)[1]]
        if weighty:
            raise TargetError(
                f"{', '.join(weighty)} of {backend} would get traffic by a restart of HAProxy alone; in its "
                "configuration write weight 0 for them, and load-server-state-from-file"
            )

    def _is_running(self, name: str) -> bool:
        if self._settings.launch is not None:
            return self._launcher.is_alive(name)
        return self._socket.servers(self._settings.backend)[name].is_up

    def _stop(self, servers: Iterable[HaproxyServer]) -> None:
        for server in servers:
            self._launcher.stop(server.server, STOP_SECONDS)

    def _of(self, wanted: Iterable[HaproxyServer], servers: Mapping[str, ServerStatus]) -> list[ServerStatus]:
        missing = [one.server for one in wanted if one.server not in servers]
        if missing:
            raise TargetError(f"backend {self._settings.backend} of HAProxy has no server {', '.join(missing)}")
        return [servers[one.server] for one in wanted]

    def _keep(self) -> None:
        """Write the state file whole or not at all."""
        path = Path(self._settings.state_file)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            temporary.write_text(self._socket.state_dump(), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise TargetError(f"HAProxy's state file {path} cannot be written: {error}") from error


def _over(present: Flags, flags: Flags) -> dict[str, str | None]:
    """The flags over the present ones, each once, however it is spelled."""
    return dict({plain(flag): (flag, value) for flag, value in (*present.items(), *flags.items())}.values())


def closest_weights(percent: float, original: Mapping[str, int], candidates: int) -> tuple[dict[str, int], int]:
    """Stable weights and the candidates' weight that come nearest to a share (0 < percent < 100).

    The stable ones keep the proportions of `original`. TargetError when whole weights cannot express the share.
    """
    highest = max(original.values())
    best: tuple[float, dict[str, int], int] | None = None
    for scale in range(1, MAX_WEIGHT + 1):
        stable = {name: max(1, round(weight * scale / highest)) if weight else 0 for name, weight in original.items()}
        total = sum(stable.values())
        weight = round(percent * total / ((100 - percent) * candidates))
        if not 1 <= weight <= MAX_WEIGHT:
            continue
        error = abs(100 * weight * candidates / (weight * candidates + total) - percent)
        if best is None or error < best[0]:
            best = (error, stable, weight)
    if best is None:
        raise TargetError(f"{percent:g} % cannot be expressed in weights of 1 to {MAX_WEIGHT}; choose a larger share")
    return best[1], best[2]
