"""Telemetry of the fleet's hosts: the protocol of all sources, and the one that scrapes exporters.

Here: `TelemetrySource`, `ExporterTelemetry` (dcgm-exporter and node_exporter pages over HTTP). Not here: this host
(`resources.host` and the GPU collector), a Prometheus-compatible server (`prometheus`), or what the
exporters' names mean (`optiinfra_pipelines.telemetry`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple, Protocol

import polars as pl

from optiinfra_pipelines.domain.fleet import Host, Target
from optiinfra_pipelines.exposition import ExpositionError, Page, Reader
from optiinfra_pipelines.sql.sources import raw_tables
from optiinfra_pipelines.telemetry import dcgm, node_exporter
from optiinfra_pipelines.telemetry.advice import Missing, missing_from_dcgm, missing_from_node_exporter
from optiinfra_pipelines.telemetry.samples import Row, Selection
from resources.scrape.metrics_endpoint import MetricsEndpoints, ScrapeResult

Exporter = Literal["dcgm", "node_exporter"]
# What each exporter kind feeds; the last one of each takes how the reading went.
TABLES: Mapping[Exporter, tuple[str, ...]] = {
    "dcgm": ("raw_gpu_samples", "raw_gpu_collections"),
    "node_exporter": ("raw_host_samples", "raw_host_devices", "raw_host_collections"),
}
# The exporter was never heard, as against one that answered with something of no use.
_UNHEARD = frozenset(
    {"connect_refused", "connect_timeout", "connect_failed", "dns", "tls", "deadline", "closed_early", "breaker_open"}
)


class TelemetrySource(Protocol):
    """Raw GPU and host rows of some hosts. A host that cannot be read is a row that says so, never an exception."""

    def collect(self, now: datetime) -> Mapping[str, pl.DataFrame]:
        """Frames by raw table name. now: start of the tick, UTC."""
        ...


class Description(NamedTuple):
    """What the doctor says of one exporter: `status` as in the collections tables, and what the page does not tell."""

    host: str
    exporter: Exporter
    url: str
    status: str
    detail: str | None
    gpu_count: int | None
    missing: list[Missing]


@dataclass(frozen=True)
class _Reading:
    """One exporter read once: its rows by table (collections row included), and what it is described by."""

    tables: Mapping[str, list[Row]]
    status: str
    detail: str | None
    gpu_count: int | None = None
    missing: tuple[Missing, ...] = ()


class ExporterTelemetry:
    """Scrapes the exporters that fleet.yaml names for its hosts, all at once.

    exporters: the kinds to scrape; frames of their tables are returned, empty ones too.
    endpoints: shared with the engines' scrapes; it owns deadlines, caps and breakers. Rows carry the moment their page
    was asked for.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        endpoints: MetricsEndpoints,
        exporters: Collection[Exporter] = tuple(TABLES),
        reader: Reader | None = None,
    ) -> None:
        self._endpoints = endpoints
        self._reader = reader or Reader()
        self._tables = [table for exporter in exporters for table in TABLES[exporter]]
        self._exporters: list[tuple[Host, Exporter, Target]] = []
        for host in hosts:
            for exporter in exporters:
                if url := host.dcgm_exporter if exporter == "dcgm" else host.node_exporter:
                    # Two hosts may share an exporter's URL and one host has two: name and URL together are one target.
                    target = Target.model_validate({"name": host.name, "url": url, "source": host.source})
                    self._exporters.append((host, exporter, target))
        self._gpu_samples = Selection(lambda name: name.startswith("DCGM_"))
        self._host_samples = Selection(node_exporter.FAMILIES.__contains__)
        self._boots: dict[str, node_exporter.Boot] = {}

    def collect(self, now: datetime) -> Mapping[str, pl.DataFrame]:
        rows: dict[str, list[Row]] = {table: [] for table in self._tables}
        for _, _, reading in self._readings(now):
            for table, more in reading.tables.items():
                rows[table] += more
        return {table: raw_tables()[table].frame(found) for table, found in rows.items()}

    def describe(self, now: datetime) -> list[Description]:
        """Ask every exporter once and say what came, in the order of fleet.yaml."""
        return [
            Description(target.name, exporter, target.url, told.status, told.detail, told.gpu_count, list(told.missing))
            for target, exporter, told in self._readings(now)
        ]

    def _readings(self, now: datetime) -> list[tuple[Target, Exporter, _Reading]]:
        results = self._endpoints.scrape([target for _, _, target in self._exporters], now)
        return [
            (target, exporter, self._read(host, exporter, result))
            for (host, exporter, target), result in zip(self._exporters, results, strict=True)
        ]

    def _read(self, host: Host, exporter: Exporter, result: ScrapeResult) -> _Reading:
        read = self._read_gpus if exporter == "dcgm" else self._read_host
        if result.text is None:
            status = "unreachable" if result.error_kind in _UNHEARD else "error"
            return _without_rows(exporter, result, status, f"{result.error_kind}: {result.error_detail}")
        try:
            page = self._reader.read(result.text, key=(exporter, result.target.url))
        except ExpositionError as error:
            return _without_rows(exporter, result, "error", f"malformed: {error}")
        return read(host, page, result)

    def _read_gpus(self, host: Host, page: Page, result: ScrapeResult) -> _Reading:
        told = dcgm.read_gpus(
            self._gpu_samples.of(page), host=host.name, sampled_at=result.scraped_at, source=host.source
        )
        if not told.rows:
            cause = (
                f"{told.nameless_sample_count} DCGM samples, none with a UUID label: does a relabeling drop it?"
                if told.nameless_sample_count
                else "no DCGM_FI_ family on the page: is this dcgm-exporter, and does it see a GPU?"
            )
            return _without_rows("dcgm", result, "error", cause)
        collection = _collection("dcgm", result, "ok", None) | {
            "gpu_count": told.gpu_count,
            "error_count": told.nameless_sample_count,
        }
        return _Reading(
            {"raw_gpu_samples": told.rows, "raw_gpu_collections": [collection]},
            "ok",
            None,
            told.gpu_count,
            tuple(missing_from_dcgm(told.fields)),
        )

    def _read_host(self, host: Host, page: Page, result: ScrapeResult) -> _Reading:
        told = node_exporter.read_host(
            self._host_samples.of(page),
            host=host.name,
            sampled_at=result.scraped_at,
            source=host.source,
            previous_boot=self._boots.get(host.name),
        )
        if not told.host_rows:
            return _without_rows("node_exporter", result, "error", "no node_ family: is this node_exporter's page?")
        if told.boot:
            self._boots[host.name] = told.boot
        return _Reading(
            {
                "raw_host_samples": told.host_rows,
                "raw_host_devices": told.device_rows,
                "raw_host_collections": [_collection("node_exporter", result, "ok", None)],
            },
            "ok",
            None,
            missing=tuple(missing_from_node_exporter(told.families)),
        )


def _without_rows(exporter: Exporter, result: ScrapeResult, status: str, detail: str) -> _Reading:
    return _Reading({TABLES[exporter][-1]: [_collection(exporter, result, status, detail)]}, status, detail)


def _collection(exporter: Exporter, result: ScrapeResult, status: str, detail: str | None) -> Row:
    return {
        "sampled_at": result.scraped_at,
        "host": result.target.name,
        "telemetry": exporter,
        "status": status,
        "detail": detail[:300] if detail else None,
        "duration_seconds": result.duration_seconds,
    }
