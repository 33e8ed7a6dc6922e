"""The orchestrator's contract: the document is valid OpenAPI, and what is asked and answered keeps to it."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from openapi_spec_validator import validate

from optiinfra_pipelines.domain.rollout_targets import OrchestratorSettings
from resources.rollouts.targets import StaleTokenError, TargetError
from resources.rollouts.targets.orchestrator import client as client_module
from resources.rollouts.targets.orchestrator.client import OrchestratorClient
from resources.rollouts.targets.orchestrator.target import OrchestratorTarget
from tests.rollouts.orchestrator_server import CONTRACT, Fault, OrchestratorServer
from tests.rollouts.orchestrator_server import contract as read_contract

FLAGS: dict[str, str | None] = {"max_num_seqs": "128", "enable_chunked_prefill": "", "swap_space": None}
VARIABLE = "OPTIINFRA_ORCHESTRATOR_TOKEN"


@pytest.fixture
def server() -> Iterator[OrchestratorServer]:
    made = OrchestratorServer()
    yield made
    made.close()
    assert made.broken == []


def connected(server: OrchestratorServer, environ: dict[str, str] | None = None) -> OrchestratorTarget:
    settings = OrchestratorSettings(url=server.url)
    given = {VARIABLE: server.token} if environ is None else environ
    return OrchestratorTarget(settings, "chat", OrchestratorClient(settings, given, sleep=lambda _: None))


@pytest.fixture
def target(server: OrchestratorServer) -> OrchestratorTarget:
    return connected(server)


def test_the_document_is_valid_openapi() -> None:
    validate(yaml.safe_load(CONTRACT.read_text()))


def test_the_contract_of_the_tests_sees_what_breaks_it() -> None:
    """Held against the document: a share of 101 %, a key too short, an answer without what it must have."""
    contract = read_contract()
    found = contract.operation("PUT", "/v1/deployments/chat/share")
    assert found is not None
    operation, values = found
    headers = {"Fencing-Token": "1", "If-Match": '"v1"', "Idempotency-Key": "short"}
    faults = contract.request_faults(operation, values, headers, {"percent": 101})
    assert [one.split(":")[0] for one in faults] == ["setShare Idempotency-Key", "setShare body"]
    assert any("'percent' is a required property" in one for one in contract.answer_faults(operation, 200, {}, None))
    assert "setShare answer 200: no ETag" in contract.answer_faults(operation, 200, {}, None)


def test_a_whole_walk_of_shares_there_and_back(server: OrchestratorServer, target: OrchestratorTarget) -> None:
    target.claim("r-1", 1)
    target.start_candidates(2, FLAGS, 1)
    assert server.flags == FLAGS
    assert [one.server for one in target.started_arm()] == ["candidate-0", "candidate-1"]
    assert target.is_alive("candidate-0")
    assert len(target.stable_arm()) == 3
    for percent in (1.0, 50.0, 100.0):
        target.set_share(percent, 1)
        assert target.observe().percent == percent
    with pytest.raises(TargetError, match="refuses DELETE /v1/deployments/chat/candidates: status 409"):
        target.stop_candidates(1)
    target.set_share(0.0, 1)
    assert target.drain(1)
    target.stop_candidates(1)

    assert target.observe().candidates == 0
    assert [name for name, _ in server.done] == [
        "claim", "startCandidates", "setShare", "setShare", "setShare", "rollBack", "stopCandidates",
    ]  # fmt: skip


def test_a_promotion_is_asked_for_until_the_old_replicas_are_out(
    server: OrchestratorServer, target: OrchestratorTarget
) -> None:
    target.claim("r-1", 1)
    target.start_candidates(3, FLAGS, 1)
    target.set_share(100.0, 1)
    server.drains_at_once = False
    assert not target.promote("r-1", 1)
    server.drains_at_once = True
    assert target.promote("r-1", 1)


def test_what_moved_between_reading_and_writing_is_read_again(
    server: OrchestratorServer, target: OrchestratorTarget
) -> None:
    """A replica came up meanwhile: 412, then the share is set on what is so now. Somebody who never rests is named."""
    target.claim("r-1", 1)
    target.start_candidates(1, FLAGS, 1)
    moves = iter([True, True, False])
    server.before_change = lambda *_: server.move() if next(moves) else None
    target.set_share(10.0, 1)
    assert target.observe().percent == 10
    server.before_change = lambda *_: server.move()

    with pytest.raises(TargetError, match="moved 6 times while share was being changed"):
        target.set_share(20.0, 1)
    target.set_share(0.0, 1)
    assert target.observe().percent == 0


def test_one_who_was_replaced_in_the_middle_changes_nothing(server: OrchestratorServer) -> None:
    """The token rises between reading and writing: told by 409, and by the answer that is read after it."""
    old, new = connected(server), connected(server)
    old.claim("r-1", 1)
    old.start_candidates(1, FLAGS, 1)
    done: list[Any] = []

    def meanwhile(method: str, path: str) -> None:
        if not done:
            done.append(path)
            new.claim("r-1", 2)

    server.before_change = meanwhile
    with pytest.raises(StaleTokenError, match="token 1 is stale; 2 owns"):
        old.set_share(50.0, 1)
    for act in (lambda: old.set_share(0.0, 1), lambda: old.drain(1), lambda: old.stop_candidates(1)):
        with pytest.raises(StaleTokenError):
            act()
    assert new.observe().percent == 0
    assert new.observe().candidates == 1


def test_what_was_done_and_not_answered_is_not_done_twice(
    server: OrchestratorServer, target: OrchestratorTarget
) -> None:
    """The connection is cut after the change: the same key comes again and gets the first answer."""
    target.claim("r-1", 1)
    server.faults = [Fault("PUT", "candidates", is_done=True)]
    target.start_candidates(2, FLAGS, 1)

    assert [name for name, _ in server.done] == ["claim", "startCandidates"]
    assert server.asked.count(("PUT", "/v1/deployments/chat/candidates")) == 2


def test_what_is_busy_is_asked_again_within_its_patience(
    server: OrchestratorServer, target: OrchestratorTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults = [
        Fault("GET", "chat", 429, retry_after=1),
        Fault("GET", "chat", 500),
        Fault("GET", "chat", 503),
        Fault("GET", "chat"),
    ]
    assert target.observe().percent == 0
    monkeypatch.setattr(client_module, "PATIENCE_SECONDS", 0.05)
    server.faults = [Fault("GET", "chat", 503, times=999)]

    with pytest.raises(TargetError, match="did not answer GET /v1/deployments/chat in 0 s: status 503: made to fail"):
        target.observe()


def test_an_orchestrator_that_hangs_costs_its_timeout(
    server: OrchestratorServer, target: OrchestratorTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "PATIENCE_SECONDS", 0.3)
    target._client._client.timeout = 0.1
    server.faults = [Fault("GET", "chat", times=99, hang_seconds=0.4)]

    with pytest.raises(TargetError, match="ReadTimeout"):
        target.observe()


@pytest.mark.parametrize(
    ("environ", "says"),
    [({}, f"set {VARIABLE} in the environment"), ({VARIABLE: "wrong"}, f"check the token in {VARIABLE}")],
)
def test_a_missing_or_wrong_token_is_told_without_it(
    server: OrchestratorServer, environ: dict[str, str], says: str
) -> None:
    with pytest.raises(TargetError, match=says) as refused:
        connected(server, environ).observe()
    assert "wrong" not in str(refused.value)


def test_a_deployment_it_does_not_know_is_named(server: OrchestratorServer) -> None:
    settings = OrchestratorSettings(url=server.url)
    target = OrchestratorTarget(settings, "other", OrchestratorClient(settings, {VARIABLE: server.token}))

    with pytest.raises(TargetError, match=r"knows no /v1/deployments/other .*check `deployment`"):
        target.observe()
