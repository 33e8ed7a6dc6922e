"""The demo's fleet: recordings of real engines over loopback HTTP, beside this host's own live metrics.

Here: which recordings are shown and what each of them is. Not here: serving them (`replay`) or the command
(`optiinfra_pipelines.commands.demo`). Where each recording comes from: tests/fixtures/recordings/PROVENANCE.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from optiinfra_pipelines.domain.fleet import ModelShape, Objective
from resources.demo.replay import Recording, ReplayServer, load_recording

# A recorded phase of trouble lasts about a minute, so as shipped (five minutes, twice) none would call for a change.
SHORT_WINDOWS = {"advice_window_seconds": 30, "advice_windows": 1}
# What the checkpoint behind the recordings of small-llama was made with.
SMALL_LLAMA = ModelShape(layers=8, kv_heads=2, head_dim=64, dtype="bfloat16")

RECORDINGS = Path(__file__).parents[2] / "tests" / "fixtures" / "recordings"


@dataclass(frozen=True)
class Shown:
    """One recorded target of the demo. `truth` says in a few words what it really is."""

    target: str
    deployment: str
    model: str
    folder: str
    phases: tuple[str, ...]
    truth: str
    shape: ModelShape | None = None
    engine: str | None = None
    objectives: tuple[Objective, ...] = ()


SHOWN: tuple[Shown, ...] = (
    Shown(
        "vllm-recorded",
        "chat-vllm",
        "small-llama",
        "vllm/0.32.0/small_llama_kv8k",
        (
            "01_idle",
            "02_light_c1",
            "03_loaded_shared_prefix_c8",
            "04_kv_pressure_preempt_c16",
            "05_overload_queue_c64_low_kv",
            "06_drained_idle",
        ),
        "recording of a real vLLM 0.32 on CPU under real load",
        SMALL_LLAMA,
        # At an edge of the histogram; light load keeps it, what the recording then went through does not.
        objectives=(Objective(kind="ttft", threshold_seconds=5.0, target_ratio=0.95),),
    ),
    Shown(
        "llamacpp-recorded",
        "chat-llamacpp",
        "small-random",
        "llama.cpp/debian-1_0.7.0-b11669/small_np4_c8192",
        ("01_idle", "02_light_c1", "03_shared_prefix_c4", "04_overload_deferred_c24", "05_drained_idle"),
        "recording of a real llama-server under real load",
    ),
    Shown(
        "dynamo-frontend-recorded",
        "mock-dynamo",
        "mock",
        "dynamo/1.6.1/frontend_kv_router_mocker",
        ("01_idle", "02_light_c1", "03_shared_prefix_c8", "04_overload_c64", "05_drained_idle"),
        "recording of a real Dynamo frontend; the engine behind it was simulated",
    ),
    Shown(
        "dynamo-worker-recorded",
        "mock-dynamo",
        "mock",
        "dynamo/1.6.1/frontend_kv_router_mocker",
        ("worker",),
        "recording of Dynamo's mocker: a simulated engine",
        # The mocker schedules like vLLM and takes its flags.
        engine="vllm",
    ),
    Shown(
        "sglang-recorded",
        "chat-sglang",
        "small-llama",
        "sglang/0.5.23",
        ("collectors_in_process",),
        "snapshots of SGLang's own metrics code; gauges set by hand, no pace recorded",
    ),
)


def demo_recordings(root: Path = RECORDINGS) -> list[Recording]:
    """The recordings of SHOWN. Raises FileNotFoundError naming the one that has no pages."""
    return [load_recording(shown.target, [root / shown.folder / phase for phase in shown.phases]) for shown in SHOWN]


def write_demo_fleet(path: Path, server: ReplayServer, recordings: Sequence[Recording]) -> None:
    """Write the demo's fleet.yaml: one recorded target per recording, and this host live."""
    shown = {entry.target: entry for entry in SHOWN}
    targets = [
        {
            "name": recording.name,
            "url": server.url(recording.name),
            "deployment": shown[recording.name].deployment,
            "source": "recorded",
        }
        for recording in recordings
    ]
    deployments: dict[str, dict[str, object]] = {}
    for entry in SHOWN:
        named = deployments.setdefault(entry.deployment, {"name": entry.deployment, "model": entry.model})
        named.update(_known(entry))
    fleet = {
        "targets": targets,
        "deployments": list(deployments.values()),
        "hosts": [{"name": "this-host", "local": True}],
        "thresholds": SHORT_WINDOWS,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    header = "# Written by `optiinfra demo` at each start: recordings on loopback, and this host live.\n"
    path.write_text(header + yaml.safe_dump(fleet, sort_keys=False))


def _known(entry: Shown) -> dict[str, object]:
    """What fleet.yaml states of a deployment beside its name and model."""
    shape = {"shape": entry.shape.model_dump(exclude_defaults=True)} if entry.shape else {}
    promised = [objective.model_dump() for objective in entry.objectives]
    return shape | ({"engine": entry.engine} if entry.engine else {}) | ({"objectives": promised} if promised else {})
