r"""The lines of the Prometheus text format 0.0.4: which are legal, and what they say.

Here: one line in, its parts out, or `MalformedError` with the rule that it breaks. Not here: pages, caches, frames.

The judge is the parser of the Prometheus server (`model/textparse`, `PromParser`): a line that it refuses makes the
server drop the whole page, so it is refused here. Known differences, each on purpose:

* Accepted here, as the format's text allows: a signed timestamp (it is defined by Go's ParseInt), blanks before a
  sample (the server would take them into the metric's name and then refuse it), and of OpenMetrics an exemplar after
  the value (checked, then ignored).
* Refused here, because the format forbids it though PromParser lets it pass: two labels without a comma between them;
  a bare metric name and a value without a blank between them (`a.5 1` would be 0.5 at 1 ms); a raw line feed in a
  label value; a NUL outside label values and comments (Go silently drops the rest of the page); a TYPE whose name and
  type are not separated by a blank; an empty metric or label name and a label name given twice (the server refuses the
  scrape for these).
* `# EOF` is a comment like any other, as in PromParser: what follows it is read.
* A backslash before any other letter than `\\`, `"` and `n` stands for itself, as in PromParser.
"""

import re
from math import isfinite, isinf

Labels = tuple[tuple[str, str], ...]
# A label text as it stands on the page -> the quoted metric name in it, if any, and its labels.
KnownLabels = dict[str, tuple[str | None, Labels]]

_NO_LABELS: tuple[None, Labels] = (None, ())

TYPES = frozenset({"counter", "gauge", "histogram", "summary", "untyped"})

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*+"
_QUOTED = r'"((?:[^"\\]++|\\.)*+)"'
_SERIES = re.compile(rf'[ \t]*+({_NAME})?[ \t]*+(\{{(?:[^"{{}}]++|"(?:[^"\\]++|\\.)*+")*+\}})?[ \t]*+')
# The line that nearly every exporter writes; a shorter way through the same rules.
_COMMON = re.compile(rf'({_NAME})(\{{(?:[^"{{}}]++|"[^"\\]*+")*+\}})? (-?[0-9]++(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?)\Z')
# Labels without escapes or blanks: a list of nothing else needs no closer look.
_COMMON_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*+)="([^"\\]*+)"')
_COMMON_LABELS = re.compile(r'\{(?:[a-zA-Z_][a-zA-Z0-9_]*+="[^"\\]*+"(?:,(?!\})|(?=\})))++\}\Z')
_LABEL_NAME = re.compile(rf"[ \t]*+(?:([a-zA-Z_][a-zA-Z0-9_]*+)|{_QUOTED})[ \t]*+")
_LABEL_VALUE = re.compile(rf"=[ \t]*+{_QUOTED}[ \t]*+")
_NUMBER = re.compile(
    r"[+-]?(?:[0-9]++\.?[0-9]*+|\.[0-9]++)(?:e[+-]?[0-9]++)?|[+-]?inf(?:inity)?|nan", re.ASCII | re.IGNORECASE
)
_REST = re.compile(r"([^ \t]++)(?:[ \t]++([^ \t#][^ \t]*+))?[ \t]*+(.*)", re.DOTALL)
_METADATA = re.compile(r"[ \t]*+#[ \t]++(HELP|TYPE)[ \t]++(.*)", re.DOTALL)
_FAMILY = re.compile(rf"({_NAME})|{_QUOTED}")
_EXEMPLAR = re.compile(r"#[ \t]++(?=\{)")
_ESCAPE = re.compile(r'\\([\\"n])')
_INT64_DIGITS = re.compile(r"[+-]?(?=[0-9])0*+([0-9]{0,19}+)")
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


class MalformedError(Exception):
    """A line breaks a rule of the format; the argument is that rule in words."""


def read_metadata(line: str) -> tuple[str, str] | None:
    """Family and type of a TYPE line; None for HELP and for a comment, whose text is not kept."""
    found = _METADATA.match(line)
    if found is None:
        return None
    keyword, rest = found.groups()
    family = _FAMILY.match(rest)
    if family is None:
        raise MalformedError(f"{keyword} is not followed by a metric name")
    if keyword == "HELP":
        if not rest[family.end() : family.end() + 1].isascii():
            raise MalformedError(f"the metric name of HELP is followed by {_first(rest[family.end() :])}")
        return None
    kind = rest[family.end() + 1 :]
    if kind not in TYPES or rest[family.end()] not in " \t":
        raise MalformedError(f"the type {rest[family.end() :].strip()!r} is none of {', '.join(sorted(TYPES))}")
    bare, quoted = family.groups()
    return (_unescaped(quoted) if bare is None else bare), kind


def read_sample(line: str, known: KnownLabels) -> tuple[str, Labels, float, int | None, int]:
    """Metric name, labels in page order, value, timestamp (milliseconds), and where in the line the value begins.

    known: label texts (`{...}`) already read, with what they said; new ones are added.
    """
    common = _COMMON.match(line)
    if common is not None:
        name, braces, token = common.groups()
        said = _NO_LABELS if braces is None else known.get(braces)
        if said is None:
            said = known[braces] = read_labels(braces, 0)
        value = float(token)
        if said[0] is None and isfinite(value):
            return name, said[1], value, None, common.start(3)
    name, labels, start = read_series(line, known)
    return name, labels, *read_rest(line[start:]), start


def read_series(line: str, known: KnownLabels) -> tuple[str, Labels, int]:
    """Metric name, labels in page order, and where in the line the value begins; known as in `read_sample`."""
    found = _SERIES.match(line)
    assert found is not None  # every part of the pattern is optional
    name, braces = found.groups()
    end = found.end()
    if braces is None:
        if line[end : end + 1] == "{":
            read_labels(line, end)  # says what is wrong between the braces
            raise MalformedError("a label list is not closed by '}'")
        if name is None:
            raise MalformedError(f"expected a metric name, found {_first(line[end:])}")
        if end < len(line) and line[end - 1] not in " \t":
            raise MalformedError(f"expected a blank after metric name {name!r}, found {_first(line[end:])}")
        return name, (), end
    said = known.get(braces)
    if said is None:
        said = known[braces] = read_labels(braces, 0)
    quoted_name, labels = said
    if quoted_name is None:
        if name is None:
            raise MalformedError("the series has no metric name")
        return name, labels, end
    if name is not None:
        raise MalformedError(f"a second metric name, {quoted_name!r}, within the braces")
    return quoted_name, labels, end


def read_labels(text: str, start: int) -> tuple[str | None, Labels]:
    """The quoted metric name, if any, and the labels of `{...}` that begins at `start`."""
    if _COMMON_LABELS.match(text, start) is not None:
        return None, _distinct(_COMMON_LABEL.findall(text, start))
    name: str | None = None
    labels: list[tuple[str, str]] = []
    position = start + 1
    while True:
        found = _LABEL_NAME.match(text, position)
        if found is None:
            break
        bare, quoted = found.groups()
        label = _unescaped(quoted) if bare is None else bare
        position = found.end()
        if bare is None and text[position : position + 1] in (",", "}"):
            if name is not None:
                raise MalformedError(f"a second metric name, {label!r}, within the braces")
            name = label
            position += text[position] == ","
            continue
        if text[position : position + 1] != "=":
            raise MalformedError(f"expected '=' after label {label!r}, found {_first(text[position:])}")
        value = _LABEL_VALUE.match(text, position)
        if value is None:
            raise MalformedError(f"the value of label {label!r} is not a complete text in double quotes")
        labels.append((label, _unescaped(value[1])))
        position = value.end()
        if text[position : position + 1] == ",":
            position += 1
        elif _LABEL_NAME.match(text, position):
            raise MalformedError(f"no comma between label {label!r} and the next")
        else:
            break
    rest = text[position:].lstrip(" \t")
    if not rest:
        raise MalformedError("a label list is not closed by '}'")
    if rest[0] != "}":
        raise MalformedError(f"expected a label name, found {_first(rest)}")
    if name == "":
        raise MalformedError("the metric name is empty")
    return name, _distinct(labels)


def _distinct(labels: list[tuple[str, str]]) -> Labels:
    """The labels, refused where a name is empty or stands twice; `__name__` is the metric's."""
    names = dict(labels)
    if len(names) == len(labels) and "" not in names and "__name__" not in names:
        return tuple(labels)
    seen = {"__name__"}
    for label, _ in labels:
        if label in seen:
            raise MalformedError(f"label {label!r} is given twice")
        seen.add(label)
    raise MalformedError("a label name is empty")


def read_rest(rest: str) -> tuple[float, int | None]:
    """Value and timestamp (milliseconds) of what follows a series; an exemplar is checked and ignored."""
    found = _REST.match(rest)
    if found is None:
        raise MalformedError("the series has no value")
    token, stamp, remainder = found.groups()
    value = read_number(token)
    timestamp = None if stamp is None else read_timestamp(stamp)
    if remainder:
        _check_exemplar(remainder)
    return value, timestamp


def read_number(token: str) -> float:
    """A float as Go's ParseFloat takes it before Go 1.13: no hexadecimal, no underscores, no overflow."""
    if _NUMBER.fullmatch(token) is None:
        if token.endswith("\r"):
            raise MalformedError("the line ends in a carriage return; lines must end in a line feed alone")
        raise MalformedError(f"{token[:40]!r} is not a number")
    value = float(token)
    if isinf(value) and "n" not in token.lower():
        raise MalformedError(f"{token[:40]!r} is out of the range of a 64-bit float")
    return value


def read_timestamp(token: str) -> int:
    """Milliseconds since 1970 as a 64-bit integer."""
    digits = _INT64_DIGITS.fullmatch(token)
    stamp = int(digits[1] or 0) * (-1 if token[0] == "-" else 1) if digits else None
    if stamp is None or not _INT64_MIN <= stamp <= _INT64_MAX:
        raise MalformedError(
            f"{token[:40]!r} is not a timestamp in whole milliseconds"
            + ("; OpenMetrics gives seconds: ask for text/plain; version=0.0.4" if "." in token else "")
        )
    return stamp


def _check_exemplar(text: str) -> None:
    """Refuse what follows a value or timestamp unless it is `# {labels} value [timestamp in seconds]`."""
    start = _EXEMPLAR.match(text)
    braces = _SERIES.match(text, start.end()) if start else None
    if braces is None or braces[1] is not None:
        raise MalformedError(f"expected the end of the line, found {_first(text)}")
    if braces[2] is None:
        raise MalformedError("the labels of the exemplar are not closed by '}'")
    name, _ = read_labels(braces[2], 0)
    if name is not None:
        raise MalformedError(f"the exemplar has a quoted text, {name!r}, without a value")
    found = _REST.match(text, braces.end())
    if found is None or found[3]:
        raise MalformedError("an exemplar is labels, a value, and at most a timestamp")
    read_number(found[1])
    if found[2] is not None and not isfinite(read_number(found[2])):
        raise MalformedError(f"{found[2][:40]!r} is not a timestamp in seconds")


def _unescaped(text: str) -> str:
    r"""Resolve `\\`, `\"` and `\n`; any other backslash stands for itself, as in Prometheus."""
    if "\\" not in text:
        return text
    return _ESCAPE.sub(lambda found: "\n" if found[1] == "n" else found[1], text)


def _first(text: str) -> str:
    """The first character of a text, in words."""
    return repr(text[0]) if text else "the end of the line"
