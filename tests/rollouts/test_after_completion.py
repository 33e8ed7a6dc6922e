"""After a completed rollout its flags stay: under the next candidate, and in a replica that comes back from a crash."""

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from optiinfra_pipelines.domain.fleet import Deployment, Fleet
from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts, HaproxyServer, RolloutPolicy
from optiinfra_pipelines.domain.rollouts import Change, KnobGroup, Proposal, Stage, Step
from optiinfra_pipelines.rollout.machine import Input
from resources.rollouts.desk import Rollouts
from resources.rollouts.targets import TargetError
from resources.rollouts.targets.build import REPLICAS, haproxy_folder
from resources.rollouts.targets.haproxy import HaproxyTarget
from resources.rollouts.watchdog import Watchdog
from tests.rollout.conftest import NOW
from tests.rollouts.haproxy_kit import Gateway, process_at
from tests.rollouts.kit import TestClock

STEPS = (
    Step(stage=Stage.STAGING, percent=0, dwell_seconds=0, max_seconds=0),
    Step(stage=Stage.BAKE, percent=100, dwell_seconds=0, max_seconds=0),
)


class Served:
    """One stable server and one place behind the built-in gateway; what rollouts start are the fake engines."""

    def __init__(self, folder: Path) -> None:
        root = folder / "rollouts"
        self.gateway = Gateway(
            folder, stable=1, candidates=1, kind="builtin", replicas=haproxy_folder(root, "chat") / REPLICAS
        )
        settings = DeploymentRollouts(deployment="chat", haproxy=self.gateway.settings)
        fleet = Fleet(deployments=(Deployment(name="chat", model="tiny"),))
        self.clock = TestClock()
        policy = RolloutPolicy(deployments=(settings,))
        self.rollouts = Rollouts(fleet, policy, root, environ={}, clock=self.clock)
        self.target: HaproxyTarget = self.rollouts.haproxy(settings)

    def completed(self, rollout_id: str, proposed: dict[str, str | None], group: KnobGroup, token: int) -> None:
        """A rollout that came to its end: the target for real, the row as an executor would have moved it."""
        change = Change(deployment="chat", knob_group=group, current={}, proposed=proposed)
        change = self.rollouts.with_present_flags(change, "haproxy")
        row = self.rollouts.propose(
            Proposal(
                rollout_id=rollout_id,
                change=change,
                target="haproxy",
                requester="alice",
                reason="r",
                created_at=self.clock().at,
            )
        )
        row = self.rollouts.approve(rollout_id, "bob", row.proposal_hash, "", "", None)
        for given, more in ((Input.START, {"steps": STEPS}), (Input.ADVANCE, {}), (Input.COMPLETE, {})):
            row = self.rollouts.store.move(row, given, actor="x", reason=str(given), now=self.clock(), **more)  # type: ignore[arg-type]
        self.target.claim(rollout_id, token)
        self.target.start_candidates(1, proposed, token)
        self.target.set_share(100.0, token)
        until = time.monotonic() + 10
        while not self.target.promote(rollout_id, token):
            assert time.monotonic() < until
        self.clock.go(60)
        fenced = self.rollouts.store.fence(rollout_id, "x", self.clock(), "settles")
        self.rollouts.store.settle(rollout_id, fenced.token, self.clock(), actor="x")
        self.rollouts.store.release(rollout_id, fenced.token, self.clock())

    def stable(self) -> HaproxyServer:
        [server] = self.target.stable_servers
        return server

    def flags(self) -> dict[str, str]:
        """What the stable replica really runs with."""
        process = process_at(self.stable())
        assert process is not None
        line = process.cmdline()
        given = line[line.index("--hit-ratio") + 2 :]
        return dict(zip(given[::2], given[1::2], strict=True))

    def kill(self) -> None:
        process = process_at(self.stable())
        assert process is not None
        process.kill()
        process.wait(5)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.gateway.close()


def test_the_next_candidate_keeps_the_flags_of_the_one_before(served: Served) -> None:
    """Two rollouts of one flag each; a third takes the first back and leaves the second."""
    served.completed("r-1", {"max_num_seqs": "128"}, KnobGroup.BATCHING, 1)
    assert served.flags() == {"--max-num-seqs": "128"}
    served.completed("r-2", {"latency-ms": "1"}, KnobGroup.OTHER, 2)
    assert served.flags() == {"--max-num-seqs": "128", "--latency-ms": "1"}
    served.completed("r-3", {"max-num-seqs": "32"}, KnobGroup.BATCHING, 3)
    assert served.flags() == {"--max-num-seqs": "32", "--latency-ms": "1"}
    assert served.rollouts.store.get("r-3").proposal.change.current == {"max-num-seqs": "128"}


def test_a_stable_replica_that_is_gone_comes_back_with_the_flags_it_had(served: Served) -> None:
    watchdog = Watchdog(served.rollouts, lambda _: "alive")
    served.kill()
    assert watchdog.look() == [], "before a rollout completed, the stable replicas are the operator's"
    served.gateway.launcher.start("s0", served.gateway.settings.launch or (), served.stable().url, {})
    served.completed("r-1", {"max_num_seqs": "128"}, KnobGroup.BATCHING, 1)
    assert watchdog.look() == []
    served.kill()

    [done] = watchdog.look()

    assert done.did == "c0 was gone and is started again with the flags of the completed rollout"
    assert served.flags() == {"--max-num-seqs": "128"}
    assert watchdog.look() == []
    assert served.rollouts.store.events("r-1")[-1].reason == done.did
    assert process_at(served.gateway.settings.stable[0]) is None, "what the rollout took out of service stays out"


def test_one_that_dies_again_and_again_is_left_to_a_person(served: Served) -> None:
    served.completed("r-1", {"max_num_seqs": "128"}, KnobGroup.BATCHING, 1)
    at = NOW
    for _ in range(3):
        served.kill()
        at += timedelta(seconds=10)
        assert served.target.revive_stable(at) == ["c0"]
    served.kill()

    with pytest.raises(TargetError, match=r"c0 was started 3 times in 10 minutes and is gone again"):
        served.target.revive_stable(at + timedelta(seconds=10))
    assert served.target.revive_stable(at + timedelta(minutes=11)) == ["c0"]
