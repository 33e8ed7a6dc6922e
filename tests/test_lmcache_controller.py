"""LMCache's controller over real HTTP: answers mean what its source says, and every failure names its remedy."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from optiinfra_pipelines.analysis.kv_cache.curve import measure_reuse
from resources.lmcache_controller import LmcacheController, LmcacheError
from resources.traces.files import read_requests, succession

RECORDINGS = Path(__file__).parent / "fixtures/recordings/lmcache/0.5.6"
ANSWERS = json.loads((RECORDINGS / "controller/answers.json").read_text())
CACHED = list(range(512))  # what the recorded worker held: two chunks of 256 tokens


class Controller(BaseHTTPRequestHandler):
    """Gives the answer that lmcache_controller 0.5.6 gave to the same call, for `nobody` before a worker registered."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/odd/lookup":
            return self._answer(200, {"status": "ok"})
        calls = ANSWERS["without_instances" if body.get("instance_id") == "nobody" else "with_one_worker"]
        found = [call for call in calls if call["path"] == self.path and call["body"] == body]
        assert found, f"no answer to {self.path} {str(body)[:80]} was recorded"
        return self._answer(found[0]["status"], found[0]["answer"])

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Controller)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_health_lookup_and_clear_say_what_the_controller_said(url: str) -> None:
    """A worker is well; a prefix has a place and a length, the 88 tokens after it do not count; nowhere is empty."""
    with LmcacheController(url) as controller:
        health = controller.health("one")
        assert health.error_codes == {0: 0}
        assert health.is_healthy is True
        assert health.model_copy(update={"error_codes": {0: 0, 1: 3}}).is_healthy is False
        assert controller.lookup(range(600)).layout_info == {"one": ("LocalCPUBackend", len(CACHED))}
        assert controller.lookup([7, 8, 9] * 100).layout_info == {}
        assert controller.clear("one", "LocalCPUBackend").num_tokens == len(CACHED)


def test_an_instance_without_workers_is_not_well(url: str) -> None:
    """The controller answers for one that it never heard of as well: that is unknown, never a pass."""
    with LmcacheController(url) as controller:
        known = controller.health("nobody")
    assert known.error_codes == {}
    assert known.is_healthy is None


def test_a_refusal_repeats_the_reason_and_names_the_setting(url: str) -> None:
    """An instance that never registered: the controller's own words, and what to turn on."""
    with LmcacheController(url) as controller, pytest.raises(LmcacheError, match=r"should be the same.*enable_.*regis"):
        controller.clear("nobody", "LocalCPUBackend")
    with LmcacheController(f"{url}/odd") as controller, pytest.raises(LmcacheError, match="no LMCache controller"):
        controller.lookup([987654])


def test_what_was_sent_is_in_no_error(url: str) -> None:
    """The controller repeats what it did not accept; token ids are user text and stay out of messages."""
    with LmcacheController(url) as controller, pytest.raises(LmcacheError, match=r"status 422: body\.tokens\.0: ") as e:
        controller.lookup(["a word"])  # type: ignore[list-item]
    assert "a word" not in str(e.value)


def test_the_log_of_a_real_server_is_read(tmp_path: Path) -> None:
    """Each prompt of its benchmark was asked twice: eight chunks of 64, and one token more that is none."""
    frames = list(read_requests(RECORDINGS / "lookup_hashes", "lmcache", lambda share: None, succession("lmcache")))
    [rows] = frames
    assert (rows.height, set(rows["block_size"]), set(rows["input_tokens"])) == (24, {64}, {513})
    cold, warm = rows["hash_ids"][::2].to_list(), rows["hash_ids"][1::2].to_list()
    assert cold == warm
    assert measure_reuse(rows).ceiling("token") == pytest.approx(12 * 512 / (24 * 513))


def test_a_controller_that_is_not_there_is_told_by_its_address() -> None:
    """Nobody listens: the address and what should run there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with (
            LmcacheController(f"http://127.0.0.1:{port}") as controller,
            pytest.raises(LmcacheError, match=rf"{port} did not answer health .*lmcache_controller run there"),
        ):
            controller.health("one")


@contextmanager
def real_controller(tmp_path: Path) -> Iterator[str]:
    """`lmcache_controller` of an installed LMCache (pip install lmcache, with a torch), on a free port."""
    program = shutil.which("lmcache_controller")
    if program is None:
        pytest.skip("no lmcache_controller on the path: install LMCache to run against the real one")
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    log = (tmp_path / "controller.log").open("wb")
    process = subprocess.Popen(
        [program, "--host", "127.0.0.1", "--port", str(ports[0]), "--monitor-port",
            str(ports[1])],
        stdout=log, stderr=log,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", ports[0])) == 0:
                    break
            time.sleep(0.5)
        assert process.poll() is None, (tmp_path / "controller.log").read_text(errors="replace")[-2000:]
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        process.terminate()
        process.wait(30)
        log.close()


@pytest.mark.engine
def test_the_real_controller_speaks_so(tmp_path: Path) -> None:
    """Without any instance: nothing is cached anywhere, none is well, and clearing one is refused."""
    with real_controller(tmp_path) as url, LmcacheController(url) as controller:
        assert controller.lookup(list(range(1024))).layout_info == {}
        assert controller.health("nobody").is_healthy is None
        with pytest.raises(LmcacheError, match=r"body\.tokens\.0"):
            controller.lookup(["a word"])  # type: ignore[list-item]
        with pytest.raises(LmcacheError):
            controller.clear("nobody", "LocalCPUBackend")
