"""Traffic of one Kubernetes Deployment between its pods and those of a candidate, by weights of an HTTPRoute.

The HTTPRoute is the lock and the memory: the highest token, the rollout and the weights to restore stand in an
annotation beside the weights themselves, so that one write, bound to the version it was decided on, changes both or
neither. An executor that was replaced finds the higher token and stops, on whatever machine it runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from optiinfra_pipelines.domain.rollout_targets import KubernetesSettings
from resources.rollouts.targets.base import Actual, Address, ArmCounts, Flags, Replica, StaleTokenError, TargetError
from resources.rollouts.targets.gateway_page import GatewayCounters
from resources.rollouts.targets.kubernetes import objects, route
from resources.rollouts.targets.kubernetes.api import DEPLOYMENTS, ROUTES, SERVICES, ConflictError, KubeApi
from resources.rollouts.targets.kubernetes.checks import backend_selector, refuse_unfit
from resources.rollouts.targets.kubernetes.events import Events
from resources.rollouts.targets.kubernetes.pods import Pods

Json = dict[str, Any]
STATE = "optiinfra.io/rollout-state"
# Others write the same objects (status, scalers, Git); so often in a row is somebody who fights us.
MAX_CONFLICTS = 8
# Gateways take up a weight within a second or two; one that needs longer is told, and looked at again.
GATEWAY_SECONDS = 8.0
_POLL_SECONDS = 0.25


class KubernetesTarget:
    """One Deployment behind one HTTPRoute.

    in_flight: requests at some replicas by their own pages. now: the wall clock, UTC, for events and drains.
    """

    kind = "kubernetes"
    is_simulated = False

    def __init__(
        self,
        settings: KubernetesSettings,
        api: KubeApi,
        in_flight: Callable[[Sequence[Replica]], int | None] = lambda _: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._api = api
        self._in_flight = in_flight
        self._now = now
        self._sleep = sleep
        self._pods = Pods(api, settings, self._stable)
        self._events = Events(api, now)
        self._gateway = GatewayCounters(settings.gateway) if settings.gateway is not None else None
        self.counts_errors = self._gateway is not None
        self.drain_seconds = settings.drain_seconds

    # --- reading ---------------------------------------------------------------------------------------

    def observe(self) -> Actual:
        """Weights as the HTTPRoute has them, once a gateway has taken them up; pods as the Deployments count them."""
        found, stable, candidate = self._taken_up(), self._stable(), self._candidate()
        status = (candidate or {}).get("status") or {}
        running = len(self._pods.candidates()) if candidate is None else int(candidate["spec"].get("replicas", 1))
        detail = {
            "weights": route.original_weights(found["spec"].get("rules") or [], self._settings),
            "candidate_ready": int(status.get("readyReplicas") or 0),
            "generation": found["metadata"].get("generation"),
        }
        percent = route.percent_of(found["spec"].get("rules") or [], self._settings)
        return Actual(percent, running, int((stable.get("status") or {}).get("readyReplicas") or 0), None, detail)

    def stable_replicas(self) -> int:
        recorded = _state(self._route()).get("stable_replicas")
        return int(recorded or self._stable()["spec"].get("replicas", 1))

    def candidate_slots(self) -> int:
        return self._settings.max_candidates or self.stable_replicas()

    def started_arm(self) -> tuple[Address, ...]:
        return self._pods.candidate_arm()

    def not_started(self) -> str | None:
        candidate = self._candidate()
        if candidate is None:
            return f"there is no Deployment {self._where(self._settings.candidate)}"
        return self._pods.missing(int(candidate["spec"].get("replicas", 1)))

    def stable_arm(self) -> tuple[Address, ...]:
        return self._pods.stable_arm()

    def arm_counts(self) -> ArmCounts | None:
        if self._gateway is None:
            return None
        return self._gateway.read(self._settings.candidate_backend_name, self._settings.backend)

    def is_alive(self, server: str) -> bool | None:
        return self._pods.is_alive(server)

    # --- acting ----------------------------------------------------------------------------------------

    def claim(self, rollout_id: str, token: int) -> None:
        stable = None

        def change(rules: list[Json], state: Json) -> list[Json]:
            nonlocal stable
            if state.get("rollout_id") == rollout_id:
                return rules
            candidate = self._candidate()
            if not state and candidate is not None and objects.owner_of(candidate) == rollout_id:
                # The record was taken away, the candidate is ours: taking its traffic off must not wait for a person.
                state.update(rollout_id=rollout_id)
                return rules
            stable = self._stable()
            refuse_unfit(self._api, self._settings, self._route(), stable, candidate, rollout_id)
            state.clear()
            state.update(
                rollout_id=rollout_id,
                original=route.original_weights(rules, self._settings),
                stable_replicas=int(stable["spec"].get("replicas", 1)),
            )
            return rules

        written = self._on_route(token, change)
        if stable is not None:
            self._events.tell(written, "RolloutClaimed", f"rollout {rollout_id} holds it with token {token}")

    def start_candidates(self, count: int, flags: Flags, token: int) -> None:
        def remember(rules: list[Json], state: Json) -> list[Json]:
            state["flags"] = dict(flags)
            return rules

        state = _state(self._on_route(token, remember))
        stable = self._stable()
        if count > self.candidate_slots():
            raise TargetError(f"{count} candidates, but there is room for {self.candidate_slots()} (max_candidates)")
        selectors = (stable["spec"]["selector"].get("matchLabels") or {}, backend_selector(self._api, self._settings))
        labels = objects.candidate_labels(stable, *selectors)
        # Pods first, at the end last: as long as anything is there, so are they, and the way back finds it.
        made = self._have_candidate(count, flags, token, str(state["rollout_id"]), stable, labels)
        if self._settings.backend_kind == "Service":
            twin = self._api.get(SERVICES, self._settings.backend, "it is the route's stable backend")
            self._api.apply(SERVICES, objects.candidate_service(twin, self._settings, labels))
        if _state(self._route()).get("token", 0) > token:
            # Replaced between the two writes: what was made last belongs to nobody.
            self._api.delete(DEPLOYMENTS, made)
            raise StaleTokenError(f"token {token} was replaced while candidates were being started")
        self._pods.forget()
        self._events.tell(made, "CandidateStarted", f"{count} replicas with {_line(flags)}")

    def set_share(self, percent: float, token: int) -> None:
        if percent > 0 and not int(((self._candidate() or {}).get("status") or {}).get("readyReplicas") or 0):
            raise TargetError(f"no pod of Deployment {self._where(self._settings.candidate)} is ready")

        def change(rules: list[Json], state: Json) -> list[Json]:
            return route.with_share(rules, self._settings, percent, state.get("original") or {})

        before = route.percent_of(self._route()["spec"].get("rules") or [], self._settings)
        written = self._on_route(token, change)
        if before != percent:
            self._events.tell(written, "WeightSet", f"the candidate has {percent:g} % (before: {before:g} %)")
        self._taken_up()

    def drain(self, token: int) -> bool:
        self._on_route(token, lambda rules, state: self._without_traffic(rules, state))
        return self._is_drained()

    def stop_candidates(self, token: int) -> None:
        self._on_route(token, lambda rules, _: self._without_ref(rules))
        self._remove_candidate(token)

    def promote(self, rollout_id: str, token: int) -> bool:
        state = _state(self._on_route(token, lambda rules, _: rules))
        if state.get("promoted") == rollout_id:
            return True
        if state.get("rollout_id") != rollout_id or "flags" not in state:
            raise TargetError(
                f"HTTPRoute {self._where(self._settings.route)} has lost the record of rollout {rollout_id}, its "
                f"annotation {STATE}; write the candidate's flags into Deployment {self._settings.deployment} by hand"
            )
        stable = self._with_promoted_flags(rollout_id, state, token)
        if not objects.rollout_of(stable, int(state.get("stable_replicas", 1))):
            return False
        if "returned_at" not in state:
            # Back to the stable backend, whose pods now run with the candidate's flags.
            self.set_share(0.0, token)
            written = self._on_route(token, self._note_return)
            state = _state(written)
        waited = self._now().timestamp() - float(state["returned_at"])
        if not self._is_drained() and waited < self.drain_seconds:
            return False
        self.stop_candidates(token)
        self._put_strategy_back(token)

        def done(rules: list[Json], state: Json) -> list[Json]:
            state["promoted"] = rollout_id
            return rules

        self._events.tell(self._on_route(token, done), "RolloutPromoted", f"rollout {rollout_id} is complete")
        return True

    # --- parts of acting -------------------------------------------------------------------------------

    def _on_route(self, token: int, change: Callable[[list[Json], Json], list[Json]]) -> Json:
        """Read the route, refuse a stale token, change rules and state, write both onto exactly what was read."""
        for _ in range(MAX_CONFLICTS):
            found = self._route()
            state = _state(found)
            seen = int(state.get("token", 0))
            if token < seen:
                raise StaleTokenError(
                    f"token {token} is stale; {seen} owns HTTPRoute {self._where(self._settings.route)} now. If the "
                    f"store that gave it is gone for good, remove the annotation {STATE}"
                )
            before = json.dumps([found["spec"].get("rules"), state], sort_keys=True)
            rules = change(found["spec"].get("rules") or [], state)
            state["token"] = token
            if json.dumps([rules, state], sort_keys=True) == before:
                return found
            body = {
                "apiVersion": ROUTES.api_version,
                "kind": ROUTES.kind,
                "metadata": {
                    "name": self._settings.route,
                    "namespace": self._settings.namespace,
                    "resourceVersion": found["metadata"]["resourceVersion"],
                    "annotations": {STATE: json.dumps(state, sort_keys=True)},
                },
                "spec": {"rules": rules},
            }
            try:
                return self._api.apply(ROUTES, body)
            except ConflictError:
                continue
        raise TargetError(
            f"HTTPRoute {self._where(self._settings.route)} changed {MAX_CONFLICTS} times while it was being written; "
            "find who else writes it"
        )

    def _on_deployment(self, name: str, token: int, change: Callable[[Json], Json | None]) -> Json | None:
        """The same for a Deployment, whose own annotation has the token of its last writer. None when it is gone."""
        for _ in range(MAX_CONFLICTS):
            found = self._api.find(DEPLOYMENTS, name)
            if found is None:
                return None
            seen = int((found["metadata"].get("annotations") or {}).get(objects.TOKEN, 0))
            if token < seen:
                raise StaleTokenError(
                    f"token {token} is stale; {seen} owns Deployment {self._where(name)} now. If the store that gave "
                    f"it is gone for good, remove the annotation {objects.TOKEN}"
                )
            patch = change(found)
            if patch is None:
                return found
            metadata = patch.setdefault("metadata", {})
            metadata["resourceVersion"] = found["metadata"]["resourceVersion"]
            metadata.setdefault("annotations", {})[objects.TOKEN] = str(token)
            try:
                return self._api.merge(DEPLOYMENTS, name, patch)
            except ConflictError:
                continue
        raise TargetError(f"Deployment {self._where(name)} changed {MAX_CONFLICTS} times; find who else writes it")

    def _have_candidate(
        self, count: int, flags: Flags, token: int, rollout_id: str, stable: Json, labels: Mapping[str, str]
    ) -> Json:
        name = self._settings.candidate

        def scaled(found: Json) -> Json | None:
            owner = objects.owner_of(found)
            if owner != rollout_id:
                raise TargetError(f"Deployment {self._where(name)} belongs to rollout {owner}; delete it first")
            return None if int(found["spec"].get("replicas", 1)) == count else {"spec": {"replicas": count}}

        found = self._on_deployment(name, token, scaled)
        if found is not None:
            return found
        body = objects.candidate_deployment(stable, self._settings, labels, count, flags)
        body["metadata"]["annotations"] = {objects.ROLLOUT: rollout_id, objects.TOKEN: str(token)}
        return self._api.apply(DEPLOYMENTS, body)

    def _remove_candidate(self, token: int) -> None:
        self._on_deployment(self._settings.candidate, token, lambda _: {})
        if self._settings.backend_kind == "Service":
            twin = self._api.find(SERVICES, self._settings.candidate_backend_name)
            if twin is not None and (twin["metadata"].get("labels") or {}).get(objects.ARM) == "candidate":
                self._api.delete(SERVICES, twin)
        found = self._candidate()
        if found is not None:
            self._events.tell(found, "CandidateStopped", f"by the holder of token {token}")
            self._api.delete(DEPLOYMENTS, found)
        self._pods.forget()

    def _with_promoted_flags(self, rollout_id: str, state: Json, token: int) -> Json:
        """The stable Deployment, told once to take the candidate's flags, a pod at a time and none taken early."""
        annotation = objects.PROMOTED

        def change(found: Json) -> Json | None:
            if (found["metadata"].get("annotations") or {}).get(annotation) == rollout_id:
                return None
            container = objects.engine_container(found, self._settings)
            field, words = objects.words_with_flags(container, state.get("flags") or {})
            containers = [
                {**one, field: words} if one["name"] == container["name"] else one
                for one in found["spec"]["template"]["spec"]["containers"]
            ]
            spec: Json = {"template": {"spec": {"containers": containers}}}
            strategy = found["spec"].get("strategy") or {}
            metadata = {"annotations": {annotation: rollout_id, f"{annotation}-strategy": json.dumps(strategy)}}
            if strategy.get("type", "RollingUpdate") == "RollingUpdate":
                spec["strategy"] = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
            return {"metadata": metadata, "spec": spec}

        before = self._stable()["metadata"]["resourceVersion"]
        written = self._on_deployment(self._settings.deployment, token, change)
        if written is None:
            raise TargetError(f"Deployment {self._where(self._settings.deployment)} is gone; restore it")
        if written["metadata"]["resourceVersion"] != before:
            flags = _line(state.get("flags") or {})
            self._events.tell(written, "FlagsPromoted", f"{flags}; write them where this Deployment comes from, too")
        return written

    def _put_strategy_back(self, token: int) -> None:
        annotation = f"{objects.PROMOTED}-strategy"

        def change(found: Json) -> Json | None:
            text = (found["metadata"].get("annotations") or {}).get(annotation)
            if text is None:
                return None
            strategy = json.loads(text)
            return {"metadata": {"annotations": {annotation: None}}, "spec": {"strategy": strategy or None}}

        self._on_deployment(self._settings.deployment, token, change)

    def _without_traffic(self, rules: list[Json], state: Json) -> list[Json]:
        return route.with_share(rules, self._settings, 0.0, state.get("original") or {})

    def _without_ref(self, rules: list[Json]) -> list[Json]:
        percent = route.percent_of(rules, self._settings)
        if percent > 0:
            raise TargetError(f"candidates with {percent:g} % of new requests are not stopped; set their share to 0")
        return route.without_candidate(rules, self._settings)

    def _note_return(self, rules: list[Json], state: Json) -> list[Json]:
        state.setdefault("returned_at", self._now().timestamp())
        return rules

    def _is_drained(self) -> bool:
        """No request at any candidate by its own page. Not known is not drained: the caller's patience ends that."""
        pods = self._pods.candidate_arm()
        return not pods or self._in_flight(pods) == 0

    def _taken_up(self) -> Json:
        """The route once a gateway has taken up what it says. TargetError when none does in time."""
        until = time.monotonic() + GATEWAY_SECONDS
        while True:
            found = self._route()
            why = route.unaccepted(found)
            if why is None:
                return found
            if time.monotonic() > until:
                raise TargetError(f"HTTPRoute {self._where(self._settings.route)}: {why}")
            self._sleep(_POLL_SECONDS)

    # --- objects -----------------------------------------------------------------------------------------

    def _route(self) -> Json:
        remedy = "check `route` and whether Gateway API is installed"
        return self._api.get(ROUTES, self._settings.route, remedy)

    def _stable(self) -> Json:
        return self._api.get(DEPLOYMENTS, self._settings.deployment, "check `deployment` and `namespace`")

    def _candidate(self) -> Json | None:
        return self._api.find(DEPLOYMENTS, self._settings.candidate)

    def _where(self, name: str) -> str:
        return f"{self._settings.namespace}/{name}"


def _state(found: Mapping[str, Any]) -> Json:
    text = (found["metadata"].get("annotations") or {}).get(STATE)
    try:
        state = json.loads(text) if text else {}
    except ValueError as error:
        raise TargetError(f"annotation {STATE} of {found['metadata']['name']} is no JSON: {error}") from error
    return dict(state)


def _line(flags: Flags) -> str:
    given = [f"--{flag}={value}" if value else f"--{flag}" for flag, value in flags.items() if value is not None]
    return " ".join(given) or "no flags of its own"
