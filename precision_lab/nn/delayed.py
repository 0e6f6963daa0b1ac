"""Delayed scaling: the scale of each tensor of a product comes from the magnitudes of earlier steps.

A present amax needs a pass over the tensor before it can be quantized; delayed scaling takes the largest of the last
steps, so that a tensor is read once. The history is a pytree that the training step carries and checkpoints.

    scaling = pl.DelayedScaling("float8_hybrid")
    history = scaling.init(loss_fn, params, batch)
    step = jax.jit(scaling.value_and_grad(loss_fn))
    (loss, grads), history = step(params, history, batch)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from precision_lab.policy import Policy
from precision_lab.rewrite import Collector, Mark, call, harvest, observing, scaled_sites, trace

History = dict[str, dict[str, jax.Array]]  # of each site and role: the magnitudes of the last steps, latest first


@dataclasses.dataclass(frozen=True)
class DelayedScaling:
    """How scales follow the magnitudes of earlier steps.

    Attributes:
      policy: a Policy or what parses to one. Sites whose weight and activation quantizers have one scale for each
        tensor ("float8_hybrid") are scaled from the history; all others as the policy says.
      length: steps that the history holds.
      margin: bits of headroom: scales are 2**margin times what the largest magnitude needs.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433; the recipe DelayedScaling of
      TransformerEngine (scale = amax * 2**margin / largest value, the largest of 1024 steps, and the scale before for
      an amax that is zero or not finite).
    """

    policy: Any
    length: int = 1024
    margin: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", Policy.parse(self.policy))
        if self.length < 1:
            raise ValueError(f"DelayedScaling(length={self.length}): the history holds at least one step.")

    def init(self, fn: Callable[..., Any], params: Any, *args: Any, has_aux: bool = False) -> History:
        """Returns a history that starts from the magnitudes of a first pass, so that its step is not out of range.

        Args:
          fn: function of params and `args` to a scalar loss, or to (loss, auxiliary data).
          params, args: what it is called with.
          has_aux: whether `fn` returns (loss, auxiliary data).

        Raises:
          ValueError: no site of the policy has one scale for each of its tensors.
        """
        if not scaled_sites(fn, self.policy, params, args):
            raise ValueError(
                f"policy '{self.policy}' has no site with one scale for each tensor, which is what delayed scaling is "
                "for. Give weight= and activation= with @tensor, as the preset 'float8_hybrid' does."
            )
        found = jax.jit(lambda params, args: self._measured(fn, params, args, None, has_aux=has_aux)[1])(params, args)
        return jax.tree.map(lambda amax: _pushed(jnp.zeros(self.length, jnp.float32), amax), found)

    def value_and_grad(self, fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
        """Returns `(params, history, *args) -> ((value, gradients), history)`, with `fn` under the policy.

        The magnitudes of this step enter the history that comes back; its scales come from the one that went in.

        Args:
          fn: as in `init`.
          has_aux: whether `fn` returns (loss, auxiliary data), which is then the value.
        """

        def run(params: Any, history: History, *args: Any) -> tuple[Any, History]:
            out, found = self._measured(fn, params, args, history, has_aux=has_aux)
            return out, jax.tree.map(_pushed, history, found)

        return run

    def _measured(
        self, fn: Callable[..., Any], params: Any, args: Sequence[Any], history: History | None, has_aux: bool = False
    ) -> tuple[Any, dict[str, dict[str, jax.Array]]]:
        """Returns value and gradients, and the magnitudes at each scaled site; by present scales without a history."""
        roles = scaled_sites(fn, self.policy, params, args)
        amaxes = None if history is None else jax.tree.map(jnp.max, history)

        def loss(params: Any) -> Any:
            out = call(fn, self.policy, params, args, {}, amaxes=amaxes, margin=self.margin)
            return self.policy.cast_to_output(out)

        def wants(mark: Mark) -> bool:
            return mark.site in roles and mark.role in roles[mark.site]

        with observing(()):
            traced = trace(jax.value_and_grad(loss, has_aux=has_aux), params, (), {})
        out, found = harvest(traced.jaxpr, traced.arrays, Collector(wants, _amaxes, jnp.maximum, jnp.zeros_like))
        table = {site: {role: jnp.zeros((), jnp.float32) for role in names} for site, names in roles.items()}
        for mark, amax in found.items():
            table[mark.site][mark.role] = amax
        return traced.rebuild(out), table


def _amaxes(pairs: Sequence[tuple[Mark, jax.Array]]) -> list[jax.Array]:
    """Returns the largest magnitude of each array."""
    return [jnp.max(jnp.abs(x.astype(jnp.float32)), initial=0) for _, x in pairs]


def _pushed(row: jax.Array, amax: jax.Array) -> jax.Array:
    """Returns a history with one more step; the largest so far stands for a magnitude that is zero or not finite."""
    usable = jnp.isfinite(amax) & (amax > 0)
    return jnp.roll(row, 1).at[0].set(jnp.where(usable, amax, jnp.max(row)))
