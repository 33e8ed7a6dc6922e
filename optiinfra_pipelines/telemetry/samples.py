"""The one shape the mappings read: a sample, wherever it came from (a scraped page, a server's answer).

Here: the shape, and picking a parsed page's wanted samples. Not here: parsing text (`exposition`) or JSON
(`prometheus_api`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

from optiinfra_pipelines.exposition import Layout, Page

Row = dict[str, object]


class Sample(NamedTuple):
    """One value of one series. Labels carry no `__name__`."""

    name: str
    labels: Mapping[str, str]
    value: float


class Selection:
    """The samples of pages whose family is wanted. What a layout holds is worked out once per layout."""

    def __init__(self, is_wanted: Callable[[str], bool]) -> None:
        self._is_wanted = is_wanted
        self._plans: WeakKeyDictionary[Layout, list[tuple[int, str, Mapping[str, str]]]] = WeakKeyDictionary()

    def of(self, page: Page) -> list[Sample]:
        plan = self._plans.get(page.layout)
        if plan is None:
            series = zip(page.layout.names, page.layout.labels, strict=True)
            plan = [(place, name, dict(labels)) for place, (name, labels) in enumerate(series) if self._is_wanted(name)]
            self._plans[page.layout] = plan
        values = page.values
        return [Sample(name, labels, values[place]) for place, name, labels in plan]
