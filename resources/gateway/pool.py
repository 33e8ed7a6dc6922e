"""Which server gets the next request, and what is counted of it.

Pure: no sockets, no clock. Weights, states and counters of the servers of one pool; forwarding is `proxy`, commands
are `runtime`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, model_validator

from optiinfra_pipelines.domain.base import Frozen, Name

# HAProxy's weights are whole and end at 256; what sets them speaks to both.
MAX_WEIGHT = 256
# Two failed health checks take a server out, one good one brings it back.
FALL = 2

State = Literal["ready", "drain", "maint"]


class ServerSettings(Frozen):
    """One server: its name, where it listens, and the weight it starts with."""

    name: Name
    host: str = "127.0.0.1"
    port: int = Field(gt=0, lt=65536)
    weight: int = Field(default=1, ge=0, le=MAX_WEIGHT)


class GatewaySettings(Frozen):
    """What one gateway process serves. state_file: read at the start, so that a restart keeps the weights in force."""

    backend: Name
    port: int = Field(gt=0, lt=65536)
    socket: str
    state_file: str
    health_path: str = "/health"
    servers: tuple[ServerSettings, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> GatewaySettings:
        names = [server.name for server in self.servers]
        if len(set(names)) != len(names):
            raise ValueError(f"pool {self.backend}: a server stands twice in {names}")
        return self


@dataclass
class Server:
    """One server as it is now. requests, failures: since the gateway started."""

    settings: ServerSettings
    weight: int
    state: State = "ready"
    is_up: bool = True
    in_flight: int = 0
    requests: int = 0
    # Answers of 5xx; connections that were refused; answers that broke off.
    refused_by_server: int = 0
    not_connected: int = 0
    broken_off: int = 0
    _failed_checks: int = 0
    _credit: int = 0

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def status(self) -> str:
        """As HAProxy words it."""
        if self.state == "maint":
            return "MAINT"
        if not self.is_up:
            return "DOWN"
        return "DRAIN" if self.state == "drain" or self.weight == 0 else "UP"

    def checked(self, is_good: bool) -> None:
        """Take one health check into account."""
        self._failed_checks = 0 if is_good else self._failed_checks + 1
        self.is_up = is_good or (self.is_up and self._failed_checks < FALL)


@dataclass
class Pool:
    """The servers of one backend."""

    backend: str
    servers: dict[str, Server] = field(default_factory=dict)

    @classmethod
    def of(cls, backend: str, servers: Iterable[ServerSettings]) -> Pool:
        """A pool in which every server has its initial weight."""
        return cls(backend, {one.name: Server(one, one.weight) for one in servers})

    def choose(self, besides: Collection[str] = ()) -> Server | None:
        """The next server by smooth weighted round robin; None when nobody may take a request.

        besides: servers that this request has tried. Over any stretch each server's share is its weight's, and its
        turns are spread evenly.
        """
        able = [one for one in self.servers.values() if one.status == "UP" and one.name not in besides]
        if not able:
            return None
        for one in able:
            one._credit += one.weight
        chosen = max(able, key=lambda one: one._credit)
        chosen._credit -= sum(one.weight for one in able)
        return chosen

    def set_weight(self, name: str, weight: int) -> None:
        """Set a weight; credits start anew, so that a change acts with the next request."""
        self.servers[name].weight = weight
        for one in self.servers.values():
            one._credit = 0
