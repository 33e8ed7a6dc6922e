"""Weights of the stable and the candidate backend in an HTTPRoute's rules: reading, setting, restoring. Pure.

Weights of one rule are relative to their sum, 0 to 1,000,000, 1 when absent. Other backends of a rule keep their
share; the candidate takes its percent from the stable backend's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from optiinfra_pipelines.domain.rollout_targets import KubernetesSettings
from resources.rollouts.targets.base import TargetError

Json = dict[str, Any]
MAX_WEIGHT = 1_000_000
# A hundredth of a percent; the proportion of the rule's backends is kept exactly up to weights of 100.
FINEST = 10_000
# Weights as they stood before the rollout: by rule, by backend; None: absent.
Original = Mapping[str, Mapping[str, int | None]]


def rule_key(rule: Mapping[str, Any], index: int) -> str:
    """What a rule is known by: its name, or its place."""
    return str(rule.get("name") or index)


def stable_rules(rules: Sequence[Json], settings: KubernetesSettings) -> list[tuple[str, Json]]:
    """The rules that send to the stable backend, by key."""
    return [
        (rule_key(rule, index), rule)
        for index, rule in enumerate(rules)
        if _ref(rule, settings.backend, settings) is not None
    ]


def original_weights(rules: Sequence[Json], settings: KubernetesSettings) -> dict[str, dict[str, int | None]]:
    """What must be restored: every weight of the rules that send to the stable backend."""
    return {
        key: {_name(ref): ref.get("weight") for ref in rule["backendRefs"] if not _is_candidate(ref, settings)}
        for key, rule in stable_rules(rules, settings)
    }


def percent_of(rules: Sequence[Json], settings: KubernetesSettings) -> float:
    """The candidate's share of what both backends get; where rules differ, the highest."""
    shares = [0.0]
    for rule in rules:
        ours, theirs = (
            _weight(_ref(rule, name, settings)) for name in (settings.candidate_backend_name, settings.backend)
        )
        if ours:
            shares.append(100 * ours / (ours + theirs))
    return max(shares)


def with_share(rules: Sequence[Json], settings: KubernetesSettings, percent: float, original: Original) -> list[Json]:
    """The rules with a share for the candidate; 0 gives every other weight back exactly as it was.

    TargetError when the rules are no longer those of `original`; never for 0, which takes off what it can.
    """
    changed = [deepcopy(rule) for rule in rules]
    if percent > 0:
        present = {key for key, _ in stable_rules(changed, settings)}
        if present != set(original):
            raise TargetError(
                f"HTTPRoute {settings.route}: rules with {settings.backend} were {sorted(original)} at the start and "
                f"are {sorted(present)} now; abort the rollout and begin anew"
            )
    for index, rule in enumerate(changed):
        _set_rule(rule, settings, percent, original.get(rule_key(rule, index), {}))
    return changed


def without_candidate(rules: Sequence[Json], settings: KubernetesSettings) -> list[Json]:
    """The rules without the candidate's backend."""
    changed = [deepcopy(rule) for rule in rules]
    for rule in changed:
        if "backendRefs" in rule:
            rule["backendRefs"] = [ref for ref in rule["backendRefs"] if not _is_candidate(ref, settings)]
    return changed


def unaccepted(route: Mapping[str, Any]) -> str | None:
    """Why what the route says may not be what flows: no gateway took up this generation of it. None when all did."""
    parents = (route.get("status") or {}).get("parents") or []
    if not parents:
        return "no Gateway has accepted it: check its parentRefs and the Gateway's listeners"
    generation = route["metadata"].get("generation", 0)
    for parent in parents:
        conditions = {one["type"]: one for one in parent.get("conditions") or []}
        who = parent.get("parentRef", {}).get("name", "its Gateway")
        for kind in ("Accepted", "ResolvedRefs"):
            found = conditions.get(kind)
            if found is None or found.get("observedGeneration", generation) < generation:
                return f"{who} has not taken up generation {generation} yet ({kind})"
            if found["status"] != "True":
                return f"{who}: {kind} is {found['status']}: {found.get('reason')}: {found.get('message')}"
    return None


def _set_rule(rule: Json, settings: KubernetesSettings, percent: float, original: Mapping[str, int | None]) -> None:
    stable = _ref(rule, settings.backend, settings)
    candidate = _ref(rule, settings.candidate_backend_name, settings)
    if percent <= 0:
        if candidate is not None:
            candidate["weight"] = 0
        for ref in rule.get("backendRefs") or []:
            if not _is_candidate(ref, settings) and _name(ref) in original:
                _put(ref, original[_name(ref)])
        if stable is not None and candidate is not None and not original and not _weight(stable):
            # What was there before is lost; a backend without weight would answer nobody.
            _put(stable, None)
        return
    if stable is None:
        return
    if candidate is None:
        candidate = {**deepcopy(stable), "name": settings.candidate_backend_name}
        rule["backendRefs"].insert(rule["backendRefs"].index(stable) + 1, candidate)
    before = {name: 1 if weight is None else weight for name, weight in original.items()}
    scale = min(FINEST, MAX_WEIGHT // max(1, *before.values()))
    for ref in rule["backendRefs"]:
        if not _is_candidate(ref, settings) and _name(ref) in before:
            ref["weight"] = before[_name(ref)] * scale
    whole = before[settings.backend] * scale
    candidate["weight"] = round(whole * percent / 100)
    stable["weight"] = whole - candidate["weight"]


def _ref(rule: Mapping[str, Any], name: str, settings: KubernetesSettings) -> Json | None:
    for ref in rule.get("backendRefs") or []:
        is_kind = ref.get("kind", "Service") == settings.backend_kind
        if ref["name"] == name and is_kind and ref.get("group", "") == settings.backend_group:
            found: Json = ref
            return found
    return None


def _is_candidate(ref: Mapping[str, Any], settings: KubernetesSettings) -> bool:
    return bool(ref["name"] == settings.candidate_backend_name)


def _name(ref: Mapping[str, Any]) -> str:
    return str(ref["name"])


def _weight(ref: Mapping[str, Any] | None) -> int:
    return 0 if ref is None else int(ref.get("weight", 1))


def _put(ref: Json, weight: int | None) -> None:
    if weight is None:
        ref.pop("weight", None)
    else:
        ref["weight"] = weight
