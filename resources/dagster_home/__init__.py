"""Dagster for one fleet: its settings, its three processes, and the bounds of its own storage."""
