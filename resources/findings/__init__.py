"""Diagnosis and the warehouse: reading its windows; keeping findings, objectives and waste."""
