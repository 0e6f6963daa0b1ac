"""observe and observed: statistics of what flows through the sites of a function, a model or a whole train step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from precision_lab import formats
from precision_lab.nn.carried import CONVERTED
from precision_lab.nn.own import call_as_it_is, own_policy
from precision_lab.nn.pure import PureCall, pure_call
from precision_lab.policy import Policy
from precision_lab.rewrite import Collector, Mark, Traced, call, harvest, is_qtensor, observing, trace_program
from precision_lab.telemetry.observation import Observation
from precision_lab.telemetry.statistics import TensorStats, empty, merge, stats_of_many

ROLES = ("lhs", "rhs", "output", "value", "lhs_cotangent", "rhs_cotangent", "output_cotangent", "value_cotangent")


def observe(
    target: Any,
    *args: Any,
    policy: Any = None,
    loss: Callable[[Any], jax.Array] | None = None,
    grad: bool | str = "auto",
    roles: Sequence[str] = ROLES,
    limit: int | None = None,
    rounding: bool = True,
    per_layer: bool = False,
    **kwargs: Any,
) -> Observation:
    """Runs `target` once under `policy` and returns the statistics of operands, outputs and cotangents at its sites.

    Args:
      target: an `nnx.Module`, a `linen.Module` or a function `fn(params, *args, **kwargs)`; none is changed.
      args, kwargs: what it is called with; for a Linen model the arguments of `apply`, variables first; for a function
        its params first.
      policy: a Policy or what parses to one, in place of any that a model is under. None runs a target that is under
        a policy as it is, with all that it carries (a converted one with its static scales, one of `prepare_qat` with
        its ranges), and any other under "float32". Weights that are stored quantized are seen as the values that they
        stand for.
      loss: makes a scalar of the output, for the gradients of a model.
      grad: whether to run the backward pass too, for the cotangents; "auto" does if there is a scalar to differentiate.
      roles: which tensors to look at, some of `ROLES`.
      limit: look at so many elements of a tensor at most, see `tensor_stats`.
      rounding: whether to measure the error of rounding each tensor to its format (SQNR, exact counts of what
        overflows and what becomes zero).
      per_layer: keep the statistics of every iteration of a scan apart.

    Returns:
      An Observation, which prints as a table. Operands are seen as they come, before their cast.

    Raises:
      TypeError: `target` is no model or function, or grad=True without a scalar.
      ValueError: a rule matches no site, an unknown role, nothing to observe, or a policy for a function that has one,
        by apply_policy or convert.
    """
    forward, pure = run_under(target, args, kwargs, policy, loss)
    run = _gradient(forward) if _wants_gradient(forward, pure, grad) else forward
    with observing(()):
        traced = trace_program(run, (pure.params, *pure.args), pure.kwargs)
    return jax.jit(lambda arrays: _harvested(traced, arrays, roles, limit, rounding, per_layer)[1])(traced.arrays)


def observed(
    fn: Callable[..., Any],
    *,
    roles: Sequence[str] = ("lhs", "rhs", "output", "value", "output_cotangent", "value_cotangent"),
    limit: int | None = 4096,
    rounding: bool = False,
    per_layer: bool = False,
    when: Callable[..., Any] | None = None,
) -> Callable[..., tuple[Any, Observation]]:
    """Returns a function that also returns what it observed: `(fn(*args, **kwargs), Observation)`.

    The results of `fn` are the same, bit for bit. Meant to stay on in training, for a whole step (`jax.jit(observed(
    step))`): it is an ordinary function of arrays, the differentiation is inside, and the observation is a small pytree
    that `merged` adds up over steps. To look at every n-th step only, either call this one then and `fn` otherwise, or
    give `when`.

    Args:
      fn: function of pytrees that calls a model or function under a policy (`apply_policy`; "float32" changes nothing),
        whose sites are observed, or values marked by `mark`.
      roles, limit, rounding, per_layer: as in `observe`; by default cheap, from a sample of each tensor.
      when: from the same arguments to a traced truth value; if it is false nothing is looked at and the observation
        is empty.

    Raises (when called):
      ValueError: nothing inside is observed; or the result is differentiated, see `harvest`.
      TypeError: `when` returns None.
    """

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> tuple[Any, Observation]:
        with observing(()):
            traced = trace_program(fn, args, kwargs)
        look = None if when is None else when(*args, **kwargs)
        if when is not None and look is None:
            raise TypeError("when= returned None, and not whether to look: return a bool, traced or not.")
        out, observation = _harvested(traced, traced.arrays, roles, limit, rounding, per_layer, look)
        return traced.rebuild(out), observation

    return wrapper


def tree_stats(tree: Any, fmt: Any = None, *, limit: int | None = None, rounding: bool = True) -> Observation:
    """Returns the statistics of the floating arrays of a tree, such as gradients, updates or a checkpoint, by path.

    It can be called inside jit. `first_nonfinite()` of the result names the first leaf that is not finite.

    Args:
      tree: pytree of arrays; leaves that are not floating arrays are left out.
      fmt: format that all are held against; None means that of each leaf's dtype.
      limit, rounding: as in `observe`.
    """
    named = [(_path_of(path), jnp.asarray(leaf)) for path, leaf in jax.tree.leaves_with_path(tree) if _is_float(leaf)]
    marks = [Mark(path, "value", formats.format(leaf.dtype if fmt is None else fmt)) for path, leaf in named]
    pairs = [(leaf, mark.fmt if rounding else None) for mark, (_, leaf) in zip(marks, named, strict=True)]
    stats = stats_of_many(pairs, limit)
    return Observation(stats, marks, rounding)


def _path_of(path: Any) -> str:
    """Writes a pytree path as `blocks/0/att/kernel`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _is_float(leaf: Any) -> bool:
    """Returns whether a leaf is a floating array, and not one that is stored quantized."""
    return hasattr(leaf, "dtype") and not is_qtensor(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _harvested(
    traced: Traced,
    arrays: Sequence[Any],
    roles: Sequence[str],
    limit: int | None,
    rounding: bool,
    per_layer: bool,
    look: Any = None,
) -> tuple[list[Any], Observation]:
    """Returns the outputs of a traced function and the observation."""
    if unknown := set(roles) - set(ROLES):
        raise ValueError(f"unknown role '{min(unknown)}'; roles are {', '.join(ROLES)}.")

    def measure(pairs: Sequence[tuple[Mark, jax.Array]]) -> list[TensorStats]:
        return stats_of_many([(x, mark.fmt if rounding else None) for mark, x in pairs], limit, look)

    out, found = harvest(
        traced.jaxpr, arrays, Collector(lambda mark: mark.role in roles, measure, merge, empty, per_layer)
    )
    if not found:
        raise ValueError(
            "nothing to observe: no product is under a policy and no value is marked. Use apply_policy(model, "
            "'float32') inside the function, or mark(x, name)."
        )
    return out, Observation(list(found.values()), list(found), rounding)


def run_under(
    target: Any, args: Any, kwargs: Any, policy: Any, loss: Callable[[Any], Any] | None = None
) -> tuple[Callable[..., Any], PureCall]:
    """Returns a call under a policy, or with None as it is, as a function (params, *args, **kwargs), and its parts.

    Models store params as the policy says.
    """
    after = loss or (lambda out: out)
    if policy is None and own_policy(target):
        own = call_as_it_is(target, args, kwargs)
        return lambda params, *args, **kwargs: after(own.fn(params, *args, **kwargs)), own
    if hasattr(target, CONVERTED):
        raise ValueError(
            f"a function that convert returned is seen as it is, without a policy; for policy '{policy}' give the "
            "function that was converted, and the packed params."
        )
    if own_policy(target) and not isinstance(target, nnx.Module | linen.Module):  # whose policy is inside of it
        raise ValueError(
            f"a function under policy '{own_policy(target)}' is seen as it is, without a policy; for policy '{policy}' "
            "give the function that apply_policy was given."
        )
    pure, replaced = pure_call(target, args, kwargs), Policy.parse("float32" if policy is None else policy)

    def forward(params: Any, *args: Any, **kwargs: Any) -> Any:
        out = call(pure.fn, replaced, pure.stored(replaced, params), args, kwargs, root=pure.root, types=pure.types)
        return after(replaced.cast_to_output(out))

    return forward, pure


def _gradient(forward: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns the function that returns the loss and its gradients with respect to the floating arrays in params."""

    def run(params: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten(params, is_leaf=is_qtensor)
        floating = [_is_float(leaf) for leaf in leaves]

        def of(floats: Sequence[Any]) -> jax.Array:
            given = iter(floats)
            full = [next(given) if is_f else x for is_f, x in zip(floating, leaves, strict=True)]
            return forward(jax.tree.unflatten(tree, full), *args, **kwargs)

        return jax.value_and_grad(of)([x for is_f, x in zip(floating, leaves, strict=True) if is_f])

    return run


def _wants_gradient(forward: Callable[[Any], Any], pure: PureCall, grad: bool | str) -> bool:
    """Returns whether to differentiate.

    Raises:
      TypeError: that is asked for and there is no scalar.
      ValueError: `grad` is none of True, False and "auto".
    """
    if grad not in (True, False, "auto"):
        raise ValueError(f"grad must be True, False or 'auto', got {grad!r}.")
    if grad is False:
        return False
    outputs = trace_program(forward, (pure.params, *pure.args), pure.kwargs).jaxpr.out_avals
    scalar = len(outputs) == 1 and outputs[0].shape == () and jnp.issubdtype(outputs[0].dtype, jnp.floating)
    if grad is True and not scalar:
        what = ", ".join(f"{aval.dtype}{list(aval.shape)}" for aval in outputs)
        raise TypeError(f"grad=True needs a scalar output to differentiate, got {what}; give loss=.")
    return scalar
