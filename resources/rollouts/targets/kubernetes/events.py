"""Events on the objects that a rollout touches, so that `kubectl describe` tells who did what. Telling never fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any
from uuid import uuid4

import structlog

from resources.rollouts.targets.base import TargetError
from resources.rollouts.targets.kubernetes.api import EVENTS, MANAGER, KubeApi

MAX_MESSAGE = 1000
_log = structlog.get_logger(__name__)


class Events:
    """Writes events; one that is refused (no right to create them, a full namespace) is a line in the log, once."""

    def __init__(self, api: KubeApi, now: Callable[[], datetime]) -> None:
        self._api = api
        self._now = now
        self._is_told = False

    def tell(self, about: Mapping[str, Any], reason: str, message: str) -> None:
        """One event on an object. reason: one word in CamelCase, as Kubernetes has them."""
        metadata = about["metadata"]
        stamp = self._now().strftime("%Y-%m-%dT%H:%M:%SZ")
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{metadata['name']}.{uuid4().hex[:16]}", "namespace": self._api.namespace},
            "involvedObject": {
                "apiVersion": about["apiVersion"],
                "kind": about["kind"],
                "name": metadata["name"],
                "namespace": self._api.namespace,
                "uid": metadata.get("uid"),
                "resourceVersion": metadata.get("resourceVersion"),
            },
            "reason": reason,
            "message": message[:MAX_MESSAGE],
            "type": "Normal",
            "source": {"component": MANAGER},
            "reportingComponent": f"optiinfra.io/{MANAGER}",
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
        }
        try:
            self._api.create(EVENTS, body)
        except TargetError as error:
            if not self._is_told:
                self._is_told = True
                _log.warning("kubernetes_event_not_written", reason=reason, cause=str(error))
