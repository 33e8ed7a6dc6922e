"""What storing weights in fewer bits frees, on which GPUs it runs, and the quality gate it never goes without.

Pure arithmetic and a table of hardware. Metrics cannot see that answers got worse, so every option carries its gate;
whether memory is the problem at all is `recommendations.rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from optiinfra_pipelines.domain.base import Engine
from optiinfra_pipelines.domain.fleet import ModelShape, WeightDtype

Format = Literal["fp8", "int8", "int4"]
FORMATS: tuple[Format, ...] = ("fp8", "int8", "int4")


@dataclass(frozen=True)
class FormatFacts:
    """A weight format: stored bits with the scales that belong to them, least compute capability, and its risk."""

    bits_low: float
    bits_high: float
    min_capability: tuple[int, int]
    hardware: str
    weight_only_below: bool
    risk: str
    source: str


# bits: a weight plus its share of the scales. Per-channel scales are a thousandth; groups of 128 with a 16-bit scale
# and a 4-bit zero point add 0.16 bits, groups of 32 add 0.63.
FACTS: Mapping[Format, FormatFacts] = MappingProxyType(
    {
        "fp8": FormatFacts(
            bits_low=8.0,
            bits_high=8.07,
            min_capability=(8, 9),
            hardware="FP8 tensor cores: Ada (8.9), Hopper (9.0) and later; on Ampere weight-only (Marlin)",
            weight_only_below=True,
            risk="smallest of the three; long reasoning and rare languages are where it shows",
            source="arXiv 2411.02355 (FP8 W8A8 nearly lossless); vLLM documentation, quantization hardware table",
        ),
        "int8": FormatFacts(
            bits_low=8.0,
            bits_high=8.13,
            min_capability=(7, 5),
            hardware="INT8 tensor cores: Turing (7.5) to Hopper (9.0); not on Blackwell",
            weight_only_below=False,
            risk="1 to 3 % of accuracy without tuning of activations",
            source="arXiv 2411.02355 (INT8 W8A8); vLLM documentation, quantization hardware table",
        ),
        "int4": FormatFacts(
            bits_low=4.02,
            bits_high=4.63,
            min_capability=(7, 5),
            hardware="W4A16 kernels (AWQ, GPTQ, Marlin): Turing (7.5) and later, Marlin from Ampere (8.0)",
            weight_only_below=True,
            risk="visible on code and long reasoning (HumanEval -8 points in one comparison); slower at large batch",
            source="arXiv 2411.02355; aimultiple.com comparison of INT4 against FP8 and INT8",
        ),
    }
)

_BITS: Mapping[WeightDtype, tuple[float, float]] = MappingProxyType(
    {
        "float32": (32.0, 32.0),
        "bfloat16": (16.0, 16.0),
        "float16": (16.0, 16.0),
        "fp8": (FACTS["fp8"].bits_low, FACTS["fp8"].bits_high),
        "int8": (FACTS["int8"].bits_low, FACTS["int8"].bits_high),
        "int4": (FACTS["int4"].bits_low, FACTS["int4"].bits_high),
    }
)

# Compute capability by what a GPU is called, most specific first (developer.nvidia.com/cuda-gpus).
_CAPABILITIES: tuple[tuple[str, tuple[int, int]], ...] = (
    ("GB300", (10, 3)),
    ("B300", (10, 3)),
    ("GB200", (10, 0)),
    ("B200", (10, 0)),
    ("B100", (10, 0)),
    ("GH200", (9, 0)),
    ("H200", (9, 0)),
    ("H100", (9, 0)),
    ("H20", (9, 0)),
    ("H800", (9, 0)),
    ("RTX 6000 ADA", (8, 9)),
    ("L40S", (8, 9)),
    ("L40", (8, 9)),
    ("L4", (8, 9)),
    ("A100", (8, 0)),
    ("A800", (8, 0)),
    ("A30", (8, 0)),
    ("A40", (8, 6)),
    ("A10", (8, 6)),
    ("T4", (7, 5)),
    ("V100", (7, 0)),
)
# INT8 tensor cores left the data-center line with Blackwell.
_NO_INT8_FROM = (10, 0)

_FLAGS: Mapping[Engine, Mapping[Format, str]] = MappingProxyType(
    {
        "vllm": {"fp8": "--quantization fp8"},
        "sglang": {"fp8": "--quantization fp8"},
        "tgi": {"fp8": "--quantize fp8"},
    }
)
_CHECKPOINT: Mapping[Format, str] = MappingProxyType(
    {
        "fp8": "an FP8 checkpoint",
        "int8": "an INT8 W8A8 checkpoint (compressed-tensors); engines do not make one at load",
        "int4": "an AWQ or GPTQ W4A16 checkpoint; engines do not make one at load",
    }
)

# What an answer-quality test has to show before any of it gets traffic; the margin is the least that a few hundred
# graded prompts can tell from noise.
QUALITY_GATE = (
    "Before any traffic: run your own evaluation set (500 graded prompts or more of your real tasks, fixed seeds) on "
    "both builds; go on only when the 95 % interval of the difference stays above -1 point, then compare a sample of "
    "answers on the canary. Latency and error metrics cannot see a change of quality."
)


@dataclass(frozen=True)
class QuantizationOption:
    """What one format does to one replica. Bytes are per GPU; a range because scales differ between recipes."""

    format: Format
    flag: str
    freed_bytes_low: float
    freed_bytes_high: float
    is_weight_only: bool
    hardware: str
    risk: str
    source: str
    quality_gate: str
    derivation: str


@dataclass(frozen=True)
class QuantizationRefusal:
    """Why a format is not offered."""

    format: Format
    reason: str


def weight_bytes(parameters: float, dtype: WeightDtype, tensor_parallel: int = 1) -> tuple[float, float]:
    """Least and most bytes of the weights on one GPU; a range for formats whose scales differ between recipes.

    Layers that recipes leave in 16 bits (embeddings, norms, the output head) are not counted here: `options` does.
    """
    low, high = _BITS[dtype]
    return parameters * low / 8 / tensor_parallel, parameters * high / 8 / tensor_parallel


# Weights that recipes keep in 16 bits: embeddings and the output head, 2 to 6 % of an 8B to 70B model's parameters,
# and up to 15 % of smaller ones with large vocabularies.
_KEPT_SHARE = (0.02, 0.15)


def capability(gpu: str | None) -> tuple[int, int] | None:
    """Compute capability of a GPU by its name; None for one that is not in the table."""
    name = (gpu or "").upper().replace("-", " ")
    return next((value for key, value in _CAPABILITIES if key in name.split() or f" {key} " in f" {name} "), None)


def options(
    engine: Engine | None, gpu: str | None, shape: ModelShape | None, tensor_parallel: int = 1
) -> list[QuantizationOption | QuantizationRefusal]:
    """Every format with its arithmetic, or why it is not offered. The gentlest first; nothing for unknown inputs."""
    return [_option(kind, engine, gpu, shape, tensor_parallel) for kind in FORMATS]


def _option(
    kind: Format, engine: Engine | None, gpu: str | None, shape: ModelShape | None, tensor_parallel: int
) -> QuantizationOption | QuantizationRefusal:
    facts = FACTS[kind]
    has = capability(gpu)
    if engine is None or engine not in _FLAGS:
        return QuantizationRefusal(kind, f"no quantization flag is known for engine {engine or 'unknown'}")
    if has is None:
        return QuantizationRefusal(kind, f"the compute capability of GPU {gpu or 'unknown'} is not known")
    if kind == "int8" and has >= _NO_INT8_FROM:
        return QuantizationRefusal(kind, f"{gpu} has no INT8 tensor cores")
    is_weight_only = kind == "int4" or has < facts.min_capability
    # Marlin's weight-only FP8 needs Ampere.
    if has < facts.min_capability and not (facts.weight_only_below and has >= (8, 0)):
        return QuantizationRefusal(kind, f"{gpu} (capability {has[0]}.{has[1]}) cannot run it: {facts.hardware}")
    if shape is None or shape.parameters is None:
        return QuantizationRefusal(kind, "the number of the model's parameters is not known")
    if shape.dtype not in ("float32", "bfloat16", "float16"):
        return QuantizationRefusal(kind, f"its weights are {shape.dtype} already")
    now = weight_bytes(shape.parameters, shape.dtype, tensor_parallel)[0]
    then = weight_bytes(shape.parameters, kind, tensor_parallel)
    most = (now - then[0]) * (1 - _KEPT_SHARE[0])
    least = (now - then[1]) * (1 - _KEPT_SHARE[1])
    gib = 1024**3
    return QuantizationOption(
        format=kind,
        flag=_FLAGS[engine].get(kind) or f"--model <{_CHECKPOINT[kind]}>",
        freed_bytes_low=least,
        freed_bytes_high=most,
        is_weight_only=is_weight_only,
        hardware=facts.hardware,
        risk=facts.risk,
        source=facts.source,
        quality_gate=QUALITY_GATE,
        derivation=(
            f"{shape.parameters / 1e9:g}e9 weights / {tensor_parallel} GPUs: {now / gib:.1f} GiB in {shape.dtype}, "
            f"{then[0] / gib:.1f} to {then[1] / gib:.1f} GiB in {kind}; {_KEPT_SHARE[0]:.0%} to {_KEPT_SHARE[1]:.0%} "
            f"of the weights stay as they are: {least / gib:.1f} to {most / gib:.1f} GiB freed"
        ),
    )
