"""Calls of models as pure functions of their parameters, for everything that looks at a model from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen, nnx

from precision_lab.nn.learned import learned_of, stored
from precision_lab.nn.linen_policy import linen_call
from precision_lab.nn.nnx_policy import nnx_call
from precision_lab.policy import Policy


class PureCall(NamedTuple):
    """A call taken apart.

    Attributes:
      fn: `fn(params, *args, **kwargs)` returns what the call returns; changed variables of a model are dropped.
      params: the parameters, as a pytree whose paths name the sites.
      args, kwargs: everything else.
      root: name scope to leave out of site paths.
      types: type name of each module by path; of a Linen model filled when `fn` runs.
      is_model: whether it is a model's, whose params a policy stores in its own dtype.
      learned: paths of the parameters that a policy leaves as they are, being learned numbers of quantizers.
      called: signature of the arguments as they were given; those of an NNX call that are no arrays are part of `fn`.
    """

    fn: Callable[..., Any]
    params: Any
    args: list[Any]
    kwargs: dict[str, Any]
    root: str
    types: dict[str, str]
    is_model: bool
    learned: frozenset[str] = frozenset()
    called: tuple[Any, ...] = ()

    def stored(self, policy: Policy, params: Any) -> Any:
        """Returns params of this call as a policy stores them; those of a function as they are."""
        return stored(policy, params, self.learned) if self.is_model else params


def pure_call(target: Any, args: Any, kwargs: dict[str, Any]) -> PureCall:
    """Returns the call `target(*args, **kwargs)` as a function of its parameters, without any policy it has.

    Args:
      target: an `nnx.Module`; a `linen.Module`, called as `apply(*args, **kwargs)` with its variables first; or a
        function of its params first.
      args, kwargs: what it is called with.

    Raises:
      TypeError: `target` is none of these, or the params of a function are missing.
    """
    if isinstance(target, nnx.Module):
        (fn, params, rest), types = nnx_call(target, args, kwargs)
        called = signature((args, kwargs))
        return PureCall(
            lambda params, rest: fn(params, rest)[0], params, [rest], {}, "", types, True, learned_of(target), called
        )
    if isinstance(target, linen.Module):
        types: dict[str, str] = {}
        fn, params, rest, root = linen_call(target, *args, types=types, **kwargs)
        has_state = bool(kwargs.get("mutable") or kwargs.get("capture_intermediates"))
        learned = learned_of(target, args[0])
        return PureCall(
            lambda *given: fn(*given)[0] if has_state else fn(*given), params, rest, {}, root, types, True, learned
        )
    require_function(target)
    if not args:
        raise TypeError("a function is observed at fn(params, ...); give its params first.")
    return PureCall(target, args[0], list(args[1:]), kwargs, "", {}, False)


def require_function(target: Any) -> None:
    """Raises TypeError for what is no function, and for a model's class in place of a model."""
    if isinstance(target, type) or not isinstance(target, Callable):
        kind = f"the class {target.__name__}" if isinstance(target, type) else f"{type(target).__name__}"
        raise TypeError(f"expected an nnx.Module or linen.Module instance or a function fn(params, ...), got {kind}.")


def apart(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Returns the arrays of a tree, and what puts them back between its other leaves."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def together(arrays: list[Any]) -> Any:
        new = dict(zip(places, arrays, strict=True))
        return jax.tree.unflatten(structure, [new.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in places], together


def signature(tree: Any) -> tuple[Any, ...]:
    """Returns what a program compiled for a tree is good for: its structure, shapes and dtypes, and other leaves."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]
    return structure, *(
        f"{x.dtype}{x.shape}" if is_array else repr(x) for x, is_array in zip(leaves, arrays, strict=True)
    )
