"""Low-bit layers for Linen, the twins of those in `low_bit_nnx`: Flax's Dense and Conv with other products.

Parameters go by the names that Flax gives them. What a layer does, and its source, stands with its twin.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import linen

from precision_lab.nn.low_bit import (
    BINARY_CONNECT,
    XNOR,
    XNOR_OF_WINDOWS,
    LowBitConvolution,
    LowBitDotGeneral,
    drawn,
    norm_of,
    refuse_zeros,
)


class LowBitDense(linen.Dense):
    """`linen.Dense` whose product is that of a policy; see `low_bit_nnx.LowBitLinear`."""

    policy: Any = "float32"

    def __post_init__(self) -> None:
        _give(self, "dot_general", LowBitDotGeneral(self.policy))
        super().__post_init__()


class LowBitConv(linen.Conv):
    """`linen.Conv` whose convolution is that of a policy; see `low_bit_nnx.LowBitConv`."""

    policy: Any = "float32"

    def __post_init__(self) -> None:
        _give_convolution(self, LowBitConvolution(self.policy))
        super().__post_init__()


class BitDense(LowBitDense):
    """Normalisation and a BitNet layer; see `low_bit_nnx.BitLinear`."""

    policy: Any = "bitnet_b158"

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns (..., features) for (..., inputs)."""
        norm = getattr(linen, norm_of(self.policy))(param_dtype=self.param_dtype, name="norm")
        return super().__call__(norm(inputs))


class XnorDense(LowBitDense):
    """Dense layer of scaled signs; see `low_bit_nnx.XnorLinear`."""

    policy: Any = XNOR


class XnorConv(linen.Conv):
    """Convolution of signs, scaled for each filter and each window; see `low_bit_nnx.XnorConv`."""

    window_scales: bool = True
    policy: Any = XNOR_OF_WINDOWS

    def __post_init__(self) -> None:
        _give_convolution(self, LowBitConvolution(self.policy, self.window_scales))
        super().__post_init__()


class XnorBlock(linen.Module):
    """Batch normalisation, sign, convolution, maximum over windows; see `low_bit_nnx.XnorBlock`.

    Attributes:
      features, kernel_size, padding, window_scales: as of `XnorConv`.
      pool: window and stride of the maximum; None for no pooling.
      use_running_average: as of `linen.BatchNorm`, for evaluation.
    """

    features: int
    kernel_size: Any
    padding: Any = "SAME"
    window_scales: bool = True
    pool: tuple[int, ...] | None = None
    use_running_average: bool = False

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the block's output for `x` (batch, ..., features of the input)."""
        x = linen.BatchNorm(self.use_running_average, name="norm")(x)
        options = {"padding": self.padding, "window_scales": self.window_scales}
        x = XnorConv(self.features, self.kernel_size, name="conv", **options)(x)
        return x if self.pool is None else linen.max_pool(x, self.pool, strides=self.pool)


class Drawn(linen.Module):
    """A product whose right operand is drawn anew at each call; see `low_bit_nnx.Drawn`.

    Attributes:
      product: of the signs.
      deterministic: whether the real weights are multiplied instead, which needs no RNG "binary".
    """

    product: Any
    deterministic: bool = False

    def __call__(self, lhs: jax.Array, rhs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """Returns the product of `lhs` and signs drawn from `rhs`."""
        signs = rhs if self.deterministic else drawn(rhs, self.make_rng("binary"))
        return self.product(lhs, signs, *args, **options)


class BinaryConnectDense(linen.Dense):
    """Dense layer whose weights are signs; see `low_bit_nnx.BinaryConnectLinear`.

    Attributes:
      stochastic: whether signs are drawn in training, by the RNG "binary".
      deterministic: whether this is evaluation, with the real weights if signs are drawn in training.
    """

    stochastic: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        drawing = functools.partial(Drawn, LowBitDotGeneral("float32"), self.deterministic)
        _give(self, "dot_general", LowBitDotGeneral(BINARY_CONNECT), drawing if self.stochastic else None)
        super().__post_init__()


class BinaryConnectConv(linen.Conv):
    """Convolution whose weights are signs; attributes as of `BinaryConnectDense`."""

    stochastic: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        drawing = functools.partial(Drawn, LowBitConvolution("float32"), self.deterministic)
        _give_convolution(self, LowBitConvolution(BINARY_CONNECT), drawing if self.stochastic else None)
        super().__post_init__()


def _give_convolution(layer: linen.Conv, product: LowBitConvolution, drawing: Any = None) -> None:
    """Sets the convolution of a layer that is being made."""
    refuse_zeros(product.policy, layer.padding, layer.mask)
    _give(layer, "conv_general_dilated", product, drawing)


def _give(layer: linen.Module, field: str, product: Any, drawing: Any = None) -> None:
    """Sets the product of a layer that is being made, or the class that makes it; no other one can be given."""
    for name, new in {field: product, f"{field}_cls": drawing}.items():
        old = getattr(layer, name)
        # A copy of a layer comes with a product of ours, and the new one follows the fields of the copy.
        ours = isinstance(old, (LowBitDotGeneral, LowBitConvolution)) or getattr(old, "func", None) is Drawn
        if old is not None and not ours:
            raise ValueError(f"{name} in a low-bit layer: its policy says what is multiplied; leave it out.")
        object.__setattr__(layer, name, new)
