"""The built-in gateway: weights are shares, no change loses a request, and nothing broken off looks whole."""

import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.gateway.pool import Pool, ServerSettings
from resources.gateway.runtime import HELP, answer, dump, restore
from resources.rollouts.targets import TargetError
from resources.rollouts.targets.haproxy import HaproxyTarget
from resources.rollouts.targets.haproxy_socket import RuntimeSocket
from tests.rollouts.haproxy_kit import Clients, Gateway, process_at, request

WEIGHTS = st.lists(st.integers(0, 256), min_size=1, max_size=6)
STATES = st.sampled_from(["ready", "drain", "maint"])


def pool_of(weights: list[int]) -> Pool:
    return Pool.of("chat", [ServerSettings(name=f"s{i}", port=9000 + i, weight=w) for i, w in enumerate(weights)])


@given(WEIGHTS)
def test_each_servers_share_of_a_round_is_its_weight(weights: list[int]) -> None:
    pool = pool_of(weights)
    chosen = Counter(one.name for _ in range(sum(weights)) if (one := pool.choose()) is not None)

    assert chosen == Counter({f"s{place}": weight for place, weight in enumerate(weights) if weight})


@given(WEIGHTS, st.lists(STATES, min_size=6, max_size=6))
def test_only_a_ready_server_that_is_up_and_has_weight_is_chosen(weights: list[int], states: list[str]) -> None:
    pool = pool_of(weights)
    for place in range(len(weights)):
        assert answer(pool, f"set server chat/s{place} state {states[place]}") == ""
    able = {f"s{place}" for place, weight in enumerate(weights) if weight and states[place] == "ready"}
    chosen = pool.choose()

    assert (chosen is None and not able) or (chosen is not None and chosen.name in able)


@given(WEIGHTS, st.lists(STATES, min_size=6, max_size=6), WEIGHTS)
def test_a_dump_restores_weights_and_states(weights: list[int], states: list[str], others: list[int]) -> None:
    pool, again = pool_of(weights), pool_of([1] * len(weights))
    for place in range(len(weights)):
        answer(pool, f"set server chat/s{place} state {states[place]}")
    restore(again, dump(pool) + "broken line\n" + dump(pool_of(others)).replace("chat", "other"))

    assert [(one.weight, one.state) for one in again.servers.values()] == [
        (one.weight, one.state) for one in pool.servers.values()
    ]


@given(st.text(max_size=60))
def test_no_command_raises_and_an_unknown_one_is_told_what_is_known(command: str) -> None:
    assert answer(pool_of([1]), command) == HELP


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    made = Gateway(tmp_path, stable=2, candidates=1, kind="builtin")
    yield made
    made.close()


@pytest.fixture
def target(gateway: Gateway) -> HaproxyTarget:
    return HaproxyTarget(gateway.settings, gateway.folder, gateway.launcher)


def test_the_rollouts_target_drives_it_and_no_change_loses_a_request(gateway: Gateway, target: HaproxyTarget) -> None:
    """25 % and back, a drain, a stop: shares counted at the clients, none lost; a restart keeps the weights."""
    ours = {gateway.settings.candidates[0].url.rsplit(":", 1)[1]}
    target.claim("r-1", 1)
    with Clients(gateway.port, threads=4) as clients:
        target.start_candidates(1, {"max_num_seqs": "128"}, 1)
        until = time.monotonic() + 20
        while not target.gateway_counts()["c0"].is_up or request(int(next(iter(ours)))) is None:
            assert time.monotonic() < until
            time.sleep(0.05)
        target.set_share(25.0, 1)
        # Health is asked every half second: until then the gateway may still hold the candidate for down.
        while not clients.share(ours, 10):
            assert time.monotonic() < until
        assert 0.18 <= clients.share(ours, 200) <= 0.32
        target.set_share(0.0, 1)
        clients.share(ours, 20)
        assert clients.share(ours, 100) == 0
        while not target.drain(1):
            assert time.monotonic() < until
        target.stop_candidates(1)
        clients.share(set(), 20)
    assert clients.lost == 0
    before = target.observe().detail["weights"]
    gateway.kill()
    with pytest.raises(TargetError, match="does not answer"):
        target.observe()
    gateway.start()
    assert target.observe().detail["weights"] == before


def test_a_killed_server_costs_what_was_in_flight_and_nothing_after(gateway: Gateway, target: HaproxyTarget) -> None:
    process = process_at(gateway.settings.stable[0])
    assert process is not None
    process.kill()
    process.wait(5)
    answers = [request(gateway.port) for _ in range(20)]

    assert None not in answers
    assert target.gateway_counts()["s0"].failed >= 1


def test_an_answer_that_breaks_off_reaches_the_client_broken(gateway: Gateway, target: HaproxyTarget) -> None:
    """A server that promises 100 bytes, sends 3 and closes: the client's connection is cut and the failure counted."""
    port = int(gateway.settings.candidates[0].url.rsplit(":", 1)[1])
    with socket.create_server(("127.0.0.1", port)) as server:
        threading.Thread(target=serve_cut, args=(server,), daemon=True).start()
        runtime = RuntimeSocket(gateway.settings.socket)
        for one in gateway.settings.stable:
            runtime.set_state("chat", one.server, "drain")
        runtime.set_weight("chat", "c0", 1)
        until = time.monotonic() + 20
        while runtime.servers("chat")["c0"].status != "UP":
            assert time.monotonic() < until
            time.sleep(0.05)
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=10)
        connection.request("POST", "/v1/completions", body=b"{}")
        reply = connection.getresponse()

        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            reply.read()
        assert runtime.servers("chat")["c0"].failed == 1


def serve_cut(server: socket.socket) -> None:
    """Healthy when asked for health; breaks off every other answer."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        is_check = connection.recv(65536).startswith(b"GET /health")
        length, body = (0, b"") if is_check else (100, b"abc")
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode() + body)
        connection.close()


def test_a_candidate_started_while_the_gateway_was_away_is_not_nobodys(gateway: Gateway, target: HaproxyTarget) -> None:
    """Its process ran, its server could not be told; the next executor finds it, and it gets its share."""
    target.claim("r-1", 1)
    target.start_candidates(1, {}, 1)
    target.drain(1)
    target.stop_candidates(1)
    gateway.kill()
    with pytest.raises(TargetError, match="does not answer"):
        target.start_candidates(1, {"max_num_seqs": "128"}, 1)
    gateway.start()

    again = HaproxyTarget(gateway.settings, gateway.folder, gateway.launcher)
    again.claim("r-1", 2)
    assert again.observe().candidates == 1
    assert [one.server for one in again.started_arm()] == ["c0"]
    port = gateway.settings.candidates[0].url.rsplit(":", 1)[1]
    again.set_share(50.0, 2)
    until = time.monotonic() + 20
    with Clients(gateway.port, threads=2) as clients:
        # The engine starts, and the gateway asks for its health every half second.
        while clients.share({port}, 20) < 0.3:
            assert time.monotonic() < until
