"""Numbers, times and names as a report shows them: with unit, NULL as "unknown", nothing that could hide in a text.

Pure. Every word of a report goes through `plain`, every value through `value` or `cell`; escaping for HTML, markdown
or a terminal is the renderer's.
"""

from __future__ import annotations

import math
import unicodedata
from datetime import UTC, datetime, timedelta

UNKNOWN = "unknown"
# A name longer than this has another purpose than to name.
_MAX_CHARS = 2_000
_SUFFIXES = {
    "_ratio": "ratio",
    "_seconds": "s",
    "_bytes": "B",
    "_watts": "W",
    "_joules": "J",
    "_celsius": "°C",
    "_usd": "USD",
    "_usd_per_hour": "USD/h",
    "_usd_per_gpu_hour": "USD/h",
    "_tokens_per_second": "tokens/s",
    "_per_second": "/s",
    "_tokens": "tokens",
    "gpu_hours": "GPU-hours",
    "_hours": "h",
    "_days": "d",
}
_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def plain(text: str) -> str:
    """One line without characters that control a terminal, turn the direction of writing or are invisible."""
    cleaned = "".join(
        char if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else "\ufffd"
        for char in text[:_MAX_CHARS].replace("\t", " ").replace("\n", " ")
    )
    return cleaned + ("…" if len(text) > _MAX_CHARS else "")


def value(number: float | None, unit: str) -> str:
    """A number with its unit, to three or four digits; ratios as percent, bytes and short times scaled."""
    if number is None or math.isnan(number):
        return UNKNOWN
    if math.isinf(number):
        return "past the last bucket" if number > 0 else "below the first bucket"
    if unit in ("ratio", "share"):
        return f"{digits(100 * number)} %"
    if unit == "s":
        return _seconds(number)
    if unit in ("B", "bytes"):
        return _bytes(number)
    if unit.startswith(("USD", "$")):
        amount = f"-${abs(number):,.2f}" if number < 0 else f"${number:,.2f}"
        return amount + unit.removeprefix("USD").removeprefix("$")
    return f"{digits(number)} {unit}".rstrip() if not unit.startswith("/") else f"{digits(number)}{unit}"


def change(number: float | None, unit: str) -> str:
    """A value with its sign; a change of a ratio is in percentage points."""
    if number is None:
        return UNKNOWN
    sign = "+" if number > 0 else "-" if number < 0 else "±"
    if unit in ("ratio", "share"):
        return f"{sign}{digits(100 * abs(number))} points"
    return sign + value(abs(number), unit)


def digits(number: float) -> str:
    """Whole numbers whole, others to four digits, with thousands separators."""
    if number == int(number) and abs(number) < 1e15:
        return f"{int(number):,}"
    return f"{number:,.0f}" if abs(number) >= 10_000 else f"{number:.4g}"


def _seconds(number: float) -> str:
    size = abs(number)
    if size >= 7_200:
        return f"{digits(round(number / 3600, 2))} h"
    if size >= 300:
        return f"{digits(round(number / 60, 1))} min"
    return f"{digits(number)} s" if size >= 1 or size == 0 else f"{digits(number * 1000)} ms"


def _bytes(number: float) -> str:
    for scale, name in _BYTES:
        if abs(number) >= scale:
            return f"{number / scale:.4g} {name}"
    return f"{digits(number)} B"


def at(moment: datetime | None) -> str:
    """A time in UTC, to the minute."""
    return UNKNOWN if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def duration(span: timedelta) -> str:
    seconds = max(0.0, span.total_seconds())
    return f"{digits(round(seconds / 86_400, 1))} d" if seconds >= 172_800 else _seconds(round(seconds))


def interval(low: float | None, high: float | None, unit: str) -> str:
    """Both ends with the unit; an end that is not known is said."""
    if low is None and high is None:
        return UNKNOWN
    if high is not None and math.isinf(high):
        return f"over {value(low, unit)}"
    return f"{value(low, unit)} to {value(high, unit)}"


def heading(column: str) -> str:
    """A column's name in words, without the unit that its values show."""
    words = column.removesuffix("_at")
    ending = _ending(column)
    if ending is not None and ending.startswith("_") and ending != "_tokens":
        words = column.removesuffix(ending)
    return words.replace("_", " ").replace("usd", "USD").replace("gpu", "GPU")


def unit_of(column: str) -> str | None:
    """The unit that a column's name tells: its longest known ending, or dollars where it begins with them."""
    if column == "usd" or column.startswith("usd_"):
        return "USD"
    ending = _ending(column)
    return None if ending is None else _SUFFIXES[ending]


def _ending(column: str) -> str | None:
    found = [suffix for suffix in _SUFFIXES if column.endswith(suffix)]
    return max(found, key=len) if found else None


def cell(column: str, item: object) -> str:
    """One value of a frame, by the unit in its column's name."""
    match item:
        case None:
            return UNKNOWN
        case bool():
            return "yes" if item else "no"
        case int() | float():
            return value(float(item), unit_of(column) or "")
        case datetime():
            return at(item)
        case timedelta():
            return duration(item)
        case list() | tuple():
            return ", ".join(cell(column, one) for one in item[:6]) + (", …" if len(item) > 6 else "")
        case _:
            return plain(str(item))
