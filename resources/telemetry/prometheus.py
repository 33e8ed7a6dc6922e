"""Telemetry of the fleet's hosts from a Prometheus-compatible server that scrapes their exporters already.

Here: asking the server (live, and catching up after we were away). Not here: how its answers read
(`optiinfra_pipelines.telemetry.prometheus_api`), what the exporters' names mean (`dcgm`, `node_exporter` there).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

import httpx
import polars as pl
from pydantic import SecretStr

from optiinfra_pipelines.domain.base import Source
from optiinfra_pipelines.sql.sources import raw_tables
from optiinfra_pipelines.telemetry import dcgm, node_exporter, prometheus_api
from optiinfra_pipelines.telemetry.prometheus_api import AnswerError
from optiinfra_pipelines.telemetry.samples import Row, Sample
from resources.scrape.errors import classify, one_line
from resources.telemetry.exporters import TABLES, Exporter

DEADLINE_SECONDS = 2.5  # for one whole answer, as for a scrape
MAX_ANSWER_BYTES = 64 * 1024 * 1024  # 15 minutes of 100 eight-GPU hosts, scraped every 15 s, are some 50 MB
# Samples of one scrape reach a store that is written to remotely in several batches; a few seconds later all are in.
SETTLE = timedelta(seconds=5)
# Three scrapes at Prometheus' default of one a minute: after that the exporter, or its scrape, is down.
STALE_AFTER = timedelta(minutes=3)
# What is read again after a start: rows that are stored already are not stored twice.
CATCH_UP = timedelta(hours=1)
_FAMILIES: Mapping[Exporter, str] = {
    "dcgm": dcgm.FAMILY_REGEX,
    "node_exporter": "|".join(sorted(node_exporter.FAMILIES)),
}


class SeriesOf(NamedTuple):
    """Which series in the server are a host's: those where `label` is `value`, such as Hostname, gpu-node-1."""

    label: str
    value: str


@dataclass(frozen=True)
class PrometheusHost:
    """A host of fleet.yaml and where its exporters' series are; None where it has no such exporter."""

    name: str
    gpus: SeriesOf | None = None
    node: SeriesOf | None = None
    source: Source = "live"

    def series(self, exporter: Exporter) -> SeriesOf | None:
        return self.gpus if exporter == "dcgm" else self.node


@dataclass
class _Progress:
    """How far the samples of one exporter kind and label were read; when each host was last heard, with what."""

    read_until: datetime
    last_sample_at: dict[str, datetime] = field(default_factory=dict)
    gpu_counts: dict[str, int] = field(default_factory=dict)


class PrometheusTelemetry:
    """Asks one server for all its hosts: one query per exporter kind and label, whatever the number of hosts.

    Rows carry the time the server's scrape took them. A tick asks for what is new, at most 15 minutes of it, oldest
    first: after an outage of ours it catches up over the next ticks.
    exporters: the kinds to ask for; frames of their tables are returned, empty ones too. catch_up: how far back the
    first tick reads.
    """

    def __init__(
        self,
        url: str,
        hosts: Sequence[PrometheusHost],
        exporters: Collection[Exporter] = tuple(TABLES),
        *,
        headers: Mapping[str, SecretStr] | None = None,
        catch_up: timedelta = CATCH_UP,
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> None:
        self._url = url.rstrip("/") + "/api/v1/query"
        self._hosts = hosts
        self._exporters = exporters
        self._catch_up = catch_up
        self._deadline_seconds = deadline_seconds
        self._client = httpx.Client(
            headers={name: value.get_secret_value() for name, value in (headers or {}).items()},
            trust_env=False,  # asked where fleet.yaml says it is, as every endpoint
        )
        self._progress: dict[tuple[Exporter, str], _Progress] = {}
        self._boots: dict[str, node_exporter.Boot] = {}

    def close(self) -> None:
        self._client.close()

    def collect(self, now: datetime) -> Mapping[str, pl.DataFrame]:
        rows: dict[str, list[Row]] = {table: [] for exporter in self._exporters for table in TABLES[exporter]}
        failure: tuple[str, str] | None = None
        for (exporter, label), hosts in self._groups().items():
            started = time.perf_counter()
            progress = self._progress.setdefault((exporter, label), _Progress(now - self._catch_up))
            if failure is None:  # a server that failed once this tick is not waited for again
                try:
                    self._read(exporter, label, hosts, progress, now, rows)
                except (httpx.HTTPError, AnswerError) as error:
                    failure = _failure(error)
            duration = time.perf_counter() - started
            for host in hosts.values():
                status, detail = failure or self._state(host, label, progress, now)
                collection: Row = {
                    "sampled_at": now,
                    "host": host.name,
                    "telemetry": "prometheus",
                    "status": status,
                    "detail": one_line(detail) if detail else None,
                    "duration_seconds": duration if len(hosts) == 1 else None,
                }
                if exporter == "dcgm" and status == "ok":
                    collection["gpu_count"] = progress.gpu_counts.get(host.name)
                rows[TABLES[exporter][-1]].append(collection)
        return {table: raw_tables()[table].frame(found) for table, found in rows.items()}

    def _groups(self) -> Mapping[tuple[Exporter, str], dict[str, PrometheusHost]]:
        """Hosts by exporter and label, and within it by the label's value."""
        groups: dict[tuple[Exporter, str], dict[str, PrometheusHost]] = defaultdict(dict)
        for exporter in self._exporters:
            for host in self._hosts:
                if series := host.series(exporter):
                    groups[exporter, series.label][series.value] = host
        return groups

    def _read(
        self,
        exporter: Exporter,
        label: str,
        hosts: Mapping[str, PrometheusHost],
        progress: _Progress,
        now: datetime,
        rows: dict[str, list[Row]],
    ) -> None:
        """The next window of samples: rows appended, progress moved on. Raises before either when the server fails."""
        window = next(iter(prometheus_api.windows(progress.read_until, now - SETTLE)), None)
        if window is None:
            return
        end, width = window
        selector = prometheus_api.selector(_FAMILIES[exporter], label, hosts)
        for moment, samples in self._ask(f"{selector}[{_milliseconds(width)}ms]", end).items():
            for value, own in prometheus_api.by_label(samples, label).items():
                host = hosts.get(value)
                if host is None:
                    continue
                progress.last_sample_at[host.name] = moment
                if exporter == "dcgm":
                    told = dcgm.read_gpus(
                        own, host=host.name, sampled_at=moment, telemetry="prometheus", source=host.source
                    )
                    rows["raw_gpu_samples"] += told.rows
                    progress.gpu_counts[host.name] = told.gpu_count
                else:
                    self._read_node(host, moment, own, rows)
        progress.read_until = end

    def _read_node(
        self, host: PrometheusHost, moment: datetime, samples: list[Sample], rows: dict[str, list[Row]]
    ) -> None:
        told = node_exporter.read_host(
            samples,
            host=host.name,
            sampled_at=moment,
            telemetry="prometheus",
            source=host.source,
            previous_boot=self._boots.get(host.name),
        )
        if told.boot:
            self._boots[host.name] = told.boot
        rows["raw_host_samples"] += told.host_rows
        rows["raw_host_devices"] += told.device_rows

    def _state(self, host: PrometheusHost, label: str, progress: _Progress, now: datetime) -> tuple[str, str | None]:
        """ok while samples keep coming. Silence is told even though the server itself answers."""
        last = progress.last_sample_at.get(host.name)
        is_catching_up = now - progress.read_until > STALE_AFTER
        if is_catching_up:
            return "ok", f"catching up: read until {progress.read_until:%Y-%m-%d %H:%M:%S} UTC"
        if last is None:
            return "unreachable", f"the server has no sample of it; is the exporter scraped, with {label} as its label?"
        if now - last > STALE_AFTER:
            return (
                "unreachable",
                f"the server's last sample is of {last:%H:%M:%S} UTC: the exporter or its scrape is down",
            )
        return "ok", None

    def _ask(self, query: str, at: datetime) -> prometheus_api.Moments:
        deadline = time.monotonic() + self._deadline_seconds
        form = {"query": query, "time": f"{at.timestamp():.3f}"}
        body = bytearray()
        with self._client.stream("POST", self._url, data=form, timeout=self._deadline_seconds) as response:
            for piece in response.iter_bytes():
                body += piece
                if len(body) > MAX_ANSWER_BYTES:
                    raise AnswerError(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise AnswerError(f"the answer was not complete within {self._deadline_seconds:g} s")
        if response.status_code != 200:
            try:
                prometheus_api.read_answer(bytes(body))
            except AnswerError as error:
                raise AnswerError(f"HTTP {response.status_code}: {error}") from error
            raise AnswerError(f"HTTP {response.status_code}")
        return prometheus_api.read_answer(bytes(body))


def _milliseconds(width: timedelta) -> int:
    """Rounded up, and one more: the end is rounded too, and what is read twice is stored once."""
    return math.ceil(width.total_seconds() * 1000) + 1


def _failure(error: httpx.HTTPError | AnswerError) -> tuple[str, str]:
    """Status and detail of the collections' rows."""
    if isinstance(error, AnswerError):
        return "error", str(error)
    kind, detail = classify(error)
    return "unreachable", f"{kind}: {detail}"
