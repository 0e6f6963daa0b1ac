"""A policy applied to a function: trace it, plan it, evaluate the plan."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from precision_lab.policy import Policy
from precision_lab.quant import QTensor
from precision_lab.rewrite.adapters import Adapter
from precision_lab.rewrite.held import Known
from precision_lab.rewrite.interpreter import evaluate
from precision_lab.rewrite.marks import observing
from precision_lab.rewrite.operations import is_castable
from precision_lab.rewrite.parameters import Parameter, Uses, abstract, is_qtensor, leaf_names
from precision_lab.rewrite.plan import Planner
from precision_lab.rewrite.scaled import Amaxes, scaled_roles
from precision_lab.rewrite.shadows import with_shadows
from precision_lab.rewrite.sites import Site, SiteTable
from precision_lab.rewrite.steps import Plan

UNDER = "precision_policy"  # attribute of what is under a policy: that policy


class Traced(NamedTuple):
    """A function traced at its arguments.

    Attributes:
      jaxpr: closed jaxpr over the arrays among the arguments.
      arrays: those arrays.
      origins: provenance of each: the path of a parameter, else None.
      rebuild: puts output arrays back into the function's output.
    """

    jaxpr: Any
    arrays: list[Any]
    origins: list[str | None]
    rebuild: Callable[[Sequence[Any]], Any]


def apply_to_function(fn: Callable, policy: Policy, numbers: Mapping[str, Any] | None = None) -> Callable:
    """Returns `fn(params, *args, **kwargs)` under `policy`, with the same signature.

    Products run in the policy's formats, in the forward and the backward pass; floating outputs are cast to its
    output dtype. Parameters are used in the dtype in which they come (`policy.cast_to_param(params)` stores them in
    the policy's); each is cast where it is used, never at entry.

    Args:
      fn: function whose first argument is a pytree of parameters. Arguments that are not arrays stay Python values.
      policy: what to apply.
      numbers: by setting, numbers of its quantizers or of its compute format that may be traced.

    Raises (when called):
      ValueError: a rule matches no site.
    """

    @functools.wraps(fn)
    def wrapped(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        return policy.cast_to_output(call(fn, policy, params, args, kwargs, numbers=numbers))

    setattr(wrapped, UNDER, policy)
    return wrapped


def call(
    fn: Callable,
    policy: Policy,
    params: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    root: str = "",
    types: Mapping[str, str] | None = None,
    every_rule: bool = True,
    amaxes: Mapping[str, Mapping[str, Any]] | None = None,
    margin: int = 0,
    given: Mapping[str, Mapping[str, Any]] | None = None,
    uses: Uses | None = None,
    adapters: Mapping[str, Adapter] | None = None,
    numbers: Mapping[str, Any] | None = None,
) -> Any:
    """Returns `fn(params, *args, **kwargs)` with its products under `policy`; its outputs keep their dtypes.

    Args:
      fn, policy, params, args, kwargs: as in `apply_to_function`.
      root: name scope to leave out of site paths.
      types: type names of modules by path; read after tracing, so that `fn` may fill it.
      every_rule: whether each rule has to match; false for a part of a model.
      amaxes: magnitudes, by site and role, to make scales of in place of those of the tensors themselves; see
        `scaled_sites`.
      margin: bits of headroom of such scales.
      given: by site and role ("lhs", "rhs"), a `Given` of scales, zero points and offsets that a quantizer takes as
        they are, or a `Held` state. In a scan over layers, arrays have a leading axis for the layers.
      uses: where to note how each parameter is used; for a call that is only traced.
      adapters: by the path of a parameter, what is added to it in its products, in low rank.
      numbers: by setting, numbers of its quantizers (`QuantizerParams`) or of "compute" (`FormatParams`) that may be
        traced; these products are simulated.

    Raises:
      ValueError: a rule matches no site, or the policy needs 64-bit mode.

    Parameters may be QTensors: products take their codes, and everything else their values.
    """
    require_x64(policy)
    traced = trace(fn, params, args, kwargs)
    scaled = {site: Amaxes(roles, margin) for site, roles in (amaxes or {}).items()}
    options: dict[str, Any] = {"amaxes": scaled, "given": Known(given or {}, numbers or {}), "adapters": adapters}
    options["every_product"] = uses is not None
    plan, table = planned(traced, policy, root, types, every_rule=every_rule, **options)
    if uses is not None:
        uses.weights |= {site.path for site in table if "weight" in site.quantized_by and _quantizes_weight(site)}
    arrays = [
        Parameter.of(x, origin, uses) if origin and (is_qtensor(x) or (uses and is_castable(x))) else x
        for x, origin in zip(traced.arrays, traced.origins, strict=True)
    ]
    return traced.rebuild(evaluate(plan, traced.jaxpr, traced.jaxpr.consts, arrays))


def _quantizes_weight(site: Site) -> bool:
    """Returns whether a weight is quantized at a site."""
    return site.treatment is not None and site.treatment.weight is not None


def sites_of_function(
    fn: Callable,
    policy: Policy,
    params: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    root: str = "",
    types: Mapping[str, str] | None = None,
    everything: bool = False,
) -> SiteTable:
    """Returns the sites of `fn(params, *args, **kwargs)` under `policy`; nothing is executed.

    Arguments may be arrays or `jax.ShapeDtypeStruct`s. Products are listed, and what a rule names; with `everything`
    every operation on floating arrays.
    """
    return planned(trace(fn, params, args, kwargs), policy, root, types, everything=everything)[1]


def scaled_sites(fn: Callable, policy: Policy, params: Any, args: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    """Returns the sites of `fn(params, *args)` that `call` can be given magnitudes for, and for which tensors there."""
    table = sites_of_function(fn, policy, params, args, {})
    roles = {site.name: scaled_roles(site.treatment, site.has_parameter) for site in table if site.treatment}
    return {name: found for name, found in roles.items() if found}


def planned(
    traced: Traced,
    policy: Policy,
    root: str,
    types: Mapping[str, str] | None = None,
    *,
    every_rule: bool = True,
    everything: bool = False,
    amaxes: Mapping[str, Amaxes] | None = None,
    given: Known | None = None,
    adapters: Mapping[str, Adapter] | None = None,
    every_product: bool = False,
) -> tuple[Plan, SiteTable]:
    """Returns the plan and the sites of a traced function.

    Raises:
      ValueError: a rule of the policy matches no site.
    """
    options: dict[str, Any] = {"observing": observing.value is not None, "amaxes": amaxes, "given": given}
    options |= {"adapters": adapters, "every_product": every_product}
    options["may_capture_data"] = not types or not every_rule  # a method of a model may be a closure over data
    planner = Planner(policy, root, types, everything=everything, **options)
    plan, _ = planner.walk(traced.jaxpr, traced.origins)
    if every_rule:
        planner.require_every_rule_used()
    if observing.value:
        planners = [Planner(other, root, types, observing=True) for other in observing.value]
        plan = with_shadows(plan, [each.walk(traced.jaxpr, traced.origins)[0] for each in planners])
    if planner.of_one_sign:
        warnings.warn(
            f"policy '{policy}' takes the signs of what is never negative, such as a ReLU's output, at "
            f"{len(planner.of_one_sign)} products, such as '{planner.of_one_sign[0]}': every activation there is +1, "
            "whatever the data. Put a norm between, or leave them out: activation=none.",
            stacklevel=3,
        )
    table = planner.table()
    products = [site for site in table if site.is_product]
    if products and all(site.reason for site in products):
        reasons = ", ".join(sorted({site.reason for site in products}))
        warnings.warn(f"policy '{policy}' reaches none of the {len(products)} products: {reasons}.", stacklevel=3)
    return plan, table


def trace(fn: Callable, params: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Traced:
    """Traces `fn(params, *args, **kwargs)` over the arrays among its arguments.

    A QTensor in `params` looks like the array that it stands for; the function gets those elsewhere as they are.
    """
    own, own_tree = jax.tree.flatten(params, is_leaf=is_qtensor)
    others, other_tree = jax.tree.flatten((args, kwargs))  # QTensors there are trees of arrays like any other
    leaves = own + others
    names = leaf_names(params)
    given = [_is_array(leaf) for leaf in leaves]
    origins = [*names, *[None] * len(others)]
    static: list[Any] = []

    def over_arrays(*arrays: Any) -> list[Any]:
        values = iter(arrays)
        full = [next(values) if is_array else leaf for is_array, leaf in zip(given, leaves, strict=True)]
        inner_args, inner_kwargs = jax.tree.unflatten(other_tree, full[len(own) :])
        out, out_tree = jax.tree.flatten(
            fn(jax.tree.unflatten(own_tree, full[: len(own)]), *inner_args, **inner_kwargs)
        )
        static[:] = [out_tree, [None if _is_array(leaf) else leaf for leaf in out], [_is_array(leaf) for leaf in out]]
        return [leaf for leaf in out if _is_array(leaf)]

    arrays = [leaf for is_array, leaf in zip(given, leaves, strict=True) if is_array]
    jaxpr = jax.make_jaxpr(over_arrays)(*map(abstract, arrays))
    out_tree, out_leaves, out_given = static

    def rebuild(out: Sequence[Any]) -> Any:
        values = iter(out)
        full = [next(values) if is_array else leaf for is_array, leaf in zip(out_given, out_leaves, strict=True)]
        return jax.tree.unflatten(out_tree, full)

    return Traced(jaxpr, arrays, [o for is_array, o in zip(given, origins, strict=True) if is_array], rebuild)


def trace_program(fn: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Traced:
    """Traces `fn(*args, **kwargs)`, inside which parameters get to `call`, QTensors as they are stored."""
    return trace(lambda _, *given, **named: fn(*given, **named), (), args, kwargs)


def _is_array(leaf: Any) -> bool:
    """Returns whether a leaf is traced; Python scalars, strings and the like stay what they are."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, QTensor))


def require_x64(policy: Policy) -> None:
    """Raises if the policy needs float64 arrays that JAX would silently make float32."""
    inside = [(key, fmt) for rule in policy.rules for key, fmt in rule.settings]
    inside += [(key, getattr(policy, key)) for key in ("dgrad", "wgrad", "round")]
    wanted = [key for key, fmt in inside if getattr(fmt, "name", "") == "float64"]
    wanted += [key for key in ("params", "compute", "output") if getattr(policy, key).name == "float64"]
    if wanted and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(f"{wanted[0]}=float64 needs 64-bit mode: jax.config.update('jax_enable_x64', True).")
