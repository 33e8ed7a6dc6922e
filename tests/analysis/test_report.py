"""A fleet report says what is known with its unit, says what is not, and shows fleet text as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache
from html.parser import HTMLParser
from io import StringIO
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from optiinfra_pipelines.analysis.insights.evidence import make_pack
from optiinfra_pipelines.analysis.insights.template import template_narrative
from optiinfra_pipelines.analysis.report.data import Advice, ReportData
from optiinfra_pipelines.analysis.report.document import Card, Document, Grid
from optiinfra_pipelines.analysis.report.html import to_html
from optiinfra_pipelines.analysis.report.markdown import MAX_CHARS, escaped, to_markdown
from optiinfra_pipelines.analysis.report.plots import LatencyLine, latency_svg, load_png, load_svg, states_svg
from optiinfra_pipelines.analysis.report.sections import make_document
from optiinfra_pipelines.analysis.report.values import cell, change, heading, interval, plain, value
from optiinfra_pipelines.commands.report import show
from optiinfra_pipelines.domain.findings import FindingKind, Severity
from optiinfra_pipelines.domain.fleet import Deployment, Objective
from optiinfra_pipelines.domain.insights import Insight
from optiinfra_pipelines.domain.objectives import ObjectiveStatus
from optiinfra_pipelines.domain.recommendations import Accuracy
from tests.advice.insight_cases import NOW, abstention, finding, recommendation, signal

TTFT = Objective(kind="ttft", target_ratio=0.99, threshold_seconds=2.0)
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'-alert(1)-'",
    "</style></svg><script>x</script>",
    "a | b || [x](javascript:alert(1)) ![i](http://evil.example/i.png)",
    "`code` **bold** # head\n- list",
    "[bold red]markup[/] [link=http://evil.example]x[/link]",
    "\x1b[31mred\x1b[0m\x07\x08",
    "\u202egnp.exe",
    "$\\frac{1}{2}$ _x_ ^2",
    "&lt;b&gt; &amp; ]]>",
    "http://evil.example/?a=1",
    "_hidden",
    "",
]


def status(**changes: Any) -> ObjectiveStatus:
    fields: dict[str, Any] = {
        "deployment": "chat-vllm",
        "objective": TTFT,
        "at": NOW,
        "state": "burning",
        "vantage": "engine",
        "edge_seconds": 2.0,
        "good": 300.0,
        "total": 547.0,
        "good_ratio": 300 / 547,
        "remaining_ratio": -3.25,
        "covered_days": 0.01,
        "unseen_requests": None,
        "burn_rates": (),
        "notes": ("judged at the bucket edge 2 s",),
    }
    return ObjectiveStatus(**fields | changes)


def insight(name: str = "vllm-7") -> Insight:
    pack = make_pack([finding(name)], [recommendation()], [abstention()])
    return Insight(
        narrative=template_narrative(pack),
        evidence=pack,
        writer="template",
        reason="GROQ_API_KEY is not set",
        written_at=NOW,
        evidence_hash="e",
        subjects_hash="s",
    )


def fleet_frame(*names: str, **columns: Any) -> pl.DataFrame:
    row: dict[str, Any] = {
        "deployment": "chat-vllm",
        "engine": "vllm",
        "source": "recorded",
        "is_up": True,
        "error_kind_last": None,
        "since_at": NOW - timedelta(minutes=15),
        "requests_per_second": 1.5,
        "generation_tokens_per_second": 110.2,
        "kv_cache_usage_max_ratio": 0.973,
        "requests_waiting_max": 12.0,
        "preemptions": 41.0,
        "p95_seconds": 3.4,
        "p95_lower_seconds": 2.5,
        "p95_upper_seconds": math.inf,
    }
    return pl.DataFrame([{"target": name, **row, **columns} for name in names])


def minutes(name: str, count: int = 5) -> dict[str, list[Any]]:
    return {"target": [name] * count, "minute_at": [NOW - timedelta(minutes=count - n) for n in range(count)]}


def load_frame(*names: str) -> pl.DataFrame:
    return pl.concat(
        pl.DataFrame(
            {
                **minutes(name),
                "kv_cache_usage_max_ratio": [0.1, None, 0.9, 1.0, 0.2],
                "requests_waiting_max": [0.0, 3.0, None, 12.0, 1.0],
            }
        )
        for name in names
    )


def latency_frame(name: str) -> pl.DataFrame:
    return pl.DataFrame(
        {
            **minutes(name),
            "metric": ["time_to_first_token_seconds"] * 5,
            "observation_count": [10.0] * 5,
            "p95_seconds": [0.2, 1.0, 3.0, 9.0, 2.0],
            "p95_lower_seconds": [0.1, 0.5, 2.5, 5.0, 1.0],
            "p95_upper_seconds": [0.25, 1.0, 5.0, math.inf, 2.5],
        }
    )


def without_plots(data: ReportData) -> ReportData:
    """The same without what is drawn: a drawing takes half a second."""
    frames = {name: frame for name, frame in data.frames.items() if name not in ("latency", "load")}
    return replace(data, frames=frames, gpu_states=None, cost=None)


def report(name: str = "vllm-7", **advice: Any) -> ReportData:
    """A full report about one target of that name."""
    claims: dict[str, Any] = {
        "objectives": [status()],
        "findings": [finding(name, severity=Severity.CRITICAL)],
        "abstentions": [abstention(reason=name or "none")],
        "recommendations": [recommendation()],
        "refusals": [],
        "accuracy": [],
        "insight": insight(name),
    }
    return ReportData(
        made_at=NOW,
        since=NOW - timedelta(hours=24),
        deployments=[Deployment(name="chat-vllm", model="m", objectives=(TTFT,))],
        advice=Advice(**claims | advice),
        frames={
            "fleet": fleet_frame(name),
            "latency": latency_frame(name),
            "load": load_frame(name),
            "gpus": pl.DataFrame({"host": [name], "sm_active_mean_ratio": [None], "memory_used_max_bytes": [2**33]}),
            "hosts": pl.DataFrame({"host": [name], "cpu_busy_ratio": [0.25]}),
        },
        gpu_states=pl.DataFrame({"host": [name] * 2, "state": ["active", "idle_held"], "gpu_hours": [3.0, 1.0]}),
        cost=pl.DataFrame({"deployment": [name, "b"], "usd": [4.2, None]}),
    )


@cache
def calm() -> Document:
    return make_document(report())


@cache
def hostile() -> Document:
    """One report in which every hostile name is a target, a subject, a host, a reason and a deployment."""
    reports = [report(name) for name in HOSTILE]

    def together(pick: Callable[[Advice], Sequence[Any] | None]) -> list[Any]:
        return [one for data in reports for one in pick(data.advice) or ()]

    merged = report(
        HOSTILE[0],
        objectives=[status(deployment=name, notes=(name,)) for name in HOSTILE],
        findings=together(lambda advice: advice.findings),
        abstentions=together(lambda advice: advice.abstentions),
    )
    return make_document(
        replace(
            merged,
            frames={
                name: pl.concat([frame for data in reports if (frame := data.frames[name]) is not None])
                for name in merged.frames
            },
            gpu_states=pl.concat([data.gpu_states for data in reports if data.gpu_states is not None]),
        )
    )


class Page(HTMLParser):
    """What a browser would make of the page: elements, their attributes, and text outside of style."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_hostile_names_stay_text_in_html() -> None:
    """Wherever a name goes, it makes no element, no attribute and no address of its own, and is there to be read."""
    page, other = Page(to_html(hostile())), Page(to_html(calm()))

    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in other.elements}
    assert "script" not in {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
        for key in ("href", "src", "xlink:href", "action"):
            assert (attributes.get(key) or "#").startswith(("#", "data:")), (tag, attributes)
    for name in HOSTILE:
        assert " ".join(plain(name).split()) in page.text


def test_the_page_needs_nothing_from_outside() -> None:
    """No address but those of namespaces, and a policy that forbids scripts and requests."""
    html = to_html(calm())

    assert set(re.findall(r"https?://[^\s\"'<>)]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "default-src 'none'" in html
    assert "@import" not in html
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", html)


def test_ids_of_the_page_are_its_own() -> None:
    """Several drawings in one page share no id, and each reference finds its own."""
    html = to_html(calm())
    ids = re.findall(r'\bid="([^"]+)"', html)

    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) | set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)


def test_hostile_names_stay_text_in_markdown() -> None:
    """Tables keep their columns; no link, image, heading or HTML of its own."""
    markdown = to_markdown(hostile())

    assert len(markdown) <= MAX_CHARS + 100
    assert not re.search(r"(?<!\\)\]\(|(?<!\\)!\[|<(?!br)", markdown.replace("&lt;", ""))
    assert "://" not in markdown
    for block in re.split(r"\n\n+", markdown):
        rows = [line for line in block.splitlines() if line.startswith("| ")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1
    headings = [line for line in markdown.splitlines() if line.startswith("#")]
    assert set(headings) <= {f"### {section.title}" for section in calm().sections}


def test_hostile_names_stay_text_in_a_terminal() -> None:
    """No markup of rich's is read, and no control character reaches the terminal."""
    out = StringIO()
    show(hostile(), Console(file=out, force_terminal=False, width=400))

    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", out.getvalue())
    for name in HOSTILE:
        assert plain(name).strip() in out.getvalue()


def test_unknown_is_said_and_never_zero() -> None:
    """NULL, an abstention's value and a table that was not made are words; no None, no nan, no 0 in their place."""
    data = report(
        objectives=[
            status(state="no_data", good=None, total=None, good_ratio=None, remaining_ratio=None, vantage=None)
        ],
        findings=[finding(signals=(signal("queue_seconds", None, "s", "vllm-7", 1.0),))],
    )
    unread = fleet_frame("vllm-7", kv_cache_usage_max_ratio=None, is_up=None, since_at=None)
    document = make_document(replace(without_plots(data), frames={"fleet": unread}))
    page = Page(to_html(document)).text

    assert "None" not in page
    assert "nan" not in re.findall(r"\w+", page)
    assert "never scraped" in page
    [objectives] = [part for part in document.sections[1].parts if isinstance(part, Grid)]
    assert objectives.rows[0][3:7] == ("unknown", "unknown", "unknown", "unknown")
    [card] = [part for part in document.sections[2].parts if isinstance(part, Card)]
    assert card.grids[0].rows[0][:3] == ("queue_seconds", "unknown", "1 s")


def test_nothing_made_differs_from_nothing_found() -> None:
    """Before the first refresh a report says so; after it, that there was nothing, and never that all is well."""
    empty = ReportData(made_at=NOW, since=NOW - timedelta(hours=1))
    none_found = ReportData(
        made_at=NOW, since=NOW - timedelta(hours=1), advice=Advice([], [], [], [], [], [], None), frames={}
    )

    before, after = to_markdown(make_document(empty)), to_markdown(make_document(none_found))
    assert before.count("Not made yet") >= 6
    assert "**unknown** open findings" in before
    assert "**0** open findings" in after
    assert "No finding is open." in after
    assert "nothing is called accurate" in after


def test_sources_are_said_at_the_top() -> None:
    """Recorded and simulated targets are never mistaken for live ones."""
    data = report()
    frame = pl.concat([fleet_frame("a"), fleet_frame("b", source="live"), fleet_frame("c", source="simulated")])
    data.frames["fleet"] = frame  # type: ignore[index]

    assert (
        "1 live, 1 recorded (shows what happened when it was recorded, not now), 1 simulated"
        in make_document(data).subtitle
    )


def test_findings_come_worst_first_with_their_evidence() -> None:
    """Critical before warning; the value, what it was held against, its window, and the rows to fetch again."""
    ended = finding("old-1").model_copy(update={"until": NOW})
    findings = [finding("b-1"), ended, finding("a-1", FindingKind.GPU_FAULT, Severity.CRITICAL)]
    cards = [
        part
        for part in make_document(without_plots(report(findings=findings))).sections[2].parts
        if isinstance(part, Card)
    ]

    assert [card.title for card in cards] == [
        "target a-1: GPU_FAULT (kv_cache_full)",
        "target b-1: MEMORY_PRESSURE (kv_cache_full)",
    ]
    assert cards[1].grids[0].rows[0] == (
        "kv_cache_usage",
        "97.31 %",
        "90 %",
        "5 min to 2026-11-20 16:42 UTC",
        "max(kv_cache_usage_max_ratio) of int_engine_minutes where target = b-1",
    )


def test_a_recommendation_shows_its_interval_and_how_to_undo_it() -> None:
    """Before, change and after as intervals with units; risk, check, undo and gate beside them."""
    [card] = [part for part in calm().sections[3].parts if isinstance(part, Card)]

    assert card.grids[0].rows[0] == (
        "kv_cache_usage",
        "97 %",
        "-48 points to -31 points",
        "49 % to 66 %",
        "arithmetic: half the bytes per token",
    )
    assert {"risk", "verify", "undo", "quality gate"} <= {name for name, _ in card.facts}


def test_no_share_is_shown_below_the_least_n() -> None:
    """Three of three right is no accuracy."""
    few = Accuracy(
        kind="REPLICAS",
        rule="r",
        n=3,
        minimum_n=20,
        is_enough=False,
        right_sign_share_ratio=1.0,
        right_sign_low_ratio=0.4,
        right_sign_high_ratio=1.0,
        coverage_share_ratio=1.0,
        coverage_low_ratio=0.4,
        coverage_high_ratio=1.0,
        concurrent_n=0,
        applied_n=4,
        unverifiable_n=1,
        realized_usd_per_hour=None,
        says="3 measured: too few to call it accurate",
    )
    [grid] = make_document(without_plots(report(accuracy=[few]))).sections[4].parts
    assert isinstance(grid, Grid)

    assert grid.rows[0][2:6] == ("3 of 4 applied", "unknown (needs 20)", "unknown (needs 20)", "unknown")


def test_a_thousand_findings_make_a_page_that_can_be_read() -> None:
    """The first ones in full, the others in a table, nothing lost; the short form keeps its size."""
    findings = [finding(f"vllm-{number}") for number in range(1000)]
    document = make_document(without_plots(report(findings=findings)))

    html = to_html(document)
    assert all(f"vllm-{number}" in html for number in range(1000))
    assert len(html) < 1_500_000
    assert len(to_markdown(document)) <= MAX_CHARS + 100


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (value(0.9731, "ratio"), "97.31 %"),
        (value(0.0, "ratio"), "0 %"),
        (value(None, "ratio"), "unknown"),
        (value(math.nan, "s"), "unknown"),
        (value(math.inf, "s"), "past the last bucket"),
        (value(0.0123, "s"), "12.3 ms"),
        (value(3.42, "s"), "3.42 s"),
        (value(720, "s"), "12 min"),
        (value(86_400, "s"), "24 h"),
        (value(8 * 2**30, "B"), "8 GiB"),
        (value(4.2, "USD/h"), "$4.20/h"),
        (value(-4.2, "USD"), "-$4.20"),
        (value(12_345.6, "tokens/s"), "12,346 tokens/s"),
        (value(12, "requests"), "12 requests"),
        (change(-0.31, "ratio"), "-31 points"),
        (change(0.0, "s"), "±0 s"),
        (interval(2.5, math.inf, "s"), "over 2.5 s"),
        (interval(None, None, "s"), "unknown"),
        (interval(None, 2.0, "s"), "unknown to 2 s"),
        (cell("kv_cache_usage_max_ratio", 0.5), "50 %"),
        (cell("is_up", False), "no"),
        (cell("usd_per_million_tokens", None), "unknown"),
        (cell("usd_per_million_tokens", 1.25), "$1.25"),
        (cell("gpu_hours", 3.5), "3.5 GPU-hours"),
        (heading("usd_per_million_tokens"), "USD per million tokens"),
        (heading("memory_used_max_bytes"), "memory used max"),
    ],
)
def test_each_value_has_its_unit(shown: str, expected: str) -> None:
    """By the unit of the signal, or the ending of the column's name."""
    assert shown == expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("1.07/s", "1.07/s"),
        ("-48 points", "-48 points"),
        ("1. first", "1\\. first"),
        ("- item", "\\- item"),
        ("---", "\\---"),
        ("a_b | c", "a\\_b \\| c"),
        ("see http://x/", "see http\\[:\\]//x/"),
        ("<b>&amp;", "&lt;b\\>&amp;amp;"),
    ],
)
def test_markdown_is_escaped_where_it_would_act(text: str, shown: str) -> None:
    """Numbers stay as they are; what begins a list, a rule, a cell, a link or HTML does not."""
    assert escaped(text) == shown


@given(st.text(max_size=200))
def test_escaped_text_has_no_live_markup(text: str) -> None:
    """Every character that markdown acts on is behind a backslash, and none is lost."""
    shown = escaped(plain(text))

    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]|~<#]", shown)
    assert "\n" not in shown


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.floats(min_value=0, max_value=1e6), st.floats(min_value=0, max_value=1e6) | st.just(math.inf)),
        min_size=1,
        max_size=4,
    ),
    st.text(max_size=30),
    st.none() | st.floats(min_value=1e-3, max_value=1e3),
)
def test_any_latency_can_be_drawn(points: list[tuple[float, float]], name: str, threshold: float | None) -> None:
    """Zero, huge, past the last bucket, one point, any name: a drawing, and well-formed."""
    rows = pl.DataFrame(
        {
            "minute_at": [NOW + timedelta(minutes=n) for n in range(len(points))],
            "p95_seconds": [min(point) for point in points],
            "p95_lower_seconds": [min(point) for point in points],
            "p95_upper_seconds": [max(point) for point in points],
        }
    )
    svg = latency_svg([LatencyLine(name, rows, threshold)])

    assert svg.startswith("<svg")
    assert "<script" not in svg
    assert "<metadata" not in svg


def test_plots_are_the_same_each_time_and_fit_both_themes() -> None:
    """The same rows give the same bytes; ink and grid are the page's own colors; the PNG stays small."""
    rows = load_frame(*[f"target-{number}" for number in range(40)])

    assert load_svg(rows) == load_svg(rows)
    assert "var(--ink)" in load_svg(rows)
    assert load_png(rows).startswith(b"\x89PNG")
    assert len(load_png(rows)) < 40_000
    states = pl.DataFrame(
        {"host": ["a"], "state": ["a new state"], "gpu_hours": [None]}, schema_overrides={"gpu_hours": pl.Float64}
    )
    assert states_svg(states).startswith("<svg")
