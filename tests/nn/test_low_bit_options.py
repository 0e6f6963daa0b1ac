"""Low-bit layers beside the options of Flax's: what they take, and what they refuse rather than pass over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from precision_lab.nn import low_bit_linen, low_bit_nnx
from precision_lab.nn.low_bit import XNOR_OF_WINDOWS, LowBitConvolution

RNG = np.random.default_rng(2)
IMAGES = jnp.asarray(RNG.normal(size=(2, 9, 7, 5)), jnp.float32)


def rngs():
    return nnx.Rngs(0, binary=7)


@pytest.mark.parametrize(
    "call",
    [
        lambda **options: low_bit_nnx.LowBitConv(5, 3, (3,), rngs=rngs(), **{"policy": "xnor", **options}),
        lambda **options: low_bit_nnx.XnorConv(5, 3, (3,), rngs=rngs(), **options),
        lambda **options: low_bit_linen.LowBitConv(3, (3,), **{"policy": "xnor", **options}),
        lambda **options: low_bit_linen.XnorConv(3, (3,), **options),
    ],
)
def test_zeros_that_signs_would_make_ones_are_refused(call):
    """Flax masks and pads causally before its product, so sign(0) = +1 stood where nothing should."""
    with pytest.raises(ValueError, match=r"puts zeros before the input.*padding=\[\(left, 0\)\]"):
        call(padding="CAUSAL")
    with pytest.raises(ValueError, match="a mask makes weights zero, of which signs make"):
        call(mask=jnp.ones((3, 5, 3)))

    assert call(padding=[(2, 0)])


@pytest.mark.parametrize("stochastic", [False, True])
def test_masks_are_refused_by_binary_connect_and_kept_by_ternary_weights(stochastic):
    mask = jnp.ones((3, 5, 3)).at[0].set(0)

    for make in (
        lambda: low_bit_nnx.BinaryConnectConv(5, 3, (3,), stochastic=stochastic, mask=mask, rngs=rngs()),
        lambda: low_bit_linen.BinaryConnectConv(3, (3,), stochastic=stochastic, mask=mask),
    ):
        with pytest.raises(ValueError, match="a mask makes weights zero"):
            make()
    ternary = low_bit_nnx.LowBitConv(5, 3, (3,), policy="twn", padding="CAUSAL", mask=mask, rngs=rngs())
    steps = jnp.zeros((1, 3, 5)).at[0, 0].set(1)
    assert np.all(ternary(steps)[0, 2] == ternary.bias[...])
    assert np.any(ternary(steps)[0, 1] != ternary.bias[...])


def test_a_convolution_takes_its_arguments_by_position_too():
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 5, 4)), jnp.float32)
    numbers = ("NHWC", "HWIO", "NHWC")
    convolve = LowBitConvolution(XNOR_OF_WINDOWS, window_scales=True)

    by_position = convolve(IMAGES, kernel, (1, 1), "VALID", None, (2, 1), numbers)

    by_name = convolve(IMAGES, kernel, (1, 1), "VALID", rhs_dilation=(2, 1), dimension_numbers=numbers)
    np.testing.assert_array_equal(by_position, by_name)
    with pytest.raises(ValueError, match="its policy says what is multiplied"):
        LowBitConvolution("xnor")(IMAGES, kernel, (1, 1), "VALID", None, None, numbers, 1, 1, jax.lax.Precision.HIGHEST)


@pytest.mark.parametrize(
    "make",
    [
        lambda: low_bit_linen.LowBitDense(5, policy="twn", dot_general_cls=lambda: jax.lax.dot_general),
        lambda: low_bit_linen.BinaryConnectDense(5, dot_general=jax.lax.dot_general),
        lambda: low_bit_linen.XnorConv(3, (3,), conv_general_dilated=jax.lax.conv_general_dilated),
        lambda: low_bit_linen.BinaryConnectConv(
            3, (3,), stochastic=True, conv_general_dilated_cls=lambda: jax.lax.conv_general_dilated
        ),
    ],
)
def test_a_low_bit_layer_of_linen_takes_no_other_product(make):
    with pytest.raises(ValueError, match="in a low-bit layer: its policy says what is multiplied; leave it out"):
        make()


@pytest.mark.parametrize("cls", [low_bit_linen.BinaryConnectDense, low_bit_linen.BinaryConnectConv])
def test_a_copy_that_draws_no_more_multiplies_by_the_signs_of_the_weights(cls):
    layer = cls(3, **({"kernel_size": (1,)} if cls is low_bit_linen.BinaryConnectConv else {}), stochastic=True)
    kernel = jnp.asarray([[-0.5, 0.1, 0.9]])[(None,) * (cls is low_bit_linen.BinaryConnectConv)]
    params = {"params": {"kernel": kernel, "bias": jnp.zeros(3)}}

    out = layer.clone(stochastic=False).apply(params, jnp.ones((1, 1, 1)))

    np.testing.assert_array_equal(out, [[[-1, 1, 1]]])
    drawn = layer.clone(stochastic=False).clone(stochastic=True)
    assert set(np.unique(drawn.apply(params, jnp.ones((1, 64, 1)), rngs={"binary": jax.random.key(0)}))) == {-1.0, 1.0}
