"""What stands behind the live demo's replicas: NVIDIA Dynamo's mocker (SIMULATED), or a real vLLM on this host's CPU.

Here: how one replica of each is started, what it runs with, the load that overloads it, and the words that say which it
is. Not here: starting and ending them (`fleet`), one replica of the mocker (`replica`).
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from optiinfra_pipelines.domain.base import Source
from resources.demo.live.replica import MODEL_NAME, metrics_port
from resources.demo.live.traffic import Load

# The mocker's pace against a real GPU's, for prompts and answers, chosen so that two cores carry Dagster beside a load
# that needs more than 32 slots: about 50 ms a token, 8 s a request.
_SPEEDUP_RATIO, _DECODE_SPEEDUP_RATIO = 0.5, 0.35
# How much more than its capacity a real engine is asked for, and from how many rounds of full slots that is measured.
_OVERLOAD_RATIO, _ROUNDS = 1.3, 4


@dataclass(frozen=True)
class LiveEngine:
    """One kind of replica. words: for screens; header: for the fleet.yaml written for it.

    command: of one replica; {port}, {model} (a folder) and {replicas} (scratch) are filled in, its flags follow.
    metrics_url: the page of a replica by its port. plan: of the walk's rollouts. tight: flags that starve it.
    load: what its clients send; None is measured at the start, as more than its slots carry. shows_effect: whether the
    walk waits for the ledger's first look at it.
    """

    source: Source
    words: Sequence[str]
    header: str
    command: Sequence[str]
    flags: Mapping[str, str]
    tight: Mapping[str, str]
    plan: Mapping[str, Any]
    missing: Callable[[], str | None]
    load: Load | None
    stable: int = 2
    candidates: int = 2
    metrics_url: Callable[[int], str] = field(default=lambda port: f"http://127.0.0.1:{metrics_port(port)}/metrics")
    ready_seconds: float = 90.0
    max_first_percent: float = 25.0
    shows_effect: bool = True

    def launch(self, folder: Path) -> tuple[str, ...]:
        """Command of one replica with {port} left open; `{flags}` comes last and wins."""
        filled = [part.replace("{model}", str(folder / "model")) for part in self.command]
        filled = [part.replace("{replicas}", str(folder / "replicas")) for part in filled]
        return (*filled, *(f"--{flag}={value}" for flag, value in self.flags.items()), "{flags}")


# Few shares, each as short as the planner allows at this traffic: two minutes.
_PLAN: Mapping[str, Any] = {
    "target": "haproxy",
    "percents": [25.0, 50.0, 100.0],
    "candidate_replicas": 2,
    "bake_minutes": 0.5,
    "detect_percent": 100.0,
    "min_requests": 100,
    "warm_up_seconds": 10.0,
}


def _dynamo_missing() -> str | None:
    absent = [name for name in ("dynamo.frontend", "dynamo.mocker") if not _is_installed(name)]
    if absent:
        return f"{', '.join(absent)} not installed; run it as: uv run --group live optiinfra demo --live"
    return None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


MOCKER = LiveEngine(
    source="simulated",
    words=(
        "OptiInfra live demo: real HTTP servers, gateway, traffic and rollouts; the ENGINES ARE SIMULATED",
        "(NVIDIA Dynamo's mocker behind its real frontend). No token here was computed by a model.",
    ),
    header="real HTTP servers on loopback; the engine is SIMULATED: NVIDIA Dynamo's mocker behind its real frontend",
    command=(
        *(sys.executable, "-m", "resources.demo.live.replica", "--port", "{port}"),
        *("--model", "{model}", "--folder", "{replicas}", "--block-size=32"),
        *(f"--speedup-ratio={_SPEEDUP_RATIO}", f"--decode-speedup-ratio={_DECODE_SPEEDUP_RATIO}"),
    ),
    # 32 slots are too few for the load, everything else is ample: they answer about 4 requests a second and replica,
    # 64 slots 6.5.
    flags={"max-num-seqs": "32", "max-num-batched-tokens": "1024", "num-gpu-blocks-override": "4096"},
    # Sixteen tokens a step for up to 64 running requests: they take turns, and prompts wait.
    tight={"max-num-batched-tokens": "16"},
    plan=_PLAN,
    missing=_dynamo_missing,
    load=Load(MODEL_NAME, requests_per_second=9.5, max_in_flight=140, prompt_bytes=(40, 160), output_tokens=(100, 200)),
)


def real_vllm(executable: Path) -> LiveEngine:
    """A real vLLM on this host's CPU with random weights of a small Llama: real scheduling, meaningless text.

    executable: the `vllm` of a virtual environment that was made as docs/live-demo.md says. One replica takes 2 GB and
    one to three minutes to start, so there are one of each kind.
    """
    told = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    return LiveEngine(
        source="live",
        words=(
            "OptiInfra live demo: a real vLLM on this host's CPU, with a real gateway, traffic and rollouts.",
            "Its weights are random: what it says means nothing, how it schedules is real.",
        ),
        header="a real vLLM on this host's CPU with random weights, on loopback",
        command=(
            *("/usr/bin/env", *(f"{name}={value}" for name, value in told.items())),
            *(str(executable), "serve", "{model}", "--served-model-name", MODEL_NAME, "--load-format", "dummy"),
            *("--host", "127.0.0.1", "--port", "{port}", "--dtype", "bfloat16", "--max-model-len", "2048"),
            *("--enforce-eager", "--block-size", "32", "--shutdown-timeout", "20"),
        ),
        flags={"max-num-seqs": "4", "max-num-batched-tokens": "1024", "num-gpu-blocks-override": "512"},
        # A prompt of some hundred tokens takes as many steps as an answer.
        tight={"max-num-batched-tokens": "8"},
        # One replica beside one: halves, and as few requests as a judgement takes at this traffic. Eight sequences take
        # a CPU longer than four: slots trade time per token for waiting, so whole requests are judged.
        plan={
            **_PLAN,
            "percents": [50.0, 100.0],
            "candidate_replicas": 1,
            "min_requests": 40,
            "warm_up_seconds": 20.0,
            "latency_signals": ["time_to_first_token_seconds", "request_duration_seconds"],
        },
        missing=lambda: None if executable.exists() else f"{executable} is not there; docs/live-demo.md makes it",
        load=None,
        stable=1,
        candidates=1,
        metrics_url=lambda port: f"http://127.0.0.1:{port}/metrics",
        ready_seconds=600.0,
        max_first_percent=50.0,
        # Few requests may be in flight, or they would wait for minutes: what comes rises with what is served, and no
        # early look can tell the two apart.
        shows_effect=False,
    )


def measured_load(url: str, engine: LiveEngine) -> Load:
    """A load that the engine's slots cannot carry: its slots are filled some times over, and the time is taken."""
    slots = int(engine.flags["max-num-seqs"]) * engine.stable
    prompts, outputs = (120, 480), (40, 80)
    body = {"model": MODEL_NAME, "prompt": "x" * (sum(prompts) // 2), "max_tokens": sum(outputs) // 2, "temperature": 0}

    def ask(number: int) -> None:
        told = {**body, "prompt": f"{number} {body['prompt']}", "ignore_eos": True}
        httpx.post(f"{url}/v1/completions", json=told, timeout=300.0, trust_env=False).raise_for_status()

    with ThreadPoolExecutor(slots) as pool:
        list(pool.map(ask, range(slots)))  # the first requests warm it up
        began = time.monotonic()
        list(pool.map(ask, range(_ROUNDS * slots)))
        seconds = time.monotonic() - began
    rate = _OVERLOAD_RATIO * _ROUNDS * slots / seconds
    return Load(MODEL_NAME, rate, max_in_flight=4 * slots, prompt_bytes=prompts, output_tokens=outputs)
