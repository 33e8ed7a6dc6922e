"""The standard load generators as a staging test uses them: what they are given, and what their results say.

Pure: rows and command lines out, text in. Both get the same planned requests with the same seed, so that request i of
one arm is request i of the other, and are read back request by request: `staging_load.judge_load` compares pairs.
Running them is `resources.rollouts.generators`.

aiperf replays the planned arrivals themselves (mooncake_trace rows with verbatim payloads, AIPerf 0.13.0: run against a
server, result recorded in tests/fixtures). `vllm bench serve` draws Poisson arrivals of its own from the seed, at the
same rate (flags and result as in the documentation and source of vLLM at about 0.32; not run here).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from optiinfra_pipelines.rollout.staging_load import ANSWER_SECONDS, PlannedRequest

GeneratorName = Literal["aiperf", "vllm"]
# In the order of preference: the one that keeps the planned arrivals first.
GENERATORS: tuple[GeneratorName, ...] = ("aiperf", "vllm")
# Files in a generator's folder: what it is given, and what it writes.
REQUESTS_FILE = "requests.jsonl"
RESULT_FILES: Mapping[GeneratorName, tuple[str, ...]] = {
    "aiperf": ("profile_export_aiperf.json", "profile_export.jsonl"),
    "vllm": ("result.json",),
}


class GeneratorError(Exception):
    """A generator that did not run to its end, or whose result is not what it documents; says which and why."""


@dataclass(frozen=True)
class Generated:
    """One run: seconds of each planned request in their order, None where it failed; and the generator's version."""

    seconds: tuple[float | None, ...]
    version: str


def requests_text(name: GeneratorName, planned: Sequence[PlannedRequest], model: str) -> str:
    """The planned requests as the generator reads them, JSON lines."""
    if name == "aiperf":
        rows: list[dict[str, Any]] = [
            {"timestamp": round(one.at_seconds * 1000), "payload": payload(one.prompt, one.max_tokens, model)}
            for one in planned
        ]
    else:
        rows = [{"prompt": one.prompt, "output_tokens": one.max_tokens} for one in planned]
    return "".join(json.dumps(row) + "\n" for row in rows)


def payload(prompt: str, max_tokens: int, model: str) -> dict[str, Any]:
    """The body of one completion as every generator of ours sends it: without sampling."""
    return {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "seed": 0}


def command(
    name: GeneratorName,
    program: str,
    *,
    url: str,
    model: str,
    tokenizer: str | None,
    folder: str,
    count: int,
    seed: int,
    rate: float,
) -> list[str]:
    """Its command line. folder: where REQUESTS_FILE lies and the results go. tokenizer: none, the model's own.

    rate: requests a second, for one that draws its own arrivals.
    """
    file = f"{folder}/{REQUESTS_FILE}"
    if name == "aiperf":
        made = "profile --endpoint-type completions --custom-dataset-type mooncake_trace --fixed-schedule"
        made += " --use-server-token-count --export-level records --ui none --no-gpu-telemetry --no-server-metrics"
        # One process of each kind: the load of a staging test needs no more, and it shares the host with the rollout.
        made += f" --request-timeout-seconds {ANSWER_SECONDS:.0f} --workers-max 1 --record-processors 1"
        made += f" --random-seed {seed}"
        given = ["--model", model, "--url", url, "--input-file", file, "--output-artifact-dir", folder]
    else:
        made = "bench serve --backend openai --endpoint /v1/completions --dataset-name custom"
        made += " --skip-chat-template --disable-shuffle --custom-output-len -1 --temperature 0 --disable-tqdm"
        made += f" --save-result --save-detailed --num-prompts {count} --request-rate {rate:.3g}"
        made += f" --seed {seed}"
        given = ["--model", model, "--base-url", url, "--dataset-path", file, "--result-dir", folder]
        given += ["--result-filename", RESULT_FILES["vllm"][0]]
    return [program, *made.split(), *given, *(["--tokenizer", tokenizer] if tokenizer else [])]


def read_result(name: GeneratorName, texts: Sequence[str], count: int, version: str) -> Generated:
    """What the files of RESULT_FILES say of `count` requests. GeneratorError where they are not what is documented.

    version: of the program, for results that do not tell it.
    """
    try:
        found = _aiperf(texts, count) if name == "aiperf" else _vllm(texts[0], version)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise GeneratorError(f"the result of {name} cannot be read: {type(error).__name__}: {error}") from error
    if len(found.seconds) != count:
        raise GeneratorError(f"the result of {name} has {len(found.seconds)} of {count} requests")
    return found


def _aiperf(texts: Sequence[str], count: int) -> Generated:
    """Summary and records. session_num is the row of the request; request_latency is in ms, absent in an error."""
    summary, records = json.loads(texts[0]), [json.loads(line) for line in texts[1].splitlines() if line.strip()]
    seconds: dict[int, float | None] = {}
    for record in records:
        latency = record["metrics"].get("request_latency")
        is_good = record.get("error") is None and not record["metadata"]["was_cancelled"] and latency is not None
        if is_good and latency["unit"] != "ms":
            raise ValueError(f"request_latency is in {latency['unit']}, not in ms")
        seconds[record["metadata"]["session_num"]] = float(latency["value"]) / 1000 if is_good else None
    if any(index not in range(count) for index in seconds):
        raise ValueError(f"session_num is beyond the {count} requests given")
    # A request without a record was not answered.
    return Generated(tuple(seconds.get(index) for index in range(count)), str(summary["aiperf_version"]))


def _vllm(text: str, version: str) -> Generated:
    """Lists in the order of the requests, in seconds; `latencies` in newer ones, else first token and gaps."""
    result = json.loads(text)
    errors, gaps = result["errors"], result["itls"]
    taken = result.get("latencies") or [first + sum(rest) for first, rest in zip(result["ttfts"], gaps, strict=True)]
    pairs = zip(taken, errors, strict=True)
    return Generated(tuple(None if error else float(seconds) for seconds, error in pairs), version)
