"""What the Prometheus text format allows, forbids, and means.

Accepted and refused lines follow the server's own parser (`PromParser`), which was run over thousands of such pages;
where this parser differs on purpose the test says so.
"""

import json
import math
import pickle
from pathlib import Path

import polars as pl
import pytest

from optiinfra_pipelines.exposition import ExpositionError, Reader, parse

PAGES = Path(__file__).parents[1] / "fixtures" / "exposition"


def sample(line: str) -> tuple[str, list[tuple[str, str]], float, int | None]:
    """The one sample of a page."""
    row = parse(line).row(0)
    return row[0], [(label["name"], label["value"]) for label in row[1]], row[2], row[3]


def test_a_page_becomes_a_frame_in_page_order() -> None:
    """One row per sample; labels keep the order of the page; a timestamp that is not given is null."""
    frame = parse('# HELP b Requests.\n# TYPE b counter\nb{z="1",a="2"} 3 1395066363000\na 4.5\n')

    assert frame.schema == {
        "name": pl.String,
        "labels": pl.List(pl.Struct({"name": pl.String, "value": pl.String})),
        "value": pl.Float64,
        "timestamp_ms": pl.Int64,
    }
    assert frame.rows() == [
        ("b", [{"name": "z", "value": "1"}, {"name": "a", "value": "2"}], 3.0, 1395066363000),
        ("a", [], 4.5, None),
    ]


@pytest.mark.parametrize("text", ["", "\n", "\n\n \t\n", "# only words\n", "# EOF\n", "# EOF"])
def test_a_page_without_samples_is_an_empty_frame_of_the_same_schema(text: str) -> None:
    """Prometheus scrapes an empty page successfully: it has no samples, which is not an error."""
    assert parse(text).schema == parse("a 1\n").schema
    assert parse(text).height == 0


ACCEPTED = {
    "metric 12.47": ("metric", [], 12.47, None),
    "metric{} 1": ("metric", [], 1.0, None),
    "metric{ } 1": ("metric", [], 1.0, None),
    "ns:sub_metric:rate5m 1": ("ns:sub_metric:rate5m", [], 1.0, None),
    "_m 1": ("_m", [], 1.0, None),
    ":m 1": (":m", [], 1.0, None),
    'm{a="b",} 1': ("m", [("a", "b")], 1.0, None),
    'm{a="b"}1': ("m", [("a", "b")], 1.0, None),
    'm {a="b"} 1': ("m", [("a", "b")], 1.0, None),
    '  m { a = "b" ,\tc\t= "d" , }\t 1  7 \t': ("m", [("a", "b"), ("c", "d")], 1.0, 7),
    "m\t1": ("m", [], 1.0, None),
    "m 1 -5": ("m", [], 1.0, -5),
    "m 1 +5": ("m", [], 1.0, 5),
    "m 1 0": ("m", [], 1.0, 0),
    "m 1 0000000000000000000000000012": ("m", [], 1.0, 12),
    "m 1 9223372036854775807": ("m", [], 1.0, 2**63 - 1),
    "m 1 -9223372036854775808": ("m", [], 1.0, -(2**63)),
    'm{a=""} 1': ("m", [("a", "")], 1.0, None),
    'm{a="} 2"} 1': ("m", [("a", "} 2")], 1.0, None),
    'm{a="{,=#\'"} 1': ("m", [("a", "{,=#'")], 1.0, None),
    'm{a="b\x00c"} 1': ("m", [("a", "b\x00c")], 1.0, None),
    'm{a="\r"} 1': ("m", [("a", "\r")], 1.0, None),
    'm{a="日本語 \U0001f600"} 1': ("m", [("a", "日本語 \U0001f600")], 1.0, None),
    # a closing brace at the end of a value, and every escape there is
    r'm{path="C:\\DIR\\",error="no \"x\"\nat all"} 1': (
        "m",
        [("path", "C:\\DIR\\"), ("error", 'no "x"\nat all')],
        1,
        None,
    ),
    # a backslash before any other letter stands for itself, also for the server
    r'm{a="C:\temp\q"} 1': ("m", [("a", r"C:\temp\q")], 1.0, None),
    r'm{a="\\n"} 1': ("m", [("a", r"\n")], 1.0, None),
    # quoted names
    '{"metric.name", "label.x"="v"} 1': ("metric.name", [("label.x", "v")], 1.0, None),
    '{"metric.name"} 1': ("metric.name", [], 1.0, None),
    '{"metric.name",} 1': ("metric.name", [], 1.0, None),
    '{a="b","metric.name"} 1': ("metric.name", [("a", "b")], 1.0, None),
    'm{"label.x"="v"} 1': ("m", [("label.x", "v")], 1.0, None),
    r'{"10€ \"of\" \\ {a\nb}","ü\n"="6"} 1': ('10€ "of" \\ {a\nb}', [("ü\n", "6")], 1.0, None),
    # an OpenMetrics exemplar is neither value nor timestamp
    'm_bucket{le="1"} 8 # {trace_id="abc}"} 0.067 1520879607.789': ("m_bucket", [("le", "1")], 8.0, None),
    'm_bucket{le="1"} 8 123 # {trace_id="x"} 0.5 123.4': ("m_bucket", [("le", "1")], 8.0, 123),
    "m_total 8 # {} 0.5": ("m_total", [], 8.0, None),
    'm_total 8 # {a="# {b=\\"c\\"} 9"} 0.5': ("m_total", [], 8.0, None),
}


@pytest.mark.parametrize("line", ACCEPTED)
def test_a_legal_line_says(line: str) -> None:
    """Names, labels in order, value and timestamp, with and without a line feed at the end of the page."""
    assert sample(line) == ACCEPTED[line]
    assert sample(line + "\n") == ACCEPTED[line]


NUMBERS = {
    "0": 0.0, "-0": -0.0, "+1": 1.0, "1.": 1.0, ".5": 0.5, "-.5": -0.5, "1e5": 1e5, "1E+05": 1e5, "1.e-2": 0.01,
    "00012": 12.0, "1e-400": 0.0, "4.9e-324": 5e-324, "1.7976931348623157e308": 1.7976931348623157e308,
    "0.1000000000000000055511151231257827021181583404541015625": 0.1, "9007199254740993": 9007199254740992.0,
    "1.7951869974226096e+09": 1795186997.4226096,
    "Inf": math.inf, "+inf": math.inf, "-INF": -math.inf, "Infinity": math.inf, "-infinity": -math.inf,
}  # fmt: skip


@pytest.mark.parametrize("token", NUMBERS)
def test_a_number_is_what_go_reads(token: str) -> None:
    """ParseFloat's decimal grammar, correctly rounded; infinities in any case of letters; also when read again."""
    reader = Reader()

    for text in ("m 3\n", f"m {token}\n", f"m {token}\n"):
        page = reader.read(text)
    assert page.values == [NUMBERS[token]]
    assert math.copysign(1, page.values[0]) == math.copysign(1, NUMBERS[token])


@pytest.mark.parametrize("token", ["NaN", "nan", "NAN", "nAn"])
def test_not_a_number_is_a_value(token: str) -> None:
    """NaN is a legal value in any case of letters."""
    assert math.isnan(parse(f"m {token}\n")["value"][0])


@pytest.mark.parametrize(
    "token",
    ["true", "1_000", "0x10", "0x1p3", "0X1P-3", "+NaN", "-nan", "1e400", "-1e999", "1,5", "1e", "e5", ".", "-", "+-1",
     "infinit", "1f", "１２", "1\xa0", "\x0b1", "1\r", "1\x1c", "\x00", "1{", "--1", "1e5.5", '"1"', "None"],
)  # fmt: skip
def test_what_go_does_not_read_as_a_number_is_refused(token: str) -> None:
    """Python's float() takes underscores, other alphabets' digits, signed NaN and overflow; Prometheus does not."""
    reader = Reader()
    reader.read("m 1\n")

    for read in (parse, reader.read):
        with pytest.raises(ExpositionError, match="line 1: "):
            read(f"m {token}\n")


REFUSED = {
    "m": "no value",
    "m ": "no value",
    'm{a="b"}': "no value",
    "m 1 2 3": "expected the end of the line",
    "m 1 x": "not a timestamp",
    "m 1 1.5": "whole milliseconds; OpenMetrics gives seconds",
    "m 1 1e3": "not a timestamp",
    "m 1 9223372036854775808": "not a timestamp",
    "m 1 99999999999999999999": "not a timestamp",
    "m 1 1_0": "not a timestamp",
    "m 1 ١": "not a timestamp",
    "m 1 -": "not a timestamp",
    "m 1 2\r": "not a timestamp",
    "m 1\r": "carriage return",
    "\r": "expected a metric name",
    "m 1 # words": "expected the end of the line, found '#'",
    "m 1 #": "expected the end of the line, found '#'",
    "m 1#": "not a number",
    'm 1 # {a="b"}': "an exemplar is",
    'm 1 # {a="b"} x': "'x' is not a number",
    'm 1 # {a="b"} 1 2 3': "an exemplar is",
    'm 1 # {a="b"} 1 NaN': "not a timestamp in seconds",
    'm 1 # {a="b" 1': "exemplar are not closed",
    'm 1 # {"a"} 1': "without a value",
    "m 1 # {a=b} 1": "label 'a'",
    'm 1 # m{a="b"} 1': "expected the end of the line",
    "1m 1": "expected a metric name, found '1'",
    "m-x 1": "expected a blank after metric name 'm'",
    "m.x 1": "expected a blank after metric name 'm'",
    "ü 1": "expected a metric name",
    "\ufeffm 1": "expected a metric name",
    "\x00": "expected a metric name",
    "m\x00 1": "expected a blank",
    "{} 1": "no metric name",
    '{a="b"} 1': "no metric name",
    '{""} 1': "the metric name is empty",
    '{"a","b"} 1': "second metric name",
    'm{"b"} 1': "second metric name",
    '{"a" b="c"} 1': "expected '=' after label 'a', found 'b'",
    'm{a="b"': "not closed by '}'",
    'm{a="b",': "not closed by '}'",
    "m{": "not closed by '}'",
    'm{a="b} 1': "value of label 'a' is not a complete text",
    'm{a="b\\"} 1': "value of label 'a' is not a complete text",
    "m{a=b} 1": "double quotes",
    "m{a='b'} 1": "double quotes",
    "m{a=} 1": "double quotes",
    "m{a} 1": "expected '=' after label 'a', found '}'",
    "m{a": "expected '=' after label 'a', found the end of the line",
    'm{="b"} 1': "expected a label name, found '='",
    'm{""="b"} 1': "a label name is empty",
    'm{1="b"} 1': "expected a label name, found '1'",
    'm{a:b="c"} 1': "expected '=' after label 'a', found ':'",
    'm{a-b="c"} 1': "expected '=' after label 'a', found '-'",
    'm{ü="c"} 1': "expected a label name",
    "m{,} 1": "expected a label name, found ','",
    'm{,a="b"} 1': "expected a label name, found ','",
    'm{a="b",,c="d"} 1': "expected a label name, found ','",
    'm{a="b",,} 1': "expected a label name, found ','",
    'm{a="b";c="d"} 1': "expected a label name, found ';'",
    'm{a="b"c="d"} 1': "no comma",
    'm{a="b" c="d"} 1': "no comma",
    'm{a="b",a="c"} 1': "label 'a' is given twice",
    'm{a="b",a=""} 1': "label 'a' is given twice",
    'm{__name__="x"} 1': "label '__name__' is given twice",
    'm{a="b"}} 1': "not a number",
    'm{a="b"}{c="d"} 1': "not a number",
    'm{{a="b"} 1': "expected a label name, found '{'",
    "m} 1": "expected a blank",
    'm a="b"} 1': "not a number",
    "# TYPE ": "TYPE is not followed by a metric name",
    "# TYPE 1a counter": "TYPE is not followed by a metric name",
    "# TYPE m": "the type '' is none of",
    "# TYPE m ": "the type '' is none of",
    "# TYPE m  counter": "none of counter, gauge",
    "# TYPE m counter ": "none of",
    "# TYPE m counter x": "none of",
    "# TYPE m COUNTER": "none of",
    "# TYPE m unknown": "the type 'unknown' is none of counter, gauge, histogram, summary, untyped",
    "# TYPE m info": "none of",
    "# TYPE m.x counter": "none of",
    "# TYPE m-counter": "none of",
    "# TYPE m counter\r": "none of",
    '# TYPE "m counter': "TYPE is not followed by a metric name",
    "# HELP ": "HELP is not followed by a metric name",
    "\t# \tHELP #": "HELP is not followed by a metric name",
    "# HELP 5 x": "HELP is not followed by a metric name",
    "# HELP mü x": "the metric name of HELP is followed by 'ü'",
    "Internal Server Error": "'Server' is not a number",
}


@pytest.mark.parametrize("line", REFUSED)
def test_an_illegal_line_is_named_with_its_number_and_cause(line: str) -> None:
    """The third line of the page is at fault; nothing of the page is returned; a remembered shape does not help it."""
    text = f'# TYPE ok counter\nok{{a="b"}} 1\n{line}\nafter 1\n'
    reader = Reader()
    reader.read('# TYPE ok counter\nok{a="b"} 1\nm 1\nafter 1\n')

    for read in (parse, reader.read):
        with pytest.raises(ExpositionError) as caught:
            read(text)
        assert caught.value.line_number == 3
        assert REFUSED[line] in caught.value.cause
        assert f"line 3: {caught.value.cause}: " in str(caught.value)


@pytest.mark.parametrize(
    "line",
    ["#", "#x", "#HELP", "# HELP", "# TYPE", "# HELPm x", "# TYPEm", "# help 5", "# UNIT m seconds", "# EOF", "# \r",
     "#\x00", "# HELP m", "# HELP m ", "# HELP m a \\ b \x00 ü", "# HELP m-x y", '# HELP "m.x" words',
     "  # TYPE\tm\tgauge", "# TYPE m untyped", '# TYPE "m.x" histogram'],
)  # fmt: skip
def test_a_comment_is_passed_over(line: str) -> None:
    """HELP and TYPE bind only when a blank follows the `#` and the keyword; all else after `#` is for people."""
    assert parse(f"a 1\n{line}\nb 2\n")["name"].to_list() == ["a", "b"]


def test_types_are_kept_by_family() -> None:
    """A quoted family keeps its own characters; a family without TYPE has no type."""
    text = '# TYPE m histogram\nm_count 1\n# TYPE "x.\\"y" gauge\nother 1\n#\tTYPE n\tsummary'

    assert dict(Reader().read(text).layout.types) == {"m": "histogram", 'x."y': "gauge", "n": "summary"}


def test_samples_after_the_end_mark_of_openmetrics_are_read() -> None:
    """`# EOF` is a comment in the text format; so it is for the Prometheus server."""
    assert parse("a 1\n# EOF\nb 2\n")["name"].to_list() == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("<!DOCTYPE html>\n<html><body>502 Bad Gateway</body></html>\n", "an HTML page"),
        ("\n  <html>", "an HTML page"),
        ('<?xml version="1.0"?>\n<Error/>', "an XML document"),
        (json.dumps({"status": "ok", "n": [1]}), "a JSON document"),
        (json.dumps({"status": "ok", "n": [1]}, indent=2), "a JSON document"),
        ("{}", "a JSON document"),
        ("[]", "a JSON document"),
        ('[{"metric": 1}]\n', "a JSON document"),
    ],
)
def test_another_kind_of_document_is_called_by_its_name(text: str, kind: str) -> None:
    """A login page or an API answer behind the metrics port is told apart from a broken exporter."""
    with pytest.raises(ExpositionError, match=f"this is {kind}, not Prometheus text"):
        parse(text)


def test_bytes_that_are_not_utf8_are_refused_with_their_place() -> None:
    """Wherever the byte stands: in a label value, in a comment."""
    reader = Reader()

    for body, column in (
        (b'a 1\nm{a="x\xff"} 1\nb 1\n', 7),
        (b"a 1\n# HELP m \xc3\nb 1\n", 10),
        (b"\n\xed\xa0\x80", 1),
    ):
        with pytest.raises(ExpositionError) as caught:
            reader.read(body)
        assert caught.value.line_number == 2
        assert f"at column {column} is not valid UTF-8" in caught.value.cause


def test_a_body_that_was_not_decompressed_says_so() -> None:
    """A gzip member begins with two bytes that no text can begin with."""
    with pytest.raises(ExpositionError, match="still compressed with gzip"):
        Reader().read(b"\x1f\x8b\x08\x00\x00\x00")


def test_half_a_surrogate_pair_in_a_str_is_refused() -> None:
    """A str may hold what UTF-8 cannot; a warm reader refuses it too, also in an exemplar that it would ignore."""
    reader = Reader()
    reader.read('m 1 # {a="b"} 1\n')

    for text in ('m{a="\ud800"} 1\n', "# \udfff\n", 'm 1 # {a="\ud800"} 1\n'):
        for read in (parse, reader.read):
            with pytest.raises(ExpositionError, match=r"line 1: U\+D[0-9A-F]{3} is half of a surrogate pair"):
                read(text)


def test_bytes_and_text_read_alike() -> None:
    """The same page in both forms has one layout and equal values."""
    reader = Reader()
    body = (PAGES / "dynamo_1.6.1_worker_loaded.prom").read_bytes()

    first, second = reader.read(body), reader.read(body.decode())

    assert first.layout is second.layout
    assert first.values == second.values


def test_an_error_shows_a_line_of_bearable_length_and_survives_pickling() -> None:
    """A label of a megabyte does not flood the log; the error can cross a process boundary."""
    with pytest.raises(ExpositionError) as caught:
        parse(f'm{{a="{"x" * 1_000_000}"}} nope\n')
    again = pickle.loads(pickle.dumps(caught.value))

    assert len(str(caught.value)) < 300
    assert str(again) == str(caught.value)
    assert again.line_number == 1


def test_a_series_given_twice_is_accepted_and_named() -> None:
    """Prometheus keeps the first sample and drops the others; label order and empty labels make no difference."""
    text = 'm{a="1",b="2"} 1\nm{b="2",a="1"} 2\nm{a="1"} 3\nn 4\nn{a=""} 5\nm{a="1",b="2"} 6\n'

    page = Reader().read(text)

    assert page.values == [1, 2, 3, 4, 5, 6]
    assert page.layout.duplicates == (1, 4, 5)


def test_hostile_lines_cost_time_in_proportion_to_their_length() -> None:
    """No nesting of quotes, backslashes or braces makes the grammar walk back and forth."""
    for piece in ('a="', "\\", '"', "{", 'a="b",', '\\"', 'a="b" ', "{}", '{"', "a", " ", "1", "#", "# {"):
        for start in ("m{", "m ", "{", "# HELP ", "m 1 # {", 'm{a="', "[", '{"'):
            with pytest.raises(ExpositionError):
                parse(start + piece * (300_000 // len(piece)) + "\n;")


def test_many_different_labels_with_one_repeated_are_refused_quickly() -> None:
    """The repeated name is found in one pass over 50,000 labels."""
    labels = ",".join(f'l{number}="x"' for number in range(50_000))

    with pytest.raises(ExpositionError, match="label 'l49999' is given twice"):
        parse(f'm{{{labels},l49999="y"}} 1\n')
