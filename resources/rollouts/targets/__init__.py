"""Targets of rollouts. `base` has the protocol; each other module is one target."""

from resources.rollouts.targets.base import Actual, RolloutTarget, StaleTokenError, TargetError

__all__ = ["Actual", "RolloutTarget", "StaleTokenError", "TargetError"]
