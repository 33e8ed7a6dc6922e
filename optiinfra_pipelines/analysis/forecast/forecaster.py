"""Forecast load series with a stated skill over persistence, and fall back to persistence where none is shown.

Pure: frames in, frames out; the clock is the last row. Per series and horizon the candidates of `models` are
scored on rolling origins of a validation stretch that they were not fitted on; the winner must beat persistence by
more than its own uncertainty there. P10 and P90 are conformal: quantiles of actual / forecast on those same origins.
Skill, coverage and the winner are columns, not claims. One fit serves all series of a call; refit when a day is new,
not at every origin (`rolling_forecasts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.forecast.models import REACH, Bools, Boosted, Floats, Ints, Linear
from optiinfra_pipelines.analysis.forecast.panel import Panel, make_panel

VALIDATION_STEPS = 288  # two days of 10-minute steps: the same window conformal factors were measured with
MIN_ORIGINS = 72  # under half a day of origins neither skill nor a P90 can be told
TOP_MEMBERS = 40  # beyond these the rest is smooth; 20 and 80 did no better on the public fleets
# Persistence is left only for a gain this many standard errors over zero (blocks of 12 steps against autocorrelation).
SKILL_SIGMAS = 2.0
BLOCK_STEPS = 12
QUANTILES = (0.1, 0.9)
ADAPTATION = 0.01  # about a hundred origins to follow a change
CANDIDATES = ("persistence", "linear", "linear_half", "boosted", "boosted_half")

FORECAST_SCHEMA = pl.Schema(
    {
        "series": pl.String,
        "origin": pl.Float64,  # last step known, in the unit of the input's `at`
        "horizon_seconds": pl.Float64,
        "p10": pl.Float64,
        "p50": pl.Float64,
        "p90": pl.Float64,
        "model": pl.String,  # one of CANDIDATES; NULL in an abstention
        "skill_ratio": pl.Float64,  # 1 - its error / persistence's, on the validation origins; 0 for persistence
        "coverage_ratio": pl.Float64,  # share of validation origins at or under their P90, factors from the others
        "origins": pl.Int64,  # validation origins all this stands on
        "burst_ratio": pl.Float64,  # P90 of peak / mean inside a step; NULL without peaks
        "reason": pl.String,
    }
)


@dataclass(frozen=True)
class Fitted:
    """Models of one horizon fitted on all steps before `until`, with what the validation showed per series."""

    ahead: int
    until: int
    load: Floats
    owner: Ints
    linear: Linear | None
    boosted: Boosted | None
    chosen: tuple[str, ...]
    skill: Floats
    coverage: Floats
    ratios: Floats  # (validation origin, series) actual / forecast of the chosen; nan in gaps
    origins: Ints  # validation origins counted per series


def _components(panel: Panel, until: int) -> tuple[Floats, Bools, Ints]:
    """The panel as components: each series' most changing members before `until`, and its rest."""
    loads, usable, owner = [], [], []
    for index in range(panel.load.shape[1]):
        members = panel.members.get(index)
        total = panel.load[:, index]
        if members is not None and members.shape[1] > 1:
            changing = np.abs(np.diff(members[:until], axis=0)).sum(axis=0)
            top = members[:, np.argsort(-changing, kind="stable")[:TOP_MEMBERS]]
            parts = np.column_stack([top, np.maximum(total - top.sum(axis=1), 0.0)])
        else:
            parts = total[:, None]
        loads.append(parts)
        usable.append(np.repeat(panel.known[:, index : index + 1], parts.shape[1], axis=1))
        owner.append(np.full(parts.shape[1], index))
    return np.concatenate(loads, axis=1), np.concatenate(usable, axis=1), np.concatenate(owner)


def _summed(parts: Floats, owner: Ints, series: int) -> Floats:
    belongs = (owner[:, None] == np.arange(series)[None, :]).astype(np.float64)
    total: Floats = parts @ belongs
    return total


def _predictions(fitted: Fitted, panel: Panel, origins: Ints) -> dict[str, Floats]:
    """Each candidate's forecasts, (origin, series)."""
    present = panel.load[origins]
    made = {"persistence": present}
    for name, model in (("linear", fitted.linear), ("boosted", fitted.boosted)):
        if model is not None:
            made[name] = _summed(model.predict(fitted.load, origins), fitted.owner, present.shape[1])
            made[f"{name}_half"] = (made[name] + present) / 2
    return made


def _fit_models(panel: Panel, ahead: int, until: int, with_boosting: bool, seed: int) -> Fitted:
    load, usable, owner = _components(panel, until)
    enough = until - ahead > 2 * REACH
    none = np.full(panel.load.shape[1], np.nan)
    return Fitted(
        ahead=ahead,
        until=until,
        load=load,
        owner=owner,
        linear=Linear.fit(load, usable, ahead, until) if enough else None,
        boosted=Boosted.fit(load, usable, ahead, until, panel.steps_per_day, seed)
        if enough and with_boosting
        else None,
        chosen=(),
        skill=none,
        coverage=none,
        ratios=np.empty((0, panel.load.shape[1])),
        origins=np.zeros(panel.load.shape[1], dtype=np.int64),
    )


def fit_forecaster(
    panel: Panel,
    ahead: int,
    until: int,
    *,
    validation_steps: int = VALIDATION_STEPS,
    boosting: bool = True,
    seed: int = 1,
) -> Fitted:
    """Choose per series on the last validation_steps before `until`, then fit the chosen on everything before it."""
    start = max(until - validation_steps - ahead, 0)
    trial = _fit_models(panel, ahead, start, boosting, seed)
    origins = np.arange(start, max(until - ahead, start))
    series = panel.load.shape[1]
    scored = panel.known[origins] & panel.known[origins + ahead]
    actual = panel.load[origins + ahead]
    made = _predictions(trial, panel, origins) if len(origins) else {}
    chosen, skill, coverage = [], np.full(series, np.nan), np.full(series, np.nan)
    ratios = np.full((len(origins), series), np.nan)
    for index in range(series):
        rows = scored[:, index]
        errors = {name: np.abs(actual[rows, index] - values[rows, index]) for name, values in made.items()}
        name, gained = _choose(errors)
        chosen.append(name)
        if not rows.any():
            continue
        skill[index] = gained
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = actual[rows, index] / made[name][rows, index]
        ratios[rows, index] = np.where(np.isfinite(ratio), ratio, np.nan)
        coverage[index] = _coverage(ratios[rows, index])
    final = _fit_models(panel, ahead, until, boosting and any("boosted" in name for name in chosen), seed)
    return Fitted(
        ahead, until, final.load, final.owner, final.linear, final.boosted, tuple(chosen), skill, coverage, ratios,
        scored.sum(axis=0),
    )  # fmt: skip


def _choose(errors: dict[str, Floats]) -> tuple[str, float]:
    """The candidate with the least error if it beats persistence beyond doubt, else persistence; and its skill."""
    naive = errors.get("persistence", np.empty(0))
    if len(naive) < MIN_ORIGINS or not naive.sum() > 0:
        return "persistence", 0.0
    best, gained = "persistence", 0.0
    for name, error in errors.items():
        skill = 1 - float(error.sum() / naive.sum())
        blocks = (naive - error)[: len(naive) // BLOCK_STEPS * BLOCK_STEPS].reshape(-1, BLOCK_STEPS).sum(axis=1)
        doubt = float(blocks.std(ddof=1) * np.sqrt(len(blocks)) / naive.sum())
        if skill > max(gained, SKILL_SIGMAS * doubt):
            best, gained = name, skill
    return best, gained


def _factor(ratios: Floats, quantile: float) -> float:
    """Conformal quantile of actual / forecast, at a level that follows recent misses (Gibbs and Candes 2021).

    ratios: in order of time, nan in gaps. The level starts at `quantile` and moves by ADAPTATION of every miss, so a
    stretch that misses more often than it should widens the interval; never narrower than the plain quantile.
    """
    known = ratios[np.isfinite(ratios)]
    if not len(known):
        return float("nan")
    ordered = np.sort(known)
    places = np.searchsorted(ordered, known, side="left" if quantile > 0.5 else "right")
    tail = 1 - quantile if quantile > 0.5 else quantile
    miss = tail
    for place in places.tolist():
        depth = len(known) - place if quantile > 0.5 else place  # how many ratios are as far out or further
        missed = depth <= miss * (len(known) + 1) - 1
        miss = min(max(miss + ADAPTATION * (tail - missed), 0.0), tail)
    rank = miss * (len(known) + 1)
    at = len(known) - int(np.floor(rank)) if quantile > 0.5 else int(np.floor(rank)) - 1
    return float(ordered[min(max(at, 0), len(known) - 1)])


def _coverage(ratios: Floats) -> float:
    """Share at or under P90 where each half's factor comes from the other half."""
    known = ratios[np.isfinite(ratios)]
    half = len(known) // 2
    if half < 10:
        return float("nan")
    under = (known[half:] <= _factor(known[:half], 0.9)).sum() + (known[:half] <= _factor(known[half:], 0.9)).sum()
    return float(under / len(known))


def predict(fitted: Fitted, panel: Panel, origin: int) -> pl.DataFrame:
    """Forecasts of all series from step `origin` (FORECAST_SCHEMA)."""
    points = _chosen_points(fitted, _predictions(fitted, panel, np.array([origin])))[0]
    return _stated(fitted, panel, origin, points, fitted.ratios)


def _chosen_points(fitted: Fitted, made: dict[str, Floats]) -> Floats:
    """(origin, series): the forecasts of each series' chosen candidate."""
    return np.column_stack([made.get(name, made["persistence"])[:, i] for i, name in enumerate(fitted.chosen)])


def _stated(fitted: Fitted, panel: Panel, origin: int, points: Floats, ratios: Floats) -> pl.DataFrame:
    """Points with their interval and standing. ratios: actual / forecast of outcomes known at the origin, in order."""
    rows = []
    for index, name in enumerate(panel.names):
        reason = _refusal(fitted, panel, origin, index)
        known = reason is None
        model, point = fitted.chosen[index], float(points[index])
        low, high = (_factor(ratios[:, index], quantile) for quantile in QUANTILES) if known else (1.0, 1.0)
        rows.append(
            {
                "series": name,
                "origin": panel.at[origin],
                "horizon_seconds": fitted.ahead * panel.step_seconds,
                "p10": min(point * low, point) if known else None,
                "p50": point if known else None,
                "p90": max(point * high, point) if known else None,
                "model": model if known else None,
                "skill_ratio": fitted.skill[index] if known else None,
                "coverage_ratio": fitted.coverage[index] if known else None,
                "origins": int(fitted.origins[index]),
                "burst_ratio": panel.burst_ratio[index],
                "reason": reason or _why(model, fitted.skill[index]),
            }
        )
    return pl.DataFrame(rows, schema=FORECAST_SCHEMA).with_columns(pl.col(pl.Float64).fill_nan(None))


def _refusal(fitted: Fitted, panel: Panel, origin: int, index: int) -> str | None:
    if fitted.origins[index] < MIN_ORIGINS:
        return f"{fitted.origins[index]} of {MIN_ORIGINS} origins with a known outcome: too few to state an interval"
    if not panel.known[origin, index]:
        return "the last step is a gap in the recording: nothing to forecast from"
    return None


def _why(model: str, skill: float) -> str:
    if model == "persistence":
        return "no candidate beat the last value beyond doubt"
    return f"{skill:.1%} less error than the last value on the validation origins"


def forecast(
    history: pl.DataFrame,
    horizons_seconds: Sequence[float],
    *,
    step_seconds: float,
    members: pl.DataFrame | None = None,
    boosting: bool = True,
    seed: int = 1,
) -> pl.DataFrame:
    """Forecast every series of `history` from its last step (FORECAST_SCHEMA, one row per series and horizon).

    history: series, at (seconds), value (>= 0, NULL in a gap), optional peak (largest value inside the step); a
    missing row is a gap. members: series, member, at, value: the clients or deployments that add up to a series.
    A horizon is rounded up to whole steps.
    """
    panel = make_panel(history, step_seconds, members)
    frames = [pl.DataFrame(schema=FORECAST_SCHEMA)]
    for horizon in horizons_seconds:
        ahead = max(1, int(np.ceil(horizon / step_seconds - 1e-9)))
        if len(panel.at):
            fitted = fit_forecaster(panel, ahead, len(panel.at), boosting=boosting, seed=seed)
            frames.append(predict(fitted, panel, len(panel.at) - 1))
    return pl.concat(frames)


def rolling_forecasts(
    history: pl.DataFrame,
    horizon_seconds: float,
    *,
    step_seconds: float,
    first_origin: int,
    refit_steps: int,
    members: pl.DataFrame | None = None,
    boosting: bool = True,
    seed: int = 1,
) -> pl.DataFrame:
    """What `forecast` would have said at every step from `first_origin` on, beside what came.

    FORECAST_SCHEMA plus actual and persistence (NULL where either end is a gap). Each refit sees only steps before it;
    conformal factors follow with the outcomes known at each origin.
    """
    panel = make_panel(history, step_seconds, members)
    ahead = max(1, int(np.ceil(horizon_seconds / step_seconds - 1e-9)))
    frames = []
    for start in range(first_origin, len(panel.at) - ahead, refit_steps):
        fitted = fit_forecaster(panel, ahead, start + 1, boosting=boosting, seed=seed)
        origins = np.arange(start, min(start + refit_steps, len(panel.at) - ahead))
        # From the first origin whose outcome is not in the fit's own validation.
        first = max(start + 1 - ahead, 0)
        points = _chosen_points(fitted, _predictions(fitted, panel, np.arange(first, int(origins[-1]) + 1)))
        targets = np.arange(first, int(origins[-1]) + 1) + ahead
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = panel.load[targets] / points
        usable = panel.known[targets] & panel.known[targets - ahead] & np.isfinite(ratio)
        ratio = np.where(usable, ratio, np.nan)
        for origin in origins:
            came = ratio[: origin + 1 - ahead - first]  # outcomes after the fit that are known at this origin
            recent = np.concatenate([fitted.ratios, came])[-max(len(fitted.ratios), 1) :]
            both = panel.known[origin] & panel.known[origin + ahead]
            frames.append(
                _stated(fitted, panel, int(origin), points[origin - first], recent).with_columns(
                    actual=pl.Series(np.where(both, panel.load[origin + ahead], np.nan)).fill_nan(None),
                    persistence=pl.Series(np.where(both, panel.load[origin], np.nan)).fill_nan(None),
                )
            )
    return pl.concat(frames) if frames else pl.DataFrame(schema=FORECAST_SCHEMA)
