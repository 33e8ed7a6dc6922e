"""Is the candidate's throughput lower than the margin allows? An asymptotic confidence sequence on the log ratio.

Tokens per second is no count, so the exact test of `rollout.eprocess` does not apply. The log ratio of a tick is
averaged over batches, which takes its autocorrelation into the variance. Meaningful only at equal load per replica.
Source: Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas, "Time-uniform central limit theory and asymptotic confidence
sequences" (arXiv 2103.06476), one-sided normal mixture. Pure.
"""

from __future__ import annotations

import math

from scipy.stats import norm

# 30 s batches at the 5 s look: longer than the 45 s drift's half, so batches are nearly independent.
BATCH_TICKS = 6
# Under eight batches (4 minutes) the variance of batches is a guess; measured false alarms need it.
MIN_BATCHES = 8
# The mixture is tuned to be sharpest after this many ticks (2 minutes).
_TUNED_TICKS = 24


class ThroughputSequence:
    """Evidence that the candidate's tokens per second fall short of the baseline's by more than a margin."""

    def __init__(self, margin_ratio: float = 0.10, batch_ticks: int = BATCH_TICKS) -> None:
        if not 0 <= margin_ratio < 1 or batch_ticks < 1:
            raise ValueError(f"margin {margin_ratio} must be in [0, 1), batch {batch_ticks} at least 1")
        self._log_margin = math.log(1 - margin_ratio)
        self._batch_ticks = batch_ticks
        self._pending: list[float] = []
        self._batches: list[float] = []
        self._log_e = 0.0

    @property
    def batches(self) -> int:
        return len(self._batches)

    @property
    def log_e(self) -> float:
        """log of the evidence at the last full batch; 0 before MIN_BATCHES."""
        return self._log_e

    def observe(self, candidate: float, baseline_mean: float) -> None:
        """One tick: tokens per second of one candidate replica, and the mean over baseline replicas.

        A tick in which either is not positive says nothing of their ratio and is left out.
        """
        if not (candidate > 0 and baseline_mean > 0 and math.isfinite(candidate) and math.isfinite(baseline_mean)):
            return
        self._pending.append(math.log(baseline_mean) - math.log(candidate) + self._log_margin)
        if len(self._pending) < self._batch_ticks:
            return
        self._batches.append(math.fsum(self._pending) / self._batch_ticks)
        self._pending = []
        if len(self._batches) >= MIN_BATCHES:
            self._log_e = self._evidence()

    def _evidence(self) -> float:
        count = len(self._batches)
        mean = math.fsum(self._batches) / count
        spread = math.fsum((batch - mean) ** 2 for batch in self._batches) / (count - 1)
        # No spread at all is no measurement of one: identical batches come from a frozen gauge, not from traffic.
        variance = spread * self._batch_ticks
        if variance <= 0:
            return 0.0
        ticks = count * self._batch_ticks
        rho2 = 1 / (_TUNED_TICKS * variance)
        total, information = ticks * mean, ticks * variance
        scale = information + 1 / rho2
        return float(
            math.log(2)
            - 0.5 * math.log(1 + information * rho2)
            + total * total / (2 * scale)
            + norm.logcdf(total / math.sqrt(scale))
        )
