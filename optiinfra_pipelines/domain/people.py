"""Names of people: when two self-declared ones mean one person, and where an approver's secret is kept.

Here: comparing names. Not here: who may do what (`optiinfra_pipelines.rollout.gate`).
"""

from __future__ import annotations

import re
import unicodedata

# The name our own runs act under; it proposes and executes, and so may never approve.
SERVICE = "optiinfra"


def same_person(one: str, other: str) -> bool:
    """Whether two self-declared names mean one person: spelling, case and spaces do not make two."""
    return _person(one) == _person(other)


def secret_name(approver: str) -> str:
    """Environment variable that holds an approver's secret, such as OPTIINFRA_APPROVER_SECRET_ALICE_W."""
    return "OPTIINFRA_APPROVER_SECRET_" + re.sub(r"[^A-Z0-9]+", "_", approver.strip().upper())


def _person(name: str) -> str:
    """Letters and digits alone, in compatibility form and without case."""
    decomposed = unicodedata.normalize("NFKD", name).casefold()
    return "".join(letter for letter in decomposed if unicodedata.category(letter)[0] in "LN")
