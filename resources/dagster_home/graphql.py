"""Launch jobs of a running Dagster and follow them, as the launchpad does: by its GraphQL.

Here: the two questions and what their answers mean. Not here: which job with which config
(`optiinfra_pipelines.commands.live_walk`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

# A run's process starts in 5 to 16 s; on a host whose cores are taken many times over, in minutes.
RUN_SECONDS = 600.0
_LOOK_SECONDS = 0.5
_ANSWER_SECONDS = 120.0

_LAUNCH = """
mutation Launch($parameters: ExecutionParams!) {
  launchRun(executionParams: $parameters) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
    ... on PipelineNotFoundError { message }
  }
}
"""
_RUN = """
query Run($run: ID!) {
  runOrError(runId: $run) {
    __typename
    ... on Run { status tags { key value } }
    ... on Error { message }
  }
  logsForRun(runId: $run) {
    ... on EventConnection {
      events {
        __typename
        ... on ExecutionStepFailureEvent { error { message causes { message } } }
      }
    }
  }
}
"""
_OVER = frozenset({"SUCCESS", "FAILURE", "CANCELED"})


class LaunchError(RuntimeError):
    """A job could not be launched or did not succeed; the text has Dagster's reason."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that succeeded, with its tags."""

    run_id: str
    tags: Mapping[str, str]


class Launchpad:
    """The jobs of one code location behind one web server. url: its root, such as http://127.0.0.1:3000."""

    def __init__(self, url: str, location: str = "optiinfra") -> None:
        self._url = f"{url.rstrip('/')}/graphql"
        self._location = location

    def run(
        self,
        job: str,
        op: str,
        config: Mapping[str, Any],
        *,
        is_stopped: Callable[[], bool] = lambda: False,
        seconds: float = RUN_SECONDS,
    ) -> FinishedRun:
        """Launch a job whose one op takes this config, and wait for its success. LaunchError otherwise.

        A run that Dagster gave up before its op began, as on a host too busy to start it in time, is launched again.
        """
        until = time.monotonic() + seconds
        run_id = self.launch(job, op, config)
        while time.monotonic() < until and not is_stopped():
            answer = self._ask(_RUN, {"run": run_id})
            run = answer["runOrError"]
            if run["__typename"] != "Run":
                raise LaunchError(f"run {run_id} of {job}: {run.get('message')}")
            if run["status"] == "SUCCESS":
                return FinishedRun(run_id, {tag["key"]: tag["value"] for tag in run["tags"]})
            if run["status"] == "FAILURE" and not _has_begun(answer):
                run_id = self.launch(job, op, config)
            elif run["status"] in _OVER:
                raise LaunchError(f"{job} ended with {run['status']}: {_reason(answer)}")
            time.sleep(_LOOK_SECONDS)
        raise LaunchError(f"{job} did not end within {seconds:.0f} s; its run is {run_id}")

    def launch(self, job: str, op: str, config: Mapping[str, Any]) -> str:
        """Launch a job; returns its run id."""
        selector = {
            "repositoryLocationName": self._location,
            "repositoryName": "__repository__",
            "pipelineName": job,
        }
        run_config = {"ops": {op: {"config": dict(config)}}}
        answer = self._ask(_LAUNCH, {"parameters": {"selector": selector, "runConfigData": run_config}})
        launched = answer["launchRun"]
        if launched["__typename"] != "LaunchRunSuccess":
            said = launched.get("message") or "; ".join(one["message"] for one in launched.get("errors", []))
            raise LaunchError(f"{job} was not launched: {launched['__typename']}: {said}")
        return str(launched["run"]["runId"])

    def _ask(self, question: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        body = {"query": question, "variables": dict(variables)}
        try:
            reply = httpx.post(self._url, json=body, timeout=_ANSWER_SECONDS, trust_env=False)
            answer = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise LaunchError(f"{self._url} does not answer: {type(error).__name__}: {error}") from error
        if answer.get("errors"):
            raise LaunchError("; ".join(str(one.get("message")) for one in answer["errors"]))
        data: dict[str, Any] = answer["data"]
        return data


def _has_begun(answer: Mapping[str, Any]) -> bool:
    return any(one["__typename"] == "ExecutionStepStartEvent" for one in answer["logsForRun"].get("events", []))


def _reason(answer: Mapping[str, Any]) -> str:
    """The innermost cause of the first step that failed."""
    for event in answer.get("logsForRun", {}).get("events", []):
        error = event.get("error")
        if error:
            causes = [cause["message"] for cause in error.get("causes") or []]
            return str((causes or [error["message"]])[-1]).strip()
    return "no step tells why"
