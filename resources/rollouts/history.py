"""What the stable replicas did before a rollout, from the warehouse: latencies by minute, and ticks for an A/A replay.

Counts are exact increments of stored cumulative histograms, per process: a restart counts from zero, a gap or a change
of bounds counts nothing. What is made of them is `rollout.margins` and `rollout.calibration`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt

from optiinfra_pipelines.rollout.calibration import Calibration, calibrate, drifts, windows
from optiinfra_pipelines.rollout.margins import JudgedEdge, StableHistogram, merge
from optiinfra_pipelines.rollout.staging_load import LoadMix
from resources.rollouts.budgets import Read

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Margins are of the load as it is now; stakes of a whole day with its peaks.
REFERENCE = timedelta(hours=1)
REPLAY = timedelta(hours=24)
# Half an hour of looks: the time over which the judge's false alarms are stated.
REPLAY_TICKS = 360
# A replica counts in a tick when its scrapes lie no further apart than this many looks.
_MAX_GAP_LOOKS = 1.8

_ROWS = """
select h.target, h.engine_rank, h.scraped_at, h.bucket_counts, h.bounds_id, b.upper_bounds
from raw_engine_histograms as h
join raw_histogram_bounds as b using (bounds_id)
where h.metric = ? and list_contains(?, h.target) and h.scraped_at > ? and h.scraped_at <= ?
  and h.bucket_counts is not null
order by h.target, h.engine_rank, h.scraped_at
"""

# Of neighboring scrapes of one process, as far as neither counter fell; nothing where a page counts no lookups.
_LOOKUPS = """
select sum(queries) as queries, sum(hits) as hits
from (
    select
        prefix_cache_queries_total - lag(prefix_cache_queries_total) over process as queries,
        prefix_cache_hits_total - lag(prefix_cache_hits_total) over process as hits
    from raw_engine_samples
    where list_contains(?, target) and scraped_at > ? and scraped_at <= ?
    window process as (partition by target, engine_rank, process_started_at order by scraped_at)
)
where hits between 0 and queries
"""

# Of one replica, all its ranks together; NULL where a page tells no running requests.
_IN_FLIGHT = """
select max(in_flight) as in_flight
from (
    select sum(requests_running + coalesce(requests_waiting, 0)) as in_flight
    from raw_engine_samples
    where list_contains(?, target) and scraped_at > ? and scraped_at <= ?
    group by target, scraped_at
)
"""


@dataclass(frozen=True)
class _Increments:
    """One process: seconds of each scrape and the increments of its buckets since the one before."""

    target: str
    upper_bounds: tuple[float, ...]
    seconds: Floats
    counts: Floats


class StableHistory:
    """The stored past of some targets. read: SQL with parameters to a frame. look_seconds: cadence of the scrapes."""

    def __init__(self, read: Read, targets: Sequence[str], look_seconds: float) -> None:
        self._read = read
        self._targets = list(targets)
        self._look_seconds = look_seconds

    def minutes(self, signal: str, now: datetime) -> list[StableHistogram]:
        """The last hour, one histogram a minute over all targets; empty where nothing is stored."""
        found = self._increments(signal, now - REFERENCE, now)
        sums: dict[int, Floats] = {}
        bounds = _common_bounds(found)
        for one in found:
            if one.upper_bounds == bounds:
                for minute in np.unique(one.seconds // 60).astype(int).tolist():
                    counts = one.counts[one.seconds // 60 == minute].sum(axis=0)
                    sums[minute] = sums.get(minute, np.zeros(len(bounds))) + counts
        return [StableHistogram(bounds, counts.tolist()) for _, counts in sorted(sums.items()) if counts[-1] > 0]

    def calibration(self, signal: str, edges: Sequence[JudgedEdge], now: datetime, *, alpha: float) -> Calibration:
        """The stake at which stable replicas, judged against each other over the last day, hardly ever fail."""
        found = self._increments(signal, now - REPLAY, now)
        replicas = self._ticks(found, [edge.bound_seconds for edge in edges], now)
        null_odds = [edge.null_odds for edge in edges]
        replays = windows(replicas, REPLAY_TICKS)
        return calibrate(replays, null_odds, alpha=alpha, drift=drifts(replicas, null_odds) if replays else ())

    def load_mix(self, now: datetime) -> LoadMix:
        """Lengths, rate, cache hits and most requests in flight of one replica in the last hour, for a staging test;
        what is not stored stays unknown, and prompts that share nothing.
        """
        prompts, answers = (self.minutes(signal, now) for signal in ("prompt_tokens", "generation_tokens"))
        seconds = 60.0 * len(prompts) * len(self._targets)
        return LoadMix(
            merge(prompts) if prompts else None,
            merge(answers) if answers else None,
            sum(one.total for one in prompts) / seconds if prompts else None,
            self._hit_ratio(now),
            self._in_flight(now),
        )

    def _in_flight(self, now: datetime) -> int | None:
        """Most requests at one replica at one look; None where none is told."""
        found = self._read(_IN_FLIGHT, [self._targets, now - REFERENCE, now])
        most = None if found is None or found.is_empty() else found.item(0, 0)
        return None if most is None else int(most)

    def _hit_ratio(self, now: datetime) -> float:
        """Share of prompt tokens that lay in the prefix cache; 0 where none is counted."""
        found = self._read(_LOOKUPS, [self._targets, now - REFERENCE, now])
        if found is None or found.is_empty():
            return 0.0
        queries, hits = found.row(0)
        return float(hits / queries) if queries else 0.0

    def _ticks(
        self, found: Sequence[_Increments], bounds: Sequence[float], now: datetime
    ) -> dict[str, tuple[Ints, Ints]]:
        """Per replica: requests of every look of the day, and how many went over each edge; gaps are empty looks."""
        looks = int(REPLAY.total_seconds() / self._look_seconds)
        began = now.timestamp() - REPLAY.total_seconds()
        replicas: dict[str, tuple[Ints, Ints]] = {}
        for one in found:
            columns = [one.upper_bounds.index(bound) for bound in bounds if bound in one.upper_bounds]
            if len(columns) < len(bounds):
                continue
            totals, overs = replicas.setdefault(
                one.target, (np.zeros(looks, np.int64), np.zeros((looks, len(bounds)), np.int64))
            )
            index = np.clip(((one.seconds - began) / self._look_seconds).astype(int), 0, looks - 1)
            np.add.at(totals, index, one.counts[:, -1].astype(np.int64))
            np.add.at(overs, index, (one.counts[:, -1:] - one.counts[:, columns]).astype(np.int64))
        return replicas

    def _increments(self, signal: str, since: datetime, until: datetime) -> list[_Increments]:
        frame = self._read(_ROWS, [signal, self._targets, since, until])
        found: list[_Increments] = []
        if frame is None:
            return found
        for (target, _, _), rows in frame.group_by(["target", "engine_rank", "bounds_id"], maintain_order=True):
            bounds = tuple(rows["upper_bounds"][0].to_list())
            counts = np.array(rows["bucket_counts"].to_list(), dtype=np.float64).reshape(rows.height, len(bounds))
            seconds = rows["scraped_at"].dt.epoch("us").to_numpy() / 1e6
            if rows.height < 2:
                continue
            deltas = np.diff(counts, axis=0)
            is_restart = deltas[:, -1] < 0
            deltas[is_restart] = counts[1:][is_restart]
            is_whole = (np.diff(seconds) <= _MAX_GAP_LOOKS * self._look_seconds) & (deltas >= 0).all(axis=1)
            found.append(_Increments(str(target), bounds, seconds[1:][is_whole], deltas[is_whole]))
        return found


def _common_bounds(found: Sequence[_Increments]) -> tuple[float, ...]:
    """The bounds that most scrapes have."""
    counts: dict[tuple[float, ...], int] = {}
    for one in found:
        counts[one.upper_bounds] = counts.get(one.upper_bounds, 0) + len(one.seconds)
    return max(counts, key=lambda bounds: counts[bounds]) if counts else ()


def lowest(calibrations: Mapping[str, Calibration]) -> Calibration | None:
    """The most careful of several signals'; None without any."""
    return min(calibrations.values(), key=lambda one: one.stake) if calibrations else None
