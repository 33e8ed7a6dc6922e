"""PromQL's rules in plain Python, written from the rules and independent of the SQL, to compare the macros with.

`generation=2` are the rules of Prometheus 2, for the comparison with a server of that age: ranges closed on the left,
and the zero point of a counter looked for before the 1.1 rule and not after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Samples = Sequence[tuple[float, float]]


def extrapolated(samples: Samples, start: float, end: float, *, is_counter: bool, generation: int = 3) -> float | None:
    """Growth of a series over (start, end], carried to the edges; None with fewer than two samples."""
    seen = sorted((t, v) for t, v in samples if (start < t or (generation == 2 and start == t)) and t <= end)
    if len(seen) < 2:
        return None
    growth = seen[-1][1] - seen[0][1]
    if is_counter:
        growth += sum(before for (_, before), (_, now) in pairwise(seen) if now < before)
    sampled = seen[-1][0] - seen[0][0]
    if sampled == 0:
        return growth
    spacing = sampled / (len(seen) - 1)
    to_start, to_end = seen[0][0] - start, end - seen[-1][0]
    to_zero = sampled * seen[0][1] / growth if is_counter and growth > 0 and seen[0][1] >= 0 else math.inf
    if generation == 2:
        to_start = min(to_start, to_zero)
    if to_start >= spacing * 1.1:
        to_start = spacing / 2
    if to_end >= spacing * 1.1:
        to_end = spacing / 2
    return growth * (sampled + min(to_start, to_zero) + to_end) / sampled


def repaired(bounds: Sequence[float], counts: Sequence[float]) -> list[tuple[float, float]]:
    """Buckets by bound, equal bounds added up, counts that never fall."""
    merged: dict[float, float] = {}
    for bound, count in zip(bounds, counts, strict=True):
        merged[bound] = merged.get(bound, 0.0) + count
    buckets: list[tuple[float, float]] = []
    for bound in sorted(merged):
        count = merged[bound]
        if buckets:
            before = buckets[-1][1]
            is_rounding = count != before and abs(count - before) / (abs(count) + abs(before)) < 1e-12
            if count < before or is_rounding:
                count = before
        buckets.append((bound, count))
    return buckets


def quantile(q: float, bounds: Sequence[float], counts: Sequence[float]) -> float:
    """histogram_quantile."""
    if math.isnan(q):
        return math.nan
    if not 0 <= q <= 1:
        return math.copysign(math.inf, q)
    buckets = repaired(bounds, counts)
    if not buckets or buckets[-1][0] != math.inf or len(buckets) < 2 or buckets[-1][1] == 0:
        return math.nan
    rank = q * buckets[-1][1]
    place = next((k for k, (_, count) in enumerate(buckets[:-1]) if count >= rank), len(buckets) - 1)
    upper, count = buckets[place]
    if place == len(buckets) - 1:
        return buckets[-2][0]
    if place == 0 and upper <= 0:
        return upper
    lower, below = buckets[place - 1] if place else (0.0, 0.0)
    if count == below:
        return math.nan
    return lower + (upper - lower) * (rank - below) / (count - below)


def sample_quantiles(q: float, values: Sequence[float]) -> list[float]:
    """The sample quantile under nearest rank and under types 4 to 9 of Hyndman and Fan (1996)."""
    ordered, n = sorted(values), len(values)
    answers = [ordered[min(n, max(1, math.ceil(q * n))) - 1]]
    for a, b in ((0, 1), (0.5, 0.5), (0, 0), (1, 1), (1 / 3, 1 / 3), (3 / 8, 3 / 8)):
        h = min(max(a + q * (n + 1 - a - b), 1.0), float(n))
        low = math.floor(h)
        high = min(low + 1, n)
        answers.append(ordered[low - 1] + (h - low) * (ordered[high - 1] - ordered[low - 1]))
    return answers
