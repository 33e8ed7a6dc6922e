"""Fixtures of the SQL tests."""

from __future__ import annotations

from collections.abc import Iterator

import duckdb
import pytest

from optiinfra_pipelines.sql.loader import load_models
from optiinfra_pipelines.sql.models import Models
from tests.sql.harness import empty_warehouse


@pytest.fixture(scope="session")
def models() -> Models:
    """The models of the project, loaded once."""
    return load_models()


@pytest.fixture
def con() -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty warehouse: raw tables and macros."""
    with empty_warehouse() as connection:
        yield connection
