"""GPU and host telemetry of other people's exporters -> rows of the raw tables.

Here: what dcgm-exporter and node_exporter call things over their versions, in which units, with which traps, and how
a Prometheus-compatible server answers. Pure: samples in, rows out. Asking over HTTP is `resources.telemetry`; reading
this machine is `resources.host.host` and the GPU collector.
"""
