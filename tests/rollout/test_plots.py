"""A rollout's picture is drawn from the first look to the last, whatever of it is known."""

import math

import pytest

from optiinfra_pipelines.domain.verdicts import SignalState, Verdict, VerdictKind
from optiinfra_pipelines.rollout.plots import EvidencePoint, evidence_png


def point(seconds: float, percent: float, ticks: int, *states: SignalState) -> EvidencePoint:
    kind = VerdictKind.FAIL if any(one.log_e >= one.fail_at_log_e for one in states) else VerdictKind.INCONCLUSIVE
    return EvidencePoint(seconds, percent, Verdict(kind=kind, reason="", ticks=ticks, signals=states))


def state(signal: str, log_e: float, requests: int, over: int, bound: float | None) -> SignalState:
    return SignalState(
        signal=signal,
        log_e=log_e,
        fail_at_log_e=math.log(300),
        canary_requests=requests,
        baseline_requests=9 * requests,
        canary_over=over,
        baseline_over=over,
        bound=bound,
    )


@pytest.mark.parametrize(
    "points",
    [
        [],
        [point(5, 1, 0)],
        [point(5, 1, 1, state("ttft", 0.0, 0, 0, 0.5), state("errors", 0.0, 0, 0, None))],
        [point(5 * i, 1 + i // 5, 1 + i % 5, state("ttft", i * 100.0, 10 * i, i, 0.5)) for i in range(12)],
        [point(5 * i, 5, i, state("generation_tokens_per_second", -800.0, i, 0, None)) for i in range(12)],
    ],
    ids=["no look", "no signal", "no request", "two steps and a failure", "a signal that counts no requests"],
)
def test_every_rollout_has_a_picture(points: list[EvidencePoint]) -> None:
    """Evidence beyond any float, arms without requests and a rollout that never judged included."""
    assert evidence_png(points, "chat-1").startswith(b"\x89PNG")
