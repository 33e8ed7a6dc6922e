"""Pods of both arms: where they answer, whether their engine runs as it was started, and why some are missing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from optiinfra_pipelines.domain.rollout_targets import KubernetesSettings
from resources.rollouts.targets.base import Address
from resources.rollouts.targets.kubernetes.api import PODS, KubeApi
from resources.rollouts.targets.kubernetes.objects import ARM, OF, engine_container, engine_port, selector_text

Json = dict[str, Any]


class Pods:
    """The pods of one deployment, as they are at each question.

    A candidate pod that was seen stays a candidate: one that was evicted or restarted is dead, not forgotten.
    """

    def __init__(self, api: KubeApi, settings: KubernetesSettings, read_stable: Callable[[], Json]) -> None:
        self._api = api
        self._settings = settings
        self._read_stable = read_stable
        self._seen: dict[str, Address] = {}
        self._restarts: dict[str, int] = {}
        self._is_alive: dict[str, bool | None] = {}
        # Staging asks from a thread of its own.
        self._lock = threading.Lock()

    def candidates(self) -> list[Json]:
        """Candidate pods that are there in any state, also those that are ending."""
        return self._api.list(PODS, f"{ARM}=candidate,{OF}={self._settings.deployment}")

    def candidate_arm(self) -> tuple[Address, ...]:
        """Candidate pods with an address, and those that had one since `forget`."""
        stable = self._read_stable()
        pods = [pod for pod in self.candidates() if _is_serving(pod)]
        addresses = {str(pod["metadata"]["name"]): self._address(pod, stable) for pod in pods}
        container = str(engine_container(stable, self._settings)["name"])
        with self._lock:
            self._is_alive = dict.fromkeys(self._seen, False)
            for pod in pods:
                name = str(pod["metadata"]["name"])
                restarts, is_running = _engine_state(pod, container)
                is_same = restarts <= self._restarts.setdefault(name, restarts)
                self._is_alive[name] = is_running if is_same else False
            self._seen.update(addresses)
            return tuple(self._seen.values())

    def stable_arm(self) -> tuple[Address, ...]:
        """Stable pods that serve now."""
        stable = self._read_stable()
        pods = [pod for pod in self._api.list(PODS, selector_text(stable)) if _is_serving(pod) and _is_ready(pod)]
        return tuple(self._address(pod, stable) for pod in pods)

    def is_alive(self, name: str) -> bool | None:
        """As of the last `candidate_arm`."""
        return self._is_alive.get(name)

    def forget(self) -> None:
        """Begin anew: candidates are being started or stopped on purpose."""
        with self._lock:
            self._seen, self._restarts, self._is_alive = {}, {}, {}

    def missing(self, wanted: int) -> str | None:
        """Why fewer than `wanted` candidate pods have an address; None when they all do."""
        pods = self.candidates()
        ready = sum(1 for pod in pods if _is_serving(pod))
        if ready >= wanted:
            return None
        reasons = {reason for pod in pods if (reason := _why_waiting(pod)) is not None}
        return f"{ready} of {wanted} candidate pods run{': ' if reasons else ''}{'; '.join(sorted(reasons))}"

    def _address(self, pod: Mapping[str, Any], stable: Mapping[str, Any]) -> Address:
        name = str(pod["metadata"]["name"])
        url = self._settings.pod_url.format(
            ip=pod["status"]["podIP"],
            port=engine_port(stable, self._settings),
            pod=name,
            namespace=self._settings.namespace,
        )
        return Address(name, url, url.rstrip("/") + self._settings.metrics_path)


def _is_serving(pod: Mapping[str, Any]) -> bool:
    status = pod.get("status") or {}
    is_ending = pod["metadata"].get("deletionTimestamp") is not None
    return bool(status.get("podIP")) and status.get("phase") == "Running" and not is_ending


def _is_ready(pod: Mapping[str, Any]) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions") or [])


def _engine_state(pod: Mapping[str, Any], container: str) -> tuple[int, bool | None]:
    """Restarts of the engine's container so far, and whether it runs now; None: the node has not told."""
    for one in (pod.get("status") or {}).get("containerStatuses") or []:
        if one["name"] == container:
            return int(one.get("restartCount", 0)), "running" in (one.get("state") or {})
    return 0, None


def _why_waiting(pod: Mapping[str, Any]) -> str | None:
    status = pod.get("status") or {}
    for one in status.get("conditions") or []:
        if one["type"] == "PodScheduled" and one["status"] == "False":
            return str(one.get("message") or one.get("reason"))
    for one in status.get("containerStatuses") or []:
        waiting = (one.get("state") or {}).get("waiting")
        if waiting:
            return f"{waiting.get('reason')}: {waiting.get('message', '')}".rstrip(": ")
    return None
