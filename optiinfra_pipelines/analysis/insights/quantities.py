"""Numbers with their units: as a text states them, as evidence holds them, and whether the one tells the other.

Pure. A number of a text tells a fact when, in one unit, it is the fact rounded to the digits that the text states, and
that rounding moved it by at most MAX_ROUNDING. Nothing derived counts: no sums, no ratios of two facts, no "twice".
Finding the numbers in a text is `grounding`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from optiinfra_pipelines.domain.insights import Fact

# "1 s" for 0.6 s is a correct rounding and a wrong picture: past a twentieth the text must give another digit.
MAX_ROUNDING = 0.05


@dataclass(frozen=True)
class Unit:
    """What a number counts. `noun`: of counted things, singular; `per`: seconds of the denominator of a rate."""

    dimension: str
    scale: float = 1.0
    noun: str | None = None
    per_seconds: float | None = None


@dataclass(frozen=True)
class Quantity:
    """A number as written. `step`: size of its last digit. `sign`: +1 or -1 where written, else 0.

    unit_written: the text behind the digits that gave the unit.
    """

    written: str
    magnitude: float
    step: float
    sign: int = 0
    unit: Unit | None = None
    unit_written: str = ""


_SYMBOLS: Mapping[str, Unit] = MappingProxyType(
    {
        symbol: Unit(dimension, scale)
        for dimension, scales in {
            "time": {
                "s sec second seconds secs": 1.0, "ms millisecond milliseconds msec": 1e-3,
                "us µs μs microsecond microseconds": 1e-6, "min minute minutes mins": 60.0,
                "h hour hours hr hrs": 3600.0, "d day days": 86_400.0,
            },
            "ratio": {"ratio x × times": 1.0, "% percent": 0.01},
            "bytes": {
                "B byte bytes": 1.0, "kB KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
                "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40,
            },
            "power": {"W watt watts": 1.0, "kW kilowatt kilowatts": 1e3},
            "energy": {"J joule joules": 1.0, "kJ": 1e3, "Wh": 3600.0, "kWh": 3.6e6},
            "temperature": {"°C celsius": 1.0},
            "money": {"USD usd $ dollar dollars": 1.0},
            "frequency": {"Hz": 1.0, "MHz": 1e6, "GHz": 1e9},
        }.items()
        for symbols, scale in scales.items()
        for symbol in symbols.split()
    }
)  # fmt: skip
# Things that are counted: a text that says "16 GPUs" speaks of no fact that counts requests.
_NOUN_WORDS = """
abstention block boot bound chunk core cpu deployment error event failure finding gpu host item layer observation page
period preemption rank recommendation replica request restart row sample scrape segment sequence slot step subject
target token worker
"""
_NOUNS = frozenset(_NOUN_WORDS.split())
_MULTIPLIERS: Mapping[str, float] = MappingProxyType(
    {"k": 1e3, "K": 1e3, "M": 1e6, "thousand": 1e3, "million": 1e6, "billion": 1e9}
)
_COUNTING = "zero one two three four five six seven eight nine ten eleven twelve"
NUMBER_WORDS: Mapping[str, float] = MappingProxyType({word: i for i, word in enumerate(_COUNTING.split())})


def parse_unit(symbol: str) -> Unit | None:
    """The unit of a symbol or word, such as `ms`, `%`, `tokens`, `tokens/s`, `USD/h`; None when it is none we know."""
    head, has_rate, per = re.sub(r"\s+(?:per|an?)\s+", "/", symbol).strip(" -").partition("/")
    unit = _SYMBOLS.get(head) or _SYMBOLS.get(head.lower() if len(head) > 2 else head)
    if unit is None:
        noun = singular(head)
        unit = Unit("count", noun=noun) if noun in _NOUNS else None
    if not has_rate or unit is None:
        return unit
    denominator = _SYMBOLS.get(per.strip())
    if denominator is None or denominator.dimension != "time":
        return None
    return Unit(unit.dimension, unit.scale, unit.noun, denominator.scale)


def singular(word: str) -> str:
    lower = word.lower()
    return lower[:-1] if lower.endswith("s") and not lower.endswith("ss") else lower


def multiplier(symbol: str) -> float | None:
    """1,000 for `k` or `thousand`; None when it is no multiplier."""
    return _MULTIPLIERS.get(symbol)


def tells(quantity: Quantity, fact: Fact, *, is_lower: bool) -> bool:
    """Whether the number of a text is this fact.

    is_lower: the sentence has a word such as "lower" or "falls", so that a number without a sign may tell a negative
    fact: "5 % lower" for -0.05.
    """
    if quantity.sign != 0 and quantity.sign * fact.value < 0:
        return False
    if quantity.sign == 0 and fact.value < 0 and not is_lower:
        return False
    factor = _factor(quantity.unit, fact)
    if factor is None:
        return False
    true, stated, step = abs(fact.value), quantity.magnitude * factor, quantity.step * factor
    error = abs(true - stated)
    # The last term is the room that binary fractions need: 0.285 is stored as a little less.
    return error <= min(0.5 * step, MAX_ROUNDING * true) + 1e-9 * true


def _factor(stated: Unit | None, fact: Fact) -> float | None:
    """What one of the stated unit is in the fact's own; None when they measure different things.

    Without a stated unit the number must be in the fact's own; percent are never meant without being said.
    """
    own = parse_unit(fact.unit)
    if stated is None:
        return None if own is not None and own.dimension == "ratio" and own.scale != 1.0 else 1.0
    if stated.dimension == "count":
        if (stated.per_seconds is None) != (own is None or own.per_seconds is None):
            return None
        counted = {singular(word) for word in re.findall(r"[A-Za-z]+", f"{fact.unit} {fact.name}")}
        if stated.noun not in counted or (own is not None and own.dimension != "count"):
            return None
    elif own is None or own.dimension != stated.dimension:
        return None
    scale = stated.scale / (own.scale if own is not None else 1.0)
    if stated.per_seconds is None and (own is None or own.per_seconds is None):
        return scale
    if stated.per_seconds is None or own is None or own.per_seconds is None:
        return None
    return scale * own.per_seconds / stated.per_seconds
