"""The stages of a rollout as the executor goes through them: staging, then every share to the end of the bake.

Here is the order of actions. What a step's counts mean is `optiinfra_pipelines.rollout.watch`.
"""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from optiinfra_pipelines.domain.rollouts import PauseReason, Rollout, Stage, Step
from optiinfra_pipelines.domain.verdicts import VerdictKind
from optiinfra_pipelines.rollout.calibration import Calibration
from optiinfra_pipelines.rollout.counts import CountTracker, arm_tick
from optiinfra_pipelines.rollout.gate import step_refusal
from optiinfra_pipelines.rollout.guards import ArmTotals, Guards
from optiinfra_pipelines.rollout.judge import ArmTick, StepPlan
from optiinfra_pipelines.rollout.machine import Input
from optiinfra_pipelines.rollout.margins import judged_edges
from optiinfra_pipelines.rollout.planner import PlanRefusal, Traffic, plan_steps
from optiinfra_pipelines.rollout.proposal import faults, full_flags
from optiinfra_pipelines.rollout.watch import Act, Decision, Look, StepWatch
from resources.rollouts.clock import Moment
from resources.rollouts.ports import Feed, Progress, Staging, StagingReport, is_near

if TYPE_CHECKING:
    from resources.rollouts.executor import Executor

# Weights of a 70B model from a cold disk, plus compilation; slower than this is a start that hangs.
READY_SECONDS = 1800.0
# A look waits so long for what runs in the background.
ANSWER_SECONDS = 0.5
# The stakes and the steps made with them.
Planned = tuple[Calibration, tuple[Step, ...] | PlanRefusal]
# Only one seed: planning the same rollout twice must give the same steps.
PLAN_SEED = 20_260_101


def candidates_for(percent: float, stable: int, planned: int) -> int:
    """Candidate replicas that carry a share at the load the stable replicas have now."""
    return max(planned, math.ceil(percent / 100 * stable - 1e-9))


class StagingStage:
    """From the start to the first share: preflight, start, readiness, test, and the plan of the steps."""

    def __init__(self, executor: Executor, feed: Feed, staging: Staging) -> None:
        self._executor = executor
        self._feed = feed
        self._background = Background(staging)
        self._planner = ThreadPoolExecutor(max_workers=1)
        self.leave()

    def leave(self) -> None:
        """Forget what was tried: the next look begins the stage anew, with a test of its own."""
        self._began: float | None = None
        self._is_started = False
        self._plan: Future[Planned] | None = None
        self._background.forget()

    def look(self, row: Rollout, now: Moment) -> Progress:
        """One look. Everything in it may be repeated by the next executor, or after a pause."""
        executor = self._executor
        if self._began is None:
            self._began = now.seconds
        waited = now.seconds - self._began
        refusal = self._preflight(row)
        if refusal is not None:
            return executor.fail(row, now, f"preflight: {refusal}")
        why = self._start(row, now)
        traffic = self._feed.traffic(now)
        if isinstance(traffic, str):
            why = why or traffic
        if why is not None or isinstance(traffic, str):
            if waited > READY_SECONDS:
                return executor.fail(row, now, f"not ready after {waited:.0f} s: {why}")
            return executor.say(row, now, f"staging: {why}")
        planned = self._planned(row, traffic, now)
        if planned is None:
            return executor.say(row, now, "staging: the steps are being planned")
        calibration, steps = planned
        if isinstance(steps, PlanRefusal):
            return executor.fail(row, now, f"plan: {steps.reason}")
        report = self._background.tested()
        if report is None:
            return executor.say(row, now, "staging: the candidate is being tested")
        if report.kind is VerdictKind.FAIL:
            return executor.fail(row, now, f"staging test: {report.reason}", {"test": dict(report.evidence)})
        if report.kind is not VerdictKind.PASS:
            reason = f"staging test {report.kind}: {report.reason}; resume_rollout repeats it, abort_rollout ends it"
            return executor.pause(row, PauseReason.INCONCLUSIVE, reason, {"test": dict(report.evidence)})
        evidence = {
            "requests_per_second": traffic.requests_per_second,
            "steps": [step.model_dump(mode="json") for step in steps],
            "test": dict(report.evidence),
            "calibration": asdict(calibration),
        }
        row = executor.move(
            row,
            Input.ADVANCE,
            f"staging test: {report.reason}",
            steps=steps,
            latency_stake=calibration.stake,
            evidence=evidence,
        )
        return Progress(row.position, False, f"staging passed: {report.reason}")

    def _planned(self, row: Rollout, traffic: Traffic, now: Moment) -> Planned | None:
        """Stakes and steps, once, from the traffic seen when the candidate was ready; None while they are computed.

        In a thread: a day of stable replicas is replayed and hundreds of steps are simulated, which may take longer
        than the lease on a busy host.
        """
        if self._plan is None:
            plan, feed = row.proposal.plan, self._feed

            def work() -> Planned:
                calibration = feed.calibration(plan, traffic, now)
                return calibration, plan_steps(plan, traffic, stake=calibration.stake, seed=PLAN_SEED)

            self._plan = self._planner.submit(work)
        return self._plan.result() if _is_done(self._plan) else None

    def _preflight(self, row: Rollout) -> str | None:
        executor, plan = self._executor, row.proposal.plan
        found = faults(row.proposal, executor.policy)
        needed = candidates_for(100, executor.target.stable_replicas(), plan.candidate_replicas)
        slots = executor.target.candidate_slots()
        if needed > slots:
            found.append(f"all traffic needs {needed} candidate replicas, the target has room for {slots}")
        if needed > executor.policy.blast_radius.max_candidate_replicas and not executor.target.is_simulated:
            found.append(
                f"all traffic needs {needed} candidate replicas, the blast radius allows "
                f"{executor.policy.blast_radius.max_candidate_replicas}"
            )
        return "; ".join(found) or None

    def _start(self, row: Rollout, now: Moment) -> str | None:
        executor = self._executor
        if not self._is_started:
            start_candidates(executor, row, row.proposal.plan.candidate_replicas)
            self._is_started = True
        return self._background.not_ready(now)


class Background:
    """Asks a candidate in a thread: a load test or a completion that hangs must not stop the looks and the lease."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._ready: Future[str | None] | None = None
        self._test: Future[StagingReport] | None = None

    def not_ready(self, now: Moment) -> str | None:
        """Why it is not ready, as far as is known now; None once it is. Asks again at the next look until then."""
        if self._ready is None:
            self._ready = self._pool.submit(self._staging.not_ready, now)
        if not _is_done(self._ready):
            return "it has not answered yet"
        why = self._ready.result()
        if why is not None:
            self._ready = None
        return why

    def tested(self) -> StagingReport | None:
        """The report of the test; None while it runs."""
        if self._test is None:
            self._test = self._pool.submit(self._staging.test)
        return self._test.result() if _is_done(self._test) else None

    def forget(self) -> None:
        """Ask and test anew. What still runs ends first: two loads at once would measure each other."""
        for asked in (self._ready, self._test):
            if asked is not None:
                asked.cancel()
        self._ready = self._test = None


def _is_done(future: Future[Any]) -> bool:
    """Given a moment: what answers at once needs no second look."""
    wait([future], timeout=ANSWER_SECONDS)
    return future.done()


class TrafficStage:
    """One share after another: grow it, watch it, then advance, fail or wait for a person."""

    def __init__(self, executor: Executor, feed: Feed, staging: Staging) -> None:
        self._executor = executor
        self._feed = feed
        self._staging = staging
        self._traffic: Traffic | None = None
        self._entering_since: float | None = None
        self.leave()

    def leave(self) -> None:
        """Forget the step: the next look begins one, with fresh counts."""
        self._watch: StepWatch | None = None
        self._guard_watch: StepWatch | None = None
        self._plan: StepPlan | None = None
        self._tracker = CountTracker()
        self._guards: Guards | None = None
        self._canary = self._baseline = ArmTotals()
        self._preemptions_at_start: tuple[float | None, float | None] = (None, None)
        self._background: Background | None = None
        self._entering_since = None

    def look(self, row: Rollout, now: Moment) -> Progress:
        """One look at the present step."""
        executor = self._executor
        step = row.step
        if step is None:
            return executor.fail(row, now, f"step {row.position.step} is not in the plan of {len(row.steps)} steps")
        if self._watch is None:
            return self._enter(row, step, now)
        actual = executor.target.observe()
        if not is_near(actual.percent, step.percent):
            return self._drifted(row, step, now, actual.percent)
        self._observe(self._watch, now)
        decision = self._watch.decide(now.seconds)
        numbers = {"candidate_percent": actual.percent, **_numbers(decision)}
        evidence = {"verdict": decision.verdict.model_dump(mode="json") if decision.verdict else None, **numbers}
        if decision.act is Act.FAIL:
            executor.note("verdict", decision.reason, evidence)
            return executor.fail(row, now, decision.reason, evidence)
        if decision.act is Act.PAUSE:
            return executor.pause(row, PauseReason.INCONCLUSIVE, decision.reason, evidence)
        if decision.act is Act.PASS:
            return self._passed(row, step, decision, evidence)
        ends = self._watch.seconds_left(now.seconds)
        said = executor.say(row, now, f"{step.percent:g} %: {decision.reason}; decides in {ends:.0f} s", numbers)
        return replace(said, verdict=decision.verdict, decides_at=now.at + timedelta(seconds=ends))

    def guard_only(self, row: Rollout, now: Moment) -> Decision | None:
        """While nothing is judged: fail on what needs no statistics. None without traffic at the candidate."""
        if self._executor.target.observe().percent <= 0 or row.step is None:
            return None
        if self._guard_watch is None:
            self._guard_watch = self._new_watch(row, row.step, now, plan=None)
        self._observe(self._guard_watch, now)
        return self._guard_watch.decide(now.seconds)

    def _enter(self, row: Rollout, step: Step, now: Moment) -> Progress:
        executor = self._executor
        actual = executor.target.observe()
        refusal = step_refusal(row, step, actual.percent, now=now.at, policy=executor.policy)
        if refusal is not None:
            return executor.pause(row, *refusal)
        why = self._more_candidates(row, step, now)
        if why is not None:
            self._entering_since = now.seconds if self._entering_since is None else self._entering_since
            if now.seconds - self._entering_since > READY_SECONDS:
                return executor.fail(row, now, f"candidates are not ready after {READY_SECONDS:.0f} s: {why}")
            guarded = self.guard_only(row, now)
            if guarded is not None and guarded.act is Act.FAIL:
                return executor.fail(row, now, guarded.reason)
            return executor.say(row, now, f"before {step.percent:g} %: {why}")
        plan: StepPlan | None = None
        if step.percent < 100:
            traffic = self._traffic or self._feed.traffic(now)
            if isinstance(traffic, str):
                return executor.say(row, now, f"before {step.percent:g} %: {traffic}")
            self._traffic = traffic
            plan = self._step_plan(row, step, traffic)
        executor.set_share(step.percent)
        self._watch = self._new_watch(row, step, now, plan)
        self._observe(self._watch, now)
        return Progress(row.position, False, f"{step.stage}: {step.percent:g} % of new requests")

    def _more_candidates(self, row: Rollout, step: Step, now: Moment) -> str | None:
        executor = self._executor
        if self._background is None:
            wanted = candidates_for(
                step.percent, executor.target.stable_replicas(), row.proposal.plan.candidate_replicas
            )
            if (executor.target.observe().candidates or 0) < wanted:
                start_candidates(executor, row, wanted)
            self._background = Background(self._staging)
        return self._background.not_ready(now)

    def _step_plan(self, row: Rollout, step: Step, traffic: Traffic) -> StepPlan:
        plan = row.proposal.plan
        edges = {name: judged_edges(minutes, plan.margin_ratio) for name, minutes in traffic.minutes.items()}
        looks = step.max_seconds / self._executor.policy.look_seconds
        return StepPlan(
            edges={name: found for name, found in edges.items() if found},
            alpha=plan.alpha,
            latency_stake=row.latency_stake,
            max_ticks=math.ceil(looks) + 1,
            min_requests=plan.min_requests,
            judge_errors=self._feed.counts_errors,
            # Below a replica's fair share the candidate makes fewer tokens because it is asked for fewer.
            judge_throughput=step.stage is Stage.VALIDATION,
            margin_ratio=min(plan.margin_ratio, 0.99),
        )

    def _new_watch(self, row: Rollout, step: Step, now: Moment, plan: StepPlan | None) -> StepWatch:
        self._plan = plan
        self._guards = Guards(row.proposal.plan.expected_kv_tokens)
        return StepWatch(step, plan, started=now.seconds, min_requests=row.proposal.plan.min_requests)

    def _observe(self, watch: StepWatch, now: Moment) -> None:
        readings = self._feed.read(now)
        deltas, _ = self._tracker.observe([*readings.canary, *readings.baseline])
        edges = self._plan.edges if self._plan is not None else {}
        bounds = {name: [edge.bound_seconds for edge in found] for name, found in edges.items()}
        arms: list[ArmTick | None] = []
        for pages in (readings.canary, readings.baseline):
            arms.append(arm_tick([deltas[page.process] for page in pages if page.process in deltas], bounds))
        canary, baseline = arms
        now_at = (readings.canary_preemptions, readings.baseline_preemptions)
        if self._canary == ArmTotals() and self._preemptions_at_start == (None, None):
            self._preemptions_at_start = now_at
        self._canary = _add(self._canary, canary, now_at[0], self._preemptions_at_start[0])
        self._baseline = _add(self._baseline, baseline, now_at[1], self._preemptions_at_start[1])
        assert self._guards is not None
        trips = self._guards.check(readings.health, self._canary, self._baseline, readings.baseline_waiting)
        watch.observe(Look(now.seconds, canary, baseline, trips))

    def _passed(self, row: Rollout, step: Step, decision: Decision, evidence: dict[str, Any]) -> Progress:
        executor = self._executor
        executor.note("verdict", decision.reason, evidence)
        self.leave()
        if step.stage is Stage.BAKE:
            row = executor.move(row, Input.COMPLETE, decision.reason, evidence=evidence)
            return executor.settle(row, f"completed: {decision.reason}")
        row = executor.move(row, Input.ADVANCE, decision.reason, evidence=evidence)
        return Progress(row.position, False, f"{step.percent:g} % passed: {decision.reason}")

    def _drifted(self, row: Rollout, step: Step, now: Moment, percent: float) -> Progress:
        """Somebody or something else changed the share: what was judged is not what is so."""
        executor = self._executor
        if percent > 0:
            executor.set_share(0.0)
        return executor.pause(
            row, PauseReason.WEIGHT_DRIFT, f"the share was {percent:g} % where {step.percent:g} % was set; now it is 0"
        )


def start_candidates(executor: Executor, row: Rollout, count: int) -> None:
    """Have so many candidates run; a repetition changes nothing, and completes what an earlier one left half done."""
    count = max(count, executor.target.observe().candidates or 0)
    flags = full_flags(row.proposal.change)
    executor.act(
        f"have {count} candidate replicas run",
        lambda: executor.target.start_candidates(count, flags, executor.token),
        flags=flags,
    )


def _add(totals: ArmTotals, tick: ArmTick | None, preemptions: float | None, at_start: float | None) -> ArmTotals:
    since = None if preemptions is None or at_start is None or preemptions < at_start else preemptions - at_start
    if tick is None:
        return ArmTotals(totals.requests, totals.failed, since)
    return ArmTotals(totals.requests + tick.requests, totals.failed + tick.failed, since)


def _numbers(decision: Decision) -> dict[str, float]:
    if decision.verdict is None:
        return {}
    return {f"{state.signal} log_e": state.log_e for state in decision.verdict.signals}
