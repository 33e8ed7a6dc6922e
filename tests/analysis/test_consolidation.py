"""Packing onto whole GPUs: against trying every placement, and what it refuses."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.consolidation import (
    ACTIVITY_LIMIT_RATIO,
    CONTEXT_BYTES,
    Gpu,
    NoPlan,
    Plan,
    Replica,
    consolidate,
)

GB = 1e9
CARDS = [Gpu(f"h{i // 2}", f"g{i}", 80 * GB) for i in range(4)]


def replica(
    name: str, *on: str, gb: float | None = 20, sm: tuple[float, ...] | None = (0.1, 0.1), **more: str
) -> Replica:
    deployment = more.get("deployment", name)
    need = None if gb is None else gb * GB
    return Replica(name, deployment, on, need, sm, sm, more.get("service_class", "default"))


def planned(replicas: list[Replica], gpus: list[Gpu] | None = None, **options: int) -> Plan:
    plan = consolidate(gpus or CARDS, replicas, **options)
    assert isinstance(plan, Plan), plan
    return plan


def test_quiet_models_share_a_card_and_a_spare_stays() -> None:
    """Four quiet models on four cards need two; one stays spare, one is freed: whole GPUs, never a fraction."""
    plan = planned([replica(n, f"g{i}") for i, n in enumerate("abcd")])

    assert (plan.used_before, plan.used_after, plan.spare_gpus, plan.saved_gpus) == (4, 2, 1, 1)
    assert isinstance(plan.saved_gpus, int)
    assert plan.is_optimal
    assert plan.single_points == ("a", "b", "c", "d")


def test_peaks_at_the_same_time_keep_models_apart() -> None:
    """0.5 and 0.5 at one moment do not share; 0.5 now and 0.5 later do: what counts is the sum at each moment."""
    together = [replica(n, f"g{i}", sm=(0.5, 0.0)) for i, n in enumerate("abcd")]
    apart = [replica(n, f"g{i}", sm=(0.5, 0.1) if i % 2 else (0.1, 0.5)) for i, n in enumerate("abcd")]

    assert isinstance(consolidate(CARDS, together), NoPlan)
    assert planned(apart).used_after == 2


def test_a_busy_model_may_stay_alone() -> None:
    """Above the limit by itself is no reason to move it, and nothing joins it."""
    plan = planned(
        [replica("hot", "g0", sm=(0.95, 0.9)), *(replica(n, f"g{i + 1}") for i, n in enumerate("abc"))], max_tenants=3
    )
    assert [name for name, places in plan.placement.items() if places == plan.placement["hot"]] == ["hot"]


def test_three_that_fit_in_pairs_do_not_share_as_three() -> None:
    """0.3 + 0.3 is within the limit and 0.3 + 0.3 + 0.3 is not."""
    four = [replica(n, f"g{i}", sm=(0.3,)) for i, n in enumerate("abcd")]
    assert planned(four, max_tenants=4).used_after == 2


def test_replicas_of_one_deployment_stay_apart() -> None:
    """Two replicas on one card, or more of them on a host than now, would fall together."""
    pairs = [replica(f"{n}{i}", f"g{2 * i + k}", deployment=n) for k, n in enumerate("ab") for i in range(2)]
    plan = consolidate(CARDS, pairs)
    assert isinstance(plan, Plan)
    host = {gpu.uuid: gpu.host for gpu in CARDS}
    for name in "ab":
        assert {host[plan.placement[f"{name}{i}"][0]] for i in range(2)} == {"h0", "h1"}


def test_a_tensor_parallel_group_stays_on_one_host() -> None:
    """Two GPUs of one replica never lie on two hosts, and the spare is as large as the largest replica."""
    plan = consolidate(CARDS, [replica("big", "g0", "g1"), replica("small", "g2"), replica("tiny", "g3")])
    assert isinstance(plan, NoPlan)
    assert "2 must stay spare" in plan.reason


def test_faulty_cards_and_strangers_are_no_place() -> None:
    """An unhealthy card takes nothing, and two service classes do not share."""
    cards = [*CARDS, Gpu("h2", "g4", 80 * GB)]
    sick = [Gpu(g.host, g.uuid, g.total_bytes, is_healthy=g.uuid != "g0") for g in cards]
    plan = planned([replica("a", "g0"), replica("b", "g1"), replica("c", "g2"), replica("d", "g3")], sick)
    assert all("g0" not in places for places in plan.placement.values())
    assert "g0" not in plan.freed_gpus  # to be repaired, not saved
    mixed = [replica(n, f"g{i}", service_class=f"s{i}") for i, n in enumerate("abcd")]
    assert isinstance(consolidate(CARDS, mixed), NoPlan)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (replica("a", "g0", gb=None), "memory it needs not known"),
        (replica("a", "g0", sm=None), "SM activity, DRAM activity not known"),
        (replica("a"), "which GPUs it holds is not known"),
        (replica("a", "g9"), "g9 is not listed"),
        (replica("a", "g0", sm=(0.1,)), "do not cover the same moments"),
    ],
)
def test_an_unknown_input_is_a_reason_and_no_plan(broken: Replica, says: str) -> None:
    """Nothing is assumed about a replica that somebody would have to live with."""
    plan = consolidate(CARDS, [broken, replica("b", "g1"), replica("c", "g2")])
    assert isinstance(plan, NoPlan)
    assert says in plan.reason


def test_nothing_to_pack_is_said() -> None:
    """No replica, no plan."""
    assert isinstance(consolidate(CARDS, []), NoPlan)


def fewest(gpus: list[Gpu], replicas: list[Replica], max_tenants: int) -> int | None:
    """By trying every placement: the fewest GPUs that keep every limit."""
    host = {gpu.uuid: gpu.host for gpu in gpus}
    options = [
        [places for places in combinations([g.uuid for g in gpus], r.gpus) if len({host[p] for p in places}) == 1]
        for r in replicas
    ]
    best: int | None = None
    for placement in product(*options):
        used = {uuid for places in placement for uuid in places}
        if best is not None and len(used) >= best:
            continue
        if all(_fits(gpu, replicas, placement, max_tenants) for gpu in gpus) and _spread(gpus, replicas, placement):
            best = len(used)
    return best


def _fits(gpu: Gpu, replicas: list[Replica], placement: tuple[tuple[str, ...], ...], max_tenants: int) -> bool:
    here = [r for r, places in zip(replicas, placement, strict=True) if gpu.uuid in places]
    if len(here) > max_tenants or len({r.deployment for r in here}) < len(here):
        return False
    if sum((r.bytes_per_gpu or 0) + CONTEXT_BYTES for r in here) > gpu.usable_bytes:
        return False
    moments = zip(*(r.sm_active or () for r in here), strict=True)
    return len(here) < 2 or all(sum(moment) <= ACTIVITY_LIMIT_RATIO + 1e-9 for moment in moments)


def _spread(gpus: list[Gpu], replicas: list[Replica], placement: tuple[tuple[str, ...], ...]) -> bool:
    host = {gpu.uuid: gpu.host for gpu in gpus}
    for name in {r.deployment for r in replicas}:
        now = [host[r.on[0]] for r in replicas if r.deployment == name]
        then = [host[p[0]] for r, p in zip(replicas, placement, strict=True) if r.deployment == name]
        if any(then.count(h) > max(now.count(one) for one in set(host.values())) for h in set(then)):
            return False
    return True


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_solver_finds_what_trying_everything_finds(data: st.DataObject) -> None:
    """Random small fleets: as few GPUs as the best of all placements, and every limit kept."""
    tenants = data.draw(st.integers(1, 3))
    levels = st.sampled_from([0.0, 0.2, 0.35, 0.5, 0.8])
    replicas = [
        replica(
            f"r{i}",
            f"g{i}",
            gb=data.draw(st.sampled_from([10.0, 30.0, 60.0])),
            sm=(data.draw(levels), data.draw(levels)),
            deployment=data.draw(st.sampled_from(["a", "b", "c"])),
        )
        for i in range(data.draw(st.integers(1, 4)))
    ]
    plan = consolidate(CARDS, replicas, max_tenants=tenants)
    best = fewest(CARDS, replicas, tenants)

    assert best is not None
    if isinstance(plan, Plan):
        assert plan.used_after == best
        placement = tuple(plan.placement[r.name] for r in replicas)
        assert all(_fits(gpu, replicas, placement, tenants) for gpu in CARDS)
        assert plan.saved_gpus == len(plan.freed_gpus) >= 1
        assert not set(plan.freed_gpus) & {uuid for places in placement for uuid in places}
    else:
        # Nothing saved: what is emptied is no more than the spare still lacks.
        spare_lacking = max(0, 1 - (len(CARDS) - len(replicas)))
        assert len(replicas) - best <= spare_lacking
