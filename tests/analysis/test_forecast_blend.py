"""The mix of candidate forecasts: weights that sum to one, follow what is known, and keep persistence in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.analysis.forecast.blend import PERSISTENCE_SHARE, blended


def loads(seed: int, steps: int = 300) -> np.ndarray:
    return 100 * np.exp(np.cumsum(np.random.default_rng(seed).normal(0, 0.05, steps)))


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(2, 4))
def test_weights_are_shares_and_the_mix_lies_between_its_parts(seed: int, ahead: int, candidates: int) -> None:
    """Whatever came: no weight is negative, they sum to one, and nothing is forecast that no candidate reaches."""
    rng = np.random.default_rng(seed)
    made = rng.gamma(2, 50, (60, 3, candidates))
    actual = np.where(rng.random((60, 3)) < 0.2, np.nan, rng.gamma(2, 50, (60, 3)))
    points, weights = blended(made, actual, ahead)
    assert (weights >= 0).all()
    assert weights.sum(axis=2) == pytest.approx(1.0)
    assert (points >= made.min(axis=2) - 1e-9).all()
    assert (points <= made.max(axis=2) + 1e-9).all()


def test_an_outcome_counts_only_once_it_is_known() -> None:
    """Three steps ahead, what came at step 13 changes no weight before step 13."""
    values = loads(1)
    made = np.stack([values, values * 1.2], axis=-1)[:, None, :]
    actual, other = (np.append(values[3:], [np.nan] * 3)[:, None] for _ in range(2))
    other[10:] *= 3
    weights = [blended(made, came, 3)[1] for came in (actual, other)]
    assert np.array_equal(weights[0][:13], weights[1][:13])
    assert not np.array_equal(weights[0][13], weights[1][13])


def test_the_better_candidate_takes_over_and_a_worse_one_costs_little() -> None:
    """Beside one that knows the future most of the error is saved; beside one that is far off next to none is lost."""
    values = loads(2)
    actual = np.append(values[1:], np.nan)[:, None]
    naive = np.nanmean(np.abs(values[:, None] - actual))
    ratio = {}
    for name, guess in (("knows", np.append(values[1:], 0.0)), ("far off", values * 1.5)):
        points, _ = blended(np.stack([values, guess], axis=-1)[:, None, :], actual, 1)
        ratio[name] = np.nanmean(np.abs(points - actual)) / naive
    assert ratio["knows"] < 0.2
    assert ratio["far off"] < 1.1


def test_without_any_outcome_the_weights_are_those_of_the_start() -> None:
    """Persistence has its share, the others the rest; a gap teaches nothing."""
    made = np.ones((20, 1, 3))
    _, weights = blended(made, np.full((20, 1), np.nan), 1)
    assert np.allclose(weights, [PERSISTENCE_SHARE, *[(1 - PERSISTENCE_SHARE) / 2] * 2])
