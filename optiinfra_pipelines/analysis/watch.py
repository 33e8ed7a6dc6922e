"""Hard failures, seen in seconds: a target that is down, errors, a queue that runs away, requests without tokens.

Pure: the last scrapes in, alerts fired and alerts over out. It looks at raw scrapes of the last minute and waits for no
model; slow burns are the objectives' (`analysis.objectives`). Every rule needs two looks, so that a single bad
scrape is not an alert: at the 5 s cadence an outage is told within 15 s of its first bad scrape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise

from optiinfra_pipelines.domain.alerts import Alert, WatchKind
from optiinfra_pipelines.domain.base import Source

# Scrapes a rule must hold in a row, and scrapes it must not hold before the alert is over.
LOOKS_TO_FIRE, LOOKS_TO_RESOLVE = 2, 3
# Rates are taken over this stretch: six scrapes at the 5 s cadence.
WINDOW = timedelta(seconds=30)
# Errors are counted over two steps: over more, the good requests before an outage would dilute its beginning.
ERROR_WINDOW = timedelta(seconds=10)


@dataclass(frozen=True)
class Look:
    """One scrape of one target, as far as the rules need it. Counters are cumulative; None is unknown.

    finished, failed: requests that ended with an answer, and those that ended with an error (5xx included).
    tokens: output tokens, counted as they are made where the engine does so. is_idle: nothing should run there now.
    """

    at: datetime
    is_up: bool
    is_idle: bool = False
    error: str | None = None
    running: float | None = None
    waiting: float | None = None
    finished: float | None = None
    failed: float | None = None
    tokens: float | None = None
    process_started_at: datetime | None = None


@dataclass(frozen=True)
class Watched:
    """A target and its last scrapes, oldest first."""

    target: str
    deployment: str | None
    source: Source
    looks: Sequence[Look]


def watch(
    fleet: Iterable[Watched], open_alerts: Mapping[str, Alert], thresholds: Mapping[str, float]
) -> tuple[list[Alert], list[Alert]]:
    """Alerts that begin now, and open ones that are over now (with `resolved_at`).

    open_alerts: by `Alert.key`; an alert that is open is not fired again. A target that is no longer watched has
    its alerts resolved: nobody would ever see them end.
    """
    fired, resolved, seen = [], [], set()
    for watched in fleet:
        seen.add(watched.target)
        for kind in ("TARGET_DOWN", "ERRORS", "QUEUE_RUNAWAY", "STALLED"):
            open_alert = open_alerts.get(f"{kind}:{watched.target}")
            if open_alert is None:
                alert = _fire(watched, kind, thresholds)
                if alert is not None:
                    fired.append(alert)
            elif _is_over(watched, kind, thresholds):
                resolved.append(open_alert.model_copy(update={"resolved_at": watched.looks[-1].at}))
    for alert in open_alerts.values():
        if alert.target not in seen:
            resolved.append(alert.model_copy(update={"resolved_at": alert.fired_at}))
    return fired, resolved


def _fire(watched: Watched, kind: WatchKind, thresholds: Mapping[str, float]) -> Alert | None:
    looks = watched.looks
    if len(looks) < LOOKS_TO_FIRE:
        return None
    told = [_verdict(looks[: len(looks) - back], kind, thresholds) for back in range(LOOKS_TO_FIRE)]
    if not all(told):
        return None
    first = len(looks) - 1
    while first > 0 and _verdict(looks[:first], kind, thresholds):
        first -= 1
    return Alert(
        target=watched.target,
        deployment=watched.deployment,
        source=watched.source,
        kind=kind,
        since=looks[first].at,
        fired_at=looks[-1].at,
        detail=told[0] or "",
    )


def _is_over(watched: Watched, kind: WatchKind, thresholds: Mapping[str, float]) -> bool:
    """Not while it cannot be told: an alert about errors does not end because the target went down."""
    looks = watched.looks
    if len(looks) < LOOKS_TO_RESOLVE:
        return False
    recent = [looks[: len(looks) - back] for back in range(LOOKS_TO_RESOLVE)]
    if kind != "TARGET_DOWN" and not all(stretch[-1].is_up for stretch in recent):
        return False
    return not any(_verdict(stretch, kind, thresholds) for stretch in recent)


def _verdict(looks: Sequence[Look], kind: WatchKind, thresholds: Mapping[str, float]) -> str | None:
    """What is wrong at the newest of these looks, in words with numbers; None when nothing is, or it is unknown."""
    now = looks[-1]
    if kind == "TARGET_DOWN":
        return None if now.is_up or now.is_idle else f"no metrics page: {now.error or 'cause unknown'}"
    if not now.is_up:
        return None
    match kind:
        case "ERRORS":
            return _errors(_window(looks, ERROR_WINDOW), thresholds)
        case "QUEUE_RUNAWAY":
            return _queue(_window(looks, WINDOW), thresholds)
        case "STALLED":
            return _stalled(looks, thresholds)


def _window(looks: Sequence[Look], width: timedelta) -> list[Look]:
    """Up scrapes of the same process within `width` of the newest, oldest first."""
    now = looks[-1]
    return [
        look
        for look in looks
        if look.is_up and look.at >= now.at - width and look.process_started_at == now.process_started_at
    ]


def _increase(window: Sequence[Look], counter: str) -> float | None:
    """Of a counter over the window; None when an end is unknown or it fell (a restart that shows no start time)."""
    values = [getattr(look, counter) for look in window]
    if len(values) < 2 or any(value is None for value in values):
        return None
    steps = [after - before for before, after in pairwise(values)]
    return None if any(step < 0 for step in steps) else float(values[-1] - values[0])


def _errors(window: Sequence[Look], thresholds: Mapping[str, float]) -> str | None:
    failed, finished = _increase(window, "failed"), _increase(window, "finished")
    if failed is None or finished is None:
        return None
    ended = failed + finished
    if ended < thresholds["watch_minimum_requests"] or failed / ended < thresholds["watch_error_ratio"]:
        return None
    return f"{failed:.0f} of {ended:.0f} requests failed ({failed / ended:.0%}) in {_seconds(window):.0f} s"


def _queue(window: Sequence[Look], thresholds: Mapping[str, float]) -> str | None:
    """Never shrinking, doubled within the window, growing still, and more waiting than running by a factor.

    Growing still, because clients that all begin at once make a queue that jumps and then stays: a load, no runaway.
    """
    waiting = [look.waiting for look in window]
    if len(waiting) < 3 or any(value is None for value in waiting):
        return None
    known = [float(value) for value in waiting if value is not None]
    running = window[-1].running
    if running is None or known[-1] == known[-2] or any(after < before for before, after in pairwise(known)):
        return None
    least = thresholds["watch_queue_per_running"] * max(running, 1.0)
    if known[-1] < 2 * max(known[0], 1.0) or known[-1] < least:
        return None
    return (
        f"{known[-1]:.0f} requests wait behind {running:.0f} running, {known[0]:.0f} did {_seconds(window):.0f} s ago"
    )


def _stalled(looks: Sequence[Look], thresholds: Mapping[str, float]) -> str | None:
    """Requests in execution at every look and not one token, over the shortest stretch that a prefill cannot last.

    The stretch ends at the newest look and begins at the first one far enough back: a fixed window would either hold
    tokens from before the stall, or, at a beat of 5.01 s, fall short of its own length for ever.
    """
    far_enough = looks[-1].at - timedelta(seconds=thresholds["watch_stall_seconds"])
    begin = max((look.at for look in looks if look.at <= far_enough), default=None)
    if begin is None:
        return None
    window = _window(looks, looks[-1].at - begin)
    if not window or window[0].at != begin:
        return None
    if any(look.running is None or look.running < 1 for look in window):
        return None
    tokens, finished = _increase(window, "tokens"), _increase(window, "finished")
    if tokens is None or tokens > 0 or (finished or 0) > 0:
        return None
    return f"{window[-1].running:.0f} requests run and no token came in {_seconds(window):.0f} s"


def _seconds(window: Sequence[Look]) -> float:
    return (window[-1].at - window[0].at).total_seconds()
