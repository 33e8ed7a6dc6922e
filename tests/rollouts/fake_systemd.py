#!/usr/bin/env python3
"""A stand-in for `systemd-run` and `systemctl`, installed under both names on PATH; it is no systemd.

It starts real processes and keeps one file per unit in $FAKE_SYSTEMD. Only what the launcher asks is understood, and
anything else ends with status 64, so that a new question does not pass unseen.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ["FAKE_SYSTEMD"])


def pid_of(unit: str) -> int | None:
    try:
        pid = int((ROOT / unit).read_text())
        status = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return pid if status != "Z" else None


def main() -> int:
    program, words = Path(sys.argv[0]).name, [word for word in sys.argv[1:] if word != "--user"]
    with (ROOT / "asked.jsonl").open("a") as asked:
        asked.write(json.dumps([program, *sys.argv[1:]]) + "\n")
    if program == "systemd-run":
        options, line = words[: words.index("--")], words[words.index("--") + 1 :]
        unit = next(word.removeprefix("--unit=") for word in options if word.startswith("--unit="))
        if pid_of(unit) is not None:
            sys.stderr.write(f"Failed to start transient service unit: Unit {unit} was already loaded\n")
            return 1
        with Path(os.devnull).open("r+") as null:
            process = subprocess.Popen(line, stdin=null, stdout=null, stderr=null, start_new_session=True)
        (ROOT / unit).write_text(str(process.pid))
        return 0
    verb, unit = words[0], words[-1]
    pid = pid_of(unit)
    if verb == "is-active":
        sys.stdout.write("active\n" if pid is not None else "inactive\n")
        return 0 if pid is not None else 3
    if verb == "stop":
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
        while pid_of(unit) is not None:
            time.sleep(0.02)
        return 0
    if verb == "kill" and pid is not None:
        os.kill(pid, signal.SIGKILL)
        return 0
    return 64


sys.exit(main())
