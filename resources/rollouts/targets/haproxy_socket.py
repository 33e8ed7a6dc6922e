"""HAProxy's runtime socket: one command, one answer; weights, states and counters of one backend's servers.

Verified with HAProxy 2.6. Answers are empty for a change that was made; any text is its refusal. Which weights to set
is `haproxy`'s business.
"""

from __future__ import annotations

import csv
import io
import re
import socket
from dataclasses import dataclass

from resources.rollouts.targets.base import TargetError

# A write takes 0.1 to 0.2 ms; a process that does not answer in 2 s is being restarted or is gone.
TIMEOUT_SECONDS = 2.0
MAX_ANSWER_BYTES = 8 * 2**20
_WEIGHT = re.compile(r"^(\d+) \(initial (\d+)\)")


@dataclass(frozen=True)
class ServerStatus:
    """One server as `show stat` has it. in_flight: requests now. requests, failed: since HAProxy started.

    failed: answers of 5xx, by the server or made by HAProxy for it, and connections that failed.
    """

    server: str
    status: str
    weight: int
    in_flight: int
    requests: int
    failed: int

    @property
    def is_up(self) -> bool:
        """Not down as far as HAProxy knows. One at weight 0 shows DRAIN; one without health checks counts as up."""
        return self.status.startswith(("UP", "no check", "DRAIN"))


class RuntimeSocket:
    """Commands to one HAProxy process by its unix socket. Every method raises TargetError."""

    def __init__(self, path: str) -> None:
        self.path = path

    def ask(self, command: str) -> str:
        """Send one command and return the whole answer."""
        if "\n" in command or ";" in command:
            raise TargetError(f"{command!r} is more than one command")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(TIMEOUT_SECONDS)
                connection.connect(self.path)
                connection.sendall(command.encode() + b"\n")
                answer = bytearray()
                while chunk := connection.recv(65536):
                    answer += chunk
                    if len(answer) > MAX_ANSWER_BYTES:
                        raise TargetError(f"HAProxy answers {command!r} without end")
        except OSError as error:
            raise TargetError(f"HAProxy's socket {self.path} does not answer: {error}; is it running?") from error
        return answer.decode("utf-8", "replace")

    def tell(self, command: str) -> None:
        """A change; HAProxy says nothing when it made it."""
        answer = self.ask(command).strip()
        if answer:
            raise TargetError(f"HAProxy refuses {command!r}: {answer}")

    def weight(self, backend: str, server: str) -> tuple[int, int]:
        """Present weight and the one of the configuration file."""
        answer = self.ask(f"get weight {backend}/{server}")
        found = _WEIGHT.match(answer)
        if found is None:
            raise TargetError(f"HAProxy does not know server {backend}/{server}: {answer.strip()}")
        return int(found[1]), int(found[2])

    def set_weight(self, backend: str, server: str, weight: int) -> None:
        """Set and read back."""
        self.tell(f"set server {backend}/{server} weight {weight}")
        actual, _ = self.weight(backend, server)
        if actual != weight:
            raise TargetError(f"weight of {backend}/{server} is {actual} after setting {weight}")

    def set_state(self, backend: str, server: str, state: str) -> None:
        """ready, drain (no new request, not even a sticky one) or maint."""
        self.tell(f"set server {backend}/{server} state {state}")

    def servers(self, backend: str) -> dict[str, ServerStatus]:
        """Every server of a backend by name."""
        table = self.ask("show stat").lstrip("# ")
        found = {}
        for row in csv.DictReader(io.StringIO(table)):
            if row.get("pxname") == backend and row.get("svname") not in ("FRONTEND", "BACKEND", None):
                name = str(row["svname"])
                found[name] = ServerStatus(
                    name,
                    row.get("status") or "",
                    _number(row, "weight"),
                    _number(row, "scur"),
                    _number(row, "req_tot") or _number(row, "stot"),
                    _number(row, "hrsp_5xx") + _number(row, "econ") + _number(row, "eresp"),
                )
        if not found:
            raise TargetError(f"HAProxy has no backend {backend}")
        return found

    def state_dump(self) -> str:
        """`show servers state`: what `load-server-state-from-file` reads at a start."""
        return self.ask("show servers state")


def _number(row: dict[str, str], column: str) -> int:
    text = row.get(column) or "0"
    return int(text) if text.isdigit() else 0
