"""Rollouts on Kubernetes: `target` acts, `objects`, `route` and `command` compute what is written, `api` asks."""
