"""Whether a replica's prefix cache does less than its own workload allows.

Pure. There is no good hit ratio as such: 37 to 62 % is what chat traffic can reach, 0 is right for unique prompts.
So it is held against the workload's attainable ratio, where a reuse curve gives one, and against its own past.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from optiinfra_pipelines.analysis.findings.load import finding, growth, ratio
from optiinfra_pipelines.analysis.findings.window import EngineWindow
from optiinfra_pipelines.domain.findings import Finding, FindingKind, Severity

Values = Mapping[str, float]
_COLUMNS = ("prefix_cache_hits_total", "prefix_cache_queries_total")


def cache_finding(window: EngineWindow, values: Values) -> Finding | str | None:
    """A gap to the attainable hit ratio or a fall from the usual one; None without, a reason when unknown."""
    span = (window.steps[0].start_at, window.steps[-1].end_at)
    hit = ratio(window, "hit_ratio", _COLUMNS, span)
    looked_up = growth(window, "looked_up", _COLUMNS[1], span, "tokens")
    if looked_up.value is None or hit.value is None or looked_up.value < values["cache_query_tokens"]:
        return f"{looked_up.value or 0:g} of {values['cache_query_tokens']:g} tokens needed were looked up"
    past, attainable = window.hits.period_ratios, window.hits.attainable_ratio
    if attainable is None and len(past) < values["cache_periods"]:
        return f"{len(past)} of {values['cache_periods']:g} earlier periods are known, and no attainable hit ratio"
    cause, wanted = "", 0.0
    if attainable is not None and attainable - hit.value >= values["cache_fall_ratio"]:
        cause, wanted = "gap_to_attainable", attainable
    elif len(past) >= values["cache_periods"]:
        usual = median(past)
        deviation = median(abs(one - usual) for one in past)
        # Below what nine of ten periods reached, too: a workload that swings between two levels has not fallen.
        usually_at_least = sorted(past)[len(past) // 10]
        fall = usual - hit.value
        if fall >= max(values["cache_fall_ratio"], 4 * deviation) and hit.value < usually_at_least:
            cause, wanted = "sudden_fall", usual
    if not cause:
        return None
    words = "its prompts allow" if cause == "gap_to_attainable" else "were usual"
    summary = f"{100 * hit.value:.1f} % of prompt tokens came from the prefix cache, {100 * wanted:.1f} % {words}."
    evidence = [hit.model_copy(update={"threshold": wanted - values["cache_fall_ratio"]}), looked_up]
    kind = FindingKind.CACHE_INEFFICIENCY
    span_ = (span[0], None, span[1])
    return finding(window.subject, kind, cause, Severity.WARNING, span_, window.source, summary, evidence)
