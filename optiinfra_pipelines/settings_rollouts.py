"""What is wrong with `rollouts:` of a fleet.yaml, and what is right but will not work as meant.

`check_rollouts` finds faults that a single field cannot know, and makes a relative quality_prompts absolute;
`rollout_warnings` tells what an operator should know before the first proposal. What the settings mean is
`optiinfra_pipelines.domain.rollout_policy`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.people import SERVICE, same_person, secret_name
from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts
from optiinfra_pipelines.settings_checks import check_url, did_you_mean, entries_of, short
from optiinfra_pipelines.settings_yaml import Document, KeyPath, Value

_TIME = re.compile(r"([01]\d|2[0-3]):[0-5]\d\Z")
# An executor that renews its lease only once or twice in its time loses it to one slow look.
LOOKS_IN_A_LEASE = 3.0


def check_rollouts(document: Document, folder: Path | None) -> None:
    """Add to `document.problems` what the section shows; works on whatever part of it is well-formed.

    folder: the one of fleet.yaml, from which relative files count; None where there is none, and files are not looked
    for.
    """
    section = document.value.get("rollouts")
    if not isinstance(section, dict):
        return
    _check_approvers(document, section)
    _check_ages(document, section)
    for index, window in entries_of(section.get("freeze_windows")).items():
        for key in ("since", "until"):
            word = window.get(key)
            if isinstance(word, str) and not _TIME.match(word):
                message = f"wants a time of day as HH:MM, such as 22:00; got {short(word)}"
                document.complain(("rollouts", "freeze_windows", index, key), message)
    known = {str(one["name"]) for one in entries_of(document.value.get("deployments")).values() if "name" in one}
    listed = entries_of(section.get("deployments"))
    first: dict[str, int] = {}
    backends: dict[tuple[str, str], int] = {}
    for index, one in listed.items():
        path: KeyPath = ("rollouts", "deployments", index)
        word = one.get("deployment")
        if isinstance(word, str):
            if word not in known:
                message = f"{short(word)} is not among the deployments{did_you_mean(word, known)}"
                document.complain((*path, "deployment"), message)
            elif word in first:
                line = document.place(("rollouts", "deployments", first[word], "deployment")).line
                document.complain((*path, "deployment"), f"{short(word)} stands on line {line} already; keep one")
            first.setdefault(word, index)
        _check_prompts(document, path, one, folder)
        haproxy = one.get("haproxy")
        if isinstance(haproxy, dict):
            _check_haproxy(document, (*path, "haproxy"), haproxy)
            place = (str(haproxy.get("socket")), str(haproxy.get("backend")))
            if place in backends:
                line = document.place(("rollouts", "deployments", backends[place], "haproxy", "backend")).line
                message = f"is the one of line {line}; two deployments in one backend would undo each other's weights"
                document.complain((*path, "haproxy", "backend"), message)
            backends.setdefault(place, index)


def rollout_warnings(fleet: Fleet, environ: Mapping[str, str]) -> list[str]:
    """What is valid and still will not work as meant; empty when nothing is."""
    policy = fleet.rollouts
    found = []
    proven = [name for name in policy.approvers if environ.get(secret_name(name))]
    if policy.must_prove_approver and policy.approvers and not proven:
        wanted = ", ".join(secret_name(name) for name in policy.approvers)
        found.append(f"must_prove_approver: nobody can approve, for none of these is set: {wanted}")
    urls = {target.url for target in fleet.targets}
    for one in policy.deployments:
        found += _haproxy_warnings(one, urls, policy.blast_radius.max_candidate_replicas)
        found += _remote_warnings(one, environ)
    return found


def _remote_warnings(one: DeploymentRollouts, environ: Mapping[str, str]) -> list[str]:
    """Of targets that another control plane runs."""
    found = []
    if one.kubernetes is not None and one.kubernetes.gateway is None:
        found.append(
            f"{one.deployment}: kubernetes.gateway is not set, so errors that clients saw are not judged; name the "
            "metrics page of the gateway's proxy"
        )
    if one.orchestrator is not None and not environ.get(one.orchestrator.token_variable):
        found.append(
            f"{one.deployment}: {one.orchestrator.token_variable} is not set, and the orchestrator at "
            f"{one.orchestrator.url} takes no request without its token"
        )
    return found


def _haproxy_warnings(one: DeploymentRollouts, urls: set[str], max_candidates: int) -> list[str]:
    if one.haproxy is None:
        return []
    found = []
    unwatched = [server.server for server in one.haproxy.stable if server.metrics not in urls]
    if unwatched:
        found.append(
            f"{one.deployment}: the metrics page of {', '.join(unwatched)} is no target, so margins and stakes come "
            "from the minutes before the rollout and not from the stored past; add it under targets"
        )
    stable, candidates = len(one.haproxy.stable), len(one.haproxy.candidates)
    if candidates < stable:
        found.append(
            f"{one.deployment}: {candidates} candidate servers for {stable} stable ones; all traffic needs as many, "
            "and preflight will refuse"
        )
    if stable > max_candidates:
        found.append(
            f"{one.deployment}: all traffic needs {stable} candidates, blast_radius.max_candidate_replicas allows "
            f"{max_candidates}, and preflight will refuse"
        )
    return found


def _check_approvers(document: Document, section: Mapping[str, Value]) -> None:
    approvers = section.get("approvers")
    if not isinstance(approvers, list):
        return
    seen: list[str] = []
    for index, name in enumerate(approvers):
        path: KeyPath = ("rollouts", "approvers", index)
        if not isinstance(name, str):
            continue
        if same_person(name, SERVICE):
            document.complain(path, f"{SERVICE} executes rollouts and may not approve them; name a person")
        twin = next((other for other in seen if same_person(name, other)), None)
        if twin is not None:
            document.complain(path, f"{short(name)} and {short(twin)} mean one person; keep one")
        seen.append(name)


def _check_ages(document: Document, section: Mapping[str, Value]) -> None:
    look, lease = (_number(section.get(key), default) for key, default in (("look_seconds", 5), ("lease_seconds", 30)))
    if look is not None and lease is not None and lease < LOOKS_IN_A_LEASE * look:
        key = "lease_seconds" if "lease_seconds" in section else "look_seconds"
        message = (
            f"a lease of {lease:g} s with a look every {look:g} s is lost to one slow look; "
            f"make lease_seconds at least {LOOKS_IN_A_LEASE * look:g}"
        )
        document.complain(("rollouts", key), message)


def _number(word: Value | None, default: float) -> float | None:
    try:
        return default if word is None else float(str(word))
    except ValueError:
        return None  # the field's own type says it


def _check_prompts(document: Document, path: KeyPath, one: dict[str, Value], folder: Path | None) -> None:
    named = one.get("quality_prompts")
    if not isinstance(named, str) or folder is None:
        return
    file = folder / Path(named).expanduser()
    if not file.is_file():
        message = f'{file} is no file; write JSON lines such as {{"prompt": "2+2=", "expect": "4"}} there'
        document.complain((*path, "quality_prompts"), message)
    one["quality_prompts"] = str(file)


def _check_haproxy(document: Document, path: KeyPath, haproxy: Mapping[str, Value]) -> None:
    for key in ("socket", "state_file"):
        word = haproxy.get(key)
        if isinstance(word, str) and not Path(word).is_absolute():
            message = f"is {short(word)}, a relative path; runs start elsewhere: write it from the root"
            document.complain((*path, key), message)
    candidates = entries_of(haproxy.get("candidates"))
    for arm in ("stable", "candidates"):
        for index, server in entries_of(haproxy.get(arm)).items():
            for key in ("url", "metrics_url"):
                if isinstance(server.get(key), str):
                    check_url(document, (*path, arm, index, key), str(server[key]))
    launch = haproxy.get("launch")
    if not isinstance(launch, list):
        return
    if "{flags}" not in launch:
        document.complain((*path, "launch"), "has no '{flags}', so no change would reach the engine; add it")
    elif len(candidates) > 1 and not any("{port}" in str(part) or "{url}" in str(part) for part in launch):
        document.complain((*path, "launch"), "gives every candidate the same place; add '{port}' or '{url}'")
    for index, server in candidates.items():
        host = urlsplit(str(server.get("url", ""))).hostname
        if host is not None and host not in ("127.0.0.1", "localhost", "::1"):
            message = f"is on {host}, and launch starts processes of this host; leave launch out, or use 127.0.0.1"
            document.complain((*path, "candidates", index, "url"), message)
