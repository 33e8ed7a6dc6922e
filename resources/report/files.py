"""Write a report's file whole or not at all: whoever has the old one open keeps it, nobody reads half of one."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

NAME = "fleet_report.html"


@dataclass(frozen=True)
class WrittenReport:
    """Where a report lies, and how large it is."""

    path: Path
    size_bytes: int


def write_report(target: Path, html: str) -> WrittenReport:
    """Write into the folder `target` as NAME, or, when it ends in .html, to that file. OSError when it cannot be."""
    path = target if target.suffix == ".html" else target / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    data = html.encode("utf-8", "replace")
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        # A temporary file is its owner's alone; a report is for whoever may read the folder.
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return WrittenReport(path, len(data))
