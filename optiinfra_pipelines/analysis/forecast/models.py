"""The models that compete to forecast a panel of load series: persistence, robust linear, gradient boosting.

Pure arrays: load as (time, component), where the components of a series are its largest clients and the rest, or the
series itself. What is forecast is the load `ahead` steps later, per component; summing and choosing is `forecast`.
LightGBM is imported when first fitted: importing it costs about a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# Steps back and windows that the public 10-minute fleets were measured with; in steps, so they scale with the step.
LAGS = (1, 2, 3, 6, 9, 12, 18, 24)
WINDOWS = (3, 6, 18, 36, 72, 144)
REACH = 144  # steps that features look back at most; earlier origins are not fitted on
# A stronger pull to persistence costs skill on both public fleets, a weaker one gains nothing.
LINEAR_PENALTY = 0.005
BOOSTED_ROWS = 200_000  # about 3 CPU seconds a fit; more rows did not lower the error


def lagged(values: Floats, steps: int) -> Floats:
    """Values `steps` earlier; the first value where there is none."""
    if steps >= len(values):
        return np.repeat(values[:1], len(values), axis=0)
    return np.concatenate([np.repeat(values[:1], steps, axis=0), values[: len(values) - steps]])


def trailing_mean(values: Floats, steps: int) -> Floats:
    """Mean of the last `steps` values, fewer at the start."""
    total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - steps, 0)
    mean: Floats = (total[end] - total[start]) / (end - start)[:, None]
    return mean


def linear_features(load: Floats) -> Floats:
    """(time, component, feature): how far the trailing means and the recent past lie from the present."""
    means = [trailing_mean(load, steps) - load for steps in (3, 6, 18, 72, 144, 288)]
    past = [lagged(load, steps) - load for steps in (1, 2, 3, 6, 144)]
    return np.stack(means + past, axis=-1)


@dataclass(frozen=True)
class Linear:
    """Change of each component as a linear pull towards its means, fitted to absolute error (iterated weights)."""

    coefficients: Floats  # (component, feature), in units of the load

    @classmethod
    def fit(cls, load: Floats, usable: Bools, ahead: int, until: int) -> Linear:
        """Fit on origins whose target lies before `until`; usable: (time, component), False in gaps."""
        origins = np.arange(min(REACH, max(until - ahead, 0)), max(until - ahead, 0))
        features: Floats = linear_features(load[:until])[origins].transpose(1, 0, 2)
        scale = np.sqrt((features**2).mean(axis=(1, 2)))[:, None] if len(origins) else np.ones((load.shape[1], 1))
        scale = np.asarray(np.maximum(scale, 1e-12), dtype=np.float64)
        features = np.asarray(features / scale[:, :, None], dtype=np.float64)
        change = (load[origins + ahead] - load[origins]).T / scale
        counted = (usable[origins + ahead] & usable[origins]).T.astype(np.float64)
        weight: Floats = counted
        size = features.shape[2]
        penalty = LINEAR_PENALTY * max(len(origins), 1) * np.eye(size)
        solved: Floats = np.zeros((load.shape[1], size))
        small = 0.02 * np.abs(change).mean(axis=1, keepdims=True) + 1e-9
        for _ in range(20):  # converges to 3 digits in about 15
            weighted = (features * weight[:, :, None]).transpose(0, 2, 1)
            normal = weighted @ features + penalty
            solved = np.linalg.solve(normal, weighted @ change[:, :, None])[:, :, 0].astype(np.float64)
            missed = np.abs(change - (features @ solved[:, :, None])[:, :, 0])
            weight = counted / np.maximum(missed, small)
            weight = np.asarray(weight / np.maximum(weight.mean(axis=1, keepdims=True), 1e-12), dtype=np.float64)
        return cls(solved)

    def predict(self, load: Floats, origins: Ints) -> Floats:
        """(origin, component): the load `ahead` steps after each origin, from what was known there."""
        features = linear_features(load[: int(origins.max()) + 1])[origins]
        forecast: Floats = np.maximum(load[origins] + np.einsum("tcf,cf->tc", features, self.coefficients), 0.0)
        return forecast


def boosted_features(load: Floats, floor: Floats, ahead: int, steps_per_day: int) -> tuple[Floats, Floats]:
    """(time, component, feature) of the log load, all but the last two relative to the present; and the log load."""
    log = np.log(load + floor)
    columns = [lagged(log, steps) - log for steps in LAGS]
    columns += [np.log(trailing_mean(load, steps) + floor) - log for steps in WINDOWS]
    mean = {steps: trailing_mean(log, steps) for steps in (6, 18, 72)}
    columns += [np.sqrt(np.maximum(trailing_mean(log**2, steps) - mean[steps] ** 2, 0.0)) for steps in (6, 18, 72)]
    for days in (1, 2):
        back = days * steps_per_day
        columns += [lagged(log, back) - log, lagged(log, max(back - ahead, 0)) - lagged(log, back)]
    angle = 2 * np.pi * ((np.arange(len(load)) + ahead) % steps_per_day) / steps_per_day
    columns += [np.repeat(wave[:, None], load.shape[1], axis=1) for wave in (np.sin(angle), np.cos(angle))]
    columns += [log, np.repeat(np.arange(load.shape[1], dtype=np.float64)[None, :], len(load), axis=0)]
    return np.stack(columns, axis=-1), log


@dataclass(frozen=True)
class Boosted:
    """One gradient-boosted model of the log change over all components, the component as a category."""

    booster: Any
    floor: Floats
    ahead: int
    steps_per_day: int

    @classmethod
    def fit(cls, load: Floats, usable: Bools, ahead: int, until: int, steps_per_day: int, seed: int) -> Boosted:
        """As `Linear.fit`; deterministic for a seed."""
        import lightgbm

        floor = np.maximum(0.05 * load[:until].mean(axis=0), 1e-9)
        features, log = boosted_features(load[:until], floor, ahead, steps_per_day)
        origins = np.arange(REACH, until - ahead)
        counted = usable[origins + ahead] & usable[origins]
        rows, change = features[origins][counted], (log[origins + ahead] - log[origins])[counted]
        stride = max(1, -(-len(change) // BOOSTED_ROWS))
        train = lightgbm.Dataset(
            rows[::stride], change[::stride], categorical_feature=[rows.shape[1] - 1] if load.shape[1] > 1 else []
        )
        parameters = {
            "objective": "l1",
            "learning_rate": 0.05,
            "num_leaves": 15,
            "min_data_in_leaf": 50,
            "bagging_fraction": 0.8,
            "bagging_freq": 1,
            "feature_fraction": 0.7,
            "lambda_l2": 1.0,
            "max_cat_threshold": 16,
            "num_threads": 1,  # on a busy host a second thread waits more than it works
            "deterministic": True,
            "seed": seed,
            "verbosity": -1,
        }
        return cls(lightgbm.train(parameters, train, 150), floor, ahead, steps_per_day)

    def predict(self, load: Floats, origins: Ints) -> Floats:
        known = load[: int(origins.max()) + 1]
        features, log = boosted_features(known, self.floor, self.ahead, self.steps_per_day)
        change = self.booster.predict(features[origins].reshape(-1, features.shape[2]))
        forecast: Floats = np.exp(log[origins] + np.asarray(change).reshape(len(origins), -1)) - self.floor
        return np.maximum(forecast, 0.0)
