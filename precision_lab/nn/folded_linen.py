"""The Linen twin of `FoldedBatchNorm`: a layer and its batch norm as one module, which quantizes the folded kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import meta

from precision_lab.nn.batch_norm import fold_batch_norm
from precision_lab.nn.fake_quant import LinenFakeQuant
from precision_lab.nn.folded import BatchNormNumbers, folded_fake_quantize
from precision_lab.quant.state import check_schedule


class LinenFoldedBatchNorm(linen.Module):
    """A layer and the batch norm after it as one module of Linen, which quantizes the folded kernel.

    Variables are those of `layer` and `norm`: under these names or, made in a compact method, under those that they
    have there without this module; and of the kernel's `LinenFakeQuant`, under "fake_quant". `fold_batch_norm` of
    them, quantized with the state of "fake_quant", is the deployed layer, and gives the same bits as this module in
    evaluation, in float32. A training step names "batch_stats" and "quant_stats" as mutable. What is computed, and
    its source, stands with `folded_fake_quantize`.

    Attributes:
      layer: a `linen.Dense` or `linen.Conv`, grouped or not.
      norm: a `linen.BatchNorm` over its last axis; whether it uses running averages is up to `train`.
      weight: quantizer of the folded kernel, or what parses to one.
      freeze: training steps after which the statistics of the batch norm stay and are used; None for never.
      running, start, delay, momentum: as of `LinenFakeQuant`.

    Raises (when called):
      ValueError: a batch norm over other axes or devices.
      TypeError: other modules.
    """

    layer: linen.Dense | linen.Conv
    norm: linen.BatchNorm
    weight: Any = "int8@channel"
    freeze: int | None = None
    running: bool | None = None
    start: str | None = None
    delay: int = 0
    momentum: float = 0.1

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the layer's output for `x`, normalized, (..., out).

        Args:
          x: input of the layer.
          train: whether this is a step of training.
        """
        self._check()
        check_schedule(0, self.freeze, 1)
        if self.is_initializing():
            self.norm(self.layer(x), use_running_average=True)  # which makes their variables
        kernel, bias = self._of_layer()
        options = {name: getattr(self, name) for name in ("running", "start", "delay", "momentum")}
        axis = tuple(range(jnp.ndim(kernel) - 1))
        fake = LinenFakeQuant(self.weight, axis=axis, name="fake_quant", **options)
        steps, frozen = None, False
        if self.freeze is not None:
            steps = self.variable("quant_stats", "steps", lambda: jnp.zeros((), jnp.int32))
            frozen = steps.value >= self.freeze
        value, after = folded_fake_quantize(
            lambda kernel: self._product(x, kernel),
            kernel,
            bias,
            self._numbers(),
            lambda kernel: fake(kernel, train),
            train=train,
            frozen=frozen,
            epsilon=self.norm.epsilon,
            momentum=self.norm.momentum,
        )
        if train and not self.is_initializing():
            for name in ("mean", "var"):
                self.norm.put_variable("batch_stats", name, getattr(after, name))
            if steps is not None:
                steps.value += 1
        return value

    def folded(self) -> tuple[jax.Array, jax.Array]:
        """Returns kernel and bias of the one layer that this is in evaluation, not yet quantized.

        `module.apply(variables, method="folded")`.
        """
        self._check()
        return fold_batch_norm(*self._of_layer(), *self._numbers(), epsilon=self.norm.epsilon)

    def _check(self) -> None:
        """Refuses what has no folded kernel."""
        if not isinstance(self.layer, (linen.Dense, linen.Conv)) or not isinstance(self.norm, linen.BatchNorm):
            kinds = f"{type(self.layer).__name__} and {type(self.norm).__name__}"
            raise TypeError(f"expected a linen.Dense or linen.Conv and a linen.BatchNorm, got {kinds}.")
        if self.norm.axis != -1 or self.norm.axis_name is not None:
            found = f"{self.norm.axis}, {self.norm.axis_name}"
            raise ValueError(f"the batch norm must be over axis -1 of one device, got {found}.")

    def _of_layer(self) -> tuple[Any, Any]:
        """Returns the layer's kernel, and its bias or None."""
        params = meta.unbox(self.layer.variables["params"])
        return params["kernel"], params.get("bias")

    def _numbers(self) -> BatchNormNumbers:
        """Returns the numbers of the batch norm."""
        held = meta.unbox(self.norm.variables)
        params, stats = held.get("params", {}), held["batch_stats"]
        return BatchNormNumbers(params.get("scale"), params.get("bias"), stats["mean"], stats["var"])

    def _product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Returns what the layer makes of `x` with another kernel and without its bias."""
        bare = self.layer.clone(parent=None, name=None, use_bias=False)
        return bare.apply({"params": {"kernel": kernel}}, x)  # pyright: ignore[reportReturnType]
