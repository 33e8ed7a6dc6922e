"""What the launchpad's config makes of a proposal."""

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from optiinfra_pipelines.defs.rollout_config import ProposeConfig, to_change, to_proposal
from optiinfra_pipelines.domain.rollouts import Proposal

NOW = datetime(2026, 11, 27, 12, 0, tzinfo=UTC)


def proposal(**given: object) -> Proposal:
    config = ProposeConfig(requester="ada", reason="slots", deployment="chat", proposed={"max_num_seqs": "8"}, **given)
    return to_proposal(config, "chat-1", to_change(config), NOW)


def test_the_latencies_that_must_not_suffer_are_chosen() -> None:
    """More batch slots make each token later by design: who asks may judge whole requests instead."""
    assert "time_per_output_token_seconds" in proposal().plan.latency_signals
    chosen = proposal(latency_signals=["request_duration_seconds"])
    assert chosen.plan.latency_signals == ("request_duration_seconds",)


@pytest.mark.parametrize("signals", [[], ["ttft"]])
def test_none_or_an_unknown_one_is_refused_by_name(signals: list[str]) -> None:
    with pytest.raises(ValidationError, match="latency_signals"):
        proposal(latency_signals=signals)
