"""The standard generators themselves, before a real frontend of a SIMULATED engine: what they are told, and tell.

    uv sync --group live && OPTIINFRA_VLLM=v/bin/vllm OPTIINFRA_AIPERF=a/bin/aiperf pytest -n 0 -m engine \
        tests/rollouts/test_generators_real.py

vLLM's needs its extra `bench` (pandas, datasets).
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from optiinfra_pipelines.rollout import staging_load
from resources.demo.live.engines import MOCKER
from resources.demo.live.model import write_model
from resources.demo.live.replica import MODEL_NAME, metrics_port
from resources.rollouts.generators import Generator, GeneratorName

PROGRAMS = {"aiperf": os.environ.get("OPTIINFRA_AIPERF"), "vllm": os.environ.get("OPTIINFRA_VLLM")}
pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(420),
    pytest.mark.skipif(MOCKER.missing() is not None, reason=MOCKER.missing() or ""),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("replica")
    write_model(made / "model")
    return made


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """A replica that answers within tenths of a second."""
    # The mocker takes no port over 32,767 for its page, which lies beside.
    port = next(one for one in range(9300, 9400) if _is_free(one) and _is_free(metrics_port(one)))
    command = [sys.executable, "-m", "resources.demo.live.replica", "--port", str(port)]
    command += ["--model", str(folder / "model"), "--folder", str(folder), "--block-size=32", "--speedup-ratio=4"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    made, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    body = {"model": MODEL_NAME, "prompt": "hello", "max_tokens": 2}
    try:
        while not _answers(made, body):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.5)
        yield made
    finally:
        process.terminate()
        process.wait(30)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _answers(url: str, body: dict[str, object]) -> bool:
    try:
        return httpx.post(f"{url}/v1/completions", json=body, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("name", ["aiperf", "vllm"])
def test_it_sends_what_is_planned_and_tells_how_long_each_took(name: GeneratorName, url: str, folder: Path) -> None:
    program = PROGRAMS[name]
    if program is None:
        pytest.skip(f"OPTIINFRA_{name.upper()} names no {name}")
    environ = dict(os.environ) | {"HF_HUB_OFFLINE": "1"}
    generator = Generator(name, program, str(folder / "model"), environ)
    mix = staging_load.LoadMix(requests_per_second=16.0)
    planned = [one for one in staging_load.plan_round(mix, seed=7, index=0) if one.is_compared]

    good = generator.run(url, MODEL_NAME, planned, 7)
    strange = generator.run(url, "no-such-model", planned[:4], 7)

    assert len(good.seconds) == len(planned)
    assert all(one is not None and 0 < one < 30 for one in good.seconds)
    assert good.version[0].isdigit()
    assert strange.seconds == (None,) * 4
