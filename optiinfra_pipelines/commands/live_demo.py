"""`optiinfra demo --live`: a small fleet with real HTTP traffic, which rollouts really change.

The servers, the gateway, the traffic and the rollouts are real; the engines are SIMULATED, unless a real vLLM is named,
and every screen says which.
With `--script` it plays the whole walk (`live_walk`) and exits; without, a person does it in the launchpad.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import click
import yaml

from optiinfra_pipelines.commands import up
from optiinfra_pipelines.commands.console import console
from optiinfra_pipelines.commands.live_walk import APPROVER, REQUESTER, Walk, WalkError
from optiinfra_pipelines.settings import Paths, find_paths
from resources.dagster_home.graphql import LaunchError, Launchpad
from resources.dagster_home.supervisor import ChildFailedError
from resources.demo.live.engines import MOCKER, measured_load, real_vllm
from resources.demo.live.fleet import DEPLOYMENT, LiveDemoError, LiveFleet, clear_home
from resources.demo.live.gateways import GatewayKind
from resources.demo.live.traffic import Load, Traffic


def run(
    paths: Paths,
    host: str,
    port: int,
    environ: Mapping[str, str],
    *,
    gateway: GatewayKind | None,
    vllm: Path | None,
    is_scripted: bool,
) -> None:
    """Run the live fleet under the Dagster UI until told to stop, or until the scripted walk is over.

    vllm: the executable of a real one, in place of the simulated engine.
    """
    engine = real_vllm(vllm.absolute()) if vllm is not None else MOCKER
    try:
        clear_home(paths.home, paths.rollouts_dir)
        with ExitStack() as stack:
            with console.status("starting replicas and their gateway …"):
                live = LiveFleet(
                    paths.home / "live", paths.rollouts_dir, engine=engine, gateway=gateway, on_event=console.print
                )
                stack.enter_context(live)
                load = engine.load or measured_load(live.url, engine)
            live.write_fleet(paths.fleet_file)
            traffic = stack.enter_context(Traffic(live.url, load))

            def walk(is_stopped: Callable[[], bool]) -> None:
                launchpad = Launchpad(f"http://{host}:{port}")
                _walk(Walk(paths, launchpad, traffic, engine, say=console.print, is_stopped=is_stopped), is_stopped)

            banner = _banner(live, load, is_scripted=is_scripted)
            up.run(paths, host, port, environ, banner=banner, beside=walk if is_scripted else None)
    except (LiveDemoError, ChildFailedError) as error:
        raise click.ClickException(str(error)) from error


def _walk(walk: Walk, is_stopped: Callable[[], bool]) -> None:
    try:
        walk.run()
    except (WalkError, LaunchError) as error:
        if is_stopped():
            return
        raise click.ClickException(f"the walk failed: {error}") from error
    console.print("the walk is over: the good change is in force, the bad one was taken back")


def _banner(live: LiveFleet, load: Load, *, is_scripted: bool) -> str:
    """What runs, what of it is simulated, and what to do next."""
    gateway = "HAProxy" if live.gateway == "haproxy" else "the built-in gateway"
    engine = live.engine
    flags = " ".join(f"--{flag} {value}" for flag, value in engine.flags.items())
    lines = [
        *engine.words,
        f"  replicas of {DEPLOYMENT}: {engine.stable}, behind {gateway} on {live.url}, each with",
        f"  {flags}; {load.requests_per_second:.3g} requests a second, more than their slots carry.",
    ]
    if not is_scripted:
        good = {**engine.plan, "requester": REQUESTER, "reason": "…", "recommendation_id": "…"}
        bad = {
            **engine.plan,
            "deployment": DEPLOYMENT,
            "requester": REQUESTER,
            "reason": "against all advice",
            "current": {**engine.flags, "max-num-seqs": str(2 * int(engine.flags["max-num-seqs"]))},
            "proposed": dict(engine.tight),
        }
        lines += [
            "What to do next, in the UI (Deployment, then Jobs, then the job's Launchpad):",
            "  1. Within minutes asset `findings` shows QUEUE_BUILDUP, then `recommendations` more batch slots.",
            "  2. Launch propose_rollout with the recommendation's id:",
            _config("record_proposal", good),
            f"  3. Launch approve_rollout as {APPROVER}, with what the first run printed. A sensor starts the rest;",
            "     follow execute_rollout in Runs and asset rollout/execution in the catalog.",
            "  4. When it is COMPLETED, try a bad one the same way and see it rolled back by itself:",
            _config("record_proposal", bad),
        ]
    return "\n".join(lines)


def _config(op: str, config: Mapping[str, object]) -> str:
    text = yaml.safe_dump({"ops": {op: {"config": dict(config)}}}, sort_keys=False, allow_unicode=True)
    return "\n".join(f"       {line}" for line in text.splitlines())


def settings_of_live_demo(paths: Paths, environ: dict[str, str]) -> tuple[Paths, dict[str, str]]:
    """The live demo keeps a state and a fleet.yaml of its own, which each start begins anew."""
    home = paths.home / "live-demo"
    own = environ | {"OPTIINFRA_HOME": str(home), "OPTIINFRA_FLEET": str(home / "fleet.yaml")}
    return find_paths(own), own
