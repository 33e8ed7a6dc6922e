"""Remote telemetry over real loopback HTTP: exporters that serve, lie or are gone; a Prometheus-compatible server."""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import httpx
import polars as pl
import pytest

from optiinfra_pipelines.domain.fleet import Host
from optiinfra_pipelines.sql.sources import raw_tables
from resources.scrape.metrics_endpoint import MetricsEndpoints
from resources.telemetry.exporters import TABLES, ExporterTelemetry
from resources.telemetry.prometheus import PrometheusHost, PrometheusTelemetry, SeriesOf

NOW = datetime(2026, 11, 20, 15, 0, tzinfo=UTC)
NODE_PAGE = (
    Path(__file__).parent.parent / "fixtures" / "node_exporter" / "real_debian12_ne1.5.0_scrape1.prom"
).read_text()
GPU_PAGE = """
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-a",modelName="NVIDIA H100",hostname="g1"} 91
DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-a",modelName="NVIDIA H100",hostname="g1"} 300.5
DCGM_FI_DEV_GPU_UTIL{gpu="1",UUID="GPU-b",modelName="NVIDIA H100",hostname="g1"} 0
"""
Row = dict[str, object]


@dataclass
class Server:
    """A real HTTP server: path -> (status, body); POSTed forms are kept. A callable body is made from the form."""

    pages: dict[str, tuple[int, object]]
    forms: list[dict[str, str]] = field(default_factory=list)

    def __enter__(self) -> "Server":
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, form: dict[str, str]) -> None:
                status, body = server.pages.get(self.path, (404, "nothing here"))
                text = str(body(form)) if callable(body) else str(body)
                self.send_response(status)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers["Content-Length"])).decode()
                form = {key: values[0] for key, values in parse_qs(sent).items()}
                server.forms.append(form)
                self.answer(form)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class' name
                """Tests print nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def endpoints() -> Iterator[MetricsEndpoints]:
    with MetricsEndpoints() as shared:
        yield shared


def host(name: str, **exporters: str) -> Host:
    return Host.model_validate({"name": name, **exporters})


def rows(frames: object, table: str) -> list[Row]:
    assert isinstance(frames, dict)
    frame = frames[table]
    assert isinstance(frame, pl.DataFrame)
    assert frame.schema == raw_tables()[table].polars_schema
    return frame.to_dicts()


def test_a_fleet_of_good_and_bad_exporters(endpoints: MetricsEndpoints) -> None:
    """Each failure is one row that names its cause; the others' rows are complete."""
    pages: dict[str, tuple[int, object]] = {
        "/gpu": (200, GPU_PAGE),
        "/node": (200, NODE_PAGE),
        "/broken": (200, 'DCGM_FI_DEV_GPU_TEMP{gpu="0",...} 3\n'),
        "/other": (200, "python_info 1\n"),
        "/anonymous": (200, 'DCGM_FI_DEV_GPU_TEMP{gpu="0"} 30\n'),
        "/500": (500, "boom"),
    }
    with socket.create_server(("127.0.0.1", 0)) as unused:
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}/metrics"
    with Server(pages) as server:
        hosts = [
            host("good", dcgm_exporter=f"{server.url}/gpu", node_exporter=f"{server.url}/node"),
            host("broken", dcgm_exporter=f"{server.url}/broken"),
            host("other", dcgm_exporter=f"{server.url}/other", node_exporter=f"{server.url}/other"),
            host("anonymous", dcgm_exporter=f"{server.url}/anonymous"),
            host("failing", node_exporter=f"{server.url}/500"),
            host("gone", dcgm_exporter=closed, node_exporter=closed),
            host("without"),
        ]
        frames = ExporterTelemetry(hosts, endpoints).collect(NOW)

    assert set(frames) == {table for tables in TABLES.values() for table in tables}
    gpus = {row["gpu_uuid"]: row for row in rows(frames, "raw_gpu_samples")}
    assert {uuid: row["gpu_utilization_ratio"] for uuid, row in gpus.items()} == {"GPU-a": 0.91, "GPU-b": 0.0}
    assert gpus["GPU-b"]["power_watts"] is None
    states = {row["host"]: row for row in rows(frames, "raw_gpu_collections")}
    assert {name: row["status"] for name, row in states.items()} == {
        "good": "ok",
        "broken": "error",
        "other": "error",
        "anonymous": "error",
        "gone": "unreachable",
    }
    assert (states["good"]["gpu_count"], states["gone"]["gpu_count"]) == (2, None)
    assert str(states["broken"]["detail"]).startswith("malformed: line 1")
    assert "is this dcgm-exporter" in str(states["other"]["detail"])
    assert "UUID" in str(states["anonymous"]["detail"])
    assert str(states["gone"]["detail"]).startswith("connect_refused")
    (node,) = rows(frames, "raw_host_samples")
    assert (node["host"], node["load_1m"]) == ("good", 5.27)
    assert {row["device"] for row in rows(frames, "raw_host_devices")} == {"vda", "eth0", "/"}
    outcomes = {row["host"]: (row["status"], row["detail"]) for row in rows(frames, "raw_host_collections")}
    assert outcomes["good"] == ("ok", None)
    assert outcomes["failing"][0] == "error"
    assert "500" in str(outcomes["failing"][1])
    assert "is this node_exporter" in str(outcomes["other"][1])
    assert outcomes["gone"][0] == "unreachable"


def test_only_the_exporters_asked_for_are_scraped(endpoints: MetricsEndpoints) -> None:
    """The GPU sensor and the host sensor each have their own source."""
    with Server({"/gpu": (200, GPU_PAGE), "/node": (200, NODE_PAGE)}) as server:
        both = host("h", dcgm_exporter=f"{server.url}/gpu", node_exporter=f"{server.url}/node")
        frames = ExporterTelemetry([both], endpoints, ["node_exporter"]).collect(NOW)

    assert set(frames) == {"raw_host_samples", "raw_host_devices", "raw_host_collections"}
    assert len(rows(frames, "raw_host_samples")) == 1


def test_a_boot_time_that_moves_by_a_second_keeps_the_boot(endpoints: MetricsEndpoints) -> None:
    """Between two scrapes the clock was disciplined: counters of the two are still one boot's."""
    pages: dict[str, tuple[int, object]] = {"/node": (200, "node_boot_time_seconds 1000000000\nnode_load1 1\n")}
    with Server(pages) as server:
        source = ExporterTelemetry([host("h", node_exporter=f"{server.url}/node")], endpoints)
        first = rows(source.collect(NOW), "raw_host_samples")[0]
        pages["/node"] = (200, "node_boot_time_seconds 1000000001\nnode_load1 1\n")
        second = rows(source.collect(NOW + timedelta(seconds=5)), "raw_host_samples")[0]
        pages["/node"] = (200, "node_boot_time_seconds 1000005000\nnode_load1 1\n")
        third = rows(source.collect(NOW + timedelta(seconds=10)), "raw_host_samples")[0]

    assert first["boot_id"] == second["boot_id"] != third["boot_id"]


def test_the_doctor_hears_what_is_missing(endpoints: MetricsEndpoints) -> None:
    """One description per exporter, with the line to paste."""
    with Server({"/gpu": (200, GPU_PAGE)}) as server:
        hosts = [host("g", dcgm_exporter=f"{server.url}/gpu"), host("x", node_exporter=f"{server.url}/none")]
        gpu, node = ExporterTelemetry(hosts, endpoints).describe(NOW)

    assert (gpu.host, gpu.exporter, gpu.status, gpu.gpu_count) == ("g", "dcgm", "ok", 2)
    assert any("DCGM_FI_PROF_SM_ACTIVE" in missing.remedy for missing in gpu.missing)
    assert (node.exporter, node.status, node.missing) == ("node_exporter", "error", [])
    assert "404" in str(node.detail)


def matrix(*series: tuple[dict[str, str], list[tuple[datetime, float]]]) -> str:
    result = [
        {"metric": labels, "values": [[at.timestamp(), str(value)] for at, value in points]}
        for labels, points in series
    ]
    return json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}})


def gpu_series(hostname: str, uuid: str = "GPU-a") -> dict[str, str]:
    return {"__name__": "DCGM_FI_DEV_POWER_USAGE", "Hostname": hostname, "UUID": uuid, "gpu": "0"}


def prometheus(server: Server, *hosts: PrometheusHost) -> PrometheusTelemetry:
    return PrometheusTelemetry(server.url, hosts, ["dcgm"], catch_up=timedelta(minutes=1))


G1 = PrometheusHost("one", gpus=SeriesOf("Hostname", "g1"))
G2 = PrometheusHost("two", gpus=SeriesOf("Hostname", "g2"))


def test_a_server_is_asked_once_for_all_hosts_and_for_raw_samples() -> None:
    """Rows carry the time of the server's scrape; a range selector has no ghosts of dead exporters."""
    at = [NOW - timedelta(seconds=30), NOW - timedelta(seconds=15)]
    body = matrix((gpu_series("g1"), [(at[0], 300.0), (at[1], 310.0)]), (gpu_series("g2"), [(at[1], 70.0)]))
    with Server({"/api/v1/query": (200, body)}) as server:
        frames = prometheus(server, G1, G2).collect(NOW)
        (form,) = server.forms

    found = {(row["host"], row["sampled_at"]): row["power_watts"] for row in rows(frames, "raw_gpu_samples")}
    assert found == {("one", at[0]): 300.0, ("one", at[1]): 310.0, ("two", at[1]): 70.0}
    assert form["query"].startswith('{__name__=~"DCGM_FI_(DEV|PROF)_.+",Hostname=~"g1|g2"}[')
    assert [row["gpu_count"] for row in rows(frames, "raw_gpu_collections")] == [1, 1]


def test_a_host_the_server_hears_no_more_is_unreachable() -> None:
    """The server answers, the exporter behind it is dead: that must not look like a healthy silence."""
    body = matrix((gpu_series("g1"), [(NOW - timedelta(seconds=20), 300.0)]))
    pages: dict[str, tuple[int, object]] = {"/api/v1/query": (200, body)}
    with Server(pages) as server:
        source = prometheus(server, G1, G2)
        first = {row["host"]: row["status"] for row in rows(source.collect(NOW), "raw_gpu_collections")}
        pages["/api/v1/query"] = (200, matrix())
        statuses = []
        for seconds in (60, 120, 180, 240):
            frames = source.collect(NOW + timedelta(seconds=seconds))
            statuses.append(rows(frames, "raw_gpu_collections")[0])

    assert first == {"one": "ok", "two": "unreachable"}
    assert [row["status"] for row in statuses] == ["ok", "ok", "unreachable", "unreachable"]
    assert "14:59:40" in str(statuses[-1]["detail"])
    assert statuses[-1]["gpu_count"] is None


def test_what_a_failed_tick_missed_is_asked_again() -> None:
    """The cursor moves only with an answer."""
    pages: dict[str, tuple[int, object]] = {"/api/v1/query": (503, "Service Unavailable")}
    with Server(pages) as server:
        source = prometheus(server, G1)
        failed = rows(source.collect(NOW), "raw_gpu_collections")[0]
        pages["/api/v1/query"] = (200, matrix((gpu_series("g1"), [(NOW, 1.0)])))
        source.collect(NOW + timedelta(seconds=30))
        source.collect(NOW + timedelta(seconds=35))
        widths = [form["query"].rpartition("[")[2] for form in server.forms]

    assert (failed["status"], "503" in str(failed["detail"])) == ("error", True)
    assert widths == ["55001ms]", "85001ms]", "5001ms]"]


def test_a_long_absence_is_caught_up_in_pieces() -> None:
    """An hour away is read oldest first, a quarter of an hour a tick, and says so."""
    with Server({"/api/v1/query": (200, matrix())}) as server:
        source = PrometheusTelemetry(server.url, [G1], ["dcgm"], catch_up=timedelta(hours=1))
        details = [rows(source.collect(NOW), "raw_gpu_collections")[0]["detail"] for _ in range(4)]
        ends = [float(form["time"]) for form in server.forms]

    assert ends == [NOW.timestamp() - 2700, NOW.timestamp() - 1800, NOW.timestamp() - 900, NOW.timestamp() - 5]
    assert details[0] == "catching up: read until 2026-11-20 14:15:00 UTC"
    assert "no sample" in str(details[3])


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (
            400,
            '{"status":"error","errorType":"bad_data","error":"parse error"}',
            "HTTP 400: the server refused: bad_data",
        ),
        (200, "<html>login</html>", "not JSON"),
        (404, "404 page not found", "HTTP 404"),
    ],
)
def test_a_server_that_refuses_says_why(status: int, body: str, reason: str) -> None:
    """The cause is in the row of every host that it serves."""
    with Server({"/api/v1/query": (status, body)}) as server:
        told = rows(prometheus(server, G1, G2).collect(NOW), "raw_gpu_collections")

    assert [row["status"] for row in told] == ["error", "error"]
    assert all(reason in str(row["detail"]) for row in told)


def test_a_server_that_is_gone_is_unreachable() -> None:
    """Nothing listens: a row, not an exception."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    source = PrometheusTelemetry(f"http://127.0.0.1:{port}", [G1], ["dcgm"])

    (row,) = rows(source.collect(NOW), "raw_gpu_collections")
    assert row["status"] == "unreachable"
    assert str(row["detail"]).startswith("connect_refused")


def test_a_server_that_never_answers_costs_its_deadline_once() -> None:
    """Two kinds of exporters behind a hung server: the second is not waited for."""
    hosts = [PrometheusHost("one", gpus=SeriesOf("Hostname", "g1"), node=SeriesOf("instance", "g1:9100"))]
    with socket.create_server(("127.0.0.1", 0)) as hung:
        source = PrometheusTelemetry(f"http://127.0.0.1:{hung.getsockname()[1]}", hosts, deadline_seconds=1.0)
        started = time.monotonic()
        frames = source.collect(NOW)

    assert time.monotonic() - started < 2.0
    assert rows(frames, "raw_gpu_collections")[0]["status"] == "unreachable"
    assert rows(frames, "raw_host_collections")[0]["status"] == "unreachable"


@pytest.mark.engine
def test_a_real_prometheus_gives_what_its_exporters_gave(tmp_path: Path) -> None:
    """A real server scrapes a real node_exporter and a GPU page; every scrape arrives once."""
    programs = [shutil.which(name) for name in ("prometheus", "prometheus-node-exporter")]
    if None in programs:
        pytest.skip("prometheus and prometheus-node-exporter are not installed")
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    with Server({"/metrics": (200, GPU_PAGE)}) as gpu:
        targets = {"gpu": gpu.url.removeprefix("http://"), "node": f"127.0.0.1:{ports[0]}"}
        jobs = [{"job_name": job, "static_configs": [{"targets": [at]}]} for job, at in targets.items()]
        config = {"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))
        commands = [
            [
                str(programs[0]),
                f"--config.file={tmp_path}/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/data",
                f"--web.listen-address=127.0.0.1:{ports[1]}",
            ],
            [str(programs[1]), f"--web.listen-address=127.0.0.1:{ports[0]}"],
        ]
        running = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
        try:
            hosts = [PrometheusHost("g", SeriesOf("hostname", "g1"), SeriesOf("instance", targets["node"]))]
            url = f"http://127.0.0.1:{ports[1]}"
            source = PrometheusTelemetry(url, hosts, catch_up=timedelta(minutes=1))
            gpus: list[Row] = []
            nodes: list[Row] = []
            deadline = time.monotonic() + 60
            while (len(gpus) < 6 or len(nodes) < 3) and time.monotonic() < deadline:
                frames = source.collect(datetime.now(UTC))
                gpus += rows(frames, "raw_gpu_samples")
                nodes += rows(frames, "raw_host_samples")
                threading.Event().wait(0.5)
            plain = httpx.get(f"{url}/api/v1/query", params={"query": "node_boot_time_seconds"}).json()
        finally:
            for process in running:
                process.kill()
                process.wait()

    moments = sorted({row["sampled_at"] for row in gpus}, key=str)
    assert len(gpus) == 2 * len(moments), "two GPUs a scrape, no scrape twice"
    assert {row["power_watts"] for row in gpus} == {300.5, None}
    assert {row["cpu_count"] for row in nodes} == {os.cpu_count()}
    assert f"booted-{plain['data']['result'][0]['value'][1]}" == nodes[0]["boot_id"]
