"""Runs an installed load generator as a process against one server, in a folder of its own.

What it is given and how its result is read is `optiinfra_pipelines.rollout.load_generators`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from optiinfra_pipelines.rollout.load_generators import (
    GENERATORS,
    REQUESTS_FILE,
    RESULT_FILES,
    Generated,
    GeneratorError,
    GeneratorName,
    command,
    read_result,
    requests_text,
)
from optiinfra_pipelines.rollout.staging_load import PlannedRequest

# aiperf took 19 s for 10 s of load on an idle core and 40 s on a busy one; `vllm` imports PyTorch first. The longest
# load takes 80 s, its last answer two minutes more.
RUN_SECONDS = 300.0
# Not for a tool that prints its environment or sends what it measured somewhere.
_SECRETS = ("OPTIINFRA_", "GROQ_")


@dataclass(frozen=True)
class Generator:
    """An installed generator. program: its executable. tokenizer: as the operator names it; none, the model's own."""

    name: GeneratorName
    program: str
    tokenizer: str | None
    environ: Mapping[str, str]

    @cached_property
    def version(self) -> str:
        """As the program tells it; "unknown" where it does not, or where its result tells it anyway."""
        if self.name == "aiperf":
            return "unknown"
        with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
            told = subprocess.run(
                [self.program, "--version"], capture_output=True, text=True, timeout=120, check=True, env=self._told
            )
            return told.stdout.split()[-1]
        return "unknown"

    @property
    def _told(self) -> dict[str, str]:
        return {name: value for name, value in self.environ.items() if not name.startswith(_SECRETS)}

    def run(self, url: str, model: str, planned: Sequence[PlannedRequest], seed: int) -> Generated:
        """Send the planned requests to a server. GeneratorError when it ends badly, late or without a result."""
        with tempfile.TemporaryDirectory(prefix="optiinfra-load-") as name:
            folder = Path(name)
            (folder / REQUESTS_FILE).write_text(requests_text(self.name, planned, model), encoding="utf-8")
            given = command(
                self.name,
                self.program,
                url=url.rstrip("/"),
                model=model,
                tokenizer=self.tokenizer,
                folder=str(folder),
                count=len(planned),
                seed=seed,
                rate=len(planned) / planned[-1].at_seconds,
            )
            said = self._ran(given, folder)
            files = [folder / file for file in RESULT_FILES[self.name]]
            missing = [file.name for file in files if not file.exists()]
            if missing:
                raise GeneratorError(f"{self.name} left no {', '.join(missing)}: {said}")
            return read_result(
                self.name, [file.read_text(encoding="utf-8") for file in files], len(planned), self.version
            )

    def _ran(self, given: Sequence[str], folder: Path) -> str:
        """The end of what it said. Its workers are its children: all of them end with it."""
        with (folder / "output.log").open("w+", encoding="utf-8", errors="replace") as log:
            try:
                process = subprocess.Popen(
                    given,
                    cwd=folder,
                    env=self._told,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise GeneratorError(f"{self.name} could not be started: {error}") from error
            try:
                process.wait(RUN_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise GeneratorError(f"{self.name} did not end within {RUN_SECONDS:.0f} s") from error
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            log.seek(0)
            return " ".join(log.read()[-600:].split())


def find_generator(wanted: str, tokenizer: str | None, environ: Mapping[str, str]) -> Generator | None:
    """The generator to use: the wanted one, or for "auto" the first that is installed; None: our own load."""
    # Beside the interpreter first: one that is installed with us needs no PATH.
    places = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", os.defpath)])
    for name in GENERATORS:
        program = shutil.which(name, path=places) if wanted in ("auto", name) else None
        if program is not None:
            return Generator(name, program, tokenizer, environ)
    return None
