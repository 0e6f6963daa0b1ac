"""One form for everything that optax accepts as a transformation, and for what we give it."""

from typing import Any

import optax


def as_transformation(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` with `update(updates, state, params=None, **extra_args)`.

    Args:
      inner: optax transformation, or an object with `init` and `update` such as `optax.MultiSteps`.

    Raises:
      TypeError: `inner` is neither.
    """
    if isinstance(inner, optax.GradientTransformation):
        return optax.with_extra_args_support(inner)
    if isinstance(inner, optax.MultiSteps):
        return transformation(inner.init, inner.update)
    if callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None)):
        return optax.with_extra_args_support(optax.GradientTransformation(inner.init, inner.update))
    raise TypeError(f"expected an optax transformation, such as optax.adamw(1e-3), got {inner!r}.")


def transformation(init: Any, update: Any) -> optax.GradientTransformationExtraArgs:
    """Returns the optax transformation of `init` and `update`, whose state type optax's annotations cannot name."""
    return optax.GradientTransformationExtraArgs(init, update)
