"""Prometheus text exposition format 0.0.4 -> samples.

`parse` gives a frame; `Reader` is the fast way for many targets scraped again and again. Pure: text in, samples out.
Not here: fetching pages (`resources`), what the metrics mean (`engines`).
"""

from optiinfra_pipelines.exposition.errors import ExpositionError
from optiinfra_pipelines.exposition.frames import parse
from optiinfra_pipelines.exposition.pages import Layout, Page
from optiinfra_pipelines.exposition.reader import Reader

__all__ = ["ExpositionError", "Layout", "Page", "Reader", "parse"]
