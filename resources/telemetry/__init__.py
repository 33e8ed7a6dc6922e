"""GPUs and hosts of other machines: through their exporters, or through a Prometheus-compatible server."""
