"""A real Kubernetes control plane on loopback: etcd, kube-apiserver and kube-controller-manager as processes.

Real: admission, defaults, schemas of the Gateway API's own CRDs, server-side apply, rights (RBAC), Deployments,
ReplicaSets and garbage collection. PLAYED here: the scheduler and the kubelet (a pod is a process of the fake engine on
a loopback address of its own, see `kube_pods`) and a gateway's controller (it takes up every route).

OPTIINFRA_KUBE_BIN is a folder with the three programs, OPTIINFRA_KUBE_CRDS the Gateway API's CRDs as one YAML file.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from tests.rollouts.haproxy_kit import free_ports
from tests.rollouts.kube_pods import Node

Json = dict[str, Any]
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager")
BIN, CRDS = os.environ.get("OPTIINFRA_KUBE_BIN"), os.environ.get("OPTIINFRA_KUBE_CRDS")
RIGHTS = Path(__file__).parents[2] / "docs" / "kubernetes-rbac.yaml"
NAMESPACE = "llm"
START_SECONDS = 120.0
LOOK_SECONDS = 0.1
CONTROLLERS = "deployment-controller,replicaset-controller,garbage-collector-controller"
# Kind as our objects have it -> where the API keeps it.
PATHS = {
    "namespaces": "/api/v1/namespaces",
    "nodes": "/api/v1/nodes",
    "services": f"/api/v1/namespaces/{NAMESPACE}/services",
    "serviceaccounts": f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts",
    "pods": f"/api/v1/namespaces/{NAMESPACE}/pods",
    "events": f"/api/v1/namespaces/{NAMESPACE}/events",
    "deployments": f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments",
    "replicasets": f"/apis/apps/v1/namespaces/{NAMESPACE}/replicasets",
    "httproutes": f"/apis/gateway.networking.k8s.io/v1/namespaces/{NAMESPACE}/httproutes",
    "roles": f"/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}/roles",
    "rolebindings": f"/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}/rolebindings",
    "customresourcedefinitions": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
}


def missing() -> str | None:
    """Why no control plane can be started here; None when one can."""
    if BIN is None or CRDS is None:
        return "set OPTIINFRA_KUBE_BIN and OPTIINFRA_KUBE_CRDS; tests/rollouts/kube_real.py says to what"
    absent = [name for name in PROGRAMS if not (Path(BIN) / name).exists()]
    return f"{BIN} has no {', '.join(absent)}" if absent else None


class TakenUp:
    """Weights and pods as the gateway last saw them, a tenth of a second ago."""

    def __init__(self) -> None:
        self._pods: list[Json] = []
        self._weights: list[dict[str, int | None]] = [{"chat": 1}]

    def take_up(self, pods: list[Json], routes: list[Json]) -> None:
        self._pods = _serving([one for one in pods if "deletionTimestamp" not in one["metadata"]])
        for found in routes:
            self._weights = _weights(found)

    def weights(self) -> list[dict[str, int | None]]:
        return self._weights

    def all(self, plural: str) -> list[Json]:
        assert plural == "pods"
        return self._pods


def _serving(pods: list[Json]) -> list[Json]:
    """Pods with an address, each with its Deployment's name: the owning ReplicaSet's without its hash."""
    for pod in pods:
        pod["of"] = pod["metadata"]["ownerReferences"][0]["name"].rsplit("-", 1)[0]
    return [pod for pod in pods if (pod.get("status") or {}).get("podIP")]


def _weights(found: Json) -> list[dict[str, int | None]]:
    return [{ref["name"]: ref.get("weight") for ref in rule["backendRefs"]} for rule in found["spec"]["rules"]]


class RealServer:
    """Starts everything in a folder; the same surface as the tests' own server. `token` has the documented rights."""

    def __init__(self, folder: Path, node: Node) -> None:
        self._folder, self._node = folder, node
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stop = threading.Event()
        self._running: dict[str, str] = {}
        # Made by the API server at its first start, with the authority that signed it.
        self._certificate = folder / "certificates" / "apiserver.crt"
        self._admin = "admin-of-the-tests"
        self.flowing = TakenUp()
        etcd, peer, api = free_ports(3)
        self.url = f"https://127.0.0.1:{api}"
        try:
            self._start(etcd, peer, api)
        except BaseException:
            self.close()
            raise
        self._player = threading.Thread(target=self._play, daemon=True)
        self._player.start()

    def close(self) -> None:
        self._stop.set()
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
        self._node.end_all()

    # --- for tests ---------------------------------------------------------------------------------------

    @property
    def cluster(self) -> Json:
        """As a kubeconfig names it."""
        return {"server": self.url, "certificate-authority": str(self._certificate)}

    def put(self, plural: str, body: Json) -> Json:
        """Create an object as kubectl would."""
        return self._ask("POST", PATHS[plural], body)

    def get(self, plural: str, name: str) -> Json | None:
        try:
            return self._ask("GET", f"{PATHS[plural]}/{name}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def all(self, plural: str) -> list[Json]:
        """Objects of a kind, none of them ending; a pod says which Deployment it is `of`."""
        items: list[Json] = self._ask("GET", PATHS[plural])["items"]
        there = [one for one in items if "deletionTimestamp" not in one["metadata"]]
        return _serving(there) if plural == "pods" else there

    def weights(self, name: str = "chat") -> list[dict[str, int | None]]:
        found = self.get("httproutes", name)
        assert found is not None
        return _weights(found)

    def take_rights_away(self) -> None:
        """The documented RoleBinding is gone."""
        self._ask("DELETE", f"{PATHS['rolebindings']}/optiinfra-rollouts", {})

    def version(self) -> str:
        return str(self._ask("GET", "/version")["gitVersion"])

    def until_taken_up(self, name: str, seconds: float = 30.0) -> None:
        """Wait until the gateway has seen a route as it is."""
        until = time.monotonic() + seconds
        while not ((self.get("httproutes", name) or {}).get("status") or {}).get("parents"):
            assert time.monotonic() < until, f"route {name} was not taken up"
            time.sleep(LOOK_SECONDS)

    def until_ready(self, name: str, replicas: int, seconds: float = 120.0) -> None:
        """Wait until a Deployment has so many ready pods."""
        until = time.monotonic() + seconds
        while True:
            found = self.get("deployments", name)
            ready = int(((found or {}).get("status") or {}).get("readyReplicas") or 0)
            if ready == replicas:
                return
            assert time.monotonic() < until, f"{name}: {ready} of {replicas} pods are ready"
            time.sleep(LOOK_SECONDS)

    # --- the control plane -------------------------------------------------------------------------------

    def _start(self, etcd: int, peer: int, api: int) -> None:
        folder = self._folder
        folder.mkdir(parents=True)
        key, public, tokens = folder / "sa.key", folder / "sa.pub", folder / "tokens.csv"
        make = {"check": True, "capture_output": True}
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], **make)
        subprocess.run(["openssl", "rsa", "-in", str(key), "-pubout", "-out", str(public)], **make)
        tokens.write_text(f'{self._admin},admin,1,"system:masters"\n')
        store, peers = f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{peer}"
        self._run(
            "etcd", f"--data-dir={folder / 'etcd'}", f"--listen-client-urls={store}",
            f"--advertise-client-urls={store}", f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}", f"--initial-cluster=default={peers}",
        )  # fmt: skip
        self._run(
            "kube-apiserver", f"--etcd-servers={store}", "--bind-address=127.0.0.1", f"--secure-port={api}",
            f"--cert-dir={folder / 'certificates'}", f"--token-auth-file={tokens}", "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.0.0.0/24", f"--service-account-key-file={public}",
            f"--service-account-signing-key-file={key}", "--service-account-issuer=https://tests.invalid",
            "--disable-admission-plugins=ServiceAccount", "--endpoint-reconciler-type=none",
        )  # fmt: skip
        self._until_answers("/readyz")
        config = folder / "admin.kubeconfig"
        config.write_text(json.dumps(self._kubeconfig(self._admin)))
        self._run(
            "kube-controller-manager", f"--kubeconfig={config}", f"--controllers={CONTROLLERS}",
            "--leader-elect=false", "--secure-port=0",
        )  # fmt: skip
        for crd in yaml.safe_load_all(Path(str(CRDS)).read_text()):
            if crd and crd["kind"] == "CustomResourceDefinition" and crd["spec"]["names"]["plural"] == "httproutes":
                self.put("customresourcedefinitions", crd)
        self._ask("POST", PATHS["namespaces"], {"metadata": {"name": NAMESPACE}})
        self._ask("POST", PATHS["nodes"], {"metadata": {"name": "played"}})
        self._until_answers(PATHS["httproutes"])
        for one in yaml.safe_load_all(RIGHTS.read_text()):
            self.put(f"{one['kind'].lower()}s", one)
        account = f"{PATHS['serviceaccounts']}/optiinfra/token"
        self.token = str(self._ask("POST", account, {"spec": {"expirationSeconds": 3600}})["status"]["token"])

    def _kubeconfig(self, token: str) -> Json:
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": self.cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }

    def _run(self, program: str, *flags: str) -> None:
        with (self._folder / f"{program}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen([str(Path(str(BIN)) / program), *flags], stdout=log, stderr=subprocess.STDOUT)
            )

    def _until_answers(self, path: str) -> None:
        until = time.monotonic() + START_SECONDS
        while not self._answers(path):
            ended = [one.args for one in self._processes if one.poll() is not None]
            assert not ended, f"ended at once: {ended}; see the logs in {self._folder}"
            assert time.monotonic() < until, f"{path} does not answer; see the logs in {self._folder}"
            time.sleep(LOOK_SECONDS)

    def _answers(self, path: str) -> bool:
        try:
            self._ask("GET", path)
        except OSError:
            return False
        return True

    def _ask(self, method: str, path: str, body: Json | None = None, kind: str = "application/json") -> Json:
        headers = {"Authorization": f"Bearer {self._admin}", "Content-Type": kind}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)
        trusted = ssl.create_default_context(cafile=str(self._certificate))
        with urllib.request.urlopen(request, timeout=10, context=trusted) as reply:
            text = reply.read()
        answer: Json = {} if text == b"ok" else json.loads(text)
        return answer

    # --- what is played ------------------------------------------------------------------------------------

    def _play(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            try:
                pods = self._ask("GET", PATHS["pods"])["items"]
                routes = self._ask("GET", PATHS["httproutes"])["items"]
                self.flowing.take_up(pods, routes)
                for pod in pods:
                    self._play_pod(pod)
                for found in routes:
                    self._play_gateway(found)
            except OSError:
                # Gone meanwhile, moved meanwhile, or the server is stopping: looked at again.
                continue

    def _play_pod(self, pod: Json) -> None:
        name = pod["metadata"]["name"]
        where = f"{PATHS['pods']}/{name}"
        if "deletionTimestamp" in pod["metadata"]:
            self._node.end(pod)
            self._ask("DELETE", where, {"gracePeriodSeconds": 0})
            return
        if not pod["spec"].get("nodeName"):
            self._ask("POST", f"{where}/binding", {"metadata": {"name": name}, "target": {"name": "played"}})
        if name not in self._running:
            self._running[name] = self._node.run(pod)
        status = pod.get("status") or {}
        if status.get("phase") == "Running" or not self._node.is_up(self._running[name]):
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        containers = [
            {
                "name": one["name"], "image": one["image"], "imageID": "", "ready": True, "started": True,
                "restartCount": 0, "state": {"running": {"startedAt": now}},
            }
            for one in pod["spec"]["containers"]
        ]  # fmt: skip
        conditions = [
            {"type": kind, "status": "True", "lastTransitionTime": now}
            for kind in ("Initialized", "Ready", "ContainersReady", "PodScheduled")
        ]
        body = {
            "phase": "Running", "startTime": now, "podIP": self._running[name], "conditions": conditions,
            "podIPs": [{"ip": self._running[name]}], "containerStatuses": containers,
        }  # fmt: skip
        self._ask("PATCH", f"{where}/status", {"status": body}, "application/merge-patch+json")

    def _play_gateway(self, found: Json) -> None:
        generation, parents = found["metadata"]["generation"], (found.get("status") or {}).get("parents") or []
        seen = {one["observedGeneration"] for parent in parents for one in parent["conditions"]}
        if seen == {generation}:
            return
        refs = [ref["name"] for rule in found["spec"]["rules"] for ref in rule.get("backendRefs") or []]
        absent = [name for name in refs if self.get("services", name) is None]
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

        def condition(kind: str, reason: str, message: str = "") -> Json:
            return {
                "type": kind, "status": "False" if message else "True", "reason": reason, "message": message,
                "observedGeneration": generation, "lastTransitionTime": now,
            }  # fmt: skip

        resolved = condition("ResolvedRefs", "BackendNotFound", f"no service {', '.join(absent)}") if absent else (
            condition("ResolvedRefs", "ResolvedRefs")
        )  # fmt: skip
        parent = {
            "parentRef": found["spec"]["parentRefs"][0],
            "controllerName": "tests.invalid/played",
            "conditions": [condition("Accepted", "Accepted"), resolved],
        }
        where = f"{PATHS['httproutes']}/{found['metadata']['name']}/status"
        self._ask("PATCH", where, {"status": {"parents": [parent]}}, "application/merge-patch+json")
