"""Change an engine's flags in a container's command line, in whatever spelling they stand there. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from resources.rollouts.targets.base import Flags, TargetError

_SHELLS = ("sh", "bash", "ash", "dash")
# These stand without a value in every engine; what follows one of them is not theirs.
_BARE = ("enable_", "disable_", "no_", "trust_", "use_")


def refuse_shell(words: Sequence[str], where: str) -> None:
    """TargetError for a command line that a shell reads: flags in its text cannot be changed word by word."""
    for word, following in pairwise(words):
        if word.rsplit("/", 1)[-1] in _SHELLS and following.startswith("-") and "c" in following:
            raise TargetError(f"{where} runs a shell script ({word} {following}); write the engine's flags as args")


def with_flags(words: Sequence[str], flags: Flags) -> list[str]:
    """The same words with these flags: replaced where they stand (--a-b 1, --a_b=1), else appended, or taken away.

    A flag and its negation (`no_`) never stand both.
    """
    kept = list(words)
    for flag, value in flags.items():
        name = _plain(flag)
        kept, was_at = _without(kept, name)
        if value is None:
            continue
        opposite = name.removeprefix("no_") if name.startswith("no_") else f"no_{name}"
        kept, _ = _without(kept, opposite)
        word = f"--{name.replace('_', '-')}" + (f"={value}" if value else "")
        kept.insert(min(was_at, len(kept)) if was_at is not None else len(kept), word)
    return kept


def _without(words: list[str], name: str) -> tuple[list[str], int | None]:
    """The words without one flag and its value, and where it stood first."""
    kept: list[str] = []
    first: int | None = None
    skip = False
    for index, word in enumerate(words):
        if skip:
            skip = False
            continue
        if not word.startswith("--") or _plain(word.split("=", 1)[0]) != name:
            kept.append(word)
            continue
        first = len(kept) if first is None else first
        following = words[index + 1] if index + 1 < len(words) else "--"
        has_value = "=" not in word and not following.startswith("--")
        if has_value and name.startswith(_BARE):
            raise TargetError(f"it is not clear whether {following!r} belongs to {word}; write {word} last, or with =")
        skip = has_value
    return kept, first


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")
