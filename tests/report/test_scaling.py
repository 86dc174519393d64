import math

import numpy as np
import pytest

from report.scaling import crossover, growth

PIXELS = [side**2 for side in (224, 320, 448, 640, 896, 1280)]


def power(exponent, factor=1.0, constant=0.0):
    return [constant + factor * pixels**exponent for pixels in PIXELS]


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5, 2.0])
def test_a_power_is_found_exactly(exponent):
    fitted = growth(PIXELS, power(exponent, 3e-5))
    assert fitted.exponent == pytest.approx(exponent, abs=1e-9)
    assert fitted.exponent_error == pytest.approx(0, abs=1e-6)
    assert fitted.r_squared == pytest.approx(1)
    assert fitted.fitted_sizes == 3


def test_small_sizes_do_not_count():
    costs = power(2.0)
    assert growth(PIXELS, [9e9] * 3 + costs[3:]).exponent == pytest.approx(2)


def test_error_and_r_squared_are_those_of_least_squares():
    random = np.random.default_rng(0)
    pixels = np.geomspace(1e4, 1e7, 40)
    costs = pixels**1.3 * np.exp(0.1 * random.standard_normal(40))
    fitted = growth(pixels.tolist(), costs.tolist())
    x, y = np.log(pixels[20:]), np.log(costs[20:])
    slope, covariance = np.polyfit(x, y, 1, cov=True)
    assert fitted.exponent == pytest.approx(slope[0])
    assert fitted.exponent_error == pytest.approx(math.sqrt(covariance[0, 0]))
    assert fitted.r_squared == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


def test_few_sizes():
    assert growth([], []) is None
    assert growth([100], [1]) is None
    two = growth([100, 400], [1, 16])
    assert two.exponent == pytest.approx(2)
    assert (two.exponent_error, two.r_squared) == (None, None)


@pytest.mark.filterwarnings("error")
def test_no_cost_has_no_exponent_and_is_below_every_other():
    nothing = [0] * len(PIXELS)
    assert growth(PIXELS, nothing) is None
    assert crossover(PIXELS, nothing, power(1.0)).kind == "below"
    assert crossover(PIXELS, power(1.0), nothing).kind == "never"
    assert crossover(PIXELS, nothing, nothing).kind == "never"


def test_powers_cross_where_they_are_equal():
    # p^2 = 1e5 p at 1e5 pixels, between 224^2 and 320^2; lines of logarithms are exact there.
    found = crossover(PIXELS, power(1.0, 1e5), power(2.0))
    assert found.kind == "from"
    assert found.pixels == pytest.approx(1e5)
    assert (found.after_pixels, found.before_pixels) == (224**2, 320**2)
    assert str(found) == "from 316 px"


@pytest.mark.parametrize(
    ("factor", "kind", "text"),
    [(1.0, "below", "below 224 px"), (1e9, "never", "not up to 1280 px")],
)
def test_no_crossing(factor, kind, text):
    found = crossover(PIXELS, power(1.0, factor), power(2.0))
    assert (found.kind, found.after_pixels, str(found)) == (kind, None, text)


def test_an_equal_cost_is_no_smaller_cost():
    assert crossover(PIXELS, power(1.0), power(1.0)).kind == "never"


def test_what_becomes_larger_is_smaller_only_before():
    found = crossover(PIXELS, power(2.0), power(1.0, 1e5))
    assert str(found) == "only before 316 px"


def test_several_changes_are_said_and_the_last_counts():
    found = crossover(PIXELS, [2, 0.5, 2, 2, 0.5, 0.5], [1] * 6)
    assert found.often
    assert (found.after_pixels, found.before_pixels) == (640**2, 896**2)
    # Halfway on logarithms.
    assert str(found) == f"from {math.sqrt(640 * 896):.0f} px (more than once)"


def test_nothing_in_common():
    assert str(crossover([], [], [])) == ""
