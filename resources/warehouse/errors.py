"""What can go wrong in the warehouse, one class per thing a caller would do differently.

Here: exceptions only. Each message names the file or table, what happened and what to do.
"""

from __future__ import annotations


class WarehouseError(Exception):
    """Anything the warehouse refuses or cannot do; stored rows are untouched."""


class WarehouseLockedError(WarehouseError):
    """Another process held the file, or another thread needed it alone, past the deadline."""


class WarehouseFileError(WarehouseError):
    """The state directory or a file in it cannot be used: foreign, corrupt, too new, unwritable, missing."""


class BatchError(WarehouseError, ValueError):
    """A batch does not fit the raw tables; nothing of it was written."""


class SpoolFullError(WarehouseError):
    """The spool has reached its limit; the refused batch was not acknowledged, those before it are kept."""


class DiskNearlyFullError(WarehouseError):
    """Less free space than the limit; nothing was written. Collection resumes by itself once there is room."""
