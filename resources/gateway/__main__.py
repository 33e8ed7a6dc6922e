"""Run a gateway until SIGTERM: `python -m resources.gateway settings.json`.

Opens the port and the runtime socket, restores weights from the state file and checks the servers' health. SIGTERM
closes the port, lets requests in flight end, and exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

from resources.gateway.pool import GatewaySettings, Pool
from resources.gateway.proxy import MAX_HEAD_BYTES, Proxy
from resources.gateway.runtime import answer, restore

# Requests that are in flight at SIGTERM may take so long to end.
END_SECONDS = 30.0
# Between two looks at whether the last request has ended.
LOOK_SECONDS = 0.1


async def run(settings: GatewaySettings) -> None:
    """Serve until SIGTERM or SIGINT."""
    pool = Pool.of(settings.backend, settings.servers)
    with contextlib.suppress(FileNotFoundError):
        restore(pool, Path(settings.state_file).read_text(encoding="utf-8"))
    proxy = Proxy(pool, settings.health_path)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)

    async def command(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        writer.write(answer(pool, line.decode("utf-8", "replace")).encode())
        writer.close()

    # One of a gateway that was killed is in the way.
    Path(settings.socket).unlink(missing_ok=True)
    runtime = await asyncio.start_unix_server(command, settings.socket)
    Path(settings.socket).chmod(0o600)
    api = await asyncio.start_server(proxy.serve, "127.0.0.1", settings.port, limit=MAX_HEAD_BYTES, backlog=1024)
    checks = asyncio.create_task(proxy.check_for_ever())
    await stopped.wait()
    api.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_SECONDS):
            while any(server.in_flight for server in pool.servers.values()):
                await asyncio.sleep(LOOK_SECONDS)
    checks.cancel()
    runtime.close()


if __name__ == "__main__":
    asyncio.run(run(GatewaySettings.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))))
