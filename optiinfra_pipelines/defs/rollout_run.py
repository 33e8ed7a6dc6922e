"""One run of execute_rollout: an executor kept by the run, paced, and reported while it goes.

The ops are what a person sees of the stages; each lets the executor look every few seconds until the rollout has left
its stages. What a look does is `resources.rollouts.executor`.
"""

import base64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import dagster as dg

from optiinfra_pipelines.defs.schema import Metadata
from optiinfra_pipelines.domain.rollouts import RolloutState, Stage
from optiinfra_pipelines.rollout.plots import EvidencePoint, evidence_png
from resources.rollouts.desk import Pace, Rollouts

if TYPE_CHECKING:
    from resources.rollouts.executor import Executor
    from resources.rollouts.ports import Progress

ROLLOUT_TAG = "optiinfra/rollout_id"
# One observation a minute: charts stay readable, and Dagster's own storage small.
REPORT_SECONDS = 60.0
EXECUTE_OPS: tuple[tuple[str, tuple[Stage, ...], str], ...] = (
    ("staging_test", (Stage.STAGING,), "Preflight, start the candidate away from traffic, try it, plan the steps."),
    ("canary", (Stage.CANARY,), "Small shares of traffic beside a concurrent baseline."),
    ("validation", (Stage.VALIDATION,), "A replica's fair share: both arms at equal load."),
    ("gradual_rollout", (Stage.GRADUAL,), "Larger shares, up to all traffic."),
    ("bake", (Stage.BAKE,), "All traffic under watch, the old replicas warm; then it is complete."),
)


@dataclass
class _Run:
    executor: "Executor"
    pace: Pace
    began: float
    reported_at: float = float("-inf")
    said: str = ""
    points: list[EvidencePoint] = field(default_factory=list)


class Runs:
    """Executors of this process by run id. A run's ops share one; a process that died left none behind."""

    def __init__(self, rollouts: Rollouts, key: dg.AssetKey) -> None:
        self._rollouts = rollouts
        self._key = key
        self._runs: dict[str, _Run] = {}

    def begin(self, context: dg.OpExecutionContext, rollout_id: str) -> None:
        """Take the rollout for this run. RolloutError with the reason of a refusal."""
        context.instance.add_run_tags(context.run_id, {ROLLOUT_TAG: rollout_id})
        executor = self._rollouts.executor(rollout_id, f"run:{context.run_id}", context.run_id)
        pace = self._rollouts.pace(executor.target)
        progress = executor.begin(pace.clock())
        self._rollouts.guard(executor)
        self._runs[context.run_id] = _Run(executor, pace, pace.clock().seconds)
        context.log.info(progress.message)

    def stage_op(self, name: str, stages: tuple[Stage, ...], what: str) -> dg.OpDefinition:
        """The op that goes on until the rollout is past these stages."""

        @dg.op(name=name, description=what)
        def stage(context: dg.OpExecutionContext, rollout_id: str) -> str:
            self._until_past(context, rollout_id, stages)
            return rollout_id

        return stage

    def _until_past(self, context: dg.OpExecutionContext, rollout_id: str, stages: tuple[Stage, ...]) -> None:
        run = self._runs.get(context.run_id)
        if run is None:
            raise dg.Failure("another process executed it; launch execute_rollout anew", allow_retries=False)
        try:
            progress = self._look(context, run, rollout_id)
            while not progress.is_done and self._is_within(progress, stages):
                run.pace.sleep(self._rollouts.policy.look_seconds)
                progress = self._look(context, run, rollout_id)
        except BaseException as error:
            # Also what ends a run from outside: traffic comes off before the process goes.
            run.executor.stop_now(f"its run ended: {type(error).__name__}")
            raise
        self._report(context, run, rollout_id, progress)
        if progress.is_done:
            run.executor.end()
            del self._runs[context.run_id]
        if progress.is_done and progress.position.state is not RolloutState.COMPLETED:
            raise dg.Failure(f"{rollout_id} is {progress.position}: {progress.message}", allow_retries=False)

    @staticmethod
    def _is_within(progress: "Progress", stages: tuple[Stage, ...]) -> bool:
        """FAILED and COMPLETED are within: what follows them is watched to its end by the op they happened in."""
        position = progress.position
        return position.state in (RolloutState.FAILED, RolloutState.COMPLETED) or position.stage in stages

    def _look(self, context: dg.OpExecutionContext, run: _Run, rollout_id: str) -> "Progress":
        now = run.pace.clock()
        progress = run.executor.step(now)
        if progress.verdict is not None:
            percent = progress.numbers.get("candidate_percent", 0.0)
            run.points.append(EvidencePoint(now.seconds - run.began, percent, progress.verdict))
        if str(progress.position) != run.said or now.seconds - run.reported_at >= REPORT_SECONDS:
            run.said, run.reported_at = str(progress.position), now.seconds
            context.log.info("%s: %s", progress.position, progress.message)
            context.log_event(
                dg.AssetObservation(self._key, partition=rollout_id, metadata=self._metadata(run, progress))
            )
        return progress

    def _report(self, context: dg.OpExecutionContext, run: _Run, rollout_id: str, progress: "Progress") -> None:
        metadata = self._metadata(run, progress)
        if run.points:
            picture = base64.b64encode(evidence_png(run.points, rollout_id)).decode()
            metadata["evidence"] = dg.MetadataValue.md(f"![evidence over time](data:image/png;base64,{picture})")
        context.log_event(dg.AssetMaterialization(self._key, partition=rollout_id, metadata=metadata))

    @staticmethod
    def _metadata(run: _Run, progress: "Progress") -> dict[str, Metadata]:
        metadata: dict[str, Metadata] = {"position": str(progress.position), "message": progress.message}
        metadata.update(progress.numbers)
        if progress.decides_at is not None:
            metadata["next_decision_at"] = progress.decides_at.isoformat(timespec="seconds")
        if progress.verdict is not None:
            metadata["verdict"] = dg.MetadataValue.json(progress.verdict.model_dump(mode="json"))
        if run.executor.target.is_simulated:
            metadata["source"] = "SIMULATED: a rehearsal, nothing was changed"
        return metadata
