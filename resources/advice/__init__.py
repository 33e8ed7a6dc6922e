"""Forecast, scaling and cache advice and the warehouse: reading history, making each kind once, keeping it."""
