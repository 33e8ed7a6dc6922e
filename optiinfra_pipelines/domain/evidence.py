"""Evidence: one measured value, and the query that fetches it again.

Nouns and their SQL only. Computing a value from frames is `analysis.measure`; the tables are those of `dbt_like_sql`.
A signal can be fetched for as long as its table keeps the rows of its window; the value itself is stored with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Literal

from pydantic import model_validator

from optiinfra_pipelines.domain.base import Frozen

Statistic = Literal[
    "last",
    "max",
    "min",
    "mean",
    "sum",
    "count",
    "distinct",
    "increase",
    "rate",
    "increase_ratio",
    "mean_over_rate",
    "sum_ratio",
    "share_at_or_under",
]
# Statistics that need a second column.
_PAIRS: frozenset[Statistic] = frozenset({"increase_ratio", "mean_over_rate", "sum_ratio"})

# What each table's time column is, and the column that tells its series apart (counters grow within one series).
TIME: Mapping[str, str] = MappingProxyType(
    {
        "stg_scrapes": "scraped_at",
        "stg_engine_samples": "scraped_at",
        "stg_engine_histograms": "scraped_at",
        "int_engine_minutes": "minute_at",
        "int_gpu_minutes": "minute_at",
        "int_host_minutes": "minute_at",
        "int_host_process_minutes": "minute_at",
        "fct_replica_load_5m": "period_at",
    }
)
SERIES: Mapping[str, str] = MappingProxyType(
    {
        "stg_engine_samples": "engine_rank",
        "stg_engine_histograms": "engine_rank",
        "int_engine_minutes": "engine_rank",
        "int_host_process_minutes": "pid",
    }
)


class Signal(Frozen):
    """One value of one table over one window, both ends included.

    keys: column and value pairs that pick the rows. statistic: how the rows become one number; see `sql`. per: the
    second column of a ratio. across: how several series (engine ranks, processes) of one moment become one value.
    value: None when the rows do not tell. threshold: what it was held against, in the same unit.
    """

    name: str
    value: float | None
    unit: str
    window_start: datetime
    window_end: datetime
    threshold: float | None = None
    table: str
    keys: tuple[tuple[str, str], ...]
    column: str
    statistic: Statistic
    per: str | None = None
    across: Literal["sum", "max"] = "sum"

    @model_validator(mode="after")
    def _fits(self) -> Signal:
        if self.table not in TIME:
            raise ValueError(f"no signal comes from {self.table}; domain.evidence.TIME lists what does")
        if (self.per is not None) != (self.statistic in _PAIRS):
            raise ValueError(f"{self.statistic} {'needs' if self.statistic in _PAIRS else 'takes no'} second column")
        if self.statistic == "share_at_or_under" and self.threshold is None:
            raise ValueError("share_at_or_under needs its bucket edge as threshold")
        return self

    def sql(self) -> str:
        """One SELECT of one row and one column, `value`, that needs no macro and no variable.

        last, max, min, mean: of the value at each moment. sum, count, distinct: over all rows. increase: growth of a
        counter, a fall being a reset. rate: that per second between first and last row. increase_ratio: growth of
        `column` over growth of `per`. mean_over_rate: mean of `column` over the rate of `per`, a time to drain.
        share_at_or_under: share of a histogram's new observations at or under the bucket edge `threshold`.
        """
        return _SQL[self.statistic].format(
            column=_identifier(self.column),
            per=_identifier(self.per or self.column),
            across=self.across,
            threshold=self.threshold,
            time=_identifier(TIME[self.table]),
            series=_identifier(SERIES[self.table]) if self.table in SERIES else "1",
            rows=self._rows(),
        )

    def _rows(self) -> str:
        keys = "".join(f" and {_identifier(column)} = {_literal(value)}" for column, value in self.keys)
        time = _identifier(TIME[self.table])
        return (
            f"(select * from {_identifier(self.table)} where {time} >= {_moment(self.window_start)} "
            f"and {time} <= {_moment(self.window_end)}{keys})"
        )


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _moment(at: datetime) -> str:
    return f"timestamptz '{at.isoformat(sep=' ')}'"


# The value at each moment, series put together.
_MOMENTS = "(select {time} as at_, {across}({column}) as v_ from {rows} where {column} is not null group by all)"
_GROWTH = (
    "(select {series} as s_, {time} as at_, {what}::double as v_, "
    "v_ - lag(v_) over (partition by s_ order by at_) as g_ from {rows} where {what} is not null)"
)
_STEPS = "sum(case when g_ < 0 then v_ else g_ end)"


def _growth(what: str) -> str:
    return _GROWTH.replace("{what}", what)


_SECONDS = "nullif(epoch(max(at_)) - epoch(min(at_)), 0)"
_SQL: Mapping[Statistic, str] = MappingProxyType(
    {
        "last": f"select arg_max(v_, at_)::double as value from {_MOMENTS}",
        "max": f"select max(v_)::double as value from {_MOMENTS}",
        "min": f"select min(v_)::double as value from {_MOMENTS}",
        "mean": f"select avg(v_)::double as value from {_MOMENTS}",
        "sum": "select sum({column})::double as value from {rows}",
        "count": "select count({column})::double as value from {rows}",
        "distinct": "select count(distinct {column})::double as value from {rows}",
        "increase": f"select {_STEPS} as value from {_growth('{column}')}",
        "rate": f"select {_STEPS} / {_SECONDS} as value from {_growth('{column}')}",
        "increase_ratio": (
            f"select (select {_STEPS} from {_growth('{column}')}) "
            f"/ nullif((select {_STEPS} from {_growth('{per}')}), 0) as value"
        ),
        "mean_over_rate": (
            f"select (select avg(v_) from {_MOMENTS}) "
            f"/ nullif((select {_STEPS} / {_SECONDS} from {_growth('{per}')}), 0) as value"
        ),
        "sum_ratio": "select sum({column})::double / nullif(sum({per}), 0) as value from {rows}",
        "share_at_or_under": (
            "select sum(last_ - first_) / nullif(sum(all_last_ - all_first_), 0) as value from ("
            "select arg_max(n_, at_) as last_, arg_min(n_, at_) as first_, "
            "arg_max(all_, at_) as all_last_, arg_min(all_, at_) as all_first_ from ("
            "select {series} as s_, bounds_id as b_, {time} as at_, bucket_counts[-1] as all_, "
            "bucket_counts[list_position(upper_bounds, {threshold}::double)] as n_ "
            "from {rows} inner join stg_histogram_bounds using (bounds_id)) group by s_, b_)"
        ),
    }
)
