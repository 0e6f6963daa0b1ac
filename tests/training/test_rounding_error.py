"""The probe of what a quantizer loses of random numbers."""

import numpy as np
import pytest
from scipy import stats

from precision_lab import quant
from precision_lab.training import ProbeRun
from precision_lab.training.probes import RoundingErrorConfig
from precision_lab.training.probes.rounding_error import measure, samples


@pytest.mark.parametrize("spec", ["nf4@group64", "int4@group64,affine", "float4_e2m1fn@group64"])
def test_the_error_is_that_of_the_numbers_as_they_would_be_stored(spec):
    config = RoundingErrorConfig(quantizer=spec, length=512, count=8)
    x = np.float64(samples(config, 3))

    stored = np.float64(quant.quantize(np.float32(x), spec, axis=1).dequantize())

    assert measure(config, 3)["relative_mse"] == pytest.approx(np.sum((stored - x) ** 2) / np.sum(x**2), rel=1e-12)


def test_an_integer_grid_loses_a_twelfth_of_a_squared_step_of_uniform_numbers():
    """Relative to a variance of a third: 3 (1/127)^2 / 12 for one scale of all, whose largest number is nearly 1."""
    config = RoundingErrorConfig(quantizer="int8@tensor", distribution="uniform", length=1000, count=1000)

    assert measure(config, 0)["relative_mse"] == pytest.approx(3 / 127**2 / 12, rel=0.01)


def test_the_numbers_are_normal_or_uniform_and_the_same_for_every_quantizer():
    drawn = [
        np.asarray(samples(RoundingErrorConfig(quantizer=spec, distribution=name, count=8), 5)).ravel()
        for name in ("normal", "uniform")
        for spec in ("nf4", "int8")
    ]

    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[2], drawn[3])
    assert stats.kstest(drawn[0], "norm").pvalue > 1e-3
    assert stats.kstest(drawn[2], stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_a_quantizer_that_draws_or_is_none_is_refused():
    with pytest.raises(ValueError, match="draws its rounding"):
        ProbeRun.model_validate({"probe": {"kind": "rounding_error", "quantizer": "int8,stochastic"}})
    with pytest.raises(ValueError, match="expected a quantizer"):
        ProbeRun.model_validate({"probe": {"kind": "rounding_error", "quantizer": 8}})
