"""What the parser says when a page is not Prometheus text.

Here: the one exception and the words for documents that are something else altogether.
Not here: the rules that a line can break (`grammar`).
"""

import re

# A log line stays readable; a label value can be megabytes long.
SHOWN_CHARACTERS = 120

_JSON_START = re.compile(r'\{\s*(?:\}\s*$|"(?:[^"\\]++|\\.)*+"\s*:)|\[\s*(?:[\]\[{"0-9tfn-])')


class ExpositionError(ValueError):
    """A page breaks the Prometheus text format.

    line_number: 1-based line of the page. cause: which rule, in words. line: the offending line, shortened.
    """

    def __init__(self, line_number: int, cause: str, line: str) -> None:
        super().__init__(line_number, cause, line)
        self.line_number = line_number
        self.cause = cause
        self.line = shortened(line)

    def __str__(self) -> str:
        return f"line {self.line_number}: {self.cause}: {self.line!r}"


def shortened(line: str) -> str:
    """The first characters of a line, with a mark where the rest was cut."""
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + "…"


def foreign_document(text: str) -> str | None:
    """Which other kind of document a rejected page is, in words; None when it looks like broken metrics."""
    start = text.lstrip("\ufeff \t\r\n")
    if start.startswith("<"):
        kind = "an XML document" if start[:5].lower() == "<?xml" else "an HTML page"
        return f"this is {kind}, not Prometheus text"
    if _JSON_START.match(start):
        return "this is a JSON document, not Prometheus text"
    return None
