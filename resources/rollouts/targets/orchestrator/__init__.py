"""Rollouts through an orchestrator that speaks docs/orchestrator.openapi.yaml: `client` asks, `target` acts."""
