"""Forecast load series with a stated skill over persistence, and fall back to persistence where none is shown.

Pure: frames in, frames out; the clock is the last row. Per series and horizon the candidates of `models` forecast the
rolling origins of a validation stretch that they were not fitted on; `blend` mixes them by what each cost there, and
the mix is taken where it beat persistence, else persistence. P10 and P90 are conformal: quantiles of actual / forecast
on those same origins. Skill, coverage and the heaviest candidate are columns, not claims. One fit serves all series of
a call; refit when a day is new, not at every origin (`rolling_forecasts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.forecast.blend import blended
from optiinfra_pipelines.analysis.forecast.models import REACH, Bools, Boosted, Floats, Ints, Linear
from optiinfra_pipelines.analysis.forecast.panel import Panel, make_panel

VALIDATION_STEPS = 288  # two days of 10-minute steps: the same window conformal factors were measured with
MIN_ORIGINS = 72  # under half a day of origins neither skill nor a P90 can be told
TOP_MEMBERS = 40  # beyond these the rest is smooth; 20 and 80 did no better on the public fleets
QUANTILES = (0.1, 0.9)
ADAPTATION = 0.01  # about a hundred origins to follow a change
CANDIDATES = ("persistence", "linear", "linear_total", "boosted")
# A candidate that no series gives this much weight is not fitted again.
MIN_WEIGHT = 0.02

FORECAST_SCHEMA = pl.Schema(
    {
        "series": pl.String,
        "origin": pl.Float64,  # last step known, in the unit of the input's `at`
        "horizon_seconds": pl.Float64,
        "p10": pl.Float64,
        "p50": pl.Float64,
        "p90": pl.Float64,
        "model": pl.String,  # the heaviest of CANDIDATES in the mix; NULL in an abstention
        "skill_ratio": pl.Float64,  # 1 - its error / persistence's, on the validation origins; 0 for persistence
        "coverage_ratio": pl.Float64,  # share of validation origins at or under their P90, factors from the others
        "origins": pl.Int64,  # validation origins all this stands on
        "burst_ratio": pl.Float64,  # P90 of peak / mean inside a step; NULL without peaks
        "reason": pl.String,
    }
)


@dataclass(frozen=True)
class Models:
    """The candidates of one horizon, fitted on all steps before some origin."""

    ahead: int
    load: Floats  # (time, component)
    owner: Ints  # series of each component
    linear: Linear | None
    total: Linear | None  # on the series themselves; None where no series has members
    boosted: Boosted | None


@dataclass(frozen=True)
class Fitted:
    """Models fitted on all steps before `until`, with what the validation showed per series."""

    models: Models
    until: int
    first: int  # first validation origin
    names: tuple[str, ...]  # candidates, in the order of the last axis of made and weights
    made: Floats  # (validation origin, series, candidate) of models fitted before the validation
    weights: Floats  # (series, candidate) for origins from here on
    is_mixed: Bools  # per series; False: persistence
    skill: Floats
    coverage: Floats
    ratios: Floats  # (validation origin, series) actual / forecast; nan in gaps and where not known yet
    origins: Ints  # validation origins counted per series

    @property
    def ahead(self) -> int:
        return self.models.ahead


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


def _predictions(models: Models, panel: Panel, origins: Ints, names: Sequence[str] = CANDIDATES) -> dict[str, Floats]:
    """Forecasts of each candidate there is, (origin, series)."""
    present = panel.load[origins]
    made = {"persistence": present}
    for name, model in (("linear", models.linear), ("linear_total", models.total), ("boosted", models.boosted)):
        if model is None or name not in names:
            continue
        if name == "linear_total":
            made[name] = model.predict(panel.load, origins)
        else:
            made[name] = _summed(model.predict(models.load, origins), models.owner, present.shape[1])
    return made


def _fit_models(panel: Panel, ahead: int, until: int, names: Sequence[str], seed: int) -> Models:
    load, usable, owner = _components(panel, until)
    if until - ahead <= 2 * REACH:
        return Models(ahead, load, owner, None, None, None)
    with_total = "linear_total" in names and bool(panel.members)
    return Models(
        ahead,
        load,
        owner,
        Linear.fit(load, usable, ahead, until) if "linear" in names else None,
        Linear.fit(panel.load, panel.known, ahead, until) if with_total else None,
        Boosted.fit(load, usable, ahead, until, panel.steps_per_day, seed) if "boosted" in names else None,
    )


def _outcomes(panel: Panel, origins: Ints, ahead: int, until: int) -> Floats:
    """(origin, series): what came `ahead` steps after each origin; nan in gaps and where that is not before `until`."""
    targets = np.minimum(origins + ahead, len(panel.at) - 1)
    usable = panel.known[origins] & panel.known[targets] & (origins + ahead < until)[:, None]
    return np.where(usable, panel.load[targets], np.nan)


def _ratios(actual: Floats, points: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = actual / points
    return np.where(np.isfinite(ratio), ratio, np.nan)


def fit_forecaster(
    panel: Panel,
    ahead: int,
    until: int,
    *,
    validation_steps: int = VALIDATION_STEPS,
    boosting: bool = True,
    seed: int = 1,
) -> Fitted:
    """Weigh candidates per series on the last validation_steps before `until`, then fit them on all before it."""
    first = max(until - validation_steps - ahead, 0)
    wanted = [name for name in CANDIDATES if boosting or name != "boosted"]
    trial = _fit_models(panel, ahead, first, wanted, seed)
    origins = np.arange(first, until)
    guesses = _predictions(trial, panel, origins)
    names = tuple(guesses)
    made = np.stack(list(guesses.values()), axis=-1)
    actual = _outcomes(panel, origins, ahead, until)
    mix, weights = blended(made, actual, ahead)
    series = panel.load.shape[1]
    coverage = np.full(series, np.nan)
    scored = np.isfinite(actual)
    skill = _skill(actual, mix, made[:, :, 0])
    is_mixed = skill > 0
    ratios = _ratios(actual, np.where(is_mixed, mix, made[:, :, 0]))
    for index in range(series):
        coverage[index] = _coverage(ratios[scored[:, index], index])
    kept = [name for at, name in enumerate(names) if (weights[-1, is_mixed, at] >= MIN_WEIGHT).any()]
    return Fitted(
        models=_fit_models(panel, ahead, until, kept, seed), until=until, first=first, names=names, made=made,
        weights=weights[-1], is_mixed=is_mixed, skill=skill, coverage=coverage, ratios=ratios,
        origins=scored.sum(axis=0),
    )  # fmt: skip


def _skill(actual: Floats, mix: Floats, naive: Floats) -> Floats:
    """Per series, the share of persistence's error that the mix saves; 0 where it saves none or too little is known.

    No margin of doubt is asked for: the mix holds persistence and leaves it only as errors tell. On the larger public
    fleet a margin of half a standard error cost a quarter of the skill, and put one series behind by 1.4 %.
    """
    shown = np.zeros(actual.shape[1])
    for index in range(actual.shape[1]):
        rows = np.isfinite(actual[:, index])
        error, other = (float(np.abs(actual[rows, index] - made[rows, index]).sum()) for made in (mix, naive))
        if rows.sum() >= MIN_ORIGINS and other > 0:
            shown[index] = max(1 - error / other, 0.0)
    return shown


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
    made = _aligned(fitted, _predictions(fitted.models, panel, np.array([origin])))
    points = np.where(fitted.is_mixed, (made[0] * fitted.weights).sum(axis=1), made[0, :, 0])
    return _stated(fitted, panel, origin, points, fitted.weights, fitted.ratios)


def _aligned(fitted: Fitted, made: dict[str, Floats]) -> Floats:
    """(origin, series, candidate) in the order of the fit; persistence stands in for what was not fitted again."""
    return np.stack([made.get(name, made["persistence"]) for name in fitted.names], axis=-1)


def _stated(fitted: Fitted, panel: Panel, origin: int, points: Floats, weights: Floats, ratios: Floats) -> pl.DataFrame:
    """Points with their interval and standing. ratios: actual / forecast of outcomes known at the origin, in order."""
    rows = []
    for index, name in enumerate(panel.names):
        reason = _refusal(fitted, panel, origin, index)
        known = reason is None
        shares = dict(zip(fitted.names, weights[index].tolist(), strict=True)) if fitted.is_mixed[index] else {}
        model, point = max(shares, key=lambda one: shares[one], default="persistence"), float(points[index])
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
                "reason": reason or _why(shares, fitted.skill[index]),
            }
        )
    return pl.DataFrame(rows, schema=FORECAST_SCHEMA).with_columns(pl.col(pl.Float64).fill_nan(None))


def _refusal(fitted: Fitted, panel: Panel, origin: int, index: int) -> str | None:
    if fitted.origins[index] < MIN_ORIGINS:
        return f"{fitted.origins[index]} of {MIN_ORIGINS} origins with a known outcome: too few to state an interval"
    if not panel.known[origin, index]:
        return "the last step is a gap in the recording: nothing to forecast from"
    return None


def _why(shares: dict[str, float], skill: float) -> str:
    if not shares:
        return "no candidate beat the last value on the validation origins"
    parts = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda one: -one[1]))
    return f"{skill:.1%} less error than the last value on the validation origins; now {parts}"


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
        every = np.arange(fitted.first, int(origins[-1]) + 1)
        later = _aligned(fitted, _predictions(fitted.models, panel, origins))
        made = np.concatenate([fitted.made[:-1], later])  # the fit's own last origin is the first of these
        mix, weights = blended(made, _outcomes(panel, every, ahead, int(origins[-1]) + 1), ahead)
        actual = _outcomes(panel, every, ahead, len(panel.at))
        window = max(len(fitted.ratios) - ahead, 1)
        for place, origin in enumerate(origins.tolist(), start=len(fitted.made) - 1):
            # What is known at this origin, as long as the fit's own validation: it decides anew whether to mix.
            known = slice(max(place + 1 - ahead - window, 0), max(place + 1 - ahead, 0))
            skill = _skill(actual[known], mix[known], made[known, :, 0])
            now = replace(fitted, skill=skill, is_mixed=skill > 0)
            points = np.where(now.is_mixed, mix, made[:, :, 0])
            both = panel.known[origin] & panel.known[origin + ahead]
            stated = _stated(now, panel, origin, points[place], weights[place], _ratios(actual[known], points[known]))
            frames.append(
                stated.with_columns(
                    actual=pl.Series(np.where(both, panel.load[origin + ahead], np.nan)).fill_nan(None),
                    persistence=pl.Series(np.where(both, panel.load[origin], np.nan)).fill_nan(None),
                )
            )
    return pl.concat(frames) if frames else pl.DataFrame(schema=FORECAST_SCHEMA)
