"""Look at a fleet once and say what is there: targets, hosts, GPUs, and engines nobody has configured yet.

Here: asking. Not here: printing (`optiinfra_pipelines.commands.check`) or storing: the doctor leaves no row behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlsplit

import httpx

from optiinfra_pipelines.domain.fleet import Fleet, Target
from optiinfra_pipelines.engines import PORTS, Description, UnknownEngineError, describe, normalize
from optiinfra_pipelines.exposition import ExpositionError, Reader
from resources.host.host import HostCollector
from resources.nvml.gpus import GpuCollector
from resources.scrape.metrics_endpoint import MetricsEndpoints, ScrapeResult
from resources.telemetry.exporters import Description as ExporterDescription
from resources.telemetry.exporters import ExporterTelemetry

# Where an engine tells its version; the metrics pages do not. (engine, path, key of the JSON answer)
_VERSION_PATHS = (
    ("vllm", "/version", "version"),
    ("sglang", "/get_server_info", "version"),
    ("tgi", "/info", "version"),
    ("llamacpp", "/props", "build_info"),
    ("trtllm", "/version", "version"),
)
_VERSION_DEADLINE_SECONDS = 2.0


@dataclass(frozen=True)
class TargetDiagnosis:
    """One target: what its page told, or why there is none. `version` is asked of the engine itself.

    is_idle_slot: nothing should run there now, so that the fault is none.
    """

    target: Target
    description: Description | None
    fault: str | None
    version: str | None = None
    is_idle_slot: bool = False


@dataclass(frozen=True)
class HostDiagnosis:
    """One host: facts in words, and what is missing with its remedy."""

    host: str
    facts: tuple[str, ...]
    missing: tuple[str, ...]
    is_well: bool


class Doctor:
    """Asks each target, exporter and loopback port once. Use from one thread; `close` it. idle_slots: by name."""

    def __init__(self, fleet: Fleet, idle_slots: frozenset[str] = frozenset()) -> None:
        self._fleet = fleet
        self._idle_slots = idle_slots
        self._endpoints = MetricsEndpoints.of_fleet(fleet)
        self._reader = Reader()

    def close(self) -> None:
        self._endpoints.close()

    def targets(self, now: datetime) -> list[TargetDiagnosis]:
        """Every target of the fleet, in its order."""
        return [self._diagnose(result) for result in self._endpoints.scrape(self._fleet.targets, now)]

    def found(self, now: datetime) -> list[TargetDiagnosis]:
        """Engines on the usual loopback ports that no target of the fleet names yet."""
        known = {_address(target.url) for target in self._fleet.targets}
        urls = dict.fromkeys(f"http://127.0.0.1:{port.port}{port.path}" for port in PORTS)
        candidates = [
            Target(name=f"port-{urlsplit(url).port or 80}", url=url) for url in urls if _address(url) not in known
        ]
        diagnoses = [self._diagnose(result) for result in self._endpoints.scrape(candidates, now)]
        return [diagnosis for diagnosis in diagnoses if diagnosis.description is not None]

    def hosts(self, now: datetime) -> list[HostDiagnosis]:
        """Every host: this one by its own collectors, others by their exporters."""
        local = [self._local(host.name, now) for host in self._fleet.hosts if host.local]
        exporters = ExporterTelemetry(self._fleet.hosts, self._endpoints).describe(now)
        return local + [_exporter(description) for description in exporters]

    def _local(self, name: str, now: datetime) -> HostDiagnosis:
        gpus = GpuCollector(name)
        try:
            facts = gpus.describe(now)
        finally:
            gpus.close()
        collection = HostCollector(name).collect(now)["raw_host_collections"].row(0, named=True)
        told = "CPU, memory, disks and network are read" if collection["status"] == "ok" else str(collection["detail"])
        return HostDiagnosis(name, (told, *facts), (), collection["status"] == "ok")

    def _diagnose(self, result: ScrapeResult) -> TargetDiagnosis:
        target = result.target
        if result.text is None:
            is_idle = target.name in self._idle_slots
            return TargetDiagnosis(target, None, f"{result.error_kind}: {result.error_detail}", is_idle_slot=is_idle)
        try:
            page = self._reader.read(result.text, key=target.name)
            normalized = normalize(
                page, target=target.name, scraped_at=result.scraped_at, keep=target.keep, engine=target.engine
            )
        except (ExpositionError, UnknownEngineError) as error:
            return TargetDiagnosis(target, None, str(error))
        description = describe(normalized.identity, normalized)
        return TargetDiagnosis(target, description, None, description.version or _ask_version(target, description))


def _ask_version(target: Target, description: Description) -> str | None:
    """The engine's own word; None when it has no such route, or the page is a recording."""
    if target.source == "recorded":
        return None
    url = urlsplit(target.url)
    for engine, path, key in _VERSION_PATHS:
        if engine in description.dialects:
            try:
                answer = httpx.get(
                    f"{url.scheme}://{url.netloc}{path}",
                    headers={name: value.get_secret_value() for name, value in target.headers.items()},
                    timeout=_VERSION_DEADLINE_SECONDS,
                    trust_env=False,
                )
                told = answer.json().get(key) if answer.is_success else None
            except (httpx.HTTPError, ValueError, AttributeError):
                return None
            return str(told) if told else None
    return None


def _exporter(told: ExporterDescription) -> HostDiagnosis:
    gpus = f", {told.gpu_count} GPUs" if told.gpu_count is not None else ""
    fact = f"{told.exporter} at {told.url}: {told.status}{gpus}" + (f" ({told.detail})" if told.detail else "")
    missing = tuple(f"{one.column}: {one.why}; {one.remedy}" for one in told.missing)
    return HostDiagnosis(told.host, (fact,), missing, told.status == "ok")


def _address(url: str) -> tuple[str, int | None, str]:
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname in ("localhost", "::1") else parts.hostname or ""
    return host, parts.port, parts.path


def lines_to_paste(found: Sequence[TargetDiagnosis]) -> list[str]:
    """What to write under `targets:` of fleet.yaml for engines that were found."""
    lines = []
    for one in found:
        if one.description is not None:
            name = f"{one.description.engine.replace('_', '-')}-{one.target.name.removeprefix('port-')}"
            lines.append(f"  - {{name: {name}, url: {one.target.url}}}")
    return lines
