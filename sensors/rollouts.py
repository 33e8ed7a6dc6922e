"""The two sensors of rollouts: one launches what was approved, one keeps safe what nobody executes.

Each asks a resource and returns what it found. The rules are `resources.rollouts.watchdog` and `rollout.gate`.
"""

import dagster as dg

from optiinfra_pipelines.defs.rollout_run import ROLLOUT_TAG
from optiinfra_pipelines.domain.rollouts import RolloutState
from optiinfra_pipelines.rollout.alarms import changes, standing_alerts
from resources.alert_outlet import AlertOutlet
from resources.rollouts.desk import Rollouts
from resources.rollouts.watchdog import RunState, Watchdog
from sensors.watch import read_known, tell

# The daemon looks every 5 s and skips a sensor whose interval is not over: 9 and 14 make 10 and 15 s. A tick costs
# 0.05 s of CPU whether it finds something or not. Traffic that nobody judges is off 30 s (the lease) and at most one
# interval of the watch later; the dead-man process of a rollout does it within 2 s of the lease's end.
_WATCH_SECONDS = 9
_DISPATCH_SECONDS = 14


def rollout_sensors(rollouts: Rollouts, outlet: AlertOutlet) -> list[dg.SensorDefinition]:
    """`dispatch_rollouts` and `watch_rollouts`, running from the first start. outlet: where its alerts go."""
    return [_dispatch(rollouts), _watch(rollouts, outlet)]


def _dispatch(rollouts: Rollouts) -> dg.SensorDefinition:
    @dg.sensor(
        name="dispatch_rollouts",
        job_name="execute_rollout",
        minimum_interval_seconds=_DISPATCH_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Launches execute_rollout once for every approved rollout.",
    )
    def dispatch_rollouts(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        approved = [row.rollout_id for row in rollouts.all() if row.position.state is RolloutState.APPROVED]
        if not approved:
            return dg.SkipReason("nothing is approved")
        launched = {rollout_id: _launches(context.instance, rollout_id) for rollout_id in approved}
        keys = {one: rollouts.launch_key(one, list(runs), all(runs.values())) for one, runs in launched.items()}
        return dg.SensorResult(run_requests=[_request(one, key) for one, key in keys.items() if key is not None])

    return dispatch_rollouts


def _watch(rollouts: Rollouts, outlet: AlertOutlet) -> dg.SensorDefinition:
    @dg.sensor(
        name="watch_rollouts",
        job_name="execute_rollout",
        minimum_interval_seconds=_WATCH_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Takes traffic off the candidate of a rollout that nobody executes, finishes its way back, and "
        "alerts when neither works.",
    )
    def watch_rollouts(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        if not rollouts.all():
            return dg.SkipReason("no rollout")
        watched = Watchdog(rollouts, lambda run_id: _run_state(context.instance, run_id)).look()
        for one in watched:
            context.log.info("%s: %s", one.rollout_id, one.did)
        now, known = rollouts.clock().at, read_known(context.cursor)
        helpless = {one.rollout_id: one.fault for one in watched if one.fault}
        fired, resolved = changes(standing_alerts(rollouts.all(), helpless, now), known.open, now)
        told = tell(outlet, known, fired, resolved)
        if not watched and not told.is_news:
            return dg.SkipReason("every rollout is in good hands")
        requests = [_request(one.rollout_id, one.run_key) for one in watched if one.run_key]
        said = "; ".join(f"{one.rollout_id}: {one.did}" for one in watched) or told.known.said
        return dg.SensorResult(
            run_requests=requests,
            asset_events=told.events,
            cursor=told.known.cursor,
            # Dagster takes either: a tick that launches something shows what.
            skip_reason=None if requests else dg.SkipReason(said),
        )

    return watch_rollouts


def _request(rollout_id: str, run_key: str) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=run_key,
        run_config={"ops": {"take_rollout": {"config": {"rollout_id": rollout_id}}}},
        tags={ROLLOUT_TAG: rollout_id},
    )


def _launches(instance: dg.DagsterInstance, rollout_id: str) -> dict[str, bool]:
    """Runs that were launched for a rollout: whether each is over."""
    runs = instance.get_runs(dg.RunsFilter(job_name="execute_rollout", tags={ROLLOUT_TAG: rollout_id}))
    return {run.run_id: run.is_finished for run in runs}


def _run_state(instance: dg.DagsterInstance, run_id: str) -> RunState:
    run = instance.get_run_by_id(run_id)
    if run is None:
        return "unknown"
    if run.status in (dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.CANCELING):
        return "canceled"
    return "over" if run.is_finished else "alive"
