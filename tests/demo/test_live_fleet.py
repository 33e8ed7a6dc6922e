"""The live demo's parts that need no engine: its traffic's bounds, configurations, its folder, its command line."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from optiinfra_pipelines.cli import main
from optiinfra_pipelines.commands import live_demo
from optiinfra_pipelines.settings import find_paths, load_fleet
from resources.demo.live.engines import MOCKER, measured_load, real_vllm
from resources.demo.live.fleet import MARKER, LiveDemoError, LiveFleet, clear_home
from resources.demo.live.gateways import builtin_config, haproxy_config
from resources.demo.live.model import write_model
from resources.demo.live.replica import commands, environment, metrics_port
from resources.demo.live.traffic import Load, Traffic


class Slow:
    """A server that answers 200 after a while; counts what it has at once."""

    def __init__(self, seconds: float) -> None:
        self.most = self.now = self.requests = 0
        self.is_always_well = False
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    outer.now, outer.requests = outer.now + 1, outer.requests + 1
                    outer.most, number = max(outer.most, outer.now), outer.requests
                time.sleep(seconds)
                with lock:
                    outer.now -= 1
                self.send_response(500 if number % 2 and not outer.is_always_well else 200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def test_traffic_keeps_all_its_bounds_and_counts_every_request_once() -> None:
    """100 requests a second on a server that takes 0.1 s: four in flight, forty in all, answers and losses counted."""
    slow = Slow(0.1)
    with Traffic(slow.url, Load("mock", 100.0, max_in_flight=4, max_requests=40)) as traffic:
        until = time.monotonic() + 20
        while traffic.counts().sent < 40 and time.monotonic() < until:
            time.sleep(0.05)
    counts = traffic.counts()
    slow.server.shutdown()

    assert counts.sent == slow.requests == 40
    assert slow.most <= 4
    assert counts.held_back > 0
    assert counts.answered + counts.failed == 40
    assert counts.lost == {"status 500": 20}


def test_traffic_ends_after_its_time() -> None:
    slow = Slow(0.0)
    with Traffic(slow.url, Load("mock", 50.0, max_seconds=0.3)) as traffic:
        time.sleep(0.6)
        first = traffic.counts().sent
        time.sleep(0.3)
        assert traffic.counts().sent == first
    slow.server.shutdown()


def test_every_byte_is_one_token(tmp_path: Path) -> None:
    write_model(tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]

    assert len(vocabulary) == 256 + 2
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == len(vocabulary)


def test_both_gateways_start_with_the_candidates_at_weight_0(tmp_path: Path) -> None:
    live = LiveFleet(tmp_path / "live", tmp_path / "rollouts")
    built_in = builtin_config(live.settings, live.port)

    assert [one.weight for one in built_in.servers] == [100, 100, 0, 0]
    servers = [line.split()[1:] for line in haproxy_config(live.settings, live.port).splitlines() if " weight " in line]
    assert [(name, int(weight)) for name, _, _, weight in servers] == [(s.name, s.weight) for s in built_in.servers]


def test_nothing_of_a_replica_listens_beyond_loopback(tmp_path: Path) -> None:
    told = environment(tmp_path, 9001, {"DYN_SYSTEM_HOST": "0.0.0.0", "PATH": "/bin"})
    frontend, _ = commands(9000, tmp_path, ["--max-num-seqs", "4"])

    assert {told[f"DYN_{name}_HOST"] for name in ("SYSTEM", "TCP_RPC", "TCP_RESPONSE_STREAM")} == {"127.0.0.1"}
    assert frontend[frontend.index("--http-host") + 1] == "127.0.0.1"


def test_its_fleet_file_is_valid_and_calls_the_engines_simulated(tmp_path: Path) -> None:
    """Every replica there is room for is a target, its metrics page the one that the rollout reads."""
    live = LiveFleet(tmp_path / "live", tmp_path / "rollouts")
    live.write_fleet(tmp_path / "fleet.yaml")
    fleet = load_fleet(tmp_path / "fleet.yaml", {})

    assert {target.source for target in fleet.targets} == {"simulated"}
    assert [target.url for target in fleet.targets] == [one.metrics for one in live.servers]
    assert fleet.rollouts.of("chat").haproxy == live.settings
    assert len({int(one.url.rsplit(":", 1)[1]) for one in live.servers}) == 4
    assert all(metrics_port(int(one.url.rsplit(":", 1)[1])) <= 32_767 for one in live.servers)
    assert "SIMULATED" in (tmp_path / "fleet.yaml").read_text()


def test_the_screen_says_what_is_simulated_and_what_to_launch(tmp_path: Path) -> None:
    live = LiveFleet(tmp_path / "live", tmp_path / "rollouts")
    assert MOCKER.load is not None
    banner = live_demo._banner(live, MOCKER.load, is_scripted=False)

    assert "ENGINES ARE SIMULATED" in banner
    assert "propose_rollout" in banner
    assert all(f"--{flag} {value}" in banner for flag, value in MOCKER.flags.items())


def test_a_real_vllm_is_called_live_and_its_page_is_on_its_own_port(tmp_path: Path) -> None:
    """One replica beside one; what {flags} says comes last on its command line; a wrong path is told before a start."""
    engine = real_vllm(tmp_path / "v" / "bin" / "vllm")
    live = LiveFleet(tmp_path / "live", tmp_path / "rollouts", engine=engine)
    live.write_fleet(tmp_path / "fleet.yaml")
    fleet = load_fleet(tmp_path / "fleet.yaml", {})

    assert [(one.source, one.url) for one in fleet.targets] == [("live", f"{one.url}/metrics") for one in live.servers]
    assert live.settings.launch is not None
    assert live.settings.launch[-1] == "{flags}"
    assert str(tmp_path / "live" / "model") in live.settings.launch
    with pytest.raises(LiveDemoError, match=r"v/bin/vllm is not there; docs/live-demo.md makes it"):
        live.__enter__()


def test_the_load_of_a_real_engine_is_more_than_it_was_seen_to_carry() -> None:
    """Four at once that take 0.05 s each are 80 a second at most: 1.3 times as many are asked for."""
    slow = Slow(0.05)
    slow.is_always_well = True
    load = measured_load(slow.url, real_vllm(Path("vllm")))
    slow.server.shutdown()

    assert slow.most == 4
    assert 20 < load.requests_per_second <= 1.3 * 80
    assert load.max_in_flight == 16


def test_only_its_own_folder_is_emptied(tmp_path: Path) -> None:
    mine, other = tmp_path / "live-demo", tmp_path / "precious"
    clear_home(mine, mine / "rollouts")
    (mine / "old").write_text("x")
    clear_home(mine, mine / "rollouts")
    other.mkdir()
    (other / "data").write_text("x")

    assert [path.name for path in mine.iterdir()] == [MARKER]
    with pytest.raises(LiveDemoError, match="no live demo"):
        clear_home(other, other / "rollouts")
    assert (other / "data").exists()


def test_its_state_is_apart_from_the_fleets_own(tmp_path: Path) -> None:
    environ = {"OPTIINFRA_HOME": str(tmp_path)}
    paths, own = live_demo.settings_of_live_demo(find_paths(environ), environ)

    assert paths.home == tmp_path / "live-demo"
    assert own["OPTIINFRA_FLEET"] == str(paths.fleet_file)


@pytest.mark.parametrize("wrong", [["--script"], ["--gateway", "builtin"], ["--live", "--once"]])
def test_options_that_do_not_go_together_are_refused(wrong: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--home", str(tmp_path), "demo", *wrong])

    assert done.exit_code == 2
    assert "--live" in done.output
