"""What a judge says of a canary: PASS, FAIL, INCONCLUSIVE or NODATA, with the numbers behind it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from optiinfra_pipelines.domain.base import Frozen


class VerdictKind(StrEnum):
    """NODATA is never a pass; INCONCLUSIVE pauses for a person."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    NODATA = "NODATA"


class SignalState(Frozen):
    """One signal at one moment: the evidence against the canary and what it would take to fail it."""

    signal: str
    log_e: float = Field(description="Natural log of the evidence that the canary is worse than the margin allows.")
    fail_at_log_e: float = Field(description="The step fails when log_e reaches this: ln(signals / alpha).")
    canary_requests: Annotated[int, Field(ge=0)]
    baseline_requests: Annotated[int, Field(ge=0)]
    canary_over: Annotated[int, Field(ge=0)] = Field(
        description="Of the canary's, over the first judged edge or failed."
    )
    baseline_over: Annotated[int, Field(ge=0)]
    bound: float | None = Field(None, description="First judged edge in the signal's unit; None for errors.")


class Verdict(Frozen):
    """The judge's word for one step, and why."""

    kind: VerdictKind
    reason: str
    ticks: Annotated[int, Field(ge=0)]
    signals: tuple[SignalState, ...] = ()
