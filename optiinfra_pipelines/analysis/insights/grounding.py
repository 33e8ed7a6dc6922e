"""Whether every number and every name of a narrative is in the evidence that its sentence cites.

Pure. The check is closed: a text is read from end to end, and each piece must be (1) a name, flag, kind or whole
sentence of the cited evidence, letter for letter, (2) a number that tells one of its facts, or one that its own
sentence states (`quantities`), (3) a plain word (`words`), or (4) ordinary punctuation. Anything else
is a fault, so that what nobody thought of is refused. What it cannot see: a plain-word claim that no number or name
gives away; `_section_faults` narrows that by tying the summary to the worst finding and the first action to the first
recommendation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from optiinfra_pipelines.analysis.insights.quantities import (
    NUMBER_WORDS,
    Quantity,
    Unit,
    multiplier,
    parse_unit,
    tells,
)
from optiinfra_pipelines.analysis.insights.words import is_plain
from optiinfra_pipelines.domain.insights import EvidenceItem, EvidencePack, Fact, Narrative, Sentence

# Stands for a name that was found; it is in no text, since control characters are a fault.
_MASK = "\x01"
_ALLOWED = re.compile(r"[\x20-\x7e–—’‘“”…×°µμ−]*")
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)%])[+\-−])?(?P<money>\$)?(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<fraction>\.\d+)?"
    r"(?P<exponent>[eE][+-]?\d+)?(?P<attached>[A-Za-zµμ°%×]+(?:/[A-Za-z]+)?)?"
)
_WORD = re.compile(r"[A-Za-z]+(?:['’](?:s\b)?)?")
_UNIT_AHEAD = re.compile(r"[ \-]?(?P<unit>[A-Za-zµμ°%×$]+)(?P<rate>/[A-Za-z]+|\s+(?:per|an?)\s+[A-Za-z]+)?")
_RANGE_AHEAD = re.compile(r"\s*(?:-|–|to|and)\s*(?=\$?\d)")
_PUNCTUATION = re.compile(r"[ .,;:!?()\"'’‘“”…–—`\-\[\]" + _MASK + "]")
# A dash that begins a word is a flag's; one between words is not.
_FLAG = re.compile(r"(?<![\w\x01%)])--?[A-Za-z]")
# Digits that are no number by themselves: of dates, times, fractions, versions, addresses, and groups not of three.
_GLUED = re.compile(
    r"\d[/:]\d|[\w.]\.\d+\.\d|\d\.\d+\.\d|\d_|_\d"
    r"|\d +\d|(?<!\d)\.\d|(?<![\d.,])0\d|\d,(?!\d{3}(?!\d))\d|\d{4},\d{3}"
)
# A number with one of these beside it is part of something else.
_JOINED_BEFORE = re.compile(r"[\w:/.+\-]$")
_JOINED_AFTER = re.compile(r"[\w:/+\-]|\.\d")
_LOWERING_WORDS = """
less lower fewer below under down fall falls fell fallen drop drops dropped reduce reduces reduced decrease decreases
decreased decline declines shrink shrinks cut cuts save saves saved saving shorter smaller faster
"""
_LOWERING = frozenset(_LOWERING_WORDS.split())


@dataclass(frozen=True)
class Fault:
    """What is wrong with one sentence, in words that the writer can act on."""

    section: str
    text: str
    problem: str

    def __str__(self) -> str:
        return f"{self.section}: {self.problem}" + (f" in {self.text!r}" if self.text else "")


def faults_of(narrative: Narrative, pack: EvidencePack) -> list[Fault]:
    """Every fault of a narrative; empty when each of its numbers and names is in the evidence it cites."""
    items = {item.id: item for item in pack.items}
    sections: dict[str, tuple[Sentence, ...]] = {
        "summary": narrative.summary,
        "likely_root_cause": narrative.likely_root_cause,
        "first_action": narrative.first_action,
        "watch_items": narrative.watch_items,
    }
    faults = [
        Fault(section, sentence.text, problem)
        for section, sentences in sections.items()
        for sentence in sentences
        for problem in problems_of(sentence, items, pack.roster)
    ]
    return faults + list(_section_faults(narrative, pack))


def problems_of(sentence: Sentence, items: Mapping[str, EvidenceItem], roster: Sequence[str] = ()) -> list[str]:
    """What one sentence says that the evidence it cites does not."""
    strange = [cited for cited in sentence.evidence if cited not in items]
    if strange:
        return [f"cites {', '.join(map(repr, strange))}, which is no evidence"]
    cited = [items[name] for name in dict.fromkeys(sentence.evidence)]
    if not _ALLOWED.fullmatch(sentence.text):
        # Look-alike letters and hidden marks come from names at the most, and those must then be whole names.
        masked = _mask(sentence.text, _atoms(cited))
        if not _ALLOWED.fullmatch(masked.replace(_MASK, "")) or _MASK in sentence.text:
            return ["has characters that are neither plain text nor part of a cited name"]
    masked = _mask(sentence.text, _atoms(cited))
    foreign = [name for name in roster if _pattern(name).search(masked)]
    if foreign:
        return [f"names {', '.join(map(repr, foreign))}, which the evidence it cites does not"]
    return list(_read(masked, [fact for item in cited for fact in (*item.facts, *_said_facts(item))]))


def _said_facts(item: EvidenceItem) -> Iterator[Fact]:
    """The numbers of an item's own sentence, as they stand there; names, dates and versions are none."""
    text = _mask(item.says, [name for name in _atoms([item]) if name not in (item.says, item.says.rstrip("."))])
    for number in _NUMBER.finditer(text):
        if _JOINED_BEFORE.search(text, 0, number.start()):
            continue
        quantity, end = _quantity(text, number)
        if quantity is None or _JOINED_AFTER.match(text, end) or multiplier(number["attached"] or "") is not None:
            continue
        # Without a unit of its own the number counts whatever the sentence speaks of.
        unit = "" if quantity.unit is None else quantity.unit_written
        name = item.says if quantity.unit is None else unit
        yield Fact(name=name, value=(quantity.sign or 1) * quantity.magnitude, unit=unit)


def _atoms(items: Sequence[EvidenceItem]) -> list[str]:
    """What may be repeated letter for letter, longest first so that a name inside another is not taken for it."""
    found: set[str] = set()
    for item in items:
        found |= {item.id, item.title, item.says, item.says.rstrip("."), *item.names}
        found |= {item.subject} if item.subject else set()
        found |= {item.title.replace("_", " ")}
    return sorted((atom for atom in found if atom.strip()), key=lambda atom: (-len(atom), atom))


# A thousand names, each looked for in every sentence.
@lru_cache(maxsize=4096)
def _pattern(atom: str) -> re.Pattern[str]:
    """The atom as a whole name. Kinds are also found as words: memory pressure for MEMORY_PRESSURE."""
    is_kind = re.fullmatch(r"[A-Z][A-Z0-9_ ]{5,}", atom) is not None
    body = re.escape(atom).replace("_", "[_ ]") if is_kind else re.escape(atom)
    # A dot or a slash goes on with a name only when more of a name follows; at a sentence's end it does not.
    return re.compile(rf"(?<![\w\-/@:])(?<![\w]\.){body}(?!\w|[\-/@:.]\w)", re.IGNORECASE if is_kind else re.NOFLAG)


def _mask(text: str, atoms: Sequence[str]) -> str:
    for atom in atoms:
        text = _pattern(atom).sub(_MASK, text)
    return re.sub(_MASK + r"['’]s\b", _MASK, text)


def _read(text: str, facts: Sequence[Fact]) -> Iterator[str]:
    """Read what is left after the names, piece by piece; yields what is neither fact nor plain word."""
    glued = _GLUED.search(text)
    if glued is not None:
        yield f"has {glued.group()!r} inside a date, time, fraction, version or address that no cited evidence has"
        return
    is_lower = bool(_LOWERING & {word.lower() for word in re.findall(r"[A-Za-z]+", text)})
    at = 0
    while at < len(text):
        number = _NUMBER.match(text, at)
        if number is not None:
            quantity, at = _quantity(text, number)
            if quantity is None:
                yield f"has {number.group()!r}, which is neither a number with a known unit nor a cited name"
            elif not any(tells(quantity, fact, is_lower=is_lower) for fact in facts):
                yield f"states {quantity.written!r}, which is no fact of the evidence it cites"
            continue
        word = _WORD.match(text, at)
        if word is not None:
            end = word.end()
            if end < len(text) and (text[end].isdigit() or text[end] in "_/@\\"):
                end += len(re.match(r"\S*", text[end:]).group())  # type: ignore[union-attr]
                yield f"has {text[at:end]!r}, which is not in the evidence it cites"
                at = end
                continue
            yield from _word_problem(text, at, word.group(), facts, is_lower=is_lower)
            at = end
            continue
        if _PUNCTUATION.match(text, at) is None or _FLAG.match(text, at) is not None:
            piece = re.match(r"\S*", text[at:]).group()  # type: ignore[union-attr]
            yield f"has {piece!r}, which is not in the evidence it cites"
            at += max(1, len(piece))
            continue
        at += 1


def _word_problem(text: str, at: int, word: str, facts: Sequence[Fact], *, is_lower: bool) -> Iterator[str]:
    bare = word.rstrip("'’").lower().removesuffix("'s").removesuffix("’s")
    if bare in NUMBER_WORDS:
        unit, _ = _unit_ahead(text, at + len(word))
        quantity = Quantity(word, float(NUMBER_WORDS[bare]), 0.0, unit=unit)
        if not any(tells(quantity, fact, is_lower=is_lower) for fact in facts):
            yield f"states {word!r}, which is no fact of the evidence it cites"
    elif not is_plain(bare):
        yield f"uses {word!r}, which is neither in the evidence it cites nor a plain word of the list"


def _quantity(text: str, number: re.Match[str]) -> tuple[Quantity | None, int]:
    """The number that begins here and where it ends; None when what is attached to its digits is no unit."""
    end = number.end()
    decimals = len(number["fraction"] or ".") - 1
    exponent = int((number["exponent"] or "e0")[1:])
    if abs(exponent) > 30:
        return None, end
    magnitude = float(number["digits"].replace(",", "") + (number["fraction"] or "")) * 10.0**exponent
    step = 10.0 ** (exponent - decimals)
    unit, factor = None, 1.0
    digits_end = number.start("attached") if number["attached"] else end
    attached = number["attached"]
    if attached:
        unit = parse_unit(attached)
        if unit is None:
            if multiplier(attached) is None:
                return None, end
            factor = multiplier(attached) or 1.0
    if unit is None:
        word = re.match(r" (thousand|million|billion)\b", text[end:])
        if word is not None:
            factor *= multiplier(word.group(1)) or 1.0
            end += word.end()
        unit, end = _unit_ahead(text, end)
    elif unit.per_seconds is None:
        unit, end = _with_rate(text, unit, end)
    if unit is None:
        unit = _unit_of_range(text, end)
    if number["money"]:
        if unit is not None and unit.dimension != "money":
            return None, end
        unit = unit or Unit("money")
        unit, end = _with_rate(text, unit, end)
    sign = {"+": 1, "-": -1, "−": -1}.get(number["sign"] or "", 0)
    written = "USD" + text[digits_end:end] if number["money"] else text[digits_end:end]
    return Quantity(text[number.start() : end].strip(), magnitude * factor, step * factor, sign, unit, written), end


def _unit_ahead(text: str, at: int) -> tuple[Unit | None, int]:
    """The unit that follows a number, with its rate, and where it ends."""
    found = _UNIT_AHEAD.match(text, at)
    if found is None:
        return None, at
    unit = parse_unit(found["unit"])
    if unit is None:
        return None, at
    return _with_rate(text, unit, found.end("unit"))


def _with_rate(text: str, unit: Unit, at: int) -> tuple[Unit, int]:
    """`/s`, ` per second`, ` an hour` behind a unit make it a rate; a slash with anything else stays to be a fault."""
    found = re.match(r"(?:/|\s+per\s+|\s+an?\s+)([A-Za-z]+)", text[at:])
    if found is None or unit.per_seconds is not None:
        return unit, at
    per = parse_unit(found.group(1))
    if per is None or per.dimension != "time":
        return unit, at
    return Unit(unit.dimension, unit.scale, unit.noun, per.scale), at + found.end()


def _unit_of_range(text: str, at: int) -> Unit | None:
    """`0.5 to 1 s`: the first number has the unit of the second."""
    link = _RANGE_AHEAD.match(text, at)
    if link is None:
        return None
    second = _NUMBER.match(text, link.end())
    if second is None:
        return None
    following, _ = _quantity(text, second)
    return following.unit if following is not None else None


def _section_faults(narrative: Narrative, pack: EvidencePack) -> Iterator[Fault]:
    """The summary speaks of the worst finding; the first action is the first recommendation, where there is one."""
    worst = next((item for item in pack.items if item.kind == "finding"), None)
    if worst is not None:
        told = [sentence for sentence in narrative.summary if worst.id in sentence.evidence]
        if not any(worst.subject is None or _pattern(worst.subject).search(sentence.text) for sentence in told):
            yield Fault("summary", "", f"does not name {worst.subject!r} of {worst.id}, the most severe finding")
    advice = next((item for item in pack.items if item.kind == "recommendation"), None)
    if advice is not None and not any(advice.id in sentence.evidence for sentence in narrative.first_action):
        yield Fault("first_action", "", f"does not cite {advice.id}, the first recommendation")
