"""A small HTTP server with an engine's API and metrics names, for rollouts under real traffic. It is no engine.

    python tests/rollouts/fake_engine.py --port 9001 [--max-num-seqs 64] [--latency-ms 20] [--error-ratio 0.0]
        [--slow-every 0] [--hit-ratio 0.4]

Latencies are lognormal around --latency-ms; every --slow-every-th request takes 0.2 s more.
With --hit-ratio its prefix cache fills over the first hundred requests. /metrics has vLLM's names. SIGTERM finishes
what is in flight.
"""

import argparse
import itertools
import json
import math
import random
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--port", type=int, required=True)
    arguments.add_argument("--host", default="127.0.0.1")
    arguments.add_argument("--max-num-seqs", type=int, default=64)
    arguments.add_argument("--latency-ms", type=float, default=20.0)
    arguments.add_argument("--error-ratio", type=float, default=0.0)
    arguments.add_argument("--slow-every", type=int, default=0)
    arguments.add_argument("--hit-ratio", type=float)
    given = arguments.parse_args()
    asked, served = itertools.count(1), itertools.count(1)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    labels = {"model_name": "tiny", "engine": "0"}
    running = Gauge("vllm:num_requests_running", "Running.", list(labels), registry=registry).labels(**labels)
    waiting = Gauge("vllm:num_requests_waiting", "Waiting.", list(labels), registry=registry).labels(**labels)
    waiting.set(0)
    Gauge("vllm:kv_cache_usage_perc", "KV.", list(labels), registry=registry).labels(**labels).set(0.1)
    tokens = Counter("vllm:generation_tokens", "Tokens.", list(labels), registry=registry).labels(**labels)
    done = Counter("vllm:request_success", "Done.", [*labels, "finished_reason"], registry=registry)
    finished = done.labels(**labels, finished_reason="stop")
    first = Histogram(
        "vllm:time_to_first_token_seconds", "First token.", list(labels), registry=registry, buckets=BUCKETS
    ).labels(**labels)
    cache = [
        Counter(f"vllm:prefix_cache_{what}", what, list(labels), registry=registry).labels(**labels)
        for what in ("queries", "hits")
        if given.hit_ratio is not None
    ]
    rng = random.Random(given.port)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(200, generate_latest(registry) if self.path == "/metrics" else b"ok")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with running.track_inprogress():
                seconds = given.latency_ms / 1000 * rng.lognormvariate(0, 0.5)
                is_slow = given.slow_every and next(asked) % given.slow_every == 0
                seconds += 0.2 if is_slow else 0.0
                time.sleep(seconds)
            if rng.random() < given.error_ratio:
                self.answer(500, b"{}")
                return
            first.observe(seconds)
            tokens.inc(8)
            if cache:
                cache[0].inc(100)
                cache[1].inc(round(100 * given.hit_ratio * (1 - math.exp(-next(served) / 30))))
            answer = {"object": "text_completion", "choices": [{"index": 0, "text": f"yes from {given.port}"}]}
            finished.inc()
            self.answer(200, json.dumps(answer).encode())

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "text/plain" if body[:1] != b"{" else "application/json")
            self.send_header("X-Server", str(given.port))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    server = Server((given.host, given.port), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
