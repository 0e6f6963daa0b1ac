"""Loss-scale configurations: what is refused, and what becomes of jmp's."""

import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest

from precision_lab.optim import DynamicLossScale, NoLossScale, StaticLossScale, loss_scaling
from precision_lab.optim.scales import as_loss_scale


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"init": 2.0, "min": 4.0}, "min <= init <= max"),
        ({"init": 2.0**25}, "min <= init <= max"),
        ({"growth": 1.0}, "growth must be finite and above 1"),
        ({"backoff": 1.0}, "backoff must lie between 0 and 1"),
        ({"interval": 0}, "interval must be a positive integer"),
        ({"interval": True}, "interval must be a positive integer"),
        ({"hysteresis": 0}, "hysteresis must be a positive integer"),
        ({"hysteresis": 1.5}, "hysteresis must be a positive integer"),
        ({"init": float("inf")}, "init must be positive"),
        ({"min": 0.0}, "min must be positive"),
        ({"max": 2.0**127}, r"max must be positive, from 2\*\*-126 to 2\*\*126"),
    ],
)
def test_bad_dynamic_scales_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DynamicLossScale(**wrong)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), 1e-45])
def test_bad_static_scales_are_refused(scale):
    with pytest.raises(ValueError, match=r"StaticLossScale\.scale must be positive"):
        StaticLossScale(scale)


def test_a_number_is_no_loss_scale():
    with pytest.raises(TypeError, match=r"StaticLossScale\(s\).*got 1024"):
        loss_scaling(optax.sgd(1.0), 1024)
    with pytest.raises(TypeError, match="must be a number, got '8'"):
        StaticLossScale("8")  # type: ignore[arg-type]


def test_something_else_is_no_transformation():
    with pytest.raises(TypeError, match="expected an optax transformation"):
        loss_scaling(1e-3)


def test_jmp_scales_become_ours():
    dynamic = jmp.DynamicLossScale(jnp.float32(2**10), period=7, factor=4, min_loss_scale=jnp.float32(2))

    assert as_loss_scale(jmp.NoOpLossScale()) == NoLossScale()
    assert as_loss_scale(jmp.StaticLossScale(jnp.float32(8))) == StaticLossScale(8.0)
    assert as_loss_scale(dynamic) == DynamicLossScale(2.0**10, 4.0, 0.25, 7, 2.0, 2.0**126)


def test_a_float16_scale_of_jmp_stops_where_float16_does():
    theirs = jmp.DynamicLossScale(jnp.float16(2**15), min_loss_scale=jnp.float16(1))

    assert as_loss_scale(theirs).max == 2.0**15


def test_a_jmp_scale_in_mid_interval_is_refused():
    theirs = jmp.DynamicLossScale(jnp.float32(8), counter=np.int32(3))

    with pytest.raises(ValueError, match="counted 3 finite steps"):
        as_loss_scale(theirs)
