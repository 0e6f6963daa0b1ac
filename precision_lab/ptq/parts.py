"""Models taken apart into a function and parameters by path, whether of NNX, Linen or a function's, and put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen, nnx

from precision_lab.nn.pure import require_function
from precision_lab.rewrite import is_qtensor, leaf_names


class Parts(NamedTuple):
    """A model and its parameters.

    Attributes:
      target: the model, module or function.
      given: variables or params that it came with; None for an NNX model.
      params: its parameters by path, arrays or QTensors.
    """

    target: Any
    given: Any
    params: dict[str, Any]

    @property
    def is_module(self) -> bool:
        """Whether it has its parameters itself."""
        return isinstance(self.target, nnx.Module)

    @property
    def is_function(self) -> bool:
        """Whether it is no model but a function of its params."""
        return not isinstance(self.target, nnx.Module | linen.Module)

    def run(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Returns what the model returns with these parameters."""
        if self.is_module:
            return self.with_params(params)(*args, **kwargs)
        target, given = self.with_params(params)
        call = target.apply if isinstance(target, linen.Module) else target
        return call(given, *args, **kwargs)

    def under(self, change: Callable[[Any], Any]) -> Parts:
        """Returns the same with the model or function changed."""
        return self._replace(target=change(self.target))

    def with_params(self, params: Mapping[str, Any]) -> Any:
        """Returns the model, in the form in which it was given, with some of its parameters replaced."""
        if isinstance(self.target, nnx.Module):
            copy = nnx.clone(self.target)
            flat = nnx.to_flat_state(nnx.state(copy, nnx.Param))
            new = [(path, var.replace(params[name])) for path, var in flat if (name := _name(path)) in params]
            nnx.update(copy, nnx.from_flat_state(new))
            return copy
        if isinstance(self.target, linen.Module):
            return self.target, {**self.given, "params": _replaced(self.given["params"], params)}
        return self.target, _replaced(self.given, params)


def taken_apart(model: Any) -> Parts:
    """Returns the parts of an `nnx.Module`, a pair (linen.Module, variables), or a pair (function, params).

    Raises:
      TypeError: it is none of these.
    """
    if isinstance(model, nnx.Module):
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return Parts(model, None, {_name(path): variable.get_raw_value() for path, variable in flat})
    if not isinstance(model, tuple) or len(model) != 2:
        raise TypeError(
            f"expected an nnx.Module, (linen.Module, variables) or (function, params), got {type(model).__name__}."
        )
    target, given = model
    if not isinstance(target, linen.Module):
        require_function(target)
    tree = given["params"] if isinstance(target, linen.Module) else given
    leaves = jax.tree.leaves(tree, is_leaf=is_qtensor)
    return Parts(target, given, dict(zip(leaf_names(tree), leaves, strict=True)))


def _replaced(tree: Any, params: Mapping[str, Any]) -> Any:
    """Returns a tree with some of its leaves replaced."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_qtensor)
    return structure.unflatten([params.get(name, leaf) for name, leaf in zip(leaf_names(tree), leaves, strict=True)])


def _name(path: Any) -> str:
    """Writes an NNX path as sites have it."""
    return "/".join(map(str, path))
