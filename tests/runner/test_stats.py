import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as oracle

from precision_lab.runner.stats import Mean, mean_interval, student_t_975

FLOATS = st.floats(-1e6, 1e6)


@given(st.lists(FLOATS, min_size=2, max_size=8).filter(lambda values: max(values) - min(values) > 1e-3))
def test_the_interval_is_scipys(values):
    found = mean_interval(values)

    low, high = oracle.t.interval(0.95, len(values) - 1, loc=statistics.fmean(values), scale=oracle.sem(values))
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.half_width == pytest.approx((high - low) / 2)


@pytest.mark.parametrize(("degrees", "t"), [(1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042)])
def test_students_t_is_the_printed_table(degrees, t):
    assert student_t_975(degrees) == pytest.approx(t, abs=5e-4)


def test_no_values_have_no_mean_and_one_has_no_spread():
    assert mean_interval([]) is None
    assert mean_interval([2.0]).half_width is None
    assert mean_interval([2.0]).text() == "2"


def test_a_nan_or_infinity_is_visible():
    assert math.isnan(mean_interval([1.0, math.nan]).mean)
    assert mean_interval([1.0, math.inf]).mean == math.inf
    assert mean_interval([1.0, math.nan, 2.0]).text() == "nan"


@pytest.mark.parametrize(
    ("values", "signed", "text"),
    [
        # Half widths by hand: s * t / sqrt(n), with t = 4.303 for three values.
        ([1.0, 1.1, 1.2], False, "1.10 ± 0.25"),
        ([1.0, 1.1, 1.2], True, "+1.10 ± 0.25"),
        ([-1.0, -1.1, -1.2], True, "-1.10 ± 0.25"),
        ([100.0, 110.0, 120.0], False, "110 ± 25"),
        ([0.5, 0.5, 0.5], False, "0.5 ± 0"),
        ([1e-9, 2e-9, 3e-9], False, "2e-09 ± 2.5e-09"),
        ([123456.2, 123460.2, 123464.2], False, "123460.2 ± 9.9"),
        ([1e-18, -1e-18, 0.0], True, "+0 ± 2.5e-18"),
        ([1e308, 1e307, -1e308], False, "3.333e+306 ± inf"),
        ([0.123456780, 0.123456789, 0.123456798], False, "0.123456789 ± 2.2e-08"),
    ],
)
def test_a_mean_is_printed_with_two_digits_of_its_interval(values, signed, text):
    assert mean_interval(values).text(signed=signed) == text


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e6))
def test_what_is_printed_of_a_mean_is_off_by_less_than_its_interval_shows(mean, half_width):
    printed = float(Mean(mean, half_width, 3).text().partition(" ")[0])

    assert abs(printed - mean) <= 0.5000001 * 10 ** (math.floor(math.log10(half_width)) - 1)
