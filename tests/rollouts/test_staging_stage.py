"""What becomes of a rollout by its staging test: FAIL ends it, what shows nothing waits for a person, PASS goes on."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.domain.rollouts import PauseReason, Rollout, RolloutState, Stage
from optiinfra_pipelines.domain.verdicts import VerdictKind
from resources.rollouts.clock import Moment
from resources.rollouts.executor import Executor
from resources.rollouts.ports import StagingReport
from resources.rollouts.rehearsal import SimulatedFeed
from resources.rollouts.stages import StagingStage
from tests.rollouts.kit import Kit

PASS, FAIL, INCONCLUSIVE, NODATA = VerdictKind


class Told:
    """A candidate whose tests end as they are told to, the last of them again and again."""

    def __init__(self, kinds: Sequence[VerdictKind]) -> None:
        self.kinds = list(kinds)
        self.tests = 0

    def not_ready(self, now: Moment) -> str | None:
        return None

    def test(self) -> StagingReport:
        kind = self.kinds[min(self.tests, len(self.kinds) - 1)]
        self.tests += 1
        return StagingReport(kind, f"test {self.tests} shows {kind}", {"requests": 120})


def staged(kit: Kit, told: Told, owner: str = "a") -> Executor:
    made = kit.rollouts.executor("chat-1", owner)
    feed = SimulatedFeed(made.target, kit.rollouts.policy.of("chat").dry_run)
    made.staging_stage = StagingStage(made, feed, told)
    made.begin(kit.clock())
    return made


@pytest.mark.parametrize("kind", [INCONCLUSIVE, NODATA])
def test_a_test_that_shows_nothing_waits_with_its_evidence_and_is_repeated(tmp_path: Path, kind: VerdictKind) -> None:
    kit = Kit(tmp_path)
    kit.approved()
    told = Told([kind, PASS])
    executor = staged(kit, told)

    paused = kit.run(executor, "PAUSED")
    waiting = kit.run(executor, "waits for a person")

    assert paused.position.pause is waiting.position.pause is PauseReason.INCONCLUSIVE
    assert paused.position.stage is Stage.STAGING
    assert "resume_rollout repeats it" in paused.message
    [event] = [one for one in kit.store.events("chat-1") if "PAUSED" in (one.to_position or "")]
    assert event.evidence["test"] == {"requests": 120}
    assert kit.percent() == 0
    assert told.tests == 1
    kit.rollouts.resume("chat-1", "carol", "it was noise", None)
    assert kit.run(executor, "staging passed").position.stage is Stage.VALIDATION
    assert told.tests == 2


def test_a_bad_test_still_fails_and_nobody_can_resume_it(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.approved()
    kit.run(staged(kit, Told([INCONCLUSIVE])), "PAUSED")
    kit.rollouts.resume("chat-1", "carol", "", None)
    kit.clock.go(31)

    progress = kit.run(staged(kit, Told([FAIL]), "b"), "ROLLED_BACK")

    assert progress.is_done
    failed = next(one for one in kit.store.events("chat-1") if one.to_position == RolloutState.FAILED)
    assert failed.reason == "staging test: test 1 shows FAIL"
    assert failed.evidence["test"] == {"requests": 120}


def test_a_resume_between_two_looks_repeats_the_test_too(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.approved()
    told = Told([INCONCLUSIVE, PASS])
    executor = staged(kit, told)
    kit.run(executor, "PAUSED")

    kit.rollouts.resume("chat-1", "carol", "", None)

    assert kit.run(executor, "VALIDATION")
    assert told.tests == 2


def test_the_way_out_of_a_pause_may_also_be_back(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.approved()
    executor = staged(kit, Told([INCONCLUSIVE]))
    kit.run(executor, "PAUSED")

    assert kit.rollouts.abort("chat-1", "carol", "", None).position.state is RolloutState.ROLLED_BACK
    assert executor.step(kit.clock.go(5)).is_done


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([INCONCLUSIVE, NODATA]), max_size=4), st.sampled_from([PASS, FAIL]))
def test_only_a_pass_goes_on_whatever_came_before(waits: list[VerdictKind], ends: VerdictKind) -> None:
    """Every test that shows nothing pauses once; each resume asks exactly one more; the first clear one decides."""
    with tempfile.TemporaryDirectory() as folder:
        kit = Kit(Path(folder))
        kit.approved()
        told = Told([*waits, ends])
        executor = staged(kit, told)
        for number in range(len(waits)):
            assert kit.run(executor, "PAUSED").position.stage is Stage.STAGING
            assert told.tests == number + 1
            kit.rollouts.resume("chat-1", "carol", "", None)
        progress = kit.run(executor, "staging passed" if ends is PASS else "ROLLED_BACK")
        row: Rollout = kit.store.get("chat-1")

    assert told.tests == len(waits) + 1
    assert row.position.state is (RolloutState.IN_PROGRESS if ends is PASS else RolloutState.ROLLED_BACK)
    assert progress.position == row.position
