"""What findings, alerts, sizes and insights are worth, on recorded pages with known truth.

    python benchmarks/advice_acceptance.py [FOLDER] [--replicas 200] [--parts phases,quiet,...]

FOLDER: more recordings, laid out as in tests/fixtures/recordings; each part that reads recordings is printed for both.
Every phase of the truth table of tests/analysis is judged; a phase that the table does not know is named, not counted.
Thirty quiet minutes: a phase's own pages at their own pace, over and over, each round's counters going on where the
last one ended, so that rates stay what was recorded and nothing looks like a restart; judged every minute on five.
Outages: a loopback server that stops, hangs, or answers wrong is read by the real scraper and the real watch; the 5 s
between scrapes are SIMULATED (nobody waits them out), the time that a scrape takes is real, and the watch looks at
every tenth of a second that its beat can lie behind the scraper's. Insights: the templates of every recorded phase, and
replies right and wrong through the real SDK from a loopback server. The derivation is timed by the benchmarks named.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl
import structlog

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from optiinfra_pipelines.analysis.findings.diagnosis import diagnose
from optiinfra_pipelines.analysis.findings.window import EngineWindow
from optiinfra_pipelines.analysis.insights.evidence import make_pack
from optiinfra_pipelines.analysis.insights.template import template_narrative
from optiinfra_pipelines.analysis.kv_arithmetic import cache_size, shape_from_config
from optiinfra_pipelines.analysis.watch import Look, Watched, watch
from optiinfra_pipelines.domain.findings import FindingKind
from optiinfra_pipelines.domain.fleet import Fleet, Target
from optiinfra_pipelines.domain.insights import EvidencePack, Narrative
from optiinfra_pipelines.engines import normalize
from optiinfra_pipelines.exposition import Reader
from optiinfra_pipelines.sql.loader import load_models
from optiinfra_pipelines.sql.refresh import refresh_all
from resources.scrape.engine_scraper import EngineScraper
from resources.scrape.metrics_endpoint import MetricsEndpoints
from resources.scrape.recent import RecentScrapes
from resources.warehouse import Warehouse
from tests.advice.groq_server import GroqServer, says
from tests.advice.test_insight_writer import GOOD, PACK, UNGROUNDED, Bench
from tests.analysis.findings_recordings import EPOCH, RECORDINGS, five_minutes, going_on, pages_of, phase
from tests.analysis.test_findings_phases import TRUTH, VALUES, VLLM, told
from tests.analysis.test_kv_arithmetic import SMALL_LLAMA
from tests.scrape.loopback import Handler, Loopback, answer, page, silent, status
from tests.sql.harness import empty_warehouse, replay
from tests.sql.test_recorded_phases import HTTP_SECONDS

STEP = timedelta(seconds=5)
FIRST_BAD, SCRAPES = 4, 14
Bad = Callable[[int], Handler]
QUIET = re.compile(r"(idle|light|drained)")
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def row(what: str, measured: str) -> None:
    print(f"{what:<58} {measured}", flush=True)


def phases(root: Path) -> None:
    known = [folder for folder in TRUTH if pages_of(root / folder)]
    found = {folder: told(diagnose(phase(root / folder), VALUES)) for folder in known}
    wrong = [folder for folder in known if found[folder] != TRUTH[folder]]
    trouble = sum(bool(TRUTH[folder]) for folder in known)
    row("recorded phases: right finding, no other", f"{len(known) - len(wrong)} of {len(known)} ({trouble} in trouble)")
    for folder in wrong:
        print(f"    {folder}: {found[folder] or 'nothing'}, truth is {TRUTH[folder] or 'nothing'}")
    timed = {page.parent for page in root.rglob("*.prom") if re.search(r"\d{13}", page.stem)}
    for folder in sorted(timed - {root / known for known in TRUTH}):
        print(f"    not in the truth table: {folder.relative_to(root)}")


def quiet(root: Path) -> None:
    folders = [f for f in TRUTH if QUIET.search(f) and not TRUTH[f] and len(pages_of(root / f)) > 1]
    false: dict[str, set[tuple[str, str]]] = {}
    for folder in folders:
        tables = going_on(root / folder, timedelta(minutes=30))
        for end in (EPOCH + timedelta(minutes=minute) for minute in range(5, 31)):
            if found := told(diagnose(five_minutes(tables, end), VALUES)):
                false.setdefault(folder, set()).update(found)
    row(
        "false findings, 30 min of idle, light, drained pages",
        f"in {len(false)} of {len(folders)} phases, 26 looks each",
    )
    for folder, found in false.items():
        print(f"    {folder}: {found}")


def quantiles(root: Path) -> None:
    """p50, p95 and p99 of TTFT and E2E, all that the client saw answered, against fct_latency_1h."""
    models, kept, strict, untold, misses = load_models(), 0, 0, 0, []
    for truth in sorted(root.rglob("client.json")):
        folder = truth.parent
        pages = [path for path in folder.glob("*.prom") if path.stem.isdigit()]
        answered = [one for one in json.loads(truth.read_text())["requests"] if one.get("status") == 200]
        if not answered or len(pages) < 2:
            continue
        with empty_warehouse() as con:
            refresh_all(con, models, replay(con, pages, "r1")[-1] + timedelta(seconds=1))
            found = con.execute(
                "select metric, p50_lower, p50_upper, p95_lower, p95_upper, p99_lower, p99_upper from fct_latency_1h "
                "where observation_count > 0"
            ).fetchall()
        told_of = {metric: edges for metric, *edges in found}
        for metric, key in (("time_to_first_token_seconds", "ttft"), ("request_duration_seconds", "e2e")):
            if metric not in told_of:
                untold += 1
                continue
            seconds, edges = [one[key] for one in answered], told_of[metric]
            for q, lower, upper in zip((0.5, 0.95, 0.99), edges[::2], edges[1::2], strict=True):
                value = float(np.quantile(seconds, q))
                strict += lower <= value <= upper
                kept += lower <= value <= upper + HTTP_SECONDS
                if not lower <= value <= upper + HTTP_SECONDS:
                    misses.append(f"{folder.relative_to(root)} {key} p{q:.0%}: {value:.3f} not in {lower}-{upper}")
    row(
        "client-side quantiles inside the reported interval",
        f"{kept} of {kept + len(misses)} ({strict} without {HTTP_SECONDS * 1000:.0f} ms for HTTP); no interval stated "
        f"for {untold} histograms that the page lacks or leaves empty",
    )
    for miss in misses:
        print(f"    {miss}")


def outages() -> None:
    """Seconds from the first bad scrape to the alert, per kind of outage, over every offset of the watch."""
    busy = pages_of(RECORDINGS / VLLM / "05_overload_queue_c64_low_kv")[3].read_text()
    html = answer(b"<html>Bad gateway</html>", "Content-Type: text/html")
    kinds: dict[str, Bad | None] = {
        "connection refused": None,
        "no answer": lambda n: silent,
        "HTTP 500": lambda n: status(500),
        "not a metrics page": lambda n: lambda exchange: exchange.send(html),
        "half of all requests fail": lambda n: page(moved(busy, n, failed=20 * (n - FIRST_BAD + 1))),
    }
    told_in = {kind: told_after(busy, bad) for kind, bad in kinds.items()}
    for kind, seconds in told_in.items():
        print(f"    {kind:<27} {min(seconds):4.1f} to {max(seconds):4.1f} s")
    p95 = float(np.quantile(list(chain(*told_in.values())), 0.95))
    row("hard outage, first bad scrape to alert", f"p95 {p95:.1f} s, longest {max(map(max, told_in.values())):.1f} s")
    stall = told_after(busy, lambda n: page(moved(busy, FIRST_BAD - 1)))
    row("no token while requests run, to alert", f"{min(stall):.1f} to {max(stall):.1f} s (20 s are waited on purpose)")


def moved(text: str, n: int, failed: int = 0) -> str:
    """A busy page n scrapes later: 20 requests and 400 tokens more at each, and `failed` errors in all."""

    def more(found: re.Match[str]) -> str:
        name, labels, value = found.groups()
        step = 400 * n if "tokens" in name else {"length": 20 * n, "error": failed}.get(labels.split('"')[3], 0)
        return f"{name}{labels} {float(value) + step}"

    counters = "generation_tokens_total|iteration_tokens_total_(?:sum|count)|request_success_total"
    return re.sub(rf"^(vllm:(?:{counters}))(\{{.*\}}) (\S+)$", more, text, flags=re.MULTILINE)


def told_after(busy: str, bad: Bad | None) -> list[float]:
    """The server is well for FIRST_BAD scrapes, then answers with `bad`, or is gone."""
    seen: list[tuple[datetime, Look]] = []
    with ExitStack() as stack:
        server = Loopback({})
        stack.push(server) if bad else None
        server.__enter__()
        fleet = Fleet(targets=(Target(name="r0", url=server.url("/metrics"), deployment="chat"),))
        recent, scraper = RecentScrapes(fleet), EngineScraper(fleet, stack.enter_context(MetricsEndpoints()))
        for n in range(SCRAPES):
            if n < FIRST_BAD:
                server.routes["/metrics"] = page(moved(busy, n))
            elif bad is not None:
                server.routes["/metrics"] = bad(n)
            elif n == FIRST_BAD:
                server.__exit__()
            begun = time.monotonic()
            recent.remember(scraper.collect(EPOCH + n * STEP))
            took = timedelta(seconds=time.monotonic() - begun)
            seen.append((EPOCH + n * STEP + took, recent.watched()[0].looks[-1]))
    return [seconds_to_tell(seen, timedelta(seconds=tenth / 10)) for tenth in range(50)]


def seconds_to_tell(seen: Sequence[tuple[datetime, Look]], offset: timedelta) -> float:
    """The watch looks `offset` after each scrape begins, at what had come by then."""
    for n in range(SCRAPES):
        now = EPOCH + n * STEP + offset
        looks = [look for at, look in seen if at <= now]
        if watch([Watched("r0", "chat", "live", looks)], {}, VALUES)[0]:
            return (now - EPOCH - FIRST_BAD * STEP).total_seconds()
    raise SystemExit("an outage was not told")


def unknowns(root: Path) -> None:
    """Every recorded trouble with parts of its pages taken away, late, lost or impossible: is it ever called well?"""
    folders = [f for f in TRUTH if TRUTH[f] and pages_of(root / f) and not f.endswith("09_after_restart")]
    for kind, spoil in (("missing", missing), ("stale", stale), ("partial", partial), ("contradictory", contradictory)):
        cases = crashes = 0
        well: list[str] = []
        found = abstained = 0
        for folder in folders:
            truth = {FindingKind(one) for one, _ in TRUTH[folder]}
            for title, spoiled in spoil(phase(root / folder)):
                cases += 1
                try:
                    diagnosis = diagnose(spoiled, VALUES)
                except Exception as error:  # a crash of any kind is what is counted here
                    crashes += 1
                    well.append(f"{folder} {title}: {type(error).__name__}: {error}")
                    continue
                named = truth & {finding.kind for finding in diagnosis.findings}
                found += named == truth
                lost = truth - named
                abstained += bool(lost) and (not lost & diagnosis.judged)
                others = {finding.kind for finding in diagnosis.findings} & {FindingKind.RESTARTED}
                if lost & diagnosis.judged and not others:
                    well.append(f"{folder} {title}: called well")
                reasons = {one.kind for one in diagnosis.abstentions if one.reason}
                if not lost <= reasons | diagnosis.judged:
                    well.append(f"{folder} {title}: neither judged nor left open with a reason")
        row(
            f"{kind} inputs in recorded troubles",
            f"{cases} cases: found all the same {found}, left open with a reason {abstained}, called well or without a "
            f"reason {len(well) - crashes}, crashes {crashes}",
        )
        for one in well:
            print(f"    {one}")


Spoiled = Iterator[tuple[str, EngineWindow]]


def missing(whole: EngineWindow) -> Spoiled:
    """Without any one column, any one histogram, or all that a page tells of requests."""
    known = [c for c, dtype in whole.samples.schema.items() if dtype == pl.Float64 and whole.samples[c].count()]
    for column in known:
        nothing = pl.lit(None).cast(pl.Float64).alias(column)
        yield f"without {column}", replace(whole, samples=whole.samples.with_columns(nothing))
    for metric in whole.histograms["metric"].unique():
        yield f"without {metric}", replace(whole, histograms=whole.histograms.filter(pl.col("metric") != metric))
    blank = [pl.lit(None).cast(pl.Float64).alias(c) for c in known]
    yield "without a value", replace(whole, samples=whole.samples.with_columns(blank), histograms=whole.histograms[:0])


def stale(whole: EngineWindow) -> Spoiled:
    """Nothing was read since: one, two and ten minutes."""
    for minutes in (1, 2, 10):
        yield f"{minutes} min ago", replace(whole, end=whole.end + timedelta(minutes=minutes))


def partial(whole: EngineWindow) -> Spoiled:
    """Every second, two of three, and all but the first or the last two scrapes failed."""
    times = whole.scrapes["scraped_at"].to_list()
    kept_of = {
        "half lost": times[::2],
        "two thirds lost": times[::3],
        "only the first two": times[:2],
        "only the last two": times[-2:],
        "one": times[-1:],
    }
    for title, kept in kept_of.items():
        is_kept = pl.col("scraped_at").is_in(kept)
        failed = pl.when(is_kept).then(pl.col("is_up")).otherwise(pl.lit(False)).alias("is_up")
        yield (
            title,
            replace(
                whole,
                scrapes=whole.scrapes.with_columns(failed),
                samples=whole.samples.filter(is_kept),
                histograms=whole.histograms.filter(is_kept),
            ),
        )


def contradictory(whole: EngineWindow) -> Spoiled:
    """Values that cannot be, and values that gainsay each other."""
    known = [c for c, dtype in whole.samples.schema.items() if dtype == pl.Float64 and whole.samples[c].count()]
    for column in known:
        for title, value in (("NaN", math.nan), ("infinite", math.inf), ("negative", -1.0)):
            spoiled = whole.samples.with_columns(pl.lit(value).alias(column))
            yield f"{column} {title}", replace(whole, samples=spoiled)
    if "kv_cache_usage_ratio" in known:
        five = whole.samples.with_columns(pl.lit(5.0).alias("kv_cache_usage_ratio"))
        yield "KV cache used five times over", replace(whole, samples=five)
    totals = [c for c in known if c.endswith("_total")]
    backwards = whole.samples.with_columns(pl.col(c).reverse().over("engine_rank") for c in totals)
    yield "counters that run backwards", replace(whole, samples=backwards)
    if "requests_running" in known:
        nobody = whole.samples.with_columns(pl.lit(0.0).alias("requests_running"))
        yield "tokens made while nothing runs", replace(whole, samples=nobody)


def sizes(root: Path) -> None:
    """Of every page that tells its KV cache size in tokens, by the recorded model's config.json."""
    equal = total = 0
    for path in sorted((root / VLLM).rglob("*.prom")):
        page_rows = normalize(Reader().read(path.read_text()), target="t", scraped_at=EPOCH).rows["raw_engine_configs"]
        for settings in (value for one in page_rows for value in one if isinstance(value, dict)):
            if "kv_cache_size_tokens" not in settings:
                continue
            size = cache_size(
                shape_from_config(SMALL_LLAMA),
                float(settings["kv_cache_memory_bytes"]),
                block_size_tokens=int(settings["block_size"]),
                kv_dtype=settings["cache_dtype"],
                blocks_override=int(settings["num_gpu_blocks_override"]),
            )
            total += 1
            equal += size.tokens == int(settings["kv_cache_size_tokens"])
    row("KV arithmetic equal to the engine's own size, to the token", f"{equal} of {total} pages")


def insights() -> None:
    """Numbers that cannot be found again in the cited evidence, by a reading that shares nothing with the check."""
    written: list[tuple[Narrative, EvidencePack]] = []
    for folder in (folder for folder in TRUTH if pages_of(RECORDINGS / folder)):
        made = diagnose(phase(RECORDINGS / folder), VALUES)
        standing = [finding.model_copy(update={"until": None}) for finding in made.findings]
        pack = make_pack(standing, [], made.abstentions)
        written.append((template_narrative(pack), pack))
    used = []
    with tempfile.TemporaryDirectory() as home:
        warehouse = Warehouse(Path(home), clock=lambda: EPOCH)
        for content in (GOOD, *(content for content, _ in UNGROUNDED.values())):
            with warehouse.connect() as connection:
                for table in ("insights", "insight_calls", "insight_pauses"):
                    connection.execute(f"drop table if exists {table}")
            with GroqServer([says(content)]) as server:
                insight = Bench(warehouse).write(server)
            used.append(insight.writer == "model")
            written.append((insight.narrative, PACK))
    read = [(number, found) for narrative, pack in written for number, found in numbers(narrative, pack)]
    lost = [number for number, found in read if not found]
    row("insight numbers not found in evidence", f"{len(lost)} of {len(read)} in {len(written)} insights {lost or ''}")
    row("replies let through", f"right {sum(used[:1])} of 1, wrong {sum(used[1:])} of {len(used[1:])}")


def numbers(narrative: Narrative, pack: EvidencePack) -> Iterator[tuple[str, bool]]:
    items = {item.id: item for item in pack.items}
    for sentence in chain(*(getattr(narrative, section) for section in type(narrative).model_fields)):
        cited = [items[name] for name in sentence.evidence]
        text = " ".join([*(one.says for one in cited), *(" ".join((one.id, one.title, *one.names)) for one in cited)])
        stated = set(NUMBER.findall(text))
        facts = [abs(fact.value) for one in cited for fact in one.facts]
        for number in NUMBER.findall(sentence.text):
            value, decimals = float(number.replace(",", "")), len(number.partition(".")[2])
            # As it is, as a percentage, and as milliseconds.
            is_fact = any(round(fact * scale, decimals) == value for fact in facts for scale in (1, 100, 1000))
            yield number, number in stated or is_fact


def derivation(replicas: int) -> None:
    here = Path(__file__).parent
    commands = (["judge_fleet.py", str(replicas)], ["derive_recommendations.py", "--replicas", str(replicas)])
    texts = [
        subprocess.run([sys.executable, here / name, *more], capture_output=True, text=True, check=True).stdout
        for name, *more in commands
    ]
    patterns = (r"whole refresh ([\d.]+) s wall ([\d.]+)", r"one window.*? ([\d.]+) s wall +([\d.]+) s")
    (wall, cpu), (more_wall, more_cpu) = (
        map(float, re.findall(pattern, text)[0]) for pattern, text in zip(patterns, texts, strict=True)
    )
    row(
        f"full derivation, {replicas} replicas",
        f"{wall + more_wall:.1f} s wall, {cpu + more_cpu:.1f} s CPU: findings {wall:.1f} and {cpu:.1f}, "
        f"recommendations and ledger of one window {more_wall:.1f} and {more_cpu:.1f}",
    )


def main() -> None:
    parts = ("phases", "quiet", "quantiles", "sizes", "unknowns", "outages", "insights", "derivation")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--replicas", type=int, default=200)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=parts, help=",".join(parts))
    options = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    for root in (RECORDINGS, options.folder):
        if root is not None:
            print("recordings of this repository" if root == RECORDINGS else f"recordings under {root}")
            for part in (phases, quiet, quantiles, sizes, unknowns):
                if part.__name__ in options.parts:
                    part(root)
    for name, alone in (("outages", outages), ("insights", insights)):
        if name in options.parts:
            alone()
    if "derivation" in options.parts:
        derivation(options.replicas)


if __name__ == "__main__":
    main()
