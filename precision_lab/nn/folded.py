"""Quantization-aware training through a batch norm: the kernel that is quantized is the one of the deployed model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from precision_lab.nn.batch_norm import fold_batch_norm
from precision_lab.nn.fake_quant import FakeQuant, QuantStat
from precision_lab.quant.arithmetic import divide, multiply
from precision_lab.quant.state import check_schedule


class BatchNormNumbers(NamedTuple):
    """Scale and offset (gamma and beta), or None, and running statistics, of a batch norm, each float32 (out,)."""

    scale: Any
    offset: Any
    mean: Any
    var: Any


def folded_fake_quantize(
    product: Callable[[jax.Array], jax.Array],
    kernel: jax.Array,
    bias: jax.Array | None,
    norm: BatchNormNumbers,
    fake: Callable[[jax.Array], jax.Array],
    *,
    train: bool,
    frozen: Any = False,
    epsilon: float = 1e-5,
    momentum: float = 0.99,
) -> tuple[jax.Array, BatchNormNumbers]:
    """Returns a layer and its batch norm with the folded kernel quantized, and the running statistics afterwards.

    In evaluation, `product(fake(k)) + b`, where (k, b) are of `fold_batch_norm`: bit for bit the deployed layer. In
    training the kernel is folded with the running statistics too, so that its scale does not follow each batch; the
    output is then scaled by running over batch deviation and shifted as the batch says, which is what a batch norm
    does. Once frozen, training uses the running statistics and leaves them.

    Args:
      product: the layer without bias, as a function of its kernel: to (..., out).
      kernel: (..., out).
      bias: (out,), or None.
      norm: numbers of the batch norm.
      fake: the fake quantization of a kernel.
      train: whether this is a step of training.
      frozen: whether statistics stay as they are; may be traced.
      epsilon, momentum: of the batch norm; a running number moves by 1 - momentum.

    Returns:
      (output of `product`'s dtype, numbers of the batch norm).

    Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: A whitepaper", 2018,
      arXiv:1806.08342, section 3.2.2, whose correction is the inverse of the ratio here.
    """
    folded, shift = fold_batch_norm(kernel, bias, *norm, epsilon=epsilon)
    out = product(fake(folded))
    if not train:
        return (out + shift).astype(out.dtype), norm

    def of_batch() -> tuple[jax.Array, jax.Array]:
        y = product(kernel).astype(jnp.float32)
        axes = tuple(range(y.ndim - 1))
        return jnp.mean(y, axes), jnp.var(y, axes)

    # Running numbers are constants; the layer's bias, which a fixed mean does not take away again, learns.
    running = [jnp.float32(jax.lax.stop_gradient(number)) for number in (norm.mean, norm.var)]
    fixed = running[0] - (0 if bias is None else jnp.float32(bias)), running[1]
    mean, var = of_batch() if frozen is False else jax.lax.cond(jnp.asarray(frozen), lambda: fixed, of_batch)
    ratio = divide(jnp.sqrt(norm.var + np.float32(epsilon)), jnp.sqrt(var + np.float32(epsilon)))
    # The layer's bias is a part of the mean that is taken away again.
    shift = fold_batch_norm(kernel, None, norm.scale, norm.offset, mean, var, epsilon=epsilon)[1]
    moved = [
        jnp.where(frozen, old, jax.lax.stop_gradient(momentum * old + (1 - momentum) * new))
        for old, new in ((norm.mean, mean + (0 if bias is None else bias)), (norm.var, var))
    ]
    value = multiply(out.astype(jnp.float32), ratio) + shift
    return value.astype(out.dtype), norm._replace(mean=moved[0], var=moved[1])


class FoldedBatchNorm(nnx.Module):
    """A layer and the batch norm after it as one module of NNX, which quantizes the folded kernel.

    `layer` and `norm` keep their variables, so that a trained pair can be wrapped; `fold_batch_norm` of them, quantized
    with the state of `weight`, is the deployed layer, and gives the same bits as this module in evaluation, in float32.

    Attributes:
      layer, norm: the modules given.
      weight: the `FakeQuant` of the kernel.
      steps: training steps so far, if statistics freeze.

    Args:
      layer: `nnx.Linear` or `nnx.Conv`, grouped or not.
      norm: `nnx.BatchNorm` over its last axis.
      weight: quantizer of the folded kernel, or what parses to one.
      freeze: training steps after which the statistics of the batch norm stay and are used; None for never.
      use_running_average: True in evaluation; set by `model.train()` and `model.eval()`.
      options: of the kernel's `FakeQuant`: `running`, `start`, `delay`, `momentum`.

    Raises:
      ValueError: a batch norm over other axes or devices.
      TypeError: other modules.
    """

    def __init__(
        self,
        layer: nnx.Linear | nnx.Conv,
        norm: nnx.BatchNorm,
        weight: Any = "int8@channel",
        *,
        freeze: int | None = None,
        use_running_average: bool | None = False,
        **options: Any,
    ) -> None:
        if not isinstance(layer, (nnx.Linear, nnx.Conv)) or not isinstance(norm, nnx.BatchNorm):
            kinds = f"{type(layer).__name__} and {type(norm).__name__}"
            raise TypeError(f"expected an nnx.Linear or nnx.Conv and an nnx.BatchNorm, got {kinds}.")
        if norm.axis != -1 or norm.axis_name is not None:
            raise ValueError(f"the batch norm must be over axis -1 of one device, got {norm.axis}, {norm.axis_name}.")
        check_schedule(0, freeze, 1)
        self.layer, self.norm = layer, norm
        self.freeze, self.use_running_average = freeze, use_running_average
        axis = tuple(range(layer.kernel[...].ndim - 1))
        self.weight = FakeQuant(weight, axis=axis, example=self.folded()[0], **options)
        if freeze is not None:
            self.steps = QuantStat(jnp.zeros((), jnp.int32))

    def folded(self) -> tuple[jax.Array, jax.Array]:
        """Returns kernel and bias of the one layer that this is in evaluation, not yet quantized."""
        return fold_batch_norm(self.layer.kernel[...], self._bias, *self._numbers, epsilon=self.norm.epsilon)

    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Returns the layer's output for `x`, normalized, (..., out).

        Args:
          x: input of the layer.
          use_running_average: True in evaluation; None for what the module was told.
        """
        average = self.use_running_average if use_running_average is None else use_running_average
        if average is None:
            raise ValueError("FoldedBatchNorm needs use_running_average: True in evaluation, False in training.")
        value, after = folded_fake_quantize(
            lambda kernel: self._product(x, kernel),
            self.layer.kernel[...],
            self._bias,
            self._numbers,
            lambda kernel: self.weight(kernel, use_running_average=average),
            train=not average,
            frozen=False if self.freeze is None else self.steps[...] >= self.freeze,
            epsilon=self.norm.epsilon,
            momentum=self.norm.momentum,
        )
        if not average:
            self.norm.mean[...], self.norm.var[...] = after.mean, after.var
            if self.freeze is not None:
                self.steps[...] += 1
        return value

    @property
    def _bias(self) -> Any:
        """Returns the layer's bias or None."""
        return None if self.layer.bias is None else self.layer.bias[...]

    @property
    def _numbers(self) -> BatchNormNumbers:
        """Returns the numbers of the batch norm."""
        norm = self.norm
        scale, offset = (None if part is None else part[...] for part in (norm.scale, norm.bias))
        return BatchNormNumbers(scale, offset, norm.mean[...], norm.var[...])

    def _product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Returns what the layer makes of `x` with another kernel and without its bias."""
        copy = nnx.clone(self.layer)
        copy.kernel = nnx.Param(kernel)
        copy.bias, copy.use_bias = nnx.data(None), False
        return copy(x)
