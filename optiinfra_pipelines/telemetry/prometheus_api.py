"""What a Prometheus-compatible server's HTTP API says -> samples by the moment they were taken.

Here: selectors to ask for, windows for catching up, and reading answers. Not here: asking (`resources.telemetry`).

We ask an instant query of a range selector, `{...}[60s]`: it answers with raw samples and their own times. A plain
instant query would repeat an exporter's last value for five minutes after its death, and `query_range` would do the
same at every step; raw samples end when the scrapes end. The limit of 11,000 points a series is `query_range`'s, but
the windows for catching up stay below it too, for servers that apply it everywhere.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta

from optiinfra_pipelines.telemetry.samples import Sample

# An hour of one-second scrapes is 3,600 points a series; and an answer for 100 hosts stays within tens of megabytes.
CATCH_UP_WINDOW = timedelta(minutes=15)

Moments = Mapping[datetime, list[Sample]]


class AnswerError(ValueError):
    """The server answered, but not with data; the text says why and what to do."""


def selector(families: str, label: str, values: Collection[str]) -> str:
    """PromQL selector of families (an RE2 pattern, anchored at both ends) where `label` is one of `values`."""
    alternatives = "|".join(_quoted_pattern(value) for value in sorted(values))
    return f'{{__name__=~"{families}",{label}=~"{alternatives}"}}'


# RE2 reads a backslash before any of these as the character itself; other characters must not be escaped.
_PATTERN_CHARACTERS = frozenset(r"\.+*?()|[]{}^$")


def _quoted_pattern(text: str) -> str:
    pattern = "".join(f"\\{c}" if c in _PATTERN_CHARACTERS else c for c in text)
    return pattern.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def windows(start: datetime, end: datetime, width: timedelta = CATCH_UP_WINDOW) -> Iterator[tuple[datetime, timedelta]]:
    """(end, width) of windows that together cover (start, end], oldest first. Range selectors are open on the left."""
    while start < end:
        upto = min(start + width, end)
        yield upto, upto - start
        start = upto


def read_answer(body: str | bytes) -> Moments:
    """The samples of a vector or matrix answer by their time, oldest first. No series is no moments, not an error.

    NaN (also Prometheus' mark of a series that ended) and infinities are left out: no value is known. Raises
    AnswerError on anything that is not a successful answer of samples.
    """
    try:
        answer = json.loads(body)
    except ValueError as error:
        raise AnswerError(f"the answer is not JSON ({error}); is this a Prometheus server?") from error
    if not isinstance(answer, dict) or "status" not in answer:
        raise AnswerError("the answer has no status; is this a Prometheus server?")
    if answer["status"] != "success":
        raise AnswerError(f"the server refused: {answer.get('errorType')}: {answer.get('error')}")
    data = answer.get("data")
    kind = data.get("resultType") if isinstance(data, dict) else None
    if not isinstance(data, dict) or kind not in ("vector", "matrix"):
        raise AnswerError(f"the answer is a {kind}, not a vector or matrix of samples")
    moments: dict[datetime, list[Sample]] = defaultdict(list)
    try:
        for series in data["result"]:
            labels = dict(series["metric"])
            name = labels.pop("__name__", "")
            for seconds, text in series["values"] if kind == "matrix" else [series["value"]]:
                value = float(text)
                if math.isfinite(value):
                    moments[datetime.fromtimestamp(seconds, UTC)].append(Sample(name, labels, value))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise AnswerError(f"the answer's {kind} is malformed: {error!r}") from error
    return dict(sorted(moments.items()))


def by_label(samples: list[Sample], label: str) -> Mapping[str, list[Sample]]:
    """The samples of one moment by the value of a label; those without it are left out."""
    parts: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if label in sample.labels:
            parts[sample.labels[label]].append(sample)
    return parts
