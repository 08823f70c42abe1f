"""Long curves get few points, of their own; noisy ones a mean that does not move them."""

import numpy as np

from notus.evaluation.read_run import Curve
from notus.evaluation.report.charts import decimate, smooth


def curve(values):
    return Curve(np.arange(1, len(values) + 1), np.array(values, dtype=float))


def test_a_short_curve_is_kept_whole():
    short = curve(range(1500))
    assert decimate(short) is short


def test_of_a_long_curve_the_ends_and_the_extremes_are_kept():
    values = np.sin(np.arange(100_000) / 900)
    values[[0, 31_234, 77_777, -1]] = [3.0, -9.0, 8.0, 0.125]
    few = decimate(curve(values))
    assert len(few.steps) <= 1500
    assert (np.diff(few.steps) > 0).all()
    np.testing.assert_array_equal(few.values, values[few.steps - 1])  # its own points
    assert {1, 31_235, 77_778, 100_000} <= set(few.steps.tolist())


def test_a_long_gap_stays_a_gap():
    values = np.arange(100_000.0)
    values[40_000:60_000] = np.nan
    few = decimate(curve(values))
    inside = (few.steps > 40_200) & (few.steps < 59_800)
    assert inside.any()
    assert np.isnan(few.values[inside]).all()
    assert np.isfinite(few.values[~inside]).sum() > 1000


def test_smoothing_leaves_a_straight_line_where_it_is_and_takes_the_noise():
    line = np.arange(200.0)
    calm = smooth(curve(line))
    # 5% of 200 points: five to either side; at the end what there is, points 194 to 199 for the last
    np.testing.assert_allclose(calm.values[:195], line[:195])
    np.testing.assert_allclose(calm.values[-1], (194 + 199) / 2)
    noisy = smooth(curve(np.tile([0.0, 1.0], 100)))
    assert abs(noisy.values[20:-10] - 0.5).max() < 0.05


def test_smoothing_passes_over_gaps_and_leaves_short_curves_alone():
    values = np.ones(100)
    values[50] = np.nan
    values[0:2] = np.nan
    calm = smooth(curve(values)).values
    assert np.isnan(calm[0])
    np.testing.assert_allclose(calm[2:], 1.0)
    assert smooth(curve(np.ones(11))) is None
