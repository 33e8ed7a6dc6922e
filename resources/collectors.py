"""Everything that is read in a tick, per fleet: engines, GPUs and hosts, local and remote.

Built when first used, so that a process which only loads definitions opens nothing. Not here: when ticks happen
(`sensors.collection`) or where rows go (`resources.warehouse`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cached_property
from urllib.parse import urlsplit

import polars as pl

from optiinfra_pipelines.domain.fleet import Fleet, Host
from optiinfra_pipelines.sql.sources import raw_tables
from resources.host.host import HostCollector
from resources.nvml.gpus import GpuCollector
from resources.scrape.engine_scraper import REPEAT_AFTER, EngineScraper
from resources.scrape.metrics_endpoint import MetricsEndpoints
from resources.scrape.recent import RecentScrapes
from resources.telemetry.exporters import Exporter, ExporterTelemetry, TelemetrySource
from resources.telemetry.prometheus import PrometheusHost, PrometheusTelemetry, SeriesOf

Frames = Mapping[str, pl.DataFrame]
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Collectors:
    """All that one fleet is read with. Thread-safe: three sensors tick at once. `close` ends its connections.

    idle_slots: targets at which nothing should run now, by name.
    """

    def __init__(
        self, fleet: Fleet, clock: Callable[[], datetime], idle_slots: Callable[[], frozenset[str]] = frozenset
    ) -> None:
        self._fleet = fleet
        self._idle_slots = idle_slots
        self.clock = clock
        self._building = threading.RLock()
        self._gpu_pids: tuple[int, ...] = ()
        self._told_fleet_at: datetime | None = None
        self._loaded_at: datetime | None = None
        self._servers: list[PrometheusTelemetry] = []
        self.recent = RecentScrapes(fleet)

    def scrape_engines(self, now: datetime) -> dict[str, pl.DataFrame]:
        """One tick over every target; with the first, and seldom again, what fleet.yaml says, so that models can join
        it. The rows are the same each time, so that only a batch that was refused (a full disk) is made good.
        """
        with self._building:
            scraper = self._scraper
            is_told = self._told_fleet_at is not None and timedelta(0) <= now - self._told_fleet_at < REPEAT_AFTER
            if not is_told:
                self._told_fleet_at = now
                self._loaded_at = self._loaded_at or now
        frames = scraper.collect(now)
        self.recent.remember(frames)
        return frames if is_told else frames | fleet_frames(self._fleet, self._loaded_at or now)

    def sample_gpus(self, now: datetime) -> dict[str, pl.DataFrame]:
        """One tick over every GPU of every host. Remembers which processes hold this host's."""
        with self._building:
            sources: Sequence[TelemetrySource] = self._gpu_sources
        frames = _concat([source.collect(now) for source in sources])
        processes = frames.get("raw_gpu_processes")
        if processes is not None:
            local = {host.name for host in self._fleet.hosts if host.local}
            self._gpu_pids = tuple(processes.filter(pl.col("host").is_in(list(local)))["pid"].unique().to_list())
        return frames

    def sample_hosts(self, now: datetime) -> dict[str, pl.DataFrame]:
        """One tick over every host; on this one also the processes that hold its GPUs or serve a target."""
        with self._building:
            local, remote = self._local_hosts, self._host_sources
        ports = local_ports(self._fleet)
        frames: list[Frames] = [collector.collect(now, self._gpu_pids, ports) for collector in local]
        return _concat(frames + [source.collect(now) for source in remote])

    def close(self) -> None:
        """End connections and release the driver; a later tick builds them anew."""
        with self._building:
            built = self.__dict__
            closing = [built.get("endpoints"), *built.get("_local_gpus", ()), *self._servers]
            for one in closing:
                if one is not None:
                    one.close()
            self._servers.clear()
            for name in ("endpoints", "_local_gpus", "_scraper", "_gpu_sources", "_host_sources", "_local_hosts"):
                built.pop(name, None)

    @cached_property
    def endpoints(self) -> MetricsEndpoints:
        return MetricsEndpoints.of_fleet(self._fleet)

    @cached_property
    def _scraper(self) -> EngineScraper:
        return EngineScraper(self._fleet, self.endpoints, idle_slots=self._idle_slots)

    @cached_property
    def _local_gpus(self) -> list[GpuCollector]:
        return [GpuCollector(host.name, source=host.source) for host in self._fleet.hosts if host.local]

    @cached_property
    def _local_hosts(self) -> list[HostCollector]:
        return [HostCollector(host.name, source=host.source) for host in self._fleet.hosts if host.local]

    @cached_property
    def _gpu_sources(self) -> list[TelemetrySource]:
        return [*self._local_gpus, *self._remote("dcgm")]

    @cached_property
    def _host_sources(self) -> list[TelemetrySource]:
        return self._remote("node_exporter")

    def _remote(self, exporter: Exporter) -> list[TelemetrySource]:
        sources: list[TelemetrySource] = [ExporterTelemetry(self._fleet.hosts, self.endpoints, [exporter])]
        server, hosts = self._fleet.prometheus, prometheus_hosts(self._fleet.hosts)
        if server is not None and any(host.series(exporter) for host in hosts):
            asked = PrometheusTelemetry(server.url, hosts, [exporter], headers=server.headers)
            self._servers.append(asked)
            sources.append(asked)
        return sources


def prometheus_hosts(hosts: Sequence[Host]) -> list[PrometheusHost]:
    """Where the Prometheus server has each host's series."""
    return [
        PrometheusHost(
            host.name,
            SeriesOf(host.gpu_series.label, host.gpu_series.value) if host.gpu_series else None,
            SeriesOf(host.node_series.label, host.node_series.value) if host.node_series else None,
            host.source,
        )
        for host in hosts
    ]


def local_ports(fleet: Fleet) -> tuple[int, ...]:
    """Ports of live targets that are served from this machine: on loopback, or on a host that is local."""
    local = {host.name for host in fleet.hosts if host.local}
    ports = set()
    for target in fleet.targets:
        url = urlsplit(target.url)
        is_here = url.hostname in _LOOPBACK or target.host in local
        if is_here and target.source == "live":
            ports.add(url.port or (443 if url.scheme == "https" else 80))
    return tuple(sorted(ports))


def fleet_frames(fleet: Fleet, loaded_at: datetime) -> dict[str, pl.DataFrame]:
    """fleet.yaml as rows: raw_fleet_targets, raw_fleet_deployments, raw_fleet_hosts. No header, no secret."""
    targets: list[dict[str, object]] = [
        {"loaded_at": loaded_at, "target": target.name, **target.model_dump(exclude={"name", "headers", "keep"})}
        for target in fleet.targets
    ]
    deployments: list[dict[str, object]] = [
        {
            "loaded_at": loaded_at,
            "deployment": deployment.name,
            **deployment.model_dump(exclude={"name", "shape", "objectives", "flags"}),
        }
        for deployment in fleet.deployments
    ]
    hosts: list[dict[str, object]] = [
        {"loaded_at": loaded_at, "host": host.name, "is_local": host.local, "source": host.source}
        for host in fleet.hosts
    ]
    tables = raw_tables()
    return {
        "raw_fleet_targets": tables["raw_fleet_targets"].frame(targets),
        "raw_fleet_deployments": tables["raw_fleet_deployments"].frame(deployments),
        "raw_fleet_hosts": tables["raw_fleet_hosts"].frame(hosts),
    }


def _concat(sources: Sequence[Frames]) -> dict[str, pl.DataFrame]:
    """Frames of several sources, table by table."""
    tables = dict.fromkeys(name for frames in sources for name in frames)
    return {name: pl.concat([frames[name] for frames in sources if name in frames]) for name in tables}
