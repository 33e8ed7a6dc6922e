"""The documented Role grants what rollouts ask for, and nothing that they do not."""

from pathlib import Path

import yaml

from resources.rollouts.targets.kubernetes import api
from resources.rollouts.targets.kubernetes.api import APPLY, Resource
from tests.rollouts import kube_kit
from tests.rollouts.kube_kit import FLAGS
from tests.rollouts.kube_server import Request

ROLE = Path(__file__).parents[2] / "docs" / "kubernetes-rbac.yaml"
GROUP = "inference.networking.k8s.io"


def verbs(request: Request) -> set[str]:
    """What the API's authorization asks for; an apply may create."""
    has_name = request.path.split("/namespaces/")[1].count("/") > 1
    if request.method == "GET":
        return {"get" if has_name else "list"}
    made = {"create"} if request.content_type == APPLY and not request.path.endswith("httproutes/chat") else set()
    return {{"POST": "create", "PATCH": "patch", "DELETE": "delete"}[request.method]} | made


def test_the_role_is_exactly_what_a_whole_rollout_asks_for(tmp_path: Path) -> None:
    """One rollout that completes and one on pools; every request of both, by resource and verb."""
    server = kube_kit.cluster()
    target = kube_kit.target(kube_kit.settings(server, tmp_path), in_flight=lambda _: 0)
    target.claim("r-1", 1)
    target.start_candidates(2, FLAGS, 1)
    target.start_candidates(3, FLAGS, 1)
    target.set_share(100.0, 1)
    target.stable_arm()
    assert target.promote("r-1", 1)
    labels = {"app": "chat"}
    server.put("inferencepools", {"metadata": {"name": "chat"}, "spec": {"selector": {"matchLabels": labels}}})
    twin = {
        "metadata": {"name": "chat-candidate"},
        "spec": {"selector": {"matchLabels": {"optiinfra.io/arm": "candidate"}}},
    }
    server.put("inferencepools", twin)
    server.put(
        "httproutes", kube_kit.route({"backendRefs": [{"group": GROUP, "kind": "InferencePool", "name": "chat"}]})
    )
    more = kube_kit.settings(server, tmp_path, backend_kind="InferencePool", backend_group=GROUP)
    kube_kit.target(more).claim("r-2", 2)
    server.close()
    known = {one.plural: one for one in vars(api).values() if isinstance(one, Resource)}
    asked: dict[tuple[str, str], set[str]] = {}
    for request in server.requests:
        resource = known[request.path.split("/namespaces/llm/")[1].split("/")[0]]
        asked.setdefault((resource.group, resource.plural), set()).update(verbs(request))

    [role] = [one for one in yaml.safe_load_all(ROLE.read_text()) if one["kind"] == "Role"]
    granted = {(rule["apiGroups"][0], rule["resources"][0]): set(rule["verbs"]) for rule in role["rules"]}
    assert asked == granted
