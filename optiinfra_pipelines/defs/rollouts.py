"""Rollouts in the launchpad: propose, approve, reject, execute, pause, resume, abort, roll back; one partition each.

Names, config and reports only. The row in the store is the truth; what is shown here is its trace. Doing things is
`resources.rollouts.desk` and `resources.rollouts.executor`, pacing them and reporting them `defs.rollout_run`.
"""

from collections.abc import Callable

import dagster as dg

from optiinfra_pipelines.defs.rollout_config import (
    ApproveConfig,
    ExecuteConfig,
    PersonConfig,
    ProposeConfig,
    to_change,
    to_proposal,
)
from optiinfra_pipelines.defs.rollout_run import EXECUTE_OPS, Runs
from optiinfra_pipelines.defs.schema import Metadata
from optiinfra_pipelines.domain.rollouts import Change, Rollout
from resources.rollouts.desk import Rollouts
from resources.rollouts.store import RolloutError
from resources.rollouts.targets import TargetError
from resources.warehouse import WarehouseError

PARTITIONS = dg.DynamicPartitionsDefinition(name="rollouts")
REQUEST, APPROVAL, EXECUTION = (dg.AssetKey(["rollout", name]) for name in ("request", "approval", "execution"))
ROLLOUT_TAG = "optiinfra/rollout_id"
FindChange = Callable[[str], Change]


def rollout_assets() -> list[dg.AssetSpec]:
    """What the Partitions tab lists: the request, the approval and the execution of each rollout."""

    def spec(key: dg.AssetKey, description: str, deps: list[dg.AssetKey]) -> dg.AssetSpec:
        return dg.AssetSpec(
            key,
            deps=deps,
            description=description,
            partitions_def=PARTITIONS,
            group_name="rollouts",
            owners=["team:platform"],
        )

    return [
        spec(REQUEST, "What somebody proposed; one partition per rollout.", []),
        spec(APPROVAL, "Who approved or rejected it, and on what.", [REQUEST]),
        spec(EXECUTION, "How it went: shares of traffic, evidence, verdicts. SIMULATED for a dry run.", [APPROVAL]),
    ]


def rollout_jobs(rollouts: Rollouts, find_change: FindChange | None = None) -> list[dg.JobDefinition]:
    """The eight jobs. find_change: the change of a recommendation id; None where there are no recommendations."""
    return [_propose(rollouts, find_change), *_decisions(rollouts), _execute(rollouts), *_handling(rollouts)]


def _propose(rollouts: Rollouts, find_change: FindChange | None) -> dg.JobDefinition:
    @dg.op(description="Check a change and its plan, and enter it as a proposal that waits for approval.")
    def record_proposal(context: dg.OpExecutionContext, config: ProposeConfig) -> None:
        now = rollouts.clock().at
        with _refusals():
            change = rollouts.with_present_flags(_change(config, find_change), config.target)
            rollout_id = f"{change.deployment}-{now:%Y%m%d-%H%M%S}-{context.run_id[:6]}"
            row = rollouts.propose(to_proposal(config, rollout_id, change, now), context.run_id)
        context.instance.add_dynamic_partitions("rollouts", [rollout_id])
        expected = row.proposal.plan.expected_kv_tokens
        approve = f"rollout_id: {rollout_id}\nproposal_hash: {row.proposal_hash}\napprover: <another person>"
        context.log.info("%s waits for approval; launch approve_rollout with\n%s", rollout_id, approve)
        _report(
            context,
            row,
            REQUEST,
            {
                "proposal": dg.MetadataValue.json(row.proposal.model_dump(mode="json")),
                "proposal_hash": row.proposal_hash,
                "kv_cache": "not checked" if expected is None else f"checked against {expected:.0f} tokens",
                "next": dg.MetadataValue.md(f"Launch `approve_rollout` with\n```yaml\n{approve}\n```"),
            },
        )

    @dg.job(description="Propose a change of one deployment; nothing happens before another person approves it.")
    def propose_rollout() -> None:
        record_proposal()

    return propose_rollout


def _decisions(rollouts: Rollouts) -> list[dg.JobDefinition]:
    @dg.op(description="Check the approver, the hash, the freeze windows and the limits, and approve.")
    def record_approval(context: dg.OpExecutionContext, config: ApproveConfig) -> None:
        with _refusals():
            row = rollouts.approve(
                config.rollout_id,
                config.approver,
                config.proposal_hash,
                config.comment,
                config.code,
                context.run_id,
            )
        assert row.approval is not None
        _report(context, row, APPROVAL, {"approval": dg.MetadataValue.json(row.approval.model_dump(mode="json"))})

    @dg.op(description="Turn a proposal down.")
    def record_rejection(context: dg.OpExecutionContext, config: PersonConfig) -> None:
        with _refusals():
            row = rollouts.reject(config.rollout_id, config.person, config.comment, context.run_id)
        _report(context, row, APPROVAL, {"rejected_by": config.person, "comment": config.comment})

    @dg.job(description="Approve a proposal: another person than its requester, for exactly what was proposed.")
    def approve_rollout() -> None:
        record_approval()

    @dg.job(description="Turn down a proposal, or withdraw one that was approved and has not started.")
    def reject_rollout() -> None:
        record_rejection()

    return [approve_rollout, reject_rollout]


def _execute(rollouts: Rollouts) -> dg.JobDefinition:
    runs = Runs(rollouts, EXECUTION)

    @dg.op(description="Refuse without a valid approval; take the lease and the target.")
    def take_rollout(context: dg.OpExecutionContext, config: ExecuteConfig) -> str:
        with _refusals():
            runs.begin(context, config.rollout_id)
        return config.rollout_id

    stage_ops = [runs.stage_op(name, stages, what) for name, stages, what in EXECUTE_OPS]

    @dg.job(
        description="Carry out an approved rollout: staging, canary, validation, gradual rollout, bake. The sensor "
        "dispatch_rollouts launches it; by hand it refuses what is not approved.",
        # A pause may last days: the stack's limit on the run time of jobs (6 h) must not end a rollout.
        tags={"dagster/max_retries": "0", "dagster/max_runtime": "0"},
        # What ops hand on is the rollout's id; on disk it would leave a file per op behind.
        resource_defs={"io_manager": dg.mem_io_manager},
    )
    def execute_rollout() -> None:
        rollout_id = take_rollout()
        for stage_op in stage_ops:
            rollout_id = stage_op(rollout_id)

    return execute_rollout


def _handling(rollouts: Rollouts) -> list[dg.JobDefinition]:
    def job(name: str, what: str, do: Callable[[str, str, str, str | None], Rollout]) -> dg.JobDefinition:
        @dg.op(name=f"{name}_now", description=what)
        def handle(context: dg.OpExecutionContext, config: PersonConfig) -> None:
            with _refusals():
                row = do(config.rollout_id, config.person, config.comment, context.run_id)
            _report(context, row, EXECUTION, {"by": config.person, "comment": config.comment})

        @dg.job(name=name, description=what)
        def handling() -> None:
            handle()

        return handling

    return [
        job("pause_rollout", "Hold a rollout at its present share; its guards stay awake.", rollouts.pause),
        job("resume_rollout", "Go on: the present step runs again from its start, with fresh counts.", rollouts.resume),
        job(
            "abort_rollout",
            "End a rollout: withdrawn before its start; after it, traffic comes off at once and the stable state is "
            "restored.",
            rollouts.abort,
        ),
        job(
            "rollback_rollout",
            "Take a rollout back at once, at any time, freeze or not. A completed one is taken back by a new proposal "
            "with the flags exchanged, which this enters.",
            rollouts.roll_back,
        ),
    ]


def _change(config: ProposeConfig, find_change: FindChange | None) -> Change:
    if not config.recommendation_id:
        return to_change(config)
    if config.proposed or config.remove:
        raise RolloutError("give a recommendation_id or a change, not both")
    if find_change is None:
        raise RolloutError("recommendations are not kept here; write the change as deployment, current and proposed")
    return find_change(config.recommendation_id)


def _report(context: dg.OpExecutionContext, row: Rollout, key: dg.AssetKey, metadata: dict[str, Metadata]) -> None:
    context.instance.add_run_tags(context.run_id, {ROLLOUT_TAG: row.rollout_id})
    context.log_event(
        dg.AssetMaterialization(key, partition=row.rollout_id, metadata={"position": str(row.position), **metadata})
    )
    context.log.info("%s is %s", row.rollout_id, row.position)


class _refusals:  # noqa: N801
    """Turns a refusal into a failed run that says why and is not retried."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # ValueError is also pydantic's, and the ledger's for an unknown recommendation.
        if isinstance(error, RolloutError | TargetError | WarehouseError | ValueError):
            raise dg.Failure(str(error), allow_retries=False) from error
