"""The commands a rollout gives a gateway, in HAProxy's words, so that one target drives both.

Known: `show stat`, `show servers state`, `get weight b/s`, `set server b/s weight N`, `set server b/s state ready`
(or drain, maint). Anything else is answered with what is known. Pure: text in, text out.
"""

from __future__ import annotations

import re
from typing import cast

from resources.gateway.pool import MAX_WEIGHT, Pool, Server, State

# Columns of HAProxy's own table that a rollout reads, under its names.
_STAT = "# pxname,svname,scur,stot,weight,status,req_tot,hrsp_5xx,econ,eresp,"
_STATE = "# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight"
# HAProxy's bits of srv_admin_state: forced maintenance and forced drain.
_ADMIN: dict[State, int] = {"ready": 0, "maint": 1, "drain": 8}
_GET = re.compile(r"^get weight (\S+)/(\S+)$")
_WEIGHT = re.compile(r"^set server (\S+)/(\S+) weight (\d+)$")
_SET_STATE = re.compile(r"^set server (\S+)/(\S+) state (ready|drain|maint)$")
HELP = "unknown command; known: show stat, show servers state, get weight, set server weight, set server state\n"


def answer(pool: Pool, command: str) -> str:
    """What a command comes to. Empty for a change that was made, as HAProxy has it."""
    said = " ".join(command.split())
    if said == "show stat":
        return _stat(pool)
    if said == "show servers state":
        return dump(pool)
    for pattern, do in ((_GET, _weight), (_WEIGHT, _set_weight), (_SET_STATE, _set_state)):
        found = pattern.match(said)
        if found is not None:
            backend, name, *rest = found.groups()
            if backend != pool.backend or name not in pool.servers:
                return "No such server.\n"
            return do(pool, pool.servers[name], *rest)
    return HELP


def dump(pool: Pool) -> str:
    """Weights and states of every server: what `restore` reads."""
    lines = ["1", _STATE]
    for place, one in enumerate(pool.servers.values(), 1):
        fields = (1, pool.backend, place, one.name, one.settings.host, 2 if one.is_up else 0, _ADMIN[one.state])
        lines.append(" ".join(str(field) for field in (*fields, one.weight, one.settings.weight)))
    return "\n".join(lines) + "\n"


def restore(pool: Pool, text: str) -> None:
    """Take weights and states from a dump. Lines of other pools, unknown servers and broken lines are passed over."""
    states = {number: state for state, number in _ADMIN.items()}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 9 or fields[1] != pool.backend or fields[3] not in pool.servers:
            continue
        admin, weight = fields[6], fields[7]
        if admin.isdigit() and weight.isdigit() and int(weight) <= MAX_WEIGHT:
            server = pool.servers[fields[3]]
            server.weight, server.state = int(weight), states.get(int(admin), "ready")


def _stat(pool: Pool) -> str:
    lines = [_STAT]
    for one in pool.servers.values():
        numbers = (one.in_flight, one.requests, one.weight, one.status, one.requests)
        failures = (one.refused_by_server, one.not_connected, one.broken_off)
        lines.append(",".join(str(field) for field in (pool.backend, one.name, *numbers, *failures)) + ",")
    return "\n".join(lines) + "\n\n"


def _weight(pool: Pool, server: Server) -> str:
    return f"{server.weight} (initial {server.settings.weight})\n"


def _set_weight(pool: Pool, server: Server, weight: str) -> str:
    if int(weight) > MAX_WEIGHT:
        return f"Weight can only be between 0 and {MAX_WEIGHT}.\n"
    pool.set_weight(server.name, int(weight))
    return ""


def _set_state(pool: Pool, server: Server, state: str) -> str:
    server.state = cast(State, state)
    return ""
