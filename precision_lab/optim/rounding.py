"""Updating low-precision parameters in place, without a master."""

from typing import Any

import optax

from precision_lab.optim.transformation import as_transformation, transformation
from precision_lab.optim.trees import fill_hidden, hide_untrainable, keep_dtypes, strong, to_float32


def nearest_rounding(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` in float32 on low-precision parameters that are rounded to nearest at every step.

    `inner` sees float32 copies of gradients and parameters, so its moments are float32 and its update is exact to
    float32; `optax.apply_updates` then adds in float32 and rounds to the parameter's dtype. What is lost is what
    this rounding loses, and nothing else: an update below half an ulp of the parameter has no effect. That is the
    baseline against which `master_weights` is measured. Its state is that of `inner`.

    Stock optax on 16-bit parameters also keeps Adam's moments in 16 bits, where `eps` and small squares are zero.

    Args:
      inner: optax transformation.

    Raises:
      TypeError: `inner` is no transformation.

    Source: the update without master copy of Micikevicius et al., 2018, arXiv:1710.03740, section 3.1 and figure 2b;
      "nearest" in Zamirai et al., "Revisiting BFloat16 Training", 2020, arXiv:2010.06192, section 3.
    """
    inner = as_transformation(inner)

    def init(params: Any) -> Any:
        return strong(inner.init(to_float32(hide_untrainable(params))))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        grads = to_float32(hide_untrainable(updates, like=params))
        wide = None if params is None else to_float32(hide_untrainable(params))
        steps, new_state = inner.update(grads, state, params=wide, **extra_args)
        return fill_hidden(steps, updates), keep_dtypes(new_state, state)

    return transformation(init, update)
