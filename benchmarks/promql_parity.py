"""The PromQL macros against a real Prometheus server, point by point.

    python benchmarks/promql_parity.py      # needs `prometheus` and `promtool` on PATH (Debian: apt install prometheus)

The same samples (missed scrapes, resets, a late start, a sparse series) go into a Prometheus data directory through
promtool and into DuckDB; rate, increase, delta and histogram_quantile are asked over two hours on a one-minute grid.
Servers older than 3.0 close ranges on the left and look for a counter's zero point at another place: where the rules of
2 and 3 give different numbers, the server is compared with the rules of its age and the point is counted apart.
Prints points, missing and mismatches; exits 1 on any.
"""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import duckdb
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from optiinfra_pipelines.sql.macros import install_macros
from tests.sql import promql_reference as rules

START = 1_760_000_040  # Unix seconds, on the minute
HOURS = 2
SCRAPE_SECONDS = 10
BOUNDS = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, math.inf]
RANGE_SECONDS = 300
FUNCTIONS = {"rate": "rate(h_bucket[5m])", "increase": "increase(h_bucket[5m])", "delta": "delta(h_bucket[5m])"}
QUANTILES = {
    "histogram_quantile by replica": "histogram_quantile(0.95, sum by (le, replica) (rate(h_bucket[5m])))",
    "histogram_quantile of the fleet": "histogram_quantile(0.95, sum by (le) (rate(h_bucket[5m])))",
}
Series = Mapping[tuple[str, float], list[tuple[float, float]]]
Points = dict[tuple[str, float, int], float]
NO_BOUND = -1.0  # stands for the bound in the key of a quantile


def make_series(replicas: int = 5) -> Series:
    """(replica, upper bound) -> [(Unix seconds, cumulative count)]."""
    random = np.random.default_rng(11)
    series: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for replica in range(replicas):
        counts = np.zeros(len(BOUNDS))
        means = np.full(len(BOUNDS), 0.05) if replica == 3 else np.array([1, 2, 3, 4, 3, 2, 1, 0.3, 0.1])
        for tick in range(HOURS * 3600 // SCRAPE_SECONDS):
            if random.random() < 0.02 or (replica == 4 and tick < 200):
                continue
            if replica and random.random() < 0.01:
                counts[:] = 0
            counts += np.cumsum(random.poisson(means))
            # One replica is scraped exactly on the grid, so that open and closed edges matter.
            at = START + tick * SCRAPE_SECONDS + (0 if replica == 0 else replica * 1.5 + round(random.random(), 3))
            for bound, count in zip(BOUNDS, counts, strict=True):
                series.setdefault((f"r{replica}", bound), []).append((round(at, 3), float(count)))
    return series


@contextmanager
def prometheus(series: Series, folder: Path) -> Iterator[str]:
    """A server over the samples, on a free loopback port; its base URL."""
    lines = ["# TYPE h histogram"]
    for (replica, bound), samples in series.items():
        le = "+Inf" if math.isinf(bound) else str(bound)
        lines += [f'h_bucket{{replica="{replica}",le="{le}"}} {value} {at:.3f}' for at, value in samples]
    (folder / "samples.txt").write_text("\n".join([*lines, "# EOF"]) + "\n")
    (folder / "prometheus.yml").write_text("global: {}\n")
    blocks = [
        "promtool",
        "tsdb",
        "create-blocks-from",
        "openmetrics",
        str(folder / "samples.txt"),
        str(folder / "data"),
    ]
    subprocess.run(blocks, check=True, capture_output=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            "--storage.tsdb.retention.time=50y",
            f"--web.listen-address={address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_ready(f"http://{address}/-/ready", seconds=60)
        yield f"http://{address}"
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(url: str, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(f"{url} did not answer within {seconds} s")


def ask(base: str, path: str) -> dict[str, object]:
    with urllib.request.urlopen(base + path, timeout=60) as answer:
        data: dict[str, object] = json.load(answer)["data"]
    return data


def ask_range(base: str, expression: str) -> Points:
    query = {"query": expression, "start": START, "end": START + HOURS * 3600, "step": 60}
    result = ask(base, "/api/v1/query_range?" + urlencode(query))["result"]
    assert isinstance(result, list)
    return {
        (one["metric"].get("replica", ""), float(one["metric"].get("le", NO_BOUND)), int(at)): float(value)
        for one in result
        for at, value in one["values"]
    }


def ask_duckdb(series: Series) -> dict[str, Points]:
    """The same questions through the macros, by the same keys."""
    con = duckdb.connect()
    con.execute("set timezone = 'UTC'")
    install_macros(con)
    con.execute("create table samples (replica varchar, le double, taken_at timestamptz, v double)")
    for (replica, bound), samples in series.items():
        con.execute(
            "insert into samples select ?, ?, make_timestamptz(round(p[1] * 1e6)::bigint), p[2] "
            "from (select unnest(?::double[][]) as p)",
            [replica, bound, [list(point) for point in samples]],
        )
    con.execute(f"""
        create table answers as
        with windows as (
            select to_timestamp({START}) + to_minutes(m) as ends from range({HOURS * 60 + 1}) as r(m)
        ),
        held as (
            select replica, le, ends, list(taken_at) as times, list(v) as vals
            from samples join windows on taken_at > ends - interval {RANGE_SECONDS} second and taken_at <= ends
            group by all
        )
        select
            replica, le, epoch(ends)::bigint as asked_at,
            promql_rate(times, vals, ends - interval {RANGE_SECONDS} second, ends) as rate,
            promql_increase(times, vals, ends - interval {RANGE_SECONDS} second, ends) as increase,
            promql_delta(times, vals, ends - interval {RANGE_SECONDS} second, ends) as delta
        from held
    """)
    answers = {
        name: points(
            con.execute(f"select replica, le, asked_at, {name} from answers where {name} is not null").fetchall()
        )
        for name in FUNCTIONS
    }
    for name, replica in zip(QUANTILES, ("replica", "''"), strict=True):
        rows = con.execute(f"""
            with added as (
                select {replica} as replica, le, asked_at, sum(rate) as n
                from answers where rate is not null group by all
            )
            select replica, {NO_BOUND}::double, asked_at, histogram_quantile(0.95, list(le), list(n))
            from added group by replica, asked_at
        """).fetchall()
        answers[name] = points(rows)
    return answers


def points(rows: list[tuple[str, float, int, float]]) -> Points:
    return {(replica, le, int(at)): value for replica, le, at, value in rows}


def same(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(left) and math.isnan(right))


def by_old_rules(series: Series, name: str, key: tuple[str, float, int]) -> float | None:
    """What Prometheus 2 says at one point."""
    replica, bound, at = key
    if name in FUNCTIONS:
        # Counted from START, where floats hold whole milliseconds as the server does.
        samples = [(round(taken - START, 3), value) for taken, value in series[replica, bound]]
        end = float(at - START)
        growth = rules.extrapolated(samples, end - RANGE_SECONDS, end, is_counter=name != "delta", generation=2)
        return None if growth is None else growth / (RANGE_SECONDS if name == "rate" else 1)
    sums: dict[float, float] = {}
    for one, upper in series:
        rate = by_old_rules(series, "rate", (one, upper, at)) if replica in ("", one) else None
        if rate is not None:
            sums[upper] = sums.get(upper, 0.0) + rate
    return rules.quantile(0.95, list(sums), list(sums.values()))


def compare(name: str, server: Points, ours: Points, series: Series, generation: int) -> int:
    """Print one line; the number of points that are missing or wrong."""
    wrong, missing, apart = [], [], 0
    for key, value in server.items():
        mine = ours.get(key)
        if mine is not None and same(value, mine):
            continue
        old = by_old_rules(series, name, key) if generation == 2 else None
        if old is not None and same(value, old):
            apart += 1
        elif mine is None:
            missing.append((key, value))
        else:
            wrong.append((key, value, mine))
    print(
        f"{name}: points {len(server)}, equal {len(server) - apart - len(wrong) - len(missing)}, "
        f"older rule {apart}, missing {len(missing)}, mismatches {len(wrong)}",
        *wrong[:2],
        *missing[:2],
    )
    return len(wrong) + len(missing)


def main() -> int:
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        print("not run: prometheus and promtool are not on PATH")
        return 0
    series = make_series()
    ours = ask_duckdb(series)
    with tempfile.TemporaryDirectory() as folder, prometheus(series, Path(folder)) as base:
        version = str(ask(base, "/api/v1/status/buildinfo")["version"])
        generation = 2 if version.startswith("2.") else 3
        print(f"prometheus {version}, duckdb {duckdb.__version__}, {sum(map(len, series.values()))} samples")
        faults = sum(
            compare(name, ask_range(base, expression), ours[name], series, generation)
            for name, expression in {**FUNCTIONS, **QUANTILES}.items()
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
