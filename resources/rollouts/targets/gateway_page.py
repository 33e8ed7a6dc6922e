"""What a gateway's proxy counted for both arms, read from its metrics page: requests, and answers of 5xx."""

from __future__ import annotations

import httpx

from optiinfra_pipelines.domain.rollout_targets import GatewayPage
from optiinfra_pipelines.exposition import ExpositionError, Reader
from resources.rollouts.targets.base import ArmCounts, Counted, TargetError

# As for a replica's page: half a look.
TIMEOUT_SECONDS = 2.5
MAX_PAGE_BYTES = 16 * 2**20


class GatewayCounters:
    """One page, asked anew at each look."""

    def __init__(self, page: GatewayPage) -> None:
        self._page = page
        self._reader = Reader()
        self._client = httpx.Client(timeout=TIMEOUT_SECONDS, trust_env=False)

    def read(self, candidate: str, stable: str) -> ArmCounts:
        """Counters since the proxy started. TargetError when the page does not answer; an arm not yet seen has 0."""
        page = self._page
        try:
            reply = self._client.get(page.url)
            reply.raise_for_status()
            if len(reply.content) > MAX_PAGE_BYTES:
                raise TargetError(f"the gateway's page {page.url} is larger than {MAX_PAGE_BYTES} bytes")
            found = self._reader.read(reply.text)
        except (httpx.HTTPError, ExpositionError) as error:
            raise TargetError(
                f"the gateway's page {page.url} cannot be read: {type(error).__name__}: {error}"
            ) from error
        names = {page.candidate or candidate: "candidate", page.stable or stable: "stable"}
        counted = {"candidate": [0, 0], "stable": [0, 0]}
        layout = found.layout
        for name, labels, value in zip(layout.names, layout.labels, found.values, strict=True):
            known = dict(labels)
            arm = names.get(known.get(page.backend_label, ""))
            if name != page.family or arm is None:
                continue
            counted[arm][0] += int(value)
            # Istio writes 0 where no answer came at all.
            counted[arm][1] += int(value) if known.get(page.code_label, "").startswith(("5", "0")) else 0
        arms = {arm: {arm: Counted(*numbers)} for arm, numbers in counted.items()}
        return ArmCounts(arms["candidate"], arms["stable"])
