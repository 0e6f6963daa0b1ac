"""Products of low-bit layers: what stands in the place of dot_general and of the convolution in a Flax layer.

Flax layers take their product as an argument, in NNX as in Linen, so a low-bit layer is a Flax layer with one of the
products here. Each of them is a policy's: the arithmetic is that of a plain layer under the policy, bit for bit, and
no policy around the layer touches it.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from precision_lab.policy import Policy
from precision_lab.quant import fake_quantize, quantizer
from precision_lab.rewrite import call, full_precision

BINARY_CONNECT = "binary_connect"
XNOR = "xnor"
XNOR_OF_WINDOWS = "weight=binary@channel,xnor,activation=binary,unscaled,hard_tanh"  # K comes afterwards
_CONVOLUTION = inspect.signature(lax.conv_general_dilated)
_DRAWN = quantizer("binary,unscaled,stochastic")


@dataclasses.dataclass(frozen=True)
class LowBitDotGeneral:
    """`jax.lax.dot_general` with its operands in the formats of a policy.

    Attributes:
      policy: a Policy or what parses to one, without rules; its `weight` is for the right operand, `activation` for
        the left one. Results keep the dtype of the plain product.

    Raises:
      ValueError: the policy cannot be parsed, or says what is not of one product (rules, ops, storage); on a call, a
        precision is given, which the policy sets.
    """

    policy: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", _of_one_product(self.policy))

    def __call__(
        self, lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, precision: Any = None, **options: Any
    ) -> jax.Array:
        """Returns the product; arguments as of `jax.lax.dot_general`, the right operand being the parameter."""
        options = _checked(precision, options)
        return _under(self.policy, lambda w, x: lax.dot_general(x, w, dimension_numbers, **options), rhs, lhs)


@dataclasses.dataclass(frozen=True)
class LowBitConvolution:
    """`jax.lax.conv_general_dilated` with its operands in the formats of a policy; see `LowBitDotGeneral`.

    Attributes:
      policy: as of `LowBitDotGeneral`.
      window_scales: whether the result is multiplied by K, the mean magnitude of the input over each window; no
        gradient flows through it. Then `activation` has to be without a scale of its own.

    Source: Rastegari et al., "XNOR-Net", 2016, arXiv:1603.05279, section 3.2, equation 11, for K.
    """

    policy: Any
    window_scales: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", _of_one_product(self.policy))
        activation = self.policy.activation
        if self.window_scales and (activation is None or activation.is_scaled):
            raise ValueError(
                f"window_scales multiply signs, but activation={activation}; say "
                "activation=binary,unscaled,hard_tanh, or window_scales=False."
            )

    def __call__(
        self, lhs: jax.Array, rhs: jax.Array, window_strides: Any, padding: Any, *args: Any, **options: Any
    ) -> jax.Array:
        """Returns the convolution; arguments as of `jax.lax.conv_general_dilated`, `rhs` being the parameter."""
        given = _CONVOLUTION.bind(lhs, rhs, window_strides, padding, *args, **options).arguments
        options = {name: value for name, value in given.items() if name in [*given][4:]}
        options = _checked(options.pop("precision", None), options)

        def convolve(w: jax.Array, x: jax.Array, **more: Any) -> jax.Array:
            return lax.conv_general_dilated(x, w, window_strides, padding, **options, **more)

        out = _under(self.policy, convolve, rhs, lhs)
        if not self.window_scales:
            return out
        return out * window_scales(convolve, lhs, rhs.shape, options).astype(out.dtype)


def window_scales(convolve: Callable[..., jax.Array], x: jax.Array, kernel: tuple[int, ...], options: Any) -> jax.Array:
    """Returns K: the mean magnitude of `x` over the window of each output, float32, one feature wide.

    Args:
      convolve: the convolution, `convolve(kernel, x, precision=...)`; strides, padding and dilations are its.
      x: input, of any layout.
      kernel: shape of the kernel.
      options: of the convolution; its dimension numbers say which axes are features.

    Raises:
      ValueError: the convolution has groups, whose inputs would have a K each.
    """
    if options.get("feature_group_count", 1) != 1 or options.get("batch_group_count", 1) != 1:
        raise ValueError("window scales are for convolutions without groups; leave them out by window_scales=False.")
    numbers = lax.conv_dimension_numbers(x.shape, kernel, options.get("dimension_numbers"))
    magnitudes = jnp.abs(lax.stop_gradient(x).astype(jnp.float32))
    mean = jnp.mean(magnitudes, axis=numbers.lhs_spec[1], keepdims=True)
    window = [1 if axis in numbers.rhs_spec[:2] else size for axis, size in enumerate(kernel)]
    box = jnp.full(window, 1 / math.prod(window), jnp.float32)
    with full_precision():
        return convolve(box, mean, precision=lax.Precision.HIGHEST)


def drawn(kernel: jax.Array, key: jax.Array) -> jax.Array:
    """Returns +1 or -1 for each weight, +1 with the probability clip((w + 1) / 2, 0, 1); gradient straight through.

    Source: Courbariaux et al., "BinaryConnect", 2015, arXiv:1511.00363, equations 2 and 3.
    """
    return fake_quantize(kernel, _DRAWN, key=key)


def refuse_zeros(policy: Any, padding: Any, mask: Any) -> None:
    """Refuses a convolution some of whose zeros signs would make +1.

    Args:
      policy: of the convolution.
      padding, mask: as of Flax, which multiplies weights by a mask, and pads for "CAUSAL", before the convolution.

    Raises:
      ValueError: binary weights with a mask, or binary activations with causal padding.
    """
    weight, activation = (
        side is not None and side.format.name == "binary" for side in (policy.weight, policy.activation)
    )
    if weight and mask is not None:
        raise ValueError("a mask makes weights zero, of which signs make +1: leave mask out, or say weight=ternary.")
    if activation and isinstance(padding, str) and padding == "CAUSAL":
        raise ValueError(
            "padding='CAUSAL' puts zeros before the input, of which signs make +1: say padding=[(left, 0)], with "
            "left = kernel_dilation * (kernel_size - 1), whose zeros are added to signs."
        )


def norm_of(policy: Any) -> str:
    """Returns the name of the normalisation that comes before a BitNet layer of this policy."""
    return "LayerNorm" if Policy.parse(policy).weight == Policy.preset("bitnet").weight else "RMSNorm"


def _under(policy: Policy, product: Callable[..., jax.Array], w: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `product(w, x)` under a policy, and hides it from any other."""
    with full_precision():
        return call(product, policy, w, [x], {})


def _of_one_product(policy: Any) -> Policy:
    """Returns a policy that can be that of one product."""
    policy = Policy.parse(policy)
    if policy.rules:
        raise ValueError(f"a low-bit layer is one product, so policy '{policy}' can have no rules; leave them out.")
    if policy.ops != "products" or {policy.params.name, policy.output.name} != {"float32"}:
        raise ValueError(
            f"policy '{policy}' says how parameters, outputs or other operations are, which is not up to a product; "
            "leave out params=, output= and ops=, and give the layer dtype= and param_dtype=."
        )
    return policy


def _checked(precision: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that are given; Flax hands some of them on as None."""
    if precision is not None:
        raise ValueError(f"precision={precision} in a low-bit layer: its policy says what is multiplied; leave it out.")
    return {name: value for name, value in options.items() if value is not None}
