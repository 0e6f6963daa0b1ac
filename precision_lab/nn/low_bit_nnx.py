"""Low-bit layers for NNX: Flax's Linear and Conv, with the products of `low_bit` in place of their own.

Parameters go by the names that Flax gives them, so a layer can take the weights of a plain one; a policy would do the
same to that: `BitLinear` is `nnx.RMSNorm` and an `nnx.Linear` under "bitnet_b158", bit for bit.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

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


class LowBitLinear(nnx.Linear):
    """`nnx.Linear` whose product is that of a policy, whatever policy the model is under.

    Args:
      in_features, out_features: as of `nnx.Linear`.
      policy: a Policy or what parses to one, without rules: "twn", "weight=binary@channel,activation=int8@token".
      rngs: as of `nnx.Linear`.
      options: other arguments of `nnx.Linear`, but for `dot_general` and `precision`.
    """

    def __init__(self, in_features: int, out_features: int, *, policy: Any, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(in_features, out_features, dot_general=LowBitDotGeneral(policy), rngs=rngs, **options)


class LowBitConv(nnx.Conv):
    """`nnx.Conv` whose convolution is that of a policy; arguments as of `LowBitLinear` and `nnx.Conv`.

    Raises:
      ValueError: a mask of binary weights, or causal padding of binary inputs, whose zeros signs would make +1.
    """

    def __init__(
        self, in_features: int, out_features: int, kernel_size: Any, *, policy: Any, rngs: nnx.Rngs, **options: Any
    ) -> None:
        product = LowBitConvolution(policy)
        refuse_zeros(product.policy, options.get("padding"), options.get("mask"))
        super().__init__(in_features, out_features, kernel_size, conv_general_dilated=product, rngs=rngs, **options)


class BitLinear(LowBitLinear):
    """Normalisation, then a linear layer with int8 inputs by token, and binary or ternary weights.

    Args:
      in_features, out_features: as of `nnx.Linear`.
      policy: "bitnet_b158" or "bitnet"; the one comes after an RMSNorm, the other after a LayerNorm.
      rngs: as of `nnx.Linear`.
      options: other arguments of `nnx.Linear`.

    Source: Wang et al., "BitNet", 2023, arXiv:2310.11453, section 2.1; Ma et al., "The Era of 1-bit LLMs", 2024,
      arXiv:2402.17764, section 2. Theirs keep scales above 1e-5; here weights or rows of zeros give zeros.
    """

    def __init__(
        self, in_features: int, out_features: int, *, policy: Any = "bitnet_b158", rngs: nnx.Rngs, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, policy=policy, rngs=rngs, **options)
        self.norm = getattr(nnx, norm_of(policy))(in_features, param_dtype=self.param_dtype, rngs=rngs)

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns (..., out_features) for (..., in_features)."""
        return super().__call__(self.norm(inputs), *args, **kwargs)


class XnorLinear(LowBitLinear):
    """Linear layer of signs, scaled by the mean magnitudes of each output's weights and of each row of the input.

    Its inputs should be normalised and have both signs; `XnorBlock` has the order. It is the preset "xnor".

    Source: Rastegari et al., "XNOR-Net", 2016, arXiv:1603.05279, section 3.2, equations 7 to 9.
    """

    def __init__(
        self, in_features: int, out_features: int, *, policy: Any = XNOR, rngs: nnx.Rngs, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, policy=policy, rngs=rngs, **options)


class XnorConv(nnx.Conv):
    """Convolution of signs, scaled by the mean magnitudes of each filter and of the input over each window.

    Args:
      in_features, out_features, kernel_size: as of `nnx.Conv`; without groups.
      window_scales: whether there is a scale for each window, K in the paper; else signs of the input have none,
        as in the authors' code.
      policy: formats of the two operands; with window scales the input's has none.
      rngs: as of `nnx.Conv`.
      options: other arguments of `nnx.Conv`, but for `conv_general_dilated` and `precision`.

    Source: Rastegari et al., "XNOR-Net", 2016, arXiv:1603.05279, section 3.2, equation 11.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Any,
        *,
        window_scales: bool = True,
        policy: Any = XNOR_OF_WINDOWS,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        product = LowBitConvolution(policy, window_scales)
        refuse_zeros(product.policy, options.get("padding"), options.get("mask"))
        super().__init__(in_features, out_features, kernel_size, conv_general_dilated=product, rngs=rngs, **options)


class XnorBlock(nnx.Module):
    """Batch normalisation, sign, convolution, maximum over windows: the order in which XNOR-Net trains.

    Pooling signs makes most of them +1, and the signs of what ReLU has left are all +1; so either comes afterwards.

    Args:
      in_features, out_features, kernel_size, options: as of `XnorConv`.
      pool: window and stride of the maximum; None for no pooling.
      rngs: as of `nnx.Conv`.

    Source: Rastegari et al., "XNOR-Net", 2016, arXiv:1603.05279, section 3.2, figure 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Any,
        *,
        pool: tuple[int, ...] | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        self.norm = nnx.BatchNorm(in_features, rngs=rngs)
        self.conv = XnorConv(in_features, out_features, kernel_size, rngs=rngs, **options)
        self.pool = pool

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the block's output for `x` (batch, ..., in_features)."""
        x = self.conv(self.norm(x))
        return x if self.pool is None else nnx.max_pool(x, self.pool, strides=self.pool)


class Drawn(nnx.Module):
    """A product whose right operand is drawn anew at each call: signs, by the probability that the weight is.

    Args:
      product: of the signs, `LowBitDotGeneral` or `LowBitConvolution`.
      rngs: its stream "binary" (or "default") is forked, for the draws.

    Attributes:
      deterministic: whether the real weights are multiplied instead; `model.eval()` sets it.
    """

    def __init__(self, product: Any, *, rngs: nnx.Rngs) -> None:
        self.product = product
        self.deterministic = False
        self.rngs = rngs["binary"].fork()

    def __call__(self, lhs: jax.Array, rhs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """Returns the product of `lhs` and signs drawn from `rhs`."""
        return self.product(lhs, rhs if self.deterministic else drawn(rhs, self.rngs()), *args, **options)


class BinaryConnectLinear(nnx.Linear):
    """Linear layer whose weights are signs; keep the real ones in [-1, 1] by `weight_clipping`.

    Args:
      in_features, out_features: as of `nnx.Linear`.
      stochastic: whether signs are drawn at each call in training, and real weights used in evaluation; else signs
        are those of the weights, always.
      rngs: as of `nnx.Linear`; the stream "binary" (or "default") draws.
      options: other arguments of `nnx.Linear`, but for `dot_general` and `precision`.

    Source: Courbariaux et al., "BinaryConnect", 2015, arXiv:1511.00363, sections 2.2 and 2.6.
    """

    def __init__(
        self, in_features: int, out_features: int, *, stochastic: bool = False, rngs: nnx.Rngs, **options: Any
    ) -> None:
        product = Drawn(LowBitDotGeneral("float32"), rngs=rngs) if stochastic else LowBitDotGeneral(BINARY_CONNECT)
        super().__init__(in_features, out_features, dot_general=product, rngs=rngs, **options)


class BinaryConnectConv(nnx.Conv):
    """Convolution whose weights are signs; arguments as of `BinaryConnectLinear` and `nnx.Conv`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Any,
        *,
        stochastic: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        signs = LowBitConvolution(BINARY_CONNECT)
        refuse_zeros(signs.policy, options.get("padding"), options.get("mask"))
        product = Drawn(LowBitConvolution("float32"), rngs=rngs) if stochastic else signs
        super().__init__(in_features, out_features, kernel_size, conv_general_dilated=product, rngs=rngs, **options)
