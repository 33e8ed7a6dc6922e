"""Storage of the whole pipeline; the only package that opens DuckDB or writes Parquet. See `store.Warehouse`."""

from resources.warehouse.cold import Moved
from resources.warehouse.errors import (
    BatchError,
    DiskNearlyFullError,
    SpoolFullError,
    WarehouseError,
    WarehouseFileError,
    WarehouseLockedError,
)
from resources.warehouse.publish import Publication
from resources.warehouse.retention import Retained, Swept
from resources.warehouse.spool import Backlog
from resources.warehouse.store import AppendResult, Warehouse

__all__ = [
    "AppendResult",
    "Backlog",
    "BatchError",
    "DiskNearlyFullError",
    "Moved",
    "Publication",
    "Retained",
    "SpoolFullError",
    "Swept",
    "Warehouse",
    "WarehouseError",
    "WarehouseFileError",
    "WarehouseLockedError",
]
