"""What a page taught us about its engine, as data for the doctor (`optiinfra check`).

Here: counting and naming. Not here: asking the target, printing.
"""

from __future__ import annotations

from dataclasses import dataclass

from optiinfra_pipelines.domain.base import Engine
from optiinfra_pipelines.engines.catalog import Identity
from optiinfra_pipelines.engines.dialect import Vantage
from optiinfra_pipelines.engines.normalize import Normalized
from optiinfra_pipelines.engines.plan import ENGINE_COLUMNS, Missing


@dataclass(frozen=True, slots=True)
class Description:
    """One target as the doctor tells it. understood: families mapped or left out on purpose."""

    target: str
    engine: Engine
    dialects: tuple[Engine, ...]
    vantage: Vantage
    version: str | None
    generation: str | None
    models: tuple[str, ...]
    ranks: tuple[str, ...]
    understood: int
    mapped: int
    unknown: tuple[str, ...]
    missing_required: tuple[Missing, ...]
    missing_optional: tuple[Missing, ...]
    dropped_histograms: tuple[str, ...]
    notes: tuple[str, ...]


def describe(identity: Identity, normalized: Normalized) -> Description:
    """What was found on one page, what was not understood, and what is missing with the flag that turns it on."""
    samples = [dict(zip(ENGINE_COLUMNS, row, strict=True)) for row in normalized.rows["raw_engine_samples"]]
    return Description(
        target=normalized.target,
        engine=identity.engine,
        dialects=identity.dialects,
        vantage=identity.vantage,
        version=identity.version,
        generation=identity.generation,
        models=tuple(sorted({str(row["model_name"]) for row in samples if row["model_name"] is not None})),
        ranks=tuple(str(row["engine_rank"]) for row in samples),
        understood=len(normalized.mapped_families) + len(normalized.ignored_families),
        mapped=len(normalized.mapped_families),
        unknown=normalized.unknown_families,
        missing_required=tuple(m for m in normalized.missing if m.is_required),
        missing_optional=tuple(m for m in normalized.missing if not m.is_required),
        dropped_histograms=tuple(f"{d.source_metric} (rank {d.engine_rank}): {d.reason}" for d in normalized.defects),
        notes=normalized.notes,
    )
