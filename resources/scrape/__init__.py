"""Metrics pages over HTTP: asking all targets at once, reading answers, and turning engine pages into raw rows."""
