"""The live demo's walk: a change that helps goes through, one that harms comes back, and everything is told with times.

It does what a person does: looks at findings and recommendations in the read copy, launches the launchpad's own jobs,
and follows the rollout's log. It decides nothing. Here: the order of it and its account. Not here: the fleet
(`resources.demo.live`), the jobs (`optiinfra_pipelines.defs.rollouts`), the executor (`resources.rollouts`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optiinfra_pipelines.analysis.ledger.effect import EARLY, EARLY_DUE
from optiinfra_pipelines.commands import sql
from optiinfra_pipelines.defs.rollouts import ROLLOUT_TAG
from optiinfra_pipelines.domain.rollouts import PauseReason, Rollout, RolloutState
from optiinfra_pipelines.settings import Paths
from resources.dagster_home.graphql import Launchpad
from resources.demo.live.engines import LiveEngine
from resources.demo.live.fleet import DEPLOYMENT
from resources.demo.live.traffic import Traffic
from resources.rollouts.desk import STORE_FILE
from resources.rollouts.store import RolloutStore

# Two to four minutes on a quiet host with two cores, a refresh being a minute's work; several times that on a busy one.
FINDING_SECONDS = ADVICE_SECONDS = 1200.0
# Two minutes of reference, three steps of two, the bake, and starts on a busy host.
ROLLOUT_SECONDS = 2400.0
LOOK_SECONDS = 1.0
# A step that shows nothing three times is no matter of chance.
MAX_RESUMES = 2
# The ledger's first look wants whole minutes before the change began; traffic takes one to be steady.
BEFORE_SECONDS = (EARLY.min_periods + 2) * EARLY.period.total_seconds()
REQUESTER, APPROVER = "ada", "grace"
# Clients' own view before and after is that of so many requests.
_RECENT = 200
_TOLD = frozenset({"transition", "verdict", "alert", "refused"})


class WalkError(RuntimeError):
    """The walk did not go as it should; the text says where it stands."""


@dataclass(frozen=True)
class Advice:
    """The recommendation the walk carries out."""

    recommendation_id: str
    change_text: str
    proposed_slots: str


class Walk:
    """One walk. say: takes the account, line by line."""

    def __init__(
        self,
        paths: Paths,
        launchpad: Launchpad,
        traffic: Traffic,
        engine: LiveEngine,
        *,
        say: Callable[[str], None],
        is_stopped: Callable[[], bool],
    ) -> None:
        self._paths = paths
        self._launchpad = launchpad
        self._traffic = traffic
        self._engine = engine
        self._say_line = say
        self._is_stopped = is_stopped
        self._began = time.monotonic()
        self._store = RolloutStore(paths.rollouts_dir / STORE_FILE)

    def run(self) -> None:
        """All of it. WalkError when a wait is over or something else came out than should."""
        self._say("traffic runs; waiting for the pipeline to see what is wrong")
        self._finding()
        if self._engine.shows_effect:
            self._wait_until(BEFORE_SECONDS, "minutes of before, for the ledger to compare with")
        advice = self._advice()
        before = self._recent_median()
        good = self._roll_out("the good change", {"recommendation_id": advice.recommendation_id}, "more batch slots")
        if good.position.state is not RolloutState.COMPLETED:
            raise WalkError(f"the good change is {good.position} and not COMPLETED")
        self._clients(before)
        change = {
            "deployment": DEPLOYMENT,
            "current": {**self._engine.flags, "max-num-seqs": advice.proposed_slots},
            "proposed": dict(self._engine.tight),
        }
        bad = self._roll_out("the bad change", change, "a smaller token budget, against all advice")
        if bad.position.state is not RolloutState.ROLLED_BACK:
            raise WalkError(f"the bad change is {bad.position} and not ROLLED_BACK")
        self._ledger(advice)
        counts = self._traffic.counts()
        self._say(
            f"clients: {counts.sent} requests sent, {counts.answered} answered so far, {counts.failed} lost, "
            f"{counts.held_back} held back at the bound of requests in flight"
        )
        for reason, count in counts.lost.most_common():
            self._say(f"  lost: {count} x {reason}")

    # --- the steps -----------------------------------------------------------------------------------------

    def _finding(self) -> None:
        found = self._wait_for(
            "select subject_name, cause, summary, since from findings where kind = 'QUEUE_BUILDUP' and until is null "
            "and cause = 'batch_slot_bound' order by since limit 1",
            FINDING_SECONDS,
            "the finding QUEUE_BUILDUP / batch_slot_bound",
        )
        self._say(f"finding: {found['subject_name']}: QUEUE_BUILDUP / {found['cause']}: {found['summary']}")

    def _advice(self) -> Advice:
        found = self._wait_for(
            "select id, change_text, effect_signal, effect_before, effect_low, effect_high, "
            "json_extract_string(document, '$.proposed.max-num-seqs') as slots from recommendations "
            f"where rule = 'max_sequences_up' and state = 'open' and subject_name = '{DEPLOYMENT}' limit 1",
            ADVICE_SECONDS,
            "the recommendation of more batch slots",
        )
        self._say(
            f"recommendation {found['id']}: {found['change_text']}; expected: {found['effect_signal']} "
            f"{found['effect_low']:+.3g} to {found['effect_high']:+.3g} from {found['effect_before']:.3g}"
        )
        return Advice(found["id"], found["change_text"], found["slots"])

    def _roll_out(self, name: str, change: Mapping[str, Any], reason: str) -> Rollout:
        """Propose, approve as somebody else, and follow to the end."""
        config = {**self._engine.plan, **change, "requester": REQUESTER, "reason": reason}
        proposed = self._launchpad.run("propose_rollout", "record_proposal", config, is_stopped=self._is_stopped)
        rollout_id = proposed.tags[ROLLOUT_TAG]
        row = self._store.get(rollout_id)
        self._say(f"{name}: {REQUESTER} proposed {rollout_id}: {_words(row)}")
        approval = {"rollout_id": rollout_id, "approver": APPROVER, "proposal_hash": row.proposal_hash}
        self._launchpad.run("approve_rollout", "record_approval", approval, is_stopped=self._is_stopped)
        return self._follow(rollout_id)

    def _follow(self, rollout_id: str) -> Rollout:
        seen, until, resumed = 0, time.monotonic() + ROLLOUT_SECONDS, 0
        while True:
            row = self._store.get(rollout_id)
            events = self._store.events(rollout_id)
            for event in events[seen:]:
                is_share = event.kind == "result" and "of new requests" in event.reason
                if event.kind in _TOLD or is_share:
                    moved = f"{event.to_position}: " if event.to_position else ""
                    self._say(f"  {moved}{event.reason}")
            seen = len(events)
            is_settled = row.position.state is not RolloutState.COMPLETED or row.is_settled
            if row.position.is_terminal and is_settled:
                return row
            # A lost executor is replaced by the product itself; every other pause is for a person.
            if row.position.pause is PauseReason.INCONCLUSIVE and resumed < MAX_RESUMES:
                # Overloaded replicas may differ too much for one step: a person has it run again.
                resumed += 1
                self._say(f"  {APPROVER} resumes it: the step runs again, with fresh counts")
                given = {"rollout_id": rollout_id, "person": APPROVER, "comment": "once more"}
                self._launchpad.run("resume_rollout", "resume_rollout_now", given, is_stopped=self._is_stopped)
            elif row.position.pause not in (None, PauseReason.EXECUTOR_LOST):
                raise WalkError(f"{rollout_id} waits for a person: {row.position}")
            if time.monotonic() > until:
                raise WalkError(f"{rollout_id} is {row.position} after {ROLLOUT_SECONDS:.0f} s")
            self._sleep()

    def _clients(self, before: float | None) -> None:
        """What clients saw: the median of the last requests before and after."""
        sent = self._traffic.counts().answered
        while self._traffic.counts().answered < sent + _RECENT:
            self._sleep()
        after = self._recent_median()
        if before is not None and after is not None:
            self._say(f"clients: the median request took {before:.2f} s before and takes {after:.2f} s now")

    def _ledger(self, advice: Advice) -> None:
        where = f"from recommendations where id = '{advice.recommendation_id}'"
        found = self._wait_for(
            f"select state, applied_at {where} and applied_at is not null", ADVICE_SECONDS, "the ledger's 'applied'"
        )
        self._say(f"ledger: {advice.change_text}: {found['state']} at {found['applied_at']:%H:%M:%S} UTC")
        if self._engine.shows_effect:
            self._first_look(advice)
        self._say("ledger: what decides is measured an hour later, from half an hour on either side of the change")

    def _first_look(self, advice: Advice) -> None:
        early = self._wait_for(
            "select reason from recommendation_ledger where kind = 'measured_early' "
            f"and recommendation_id = '{advice.recommendation_id}'",
            EARLY_DUE.total_seconds() + ADVICE_SECONDS,
            "the ledger's first look at the effect",
        )
        self._say(f"ledger: {early['reason']}")

    # --- parts ---------------------------------------------------------------------------------------------

    def _recent_median(self) -> float | None:
        seconds = self._traffic.counts().seconds[-_RECENT:]
        return statistics.median(seconds) if seconds else None

    def _wait_for(self, query: str, seconds: float, what: str) -> dict[str, Any]:
        """The one row of a question to the read copy, as soon as there is one."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = sql.fetch(self._paths.warehouse_dir / "read.duckdb", query)
            if found is not None and not found.is_empty():
                return found.row(0, named=True)
            self._sleep()
        raise WalkError(f"{what} did not come within {seconds:.0f} s")

    def _wait_until(self, seconds: float, what: str) -> None:
        """Until so long after the walk's beginning."""
        if time.monotonic() < self._began + seconds:
            self._say(f"waiting until {seconds / 60:.0f}:00: {what}")
        while time.monotonic() < self._began + seconds:
            self._sleep()

    def _sleep(self) -> None:
        if self._is_stopped():
            raise WalkError("the demo was ended before its walk was over")
        time.sleep(LOOK_SECONDS)

    def _say(self, text: str) -> None:
        passed = time.monotonic() - self._began
        self._say_line(f"[{int(passed // 60):02d}:{int(passed % 60):02d}] {text}")


def _words(row: Rollout) -> str:
    change = row.proposal.change
    return ", ".join(f"--{flag} {change.current.get(flag)} -> {value}" for flag, value in change.proposed.items())
