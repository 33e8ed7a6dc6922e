"""Where advice is kept in the warehouse: the tables of dbt_like_sql/advice.yml, written and read.

Here: their schema, idempotent writes, retention, the newest rows. Not here: what is advised (`analysis.advise_*`) or
when (`optiinfra_pipelines.defs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources

import duckdb
import polars as pl
import yaml

from optiinfra_pipelines.sql.sources import RawTable
from resources.warehouse import Warehouse
from resources.warehouse.catalog import Layer, transaction


class AdviceTable(RawTable):
    """One table of advice.yml. `retention`: the layer of fleet.yaml's retention by which its rows live."""

    retention: Layer


@cache
def advice_tables() -> Mapping[str, AdviceTable]:
    """Every advice table by name."""
    text = (resources.files("dbt_like_sql") / "advice.yml").read_text(encoding="utf-8")
    return {name: AdviceTable(name=name, **spec) for name, spec in yaml.safe_load(text).items()}


def shaped(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    """A frame with exactly the table's columns in order: what it lacks is NULL, what the table lacks is an error."""
    schema = advice_tables()[table].polars_schema
    stray = set(frame.columns) - set(schema)
    if stray:
        raise ValueError(f"{table} has no column {sorted(stray)}; advice.yml lists what it has")
    absent = [pl.lit(None, dtype=dtype).alias(name) for name, dtype in schema.items() if name not in frame.columns]
    return frame.with_columns(absent).select(pl.col(name).cast(dtype) for name, dtype in schema.items())


class AdviceStore:
    """Every method opens the warehouse for a moment; nothing is held while something is computed."""

    def __init__(self, warehouse: Warehouse) -> None:
        self._warehouse = warehouse
        self._under_retention: set[str] = set()

    def keep(self, table: str, frame: pl.DataFrame) -> None:
        """Add rows; those of the same grain are replaced, so that a repeated run leaves one of each."""
        known = advice_tables()[table]
        rows = shaped(table, frame)
        same = " and ".join(f'old."{name}" is not distinct from new."{name}"' for name in known.grain)
        with self._warehouse.connect() as connection:
            connection.execute(known.create_sql())
            connection.register("advised", rows)
            with transaction(connection):
                connection.execute(
                    f'delete from "{table}" as old where exists (select 1 from advised as new where {same})'
                )
                connection.execute(f'insert into "{table}" by name select * from advised')
            connection.unregister("advised")
        if table not in self._under_retention and known.time is not None:
            self._warehouse.register(table, time_column=known.time, layer=known.retention, grain=known.grain, cold=None)
            self._under_retention.add(table)

    def newest(self, table: str) -> pl.DataFrame:
        """Each deployment's rows of its newest run, with the table's schema; empty before the first run."""
        known = advice_tables()[table]
        try:
            found = self._warehouse.read(
                f'select * from "{table}" qualify "{known.time}" = max("{known.time}") over (partition by deployment)'
            )
        except duckdb.CatalogException:
            return known.empty()
        return shaped(table, found)
