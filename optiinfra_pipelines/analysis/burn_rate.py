"""How fast an error budget is being spent: multiwindow, multi-burn-rate pairs.

Pure. `counts` has columns at (UTC start of a step), good and total (requests); steps may be of different lengths.
Source of the pairs: Google's SRE workbook, chapter 5; windows scale with the objective's, factors stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

import polars as pl

from optiinfra_pipelines.domain.fleet import Objective
from optiinfra_pipelines.domain.objectives import BurnPair, BurnRate

# At 30 days: 2 %, 5 % and 10 % of the budget in 1 hour, 6 hours and 3 days.
_PAIRS = (
    ("fast", 60.0, 5.0, 14.4, "page"),
    ("slow", 360.0, 30.0, 6.0, "page"),
    ("ticket", 4320.0, 360.0, 1.0, "ticket"),
)
_REFERENCE_DAYS = 30.0
# Increments are by the minute: a shorter window cannot be asked.
SHORTEST_MINUTES = 1.0


def burn_pairs(window_days: float) -> tuple[BurnPair, ...]:
    """The three pairs, their windows scaled with the objective's window and rounded to whole minutes."""
    scale = window_days / _REFERENCE_DAYS
    return tuple(
        BurnPair(
            name=name,
            long_minutes=max(SHORTEST_MINUTES, float(round(long * scale))),
            short_minutes=max(SHORTEST_MINUTES, float(round(short * scale))),
            factor=factor,
            severity="page" if severity == "page" else "ticket",
        )
        for name, long, short, factor, severity in _PAIRS
    )


def never_firing(objective: Objective) -> tuple[str, ...]:
    """What is wrong with an objective's alerts before any data come: pairs that cannot fire, or not as meant."""
    allowed = 1 - objective.target_ratio
    said = []
    for pair in burn_pairs(objective.window_days):
        needed = pair.factor * allowed
        where = f"{objective.kind}: the {pair.name} pair ({pair.long_minutes:g} min, factor {pair.factor:g})"
        if needed >= 1:
            said.append(
                f"{where} can never fire: it needs more than {100 * needed:.0f} % bad requests at a target of "
                f"{100 * objective.target_ratio:g} %; raise target_ratio above {100 * (1 - 1 / pair.factor):.2f} %"
            )
        if pair.short_minutes >= pair.long_minutes:
            said.append(
                f"{where} has windows of the same length: {objective.window_days:g} days are too short to tell a "
                "spike from a trend; use a longer window_days"
            )
    return tuple(said)


def burn_rates(
    counts: pl.DataFrame, objective: Objective, now: datetime, values: Mapping[str, float]
) -> tuple[BurnRate, ...]:
    """Every pair at `now`. Too few requests in a window is no data: neither firing nor quiet."""
    return tuple(_burn(counts, objective, pair, now, values) for pair in burn_pairs(objective.window_days))


def _burn(
    counts: pl.DataFrame, objective: Objective, pair: BurnPair, now: datetime, values: Mapping[str, float]
) -> BurnRate:
    allowed = 1 - objective.target_ratio
    fewest = values["burn_minimum_requests"]
    long_bad, long_total = bad_and_total(counts, now, pair.long_minutes)
    short_bad, short_total = bad_and_total(counts, now, pair.short_minutes)
    long_rate = long_bad / long_total / allowed if long_total else None
    short_rate = short_bad / short_total / allowed if short_total else None
    if long_rate is None or short_rate is None or long_total < fewest:
        reason = f"{long_total:g} requests in {pair.long_minutes:g} min, {short_total:g} in {pair.short_minutes:g} min"
        return BurnRate(pair=pair, long_rate=long_rate, short_rate=short_rate, is_firing=None, reason=reason)
    is_firing = long_rate > pair.factor and short_rate > pair.factor
    return BurnRate(pair=pair, long_rate=long_rate, short_rate=short_rate, is_firing=is_firing)


def bad_and_total(counts: pl.DataFrame, now: datetime, minutes: float) -> tuple[float, float]:
    """Bad and all requests of the steps that began in the last `minutes`."""
    held = counts.filter(pl.col("at") >= now - timedelta(minutes=minutes), pl.col("at") < now)
    total = float(held["total"].sum())
    return total - float(held["good"].sum()), total
