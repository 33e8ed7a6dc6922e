"""Stakes fall with what a tick tells and with what replicas differ by, never above one, and are known beforehand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiinfra_pipelines.rollout.calibration import calibrate, drifts
from optiinfra_pipelines.rollout.eprocess import fill_stakes, information
from optiinfra_pipelines.rollout.tempering import DEFAULT_STAKE, LATENCY_ALTERNATIVES, Drift, latency_rule, scale_of

LOG_RATIOS = np.log(np.array(LATENCY_ALTERNATIVES))


def stakes(informed: float, scale: float = 1.0, log_null: float = 0.27, stake: float = DEFAULT_STAKE) -> np.ndarray:
    out = np.zeros(len(LOG_RATIOS))
    fill_stakes(latency_rule(stake), scale, log_null, LOG_RATIOS, informed, out)
    return out


@settings(deadline=None, max_examples=200)
@given(st.floats(0, 1e6), st.floats(0.2, 2), st.floats(-2, 2), st.floats(0.01, 1))
def test_a_stake_is_a_share(informed: float, scale: float, log_null: float, stake: float) -> None:
    found = stakes(informed, scale, log_null, stake)

    assert ((found > 0) & (found <= 1)).all()
    assert (stakes(informed * 2 + 1, scale, log_null, stake) <= found).all()
    assert (stakes(informed, scale / 2, log_null, stake) <= found).all()


def test_information_is_the_variance_of_the_hypergeometric_law() -> None:
    from scipy.stats import hypergeom

    assert information(50, 450, 80) == pytest.approx(float(hypergeom(500, 80, 50).var()))
    assert information(0, 450, 80) == information(50, 450, 0) == information(1, 0, 1) == 0
    assert math.isfinite(information(10**12, 10**13, 10**11))


def fleet(drift: float, seed: int, ticks: int = 720, replicas: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Requests and those over an edge, [tick, replica]; log odds drift over 45 s."""
    random = np.random.default_rng(seed)
    keep = math.exp(-5 / 45)
    state, totals, overs = random.normal(0, drift, replicas), [], []
    for _ in range(ticks):
        state = keep * state + math.sqrt(1 - keep**2) * random.normal(0, drift, replicas)
        odds = 0.5 * np.exp(state)
        totals.append(random.poisson(50, replicas))
        overs.append(random.binomial(totals[-1], odds / (1 + odds)))
    return np.array(totals, dtype=np.int64), np.array(overs, dtype=np.int64)


def test_many_ticks_at_once_are_the_same_as_one_by_one() -> None:
    totals, overs = fleet(0.3, 1, ticks=100)
    at_once, by_tick = Drift(0.27), Drift(0.27)
    shares = at_once.observe_all(totals, overs)

    for tick in range(len(totals)):
        assert shares[tick] == pytest.approx(by_tick.share)
        by_tick.observe({str(r): (int(totals[tick, r]), int(overs[tick, r])) for r in range(totals.shape[1])})
    assert at_once.share == pytest.approx(by_tick.share)
    assert at_once.replica_minutes == by_tick.replica_minutes == 9 * 8


def test_drift_is_measured_and_wilder_fleets_are_judged_more_carefully() -> None:
    """An hour of nine replicas at 10 requests/s; over a minute a drift of 45 s averages to 0.82 of itself."""
    shares = {}
    for drift in (0.0, 0.24, 0.5):
        one = Drift(0.27)
        one.observe_all(*fleet(drift, 2))
        shares[drift] = one.share
    assert shares[0.0] < 0.2
    assert shares[0.24] * 0.27 == pytest.approx(0.82 * 0.24, rel=0.2)
    assert scale_of([shares[0.0]]) == 2.0
    assert scale_of([shares[0.5]]) < 0.4


def test_an_hour_lowers_the_stake_before_there_are_windows_enough_to_replay() -> None:
    totals, overs = fleet(0.5, 3)
    replicas = {str(r): (totals[:, r], overs[:, r][:, None]) for r in range(9)}
    found = calibrate([], [math.exp(0.27)], alpha=0.01, drift=drifts(replicas, [math.exp(0.27)]))

    assert found.stake < 0.25
    assert "of the margin within a minute" in found.reason


def test_a_fleet_of_one_replica_leaves_the_usual_drift() -> None:
    alone = Drift(0.27)
    for _ in range(60):
        alone.observe({"a": (50, 20)})

    assert alone.replica_minutes == 0
    assert alone.share == pytest.approx(0.82)
