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

from resources.lmcache_controller import LmcacheController, LmcacheError

CACHED = [11, 12, 13, 14]


class Controller(BaseHTTPRequestHandler):
    """Request and answer bodies as lmcache 0.5.6's v1/api_server declares them; one instance, four tokens cached."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = body.get("instance_id", "one") == "one"
        match self.path:
            case "/health" if known:
                self._answer(200, {"event_id": "health1", "error_codes": {"0": 0, "1": 3}})
            case "/lookup":
                held = body["tokens"][:4] == CACHED
                layout = {"one": ["LocalCPUBackend", 4]} if held else {}
                self._answer(200, {"event_id": "Lookup1", "layout_info": layout})
            case "/clear" if known and body["location"] == "LocalCPUBackend":
                self._answer(200, {"event_id": "Clear1", "num_tokens": 4})
            case "/odd/lookup":
                self._answer(200, {"status": "ok"})
            case _:
                self._answer(500, {"detail": f"instance {body.get('instance_id')} not registered"})

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
    """A worker with an error code makes its instance unwell; a prefix has a place and a length; nowhere is empty."""
    with LmcacheController(url) as controller:
        health = controller.health("one")
        assert health.error_codes == {0: 0, 1: 3}
        assert health.is_healthy is False
        assert controller.lookup([*CACHED, 15]).layout_info == {"one": ("LocalCPUBackend", 4)}
        assert controller.lookup([1, 2]).layout_info == {}
        assert controller.clear("one", "LocalCPUBackend").num_tokens == 4


def test_an_instance_without_workers_is_not_well(url: str) -> None:
    """No worker answered: that is unknown, never a pass."""
    with LmcacheController(url) as controller:
        known = controller.health("one")
    assert known.model_copy(update={"error_codes": {}}).is_healthy is None


def test_a_refusal_repeats_the_reason_and_names_the_setting(url: str) -> None:
    """An instance that never registered: the controller's own words, and what to turn on. Tokens are not repeated."""
    with LmcacheController(url) as controller, pytest.raises(LmcacheError, match=r"two not registered.*enable_"):
        controller.health("two")
    with LmcacheController(f"{url}/odd") as controller, pytest.raises(LmcacheError, match="no LMCache controller") as e:
        controller.lookup([987654])
    assert "987654" not in str(e.value)


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
    """Without any instance: nothing is cached anywhere, and asking for one that is not there is refused."""
    with real_controller(tmp_path) as url, LmcacheController(url) as controller:
        assert controller.lookup(list(range(1024))).layout_info == {}
        with pytest.raises(LmcacheError):
            controller.clear("nobody", "LocalCPUBackend")
