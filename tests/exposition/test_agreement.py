"""The parser says what others say, and says the same again when it reads faster.

The reference is prometheus_client, except where it is known to be wrong: it renames counters that lack `_total` (so it
gets the page without the TYPE lines of counters), and takes an exemplar's timestamp for the sample's.
"""

import math
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from optiinfra_pipelines.exposition import ExpositionError, Page, Reader, parse

PAGES = sorted((Path(__file__).parents[1] / "fixtures" / "exposition").glob("*.prom"))
# An excerpt in which somebody wrote `...` for labels: not a page that an exporter sent.
ABRIDGED = "k8saiconf_viettel-ai-platform.prom"

Sample = tuple[str, tuple[tuple[str, str], ...], float | None]


def comparable(name: str, labels: Iterable[tuple[str, str]], value: float) -> Sample:
    """A sample without the order of its labels; NaN, which equals nothing, as None."""
    return name, tuple(sorted(labels)), None if math.isnan(value) else float(value)


def read_samples(page: Page) -> list[Sample]:
    return [comparable(*row) for row in zip(page.layout.names, page.layout.labels, page.values, strict=True)]


def parsed_samples(frame: pl.DataFrame) -> list[Sample]:
    return [
        comparable(name, [(label["name"], label["value"]) for label in labels], value)
        for name, labels, value, _ in frame.iter_rows()
    ]


def reference_samples(text: str) -> list[Sample]:
    plain = re.sub(r"^# TYPE \S+ counter\n", "", text, flags=re.MULTILINE)
    return [
        comparable(found.name, found.labels.items(), found.value)
        for family in text_string_to_metric_families(plain)
        for found in family.samples
    ]


def outcome(reader: Reader, text: str, key: str | None = None) -> str | tuple[object, ...]:
    """All that a reading says: every part of the page, or the whole error."""
    try:
        page = reader.read(text, key)
    except ExpositionError as broken:
        return str(broken)
    values = [repr(value) for value in page.values]
    return page.layout.names, page.layout.labels, values, dict(page.timestamps_ms), dict(page.layout.types)


def parsed_outcome(text: str) -> str | tuple[object, ...]:
    """As `outcome`, by way of the frame, which does not carry the types."""
    try:
        frame = parse(text)
    except ExpositionError as broken:
        return str(broken)
    labels = tuple(tuple((label["name"], label["value"]) for label in row) for row in frame["labels"])
    stamps = {at: stamp for at, stamp in enumerate(frame["timestamp_ms"]) if stamp is not None}
    return tuple(frame["name"]), labels, [repr(value) for value in frame["value"]], stamps


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_recorded_page_reads_as_prometheus_client_reads_it(path: Path) -> None:
    """Names, labels and values; as frame and as page; cold and warm."""
    text = path.read_text()
    expected = sorted(reference_samples(text), key=repr)
    reader = Reader()

    for _ in range(2):
        assert sorted(read_samples(reader.read(text, path)), key=repr) == expected
        assert sorted(parsed_samples(parse(text)), key=repr) == expected


@pytest.mark.parametrize("share", ["first and last of each folder", pytest.param("all", marks=pytest.mark.slow)])
def test_recorded_pages_of_every_exporter_read_as_prometheus_client_reads_them(share: str) -> None:
    """vLLM, SGLang, llama.cpp, Dynamo, LMCache, dcgm-exporter, node_exporter: one reader for them all, read twice."""
    if "OPTIINFRA_DATA" not in os.environ:
        pytest.skip("OPTIINFRA_DATA names no folder with the full set of recorded pages")
    root = Path(os.environ["OPTIINFRA_DATA"]) / "fixtures"
    folders: dict[Path, list[Path]] = {}
    for path in sorted([*root.rglob("*.prom"), root / "node_exporter" / "upstream_e2e-output.txt"]):
        if path.name != ABRIDGED:
            folders.setdefault(path.parent, []).append(path)
    chosen = {path for paths in folders.values() for path in (paths if share == "all" else (paths[0], paths[-1]))}
    reader = Reader()

    assert len(chosen) > 50
    for path in sorted(chosen):
        text = path.read_text()
        cold = read_samples(reader.read(text, path))
        assert sorted(cold, key=repr) == sorted(reference_samples(text), key=repr), path
        assert read_samples(reader.read(text, path)) == cold, path


def test_two_scrapes_of_an_engine_share_a_layout_and_differ_in_values() -> None:
    """The second page is read by the first one's shape and still agrees with the reference."""
    first, second = (path.read_text() for path in PAGES if path.name.startswith("vllm"))
    reader = Reader()

    pages = reader.read(first, "t"), reader.read(second, "t")

    assert pages[0].layout is pages[1].layout
    assert pages[0].values != pages[1].values
    assert sorted(read_samples(pages[1]), key=repr) == sorted(reference_samples(second), key=repr)


def test_thirty_thousand_odd_but_legal_lines_read_as_prometheus_client_reads_them() -> None:
    """Escapes, braces, commas, hashes, quotes, other alphabets, special values, timestamps; each page cold and warm."""
    dice = random.Random(20261120)
    reader = Reader()
    lines_read = 0
    for _ in range(150):
        lines = [legal_line(dice) for _ in range(200)]
        text = "\n".join(lines) + "\n"
        expected = [
            (comparable(found.name, found.labels.items(), found.value), found.timestamp)
            for line in lines
            for family in text_string_to_metric_families(line)
            for found in family.samples
        ]
        for _ in range(2):
            page = reader.read(text)
            stamps = (page.timestamps_ms.get(position) for position in range(len(page.values)))
            seconds = [None if stamp is None else stamp / 1000 for stamp in stamps]
            assert list(zip(read_samples(page), seconds, strict=True)) == expected
        lines_read += len(lines)
    assert lines_read == 30_000


def legal_line(dice: random.Random) -> str:
    name = "m_" + "".join(dice.choices("abc:9", k=dice.randrange(3)))
    labels = {}
    for _ in range(dice.randrange(4)):
        labels[dice.choice("xyz_") + dice.choice(["", "1"])] = "".join(
            dice.choices('abc{}",\\# =\n\té日', k=dice.randrange(7))
        )
    body = dice.choice([",", ", "]).join(f'{label}="{escaped(value)}"' for label, value in labels.items())
    space = dice.choice([" ", " ", "  ", "\t"])
    value = dice.choice(
        ["1", "2.5", "1e9", "-3.5e-07", "NaN", "+Inf", "-Inf", "0.0", "007", repr(dice.random() * 1e12)]
    )
    stamp = dice.choice(["", "", space + str(dice.randrange(10**13)), " -62135596800000", " "])
    return name + (f"{{{body}{dice.choice(['', ','])}}}" if labels else "") + space + value + stamp


def escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def test_the_timestamp_of_an_exemplar_is_not_the_samples() -> None:
    """prometheus_client gives 123.4 s here; the sample has no timestamp, or its own."""
    line = 'm_bucket{le="1"} 8 # {trace_id="x"} 0.5 123400'

    (family,) = text_string_to_metric_families(line)
    page = Reader().read(f'{line}\nm_bucket{{le="1"}} 8 77 # {{trace_id="x"}} 0.5 123.4\n')

    assert family.samples[0].timestamp == 123.4
    assert page.values == [8, 8]
    assert dict(page.timestamps_ms) == {1: 77}


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
BARE_NAME = st.from_regex(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,6}", fullmatch=True)
BARE_LABEL = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,4}", fullmatch=True)
NAME = BARE_NAME | TEXT.filter(bool)
LABELS = st.lists(st.tuples(BARE_LABEL | TEXT.filter(bool), TEXT), max_size=4, unique_by=lambda pair: pair[0])
STAMP = st.none() | st.integers(-(2**63), 2**63 - 1)
SERIES = st.lists(st.tuples(NAME, LABELS, st.floats(), STAMP), max_size=8)


def rendered(name: str, labels: list[tuple[str, str]], value: float, stamp: int | None) -> str:
    """One line of the text format; names that are not bare words are quoted."""
    pairs = [
        (label if re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", label, re.ASCII) else f'"{escaped(label)}"')
        + f'="{escaped(text)}"'
        for label, text in labels
    ]
    is_bare = re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", name, re.ASCII)
    inside = ",".join(pairs if is_bare else [f'"{escaped(name)}"', *pairs])
    return f"{name if is_bare else ''}{{{inside}}} {value!r}" + ("" if stamp is None else f" {stamp}")


@given(SERIES, st.lists(st.floats(), min_size=8, max_size=8))
def test_what_is_written_is_what_is_read(
    series: list[tuple[str, list[tuple[str, str]], float, int | None]], other_values: list[float]
) -> None:
    """Any names, labels, values and timestamps come back exactly, first from the grammar, then by the known shape."""
    series = [entry for entry in series if "__name__" not in dict(entry[1])]
    reader = Reader()
    for values in ([entry[2] for entry in series], other_values[: len(series)]):
        now = [(name, labels, value, stamp) for (name, labels, _, stamp), value in zip(series, values, strict=True)]
        text = "".join(rendered(*entry) + "\n" for entry in now)

        page = reader.read(text)
        frame = parse(text)

        assert page.layout.names == tuple(entry[0] for entry in now)
        assert page.layout.labels == tuple(tuple(entry[1]) for entry in now)
        assert list(map(repr, page.values)) == list(map(repr, values))
        assert dict(page.timestamps_ms) == {at: entry[3] for at, entry in enumerate(now) if entry[3] is not None}
        assert frame["name"].to_list() == [entry[0] for entry in now]
        assert frame["labels"].to_list() == [[{"name": n, "value": v} for n, v in entry[1]] for entry in now]
        assert list(map(repr, frame["value"].to_list())) == list(map(repr, values))
        assert frame["timestamp_ms"].to_list() == [entry[3] for entry in now]


SEEDS = [
    '# HELP m Words.\n# TYPE m gauge\nm{a="b",c="d"} 12.5\nm{a="} 1"} NaN\n\nother 3 1395066363000\n# end\n',
    'm_bucket{le="0.1"} 8 # {trace_id="x"} 0.5 123.4\nm_bucket{le="+Inf"} 9\nm_sum -3.5e-07\n# EOF\n',
    '{"a.b","c d"="e\\"\\\\\\n"} +Inf\nname\t 7  \nx{}1',
    "\n".join(PAGES[0].read_text().split("\n")[:12]),
]
PIECES = st.sampled_from(
    ["", " ", "\t", "\n", "\r", "\x00", "{", "}", '"', ",", "=", "\\", "#", "# ", "1", "0", ".", "-", "+", "_", "e",
     "E", "nan", "-nan", "Inf", "inf", "1e400", "1_0", "0x1", "\xa0", "１", "é", "\ud800", "a", "m 1\n", " 5",
     ' # {a="b"} 1', 'a="b"', "# TYPE m counter\n", "# HELP m \n"]
)  # fmt: skip
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), PIECES), min_size=1, max_size=4)


def edited(text: str, edits: list[tuple[float, int, str]]) -> str:
    """The text with pieces put in, each in place of a few characters."""
    for place, width, piece in edits:
        at = round(place * len(text))
        text = text[:at] + piece + text[at + width :]
    return text


@settings(max_examples=400)
@given(st.sampled_from(SEEDS), st.lists(EDITS, min_size=1, max_size=3))
@example(SEEDS[0], [[(1.0, 0, "m 1\n")]])
def test_what_is_remembered_never_changes_an_answer(seed: str, versions: list[list[tuple[float, int, str]]]) -> None:
    """A page edited anywhere is refused or read, never another exception; a reader that knows the page, or its like,
    says of each version exactly what a new reader says, and what it says again."""
    reader = Reader()
    reader.read(seed, "t")
    for edits in versions:
        text = edited(seed, edits)
        fresh = outcome(Reader(), text)
        assert outcome(reader, text, "t") == fresh
        assert outcome(reader, text, "t") == fresh
        assert outcome(reader, text) == fresh
        assert parsed_outcome(text) == (fresh if isinstance(fresh, str) else fresh[:-1])
    assert outcome(reader, seed, "t") == outcome(Reader(), seed)


TOKEN = st.text(st.sampled_from("0123456789+-.eEinftyaINFTYA_ x\t"), max_size=8) | st.floats().map(repr)


@settings(max_examples=500)
@given(st.lists(TOKEN, min_size=3, max_size=3))
def test_the_fast_way_to_read_numbers_reads_the_same_numbers(tokens: list[str]) -> None:
    """Whatever stands where values stood: same values or same refusal, cold and warm."""
    line = 'a {}\nb{{c="d"}} {}\ne {}\n'
    reader = Reader()
    reader.read(line.format(1, 2, 3))

    assert outcome(reader, line.format(*tokens)) == outcome(Reader(), line.format(*tokens))


def test_fifty_thousand_numbers_are_rounded_as_python_rounds_them() -> None:
    """The last bit too: decimal texts of random floats, and long texts between two floats."""
    dice = random.Random(7)
    tokens = [repr(dice.uniform(-1, 1) * 10.0 ** dice.randrange(-300, 300)) for _ in range(40_000)]
    tokens += [f"{dice.random():.{dice.randrange(17, 60)}f}" for _ in range(10_000)]
    reader = Reader()
    reader.read("m 1\n" * len(tokens))

    page = reader.read("".join(f"m {token}\n" for token in tokens))

    assert page.values == [float(token) for token in tokens]
