"""What a SQL model is: its SQL, its grain, its columns, its tests, what it reads, and how it is kept.

Nouns only, frozen. Reading them from `dbt_like_sql` is `sql.loader`, running them is `sql.refresh`, testing the rows
is `sql.data_tests`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class ModelError(Exception):
    """A model that cannot be used: says which file, what is wrong with it and what to do."""


class Layer(StrEnum):
    """The folder of `dbt_like_sql` a model lives in."""

    STAGING = "staging"
    INTERMEDIATE = "intermediate"
    MARTS = "marts"


class Materialization(StrEnum):
    """view: nothing stored. incremental: a table of which a refresh replaces one window. table: made anew each time."""

    VIEW = "view"
    INCREMENTAL = "incremental"
    TABLE = "table"


class Severity(StrEnum):
    """What a failed test means: ERROR, the rows are wrong; WARN, look at them."""

    ERROR = "error"
    WARN = "warn"


class Noun(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelColumn(Noun):
    """One column as the SQL returns it. `unit` in words; None where the column has none."""

    name: str
    sql_type: str
    unit: str | None
    description: str


TestKind = Literal[
    "not_null",
    "unique",
    "accepted_values",
    "accepted_range",
    "relationships",
    "expression_is_true",
    "freshness",
]


class DataTest(Noun):
    """One test of a model's rows. Which fields a kind needs is checked by `sql.loader`.

    not_null: column. unique: columns. accepted_values: column, values. accepted_range: column, min and/or max,
    both inclusive. relationships: column, to, field. expression_is_true: expression (NULL passes: unknown is not
    false). freshness: column, within_minutes before the end of the tested window; with to and field, only where that
    relation has rows: without them none are awaited.
    """

    kind: TestKind
    severity: Severity = Severity.ERROR
    column: str | None = None
    columns: tuple[str, ...] = ()
    values: tuple[str | int | float | bool, ...] = ()
    min: float | None = None
    max: float | None = None
    to: str | None = None
    field: str | None = None
    expression: str | None = None
    within_minutes: float | None = None
    name: str = ""


class Model(Noun):
    """One model. `grain`: the columns that identify a row. `time`: the column that windows go by, None without one.

    `step_seconds`: width of one row in time (60, 300, 3600), to which windows are rounded out; 0 for raw rows.
    `retention`: the layer of fleet.yaml's `retention` that says how long rows live: minute, five_minute, hour.
    `times`: of what it reads, the relations that have a time column, with that column's name.
    `fingerprint` changes whenever the SQL or its columns do.
    """

    name: str
    layer: Layer
    path: str
    sql: str
    materialization: Materialization
    description: str
    grain: tuple[str, ...]
    time: str | None = None
    step_seconds: int = 0
    retention: Literal["minute", "five_minute", "hour"] | None = None
    columns: tuple[ModelColumn, ...]
    tests: tuple[DataTest, ...]
    depends_on: tuple[str, ...]
    times: Mapping[str, str]
    fingerprint: str

    @property
    def is_stored(self) -> bool:
        return self.materialization is not Materialization.VIEW


class Models(Mapping[str, Model]):
    """Every model by name, each after all that it reads."""

    def __init__(self, ordered: list[Model]) -> None:
        self._by_name = {model.name: model for model in ordered}

    def __getitem__(self, name: str) -> Model:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def downstream_of(self, names: set[str]) -> tuple[Model, ...]:
        """Models that read any of these tables or models, directly or through others, in order."""
        reached = set(names)
        found = []
        for model in self.values():
            if reached.intersection(model.depends_on):
                reached.add(model.name)
                found.append(model)
        return tuple(found)


class Window(Noun):
    """A stretch of time [start, end), both UTC."""

    start: datetime
    end: datetime

    def model_post_init(self, _context: Any, /) -> None:
        for edge in (self.start, self.end):
            if edge.tzinfo is None:
                raise ValueError(f"a window's edges are in UTC; {edge.isoformat()} has no time zone")
        if self.end < self.start:
            raise ValueError(f"window ends at {self.end.isoformat()}, before its start {self.start.isoformat()}")

    def rounded_out(self, step_seconds: int) -> Window:
        """The smallest window of whole steps around this one."""
        if not step_seconds:
            return self
        start, end = floor_time(self.start, step_seconds), floor_time(self.end, step_seconds)
        return Window(start=start, end=end if end == self.end else end + timedelta(seconds=step_seconds))


def floor_time(moment: datetime, step_seconds: int) -> datetime:
    """Start of the UTC step that holds a moment."""
    epoch = datetime.fromtimestamp(0, UTC)
    step = timedelta(seconds=step_seconds)
    return epoch + (moment - epoch) // step * step


class RefreshResult(Noun):
    """What a refresh did. `rows`: rows written, 0 for a view. `window`: what was replaced, None when nothing was."""

    model: str
    rows: int = Field(ge=0)
    seconds: float = Field(ge=0)
    window: Window | None = None


class TestResult(Noun):
    """What a data test found. `sample`: at most five of the failing rows. `sql`: a query that returns all of them."""

    __test__ = False  # not a pytest class

    model: str
    name: str
    passed: bool
    failing_rows: int
    sample: tuple[Mapping[str, object], ...]
    sql: str
    severity: Severity
