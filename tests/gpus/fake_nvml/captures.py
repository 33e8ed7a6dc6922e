"""Recordings of nvidia-smi on real GPUs, read as scripts for the fake driver.

Here: finding and reading a capture ($OPTIINFRA_DATA/fixtures/nvidia_smi; provenance in the README there). Not here:
what rows are expected of it (`test_gpus_captures.py`).
"""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import pytest

MIB = 1 << 20
MISSING = re.compile(r"^\[?(N/A|Not Supported|Requested functionality|GPU requires|Unknown)", re.IGNORECASE)


def capture(name: str) -> str:
    """Text of one capture; skips the test where the recordings are not at hand."""
    folder = os.environ.get("OPTIINFRA_DATA")
    if not folder:
        pytest.skip("OPTIINFRA_DATA is not set: it names the folder with the recordings of real GPUs")
    path = Path(folder) / "fixtures" / "nvidia_smi" / name
    if not path.exists():
        pytest.skip(f"there is no recording {path}")
    return path.read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """What a command printed, such as 'load :: query-gpu'."""
    _, _, rest = text.partition(f"# {title}")
    _, _, body = rest.partition("#" * 80 + "\n")
    return body.partition("\n" + "#" * 80)[0]


def queried(text: str, state: str) -> dict[str, str]:
    """`nvidia-smi --query-gpu` in a state (idle or load): field -> value, without those the card lacks."""
    header, values = list(
        csv.reader(section(text, f"{state} :: query-gpu").strip().splitlines(), skipinitialspace=True)
    )
    fields = {name.partition(" [")[0]: value for name, value in zip(header, values, strict=True)}
    return {name: value for name, value in fields.items() if not MISSING.match(value)}


def detail(text: str, state: str, label: str) -> str | None:
    """One value of `nvidia-smi -q`, by its label; None when it is N/A."""
    found = re.search(rf"^ +{re.escape(label)} +: (.+)$", section(text, f"{state} :: query (-q)"), re.MULTILINE)
    return None if found is None or MISSING.match(found[1]) else found[1].strip()


def number(value: str) -> float:
    """'81559 MiB' -> 81559.0"""
    return float(value.split()[0])
