"""Pack models onto as few whole GPUs and hosts as their memory and their co-timed activity allow.

Pure but for the solver (OR-Tools CP-SAT), which is loaded when first used. Only whole GPUs are counted as saved; one
spare of the largest replica's size stays (N+1), replicas of one deployment stay apart, and what is not known of a
replica makes a refusal, never an assumption. Moving anything is a person's decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

# Sum of co-timed activity a GPU may reach: past it one tenant's tokens wait for another's (packing rule of thumb).
ACTIVITY_LIMIT_RATIO = 0.7
# Share of what is left after the driver's reservation that may be given out, and a context for each process.
USABLE_RATIO = 0.9
CONTEXT_BYTES = 1e9
# More engines than this on one card and every one of them schedules against strangers.
MAX_TENANTS = 2
# What moving is worth at the least: one GPU-hour a day is noise against a drain, a load and a cold cache.
MIN_SAVED_GPUS = 1
# CP-SAT's own clock, which counts steps and not seconds: the same answer on every machine.
_DETERMINISTIC_LIMIT = 20.0


@dataclass(frozen=True)
class Gpu:
    """One card. reserved_bytes: the driver's. is_healthy: a faulty card is no place for anything."""

    host: str
    uuid: str
    total_bytes: float
    reserved_bytes: float = 0.0
    is_healthy: bool = True

    @property
    def usable_bytes(self) -> float:
        return USABLE_RATIO * (self.total_bytes - self.reserved_bytes)


@dataclass(frozen=True)
class Replica:
    """One replica as it would run anywhere. Per GPU: bytes it needs (weights, activations, KV at its p95 concurrency,
    not what it preallocates) and its activity over the same moments for all replicas (SM and DRAM ratios).

    on: the GPUs it holds now. service_class: only replicas of one class share a card.
    """

    name: str
    deployment: str
    on: tuple[str, ...]
    bytes_per_gpu: float | None
    sm_active: tuple[float, ...] | None
    dram_active: tuple[float, ...] | None
    service_class: str = "default"

    @property
    def gpus(self) -> int:
        return len(self.on)


@dataclass(frozen=True)
class Plan:
    """Where each replica goes (GPU uuids), what is freed whole, and the spare that was kept."""

    placement: dict[str, tuple[str, ...]]
    moved: tuple[str, ...]
    used_before: int
    used_after: int
    freed_gpus: tuple[str, ...]
    freed_hosts: tuple[str, ...]
    spare_gpus: int
    is_optimal: bool
    single_points: tuple[str, ...] = field(default=())

    @property
    def saved_gpus(self) -> int:
        """Whole GPUs that can be given back: those freed, less the spare that was not there before."""
        return len(self.freed_gpus)


@dataclass(frozen=True)
class NoPlan:
    """Why nothing is packed."""

    reason: str


def consolidate(gpus: Sequence[Gpu], replicas: Sequence[Replica], *, max_tenants: int = MAX_TENANTS) -> Plan | NoPlan:
    """The placement on the fewest GPUs, then hosts, then moves. NoPlan where inputs are missing or nothing is saved."""
    refusal = _refusal(gpus, replicas)
    if refusal is not None:
        return NoPlan(refusal)
    solved = _solve(gpus, replicas, max_tenants)
    if solved is None:
        return NoPlan("no placement keeps every limit: not even the present one")
    placement, is_optimal = solved
    spare = max(one.gpus for one in replicas)
    held = {uuid for one in replicas for uuid in one.on}
    used = {uuid for places in placement.values() for uuid in places}
    idle_before = sum(gpu.is_healthy and gpu.uuid not in held for gpu in gpus)
    emptied = {gpu.uuid for gpu in gpus if gpu.is_healthy and gpu.uuid in held - used}
    # The spare is kept from what the packing empties, unless idle healthy cards beside it already are one.
    freed = _freed(gpus, emptied, kept=max(0, spare - idle_before))
    if len(freed) < MIN_SAVED_GPUS:
        return NoPlan(
            f"{len(held)} GPUs are held, {len(used)} would do and {spare} must stay spare (N+1): no whole GPU is saved"
        )
    hosts_after = {gpu.host for gpu in gpus if gpu.uuid in held and gpu.uuid not in freed}
    return Plan(
        placement=placement,
        moved=tuple(sorted(one.name for one in replicas if set(placement[one.name]) != set(one.on))),
        used_before=len(held),
        used_after=len(used),
        freed_gpus=freed,
        freed_hosts=tuple(sorted({gpu.host for gpu in gpus if gpu.uuid in held} - hosts_after)),
        spare_gpus=spare,
        is_optimal=is_optimal,
        single_points=tuple(
            sorted(
                name
                for name in {one.deployment for one in replicas}
                if sum(r.deployment == name for r in replicas) == 1
            )
        ),
    )


def _refusal(gpus: Sequence[Gpu], replicas: Sequence[Replica]) -> str | None:
    if not replicas:
        return "no replica holds a GPU"
    known = {gpu.uuid for gpu in gpus}
    for one in replicas:
        strange = [uuid for uuid in one.on if uuid not in known]
        missing = [
            label
            for label, value in (
                ("memory it needs", one.bytes_per_gpu),
                ("SM activity", one.sm_active),
                ("DRAM activity", one.dram_active),
            )
            if value is None
        ]
        if not one.on or strange:
            return f"{one.name}: which GPUs it holds is not known{f' ({strange[0]} is not listed)' if strange else ''}"
        if missing:
            return f"{one.name}: {', '.join(missing)} not known"
    lengths = {len(series) for one in replicas for series in (one.sm_active, one.dram_active) if series is not None}
    if len(lengths) != 1 or 0 in lengths:
        return "activity series do not cover the same moments, so peaks cannot be added up"
    return None


def _solve(
    gpus: Sequence[Gpu], replicas: Sequence[Replica], max_tenants: int
) -> tuple[dict[str, tuple[str, ...]], bool] | None:
    """Solve, look for moments at which three or more tenants together exceed the limit, forbid those, solve again.

    Pairs are checked at every moment beforehand; few larger groups ever come up, so the model stays small.
    """
    from ortools.sat.python import cp_model  # heavy: loaded when a plan is asked for

    model = cp_model.CpModel()
    x = {(r.name, g.uuid): model.new_bool_var(f"{r.name}@{g.uuid}") for r in replicas for g in gpus}
    _place(model, gpus, replicas, x, max_tenants)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = _DETERMINISTIC_LIMIT
    while True:
        status = solver.solve(model)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None
        tenants = {g.uuid: [r for r in replicas if solver.value(x[r.name, g.uuid])] for g in gpus}
        crowds = [crowd for crowd in tenants.values() if len(crowd) > 1 and not _may_share(*crowd)]
        if not crowds:
            placement = {r.name: tuple(sorted(uuid for uuid, own in tenants.items() if r in own)) for r in replicas}
            return placement, status == cp_model.OPTIMAL
        for crowd in crowds:
            for g in gpus:
                model.add(sum(x[r.name, g.uuid] for r in crowd) <= len(crowd) - 1)


def _place(
    model: cp_model.CpModel,
    gpus: Sequence[Gpu],
    replicas: Sequence[Replica],
    x: Mapping[tuple[str, str], cp_model.IntVar],
    max_tenants: int,
) -> None:
    """The 0/1 program: x[r, g] = replica r on GPU g. Fewest GPUs, then hosts, then moves."""
    hosts = sorted({gpu.host for gpu in gpus})
    host_of = {gpu.uuid: gpu.host for gpu in gpus}
    on_host = {(r.name, h): model.new_bool_var(f"{r.name}@{h}") for r in replicas for h in hosts}
    used = {g.uuid: model.new_bool_var(f"used {g.uuid}") for g in gpus}
    host_used = {h: model.new_bool_var(f"used {h}") for h in hosts}
    for r in replicas:
        # All GPUs of a replica on one host: tensor parallelism stays inside one NVLink domain.
        model.add_exactly_one(on_host[r.name, h] for h in hosts)
        for h in hosts:
            model.add(sum(x[r.name, g.uuid] for g in gpus if g.host == h) == r.gpus * on_host[r.name, h])
        for g in gpus:
            model.add_hint(x[r.name, g.uuid], g.uuid in r.on)
    strangers = [(a, b) for a, b in combinations(replicas, 2) if not _may_share(a, b)]
    for g in gpus:
        if not g.is_healthy:
            model.add(used[g.uuid] == 0)
        model.add(sum(x[r.name, g.uuid] for r in replicas) <= max_tenants * used[g.uuid])
        model.add_implication(used[g.uuid], host_used[g.host])
        model.add(sum(_needed_bytes(r) * x[r.name, g.uuid] for r in replicas) <= math.floor(g.usable_bytes))
        for a, b in strangers:
            model.add_at_most_one(x[a.name, g.uuid], x[b.name, g.uuid])
    for name in sorted({r.deployment for r in replicas}):
        own = [r for r in replicas if r.deployment == name]
        # A lost host takes no more of a deployment than it would now.
        most = max(sum(host_of[r.on[0]] == host for r in own) for host in hosts)
        for host in hosts:
            model.add(sum(on_host[r.name, host] for r in own) <= most)
    moves = sum(1 - x[r.name, uuid] for r in replicas for uuid in r.on)
    weight_host = sum(r.gpus for r in replicas) + 1
    weight_gpu = weight_host * (len(hosts) + 1)
    model.minimize(weight_gpu * sum(used.values()) + weight_host * sum(host_used.values()) + moves)


def _needed_bytes(replica: Replica) -> int:
    """Memory of one process on one GPU."""
    return math.ceil((replica.bytes_per_gpu or 0.0) + CONTEXT_BYTES)


def _may_share(*tenants: Replica) -> bool:
    """Whether these may share a card: one service class, no two of one deployment, activity within the limit at every
    moment (the sum of what they do at once, not of their peaks)."""
    if len({one.service_class for one in tenants}) > 1 or len({one.deployment for one in tenants}) < len(tenants):
        return False
    return all(
        sum(moment) <= ACTIVITY_LIMIT_RATIO + 1e-9
        for series in ([one.sm_active or () for one in tenants], [one.dram_active or () for one in tenants])
        for moment in zip(*series, strict=True)
    )


def _freed(gpus: Sequence[Gpu], emptied: set[str], kept: int) -> tuple[str, ...]:
    """The emptied GPUs to give back: whole hosts first, so that the spare is kept where a host stays anyway."""
    by_host: dict[str, list[str]] = {}
    total: dict[str, int] = {}
    for gpu in gpus:
        total[gpu.host] = total.get(gpu.host, 0) + 1
        if gpu.uuid in emptied:
            by_host.setdefault(gpu.host, []).append(gpu.uuid)
    ordered = [
        uuid
        for host in sorted(by_host, key=lambda host: (len(by_host[host]) == total[host], host))
        for uuid in sorted(by_host[host])
    ]
    return tuple(sorted(ordered[kept:]))
