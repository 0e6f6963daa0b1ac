"""Calibration: runs data through a model to find the ranges, and with them the static scales, of its activations."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from precision_lab.nn.carried import Scales, given_scales, refuse_carried
from precision_lab.nn.pure import PureCall, apart, pure_call, signature
from precision_lab.policy import Policy
from precision_lab.policy.deriving import for_inference, with_static_scales, without_quantizers
from precision_lab.quant import Observer, ObserverState, observer
from precision_lab.rewrite import Collector, Mark, Site, call, harvest, observing, sites_of_function, trace
from precision_lab.rewrite.printing import table_text

Observers = dict[tuple[str, str], Observer]
_ROLES = ("lhs", "rhs")


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A model with static scales for its activations.

    Attributes:
      target: the model or function, as it was given.
      policy: the policy for inference, its activations quantized with one scale for each tensor.
      params: a Linen model's variables or a function's params; None for an NNX model, which has its own.
      ranges: (low, high), float32 scalars, by site and operand, as the quantizer's calibration found them.
      scales: what follows from them: `scale`, and `zero_point` under an affine scheme, likewise.
      call: shapes of the first batch's arguments, (args, kwargs); they tell `convert` where parameters are used.
    """

    target: Any
    policy: Policy
    params: Any
    ranges: dict[tuple[str, str], tuple[Any, Any]]
    scales: Scales
    call: tuple[tuple[Any, ...], dict[str, Any]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the model returns under the policy and its static scales, from unconverted parameters."""
        pure = pure_call(self.target, *arguments(self.target, self.params, args, kwargs))
        options = {"root": pure.root, "types": pure.types, "given": given_scales(self.scales)}
        out = call(pure.fn, self.policy, pure.params, pure.args, pure.kwargs, **options)
        return self.policy.cast_to_output(out)

    def __str__(self) -> str:
        from rich.table import Table

        table = Table("site", "operand", "low", "high", "scale", "zero point", title=f"policy {self.policy}")
        for (site, role), (low, high) in self.ranges.items():
            row = self.scales[site][role]
            numbers = [f"{float(x):.4g}" for x in (low, high, row["scale"])]
            zero = f"{float(row['zero_point']):.0f}" if "zero_point" in row else ""
            table.add_row(site, role, *numbers, zero)
        return table_text(table, width=140)


def calibrate(
    target: Any,
    policy: Any,
    batches: Iterable[Any],
    params: Any = None,
    *,
    momentum: float = 0.1,
    on_nonfinite: str = "warn",
) -> Calibrated:
    """Returns `target` with static scales for the activations that `policy` quantizes.

    The model runs in its floating formats over every batch; at each site the range of each operand that is no
    parameter is observed by the calibration of its quantizer ("int8@tensor,mse"): the extent, a running average
    ("ema") or a histogram ("percentile99.9", "mse", "kl"). Scales are one for each tensor: a quantizer "@token" becomes
    "@tensor". Block formats keep finding their scales in every call.

    Args:
      target: an `nnx.Module`, a `linen.Module`, or a function `fn(params, *args)`.
      policy: a Policy or what parses to one.
      batches: what the model is called with: for each batch its argument, a tuple of arguments, or a dict of keyword
        arguments; no labels.
      params: a Linen model's variables, or a function's params.
      momentum: of "ema".
      on_nonfinite: "warn", or "raise" for an error where activations have NaNs or infinities.

    Raises:
      TypeError: `params` is missing or not for this target.
      ValueError: the policy quantizes no activation, there are no batches, activations have scales by group, or a
        model that is converted, trained by prepare_qat or has adapters, which calibration would pass over; under
        "raise" NaNs and infinities.

    Warns: of NaNs and infinities in activations, which are left out of the ranges.

    Source: Krishnamoorthi, "Quantizing deep convolutional networks", 2018, arXiv:1806.08342, section 3.1.
    """
    refuse_carried(target, params, "calibrate")
    if on_nonfinite not in ("warn", "raise"):
        raise ValueError(f"on_nonfinite={on_nonfinite!r} must be 'warn' or 'raise'.")
    policy = with_static_scales(for_inference(Policy.parse(policy)))
    states: dict[tuple[str, str], ObserverState] = {}
    observers: Observers = {}
    first, compiled = None, {}
    for batch in batches:
        args, kwargs = as_call(batch)
        pure = pure_call(target, *arguments(target, params, args, kwargs))
        if first is None:
            first = jax.tree.map(shape_of_leaf, (args, kwargs))
            observers = _observers(pure, policy, momentum)
        for key, state in _run(pure, policy, observers, compiled).items():
            states[key] = observers[key].followed(states[key], state) if key in states else state
    if first is None:
        raise ValueError("calibrate got no batches; give at least one, such as [x] or a list of tuples of arguments.")
    states = _reached(states)
    _tell_of_nonfinite(states, on_nonfinite)
    scales: Scales = {}
    for (site, role), state in states.items():
        scale, zero_point = observers[site, role].scale(state)
        found = {"scale": scale} if zero_point is None else {"scale": scale, "zero_point": zero_point}
        scales.setdefault(site, {})[role] = {key: jnp.reshape(value, ()) for key, value in found.items()}
    ranges = {}
    for key, state in states.items():
        low, high = observers[key].range(state)
        ranges[key] = jnp.reshape(low, ()), jnp.reshape(high, ())
    return Calibrated(target, policy, params, ranges, scales, first)


def arguments(target: Any, params: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Returns (args, kwargs) of a call, with the params of a target that has none of its own.

    Raises:
      TypeError: they are missing, or given for an NNX model; or a target that is calibrated already.
    """
    if isinstance(target, Calibrated):
        raise TypeError("this model is calibrated already; give the model itself, which is its `target`.")
    if isinstance(target, nnx.Module):
        if params is not None:
            raise TypeError(f"{type(target).__name__} is an NNX model and has its own parameters; leave out params.")
        return tuple(args), kwargs
    if params is None:
        what = "the variables of a Linen model" if isinstance(target, linen.Module) else "the params of a function"
        raise TypeError(f"params= is missing: {what}.")
    return (params, *args), kwargs


def as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns (args, kwargs) of a batch."""
    if isinstance(batch, dict):
        return (), batch
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def shape_of_leaf(leaf: Any) -> Any:
    """Returns the shape of an array, and anything else as it is."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else leaf


def _observers(pure: PureCall, policy: Policy, momentum: float) -> Observers:
    """Returns an observer for each operand whose scale can be static.

    Raises:
      ValueError: there is none.
    """
    table = sites_of_function(pure.fn, policy, pure.params, pure.args, pure.kwargs, root=pure.root, types=pure.types)
    found = {(site.name, role): qz for site in table for role, qz in _static(site)}
    if not found:
        raise ValueError(
            f"policy '{policy}' quantizes no activation with a scale that could be static, so there is nothing to "
            "calibrate: pl.convert(model, policy, example) stores the weights."
        )
    return {key: observer(qz, momentum=momentum) for key, qz in found.items()}


def _static(site: Site) -> list[tuple[str, Any]]:
    """Returns the operands of a site that take a static scale, and their quantizers."""
    if site.treatment is None or not site.is_product:
        return []
    by = [(role, key, getattr(site.treatment, key)) for role, key in zip(_ROLES, site.quantized_by, strict=True)]
    return [(role, qz) for role, key, qz in by if key != "weight" and qz is not None and qz.is_scaled]


@partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["observer"])
@dataclasses.dataclass(frozen=True)
class _Seen:
    """What an observer has seen in one batch."""

    state: ObserverState
    observer: Observer

    def merged(self, other: _Seen) -> _Seen:
        return _Seen(self.observer.merge(self.state, other.state), self.observer)

    def emptied(self) -> _Seen:
        return _Seen(self.observer.init(self.state.low.shape), self.observer)


def _run(pure: PureCall, policy: Policy, observers: Observers, compiled: dict[Any, Any]) -> Any:
    """Returns what observers see in one call in floating formats; `compiled` keeps the programs."""
    given = (pure.params, pure.args, pure.kwargs)
    arrays, together = apart(given)
    if (key := (pure.called, signature(given))) not in compiled:
        plain = without_quantizers(policy)
        compiled[key] = jax.jit(lambda arrays: _observed(pure, plain, observers, *together(arrays)))
    return compiled[key](arrays)


def _observed(
    pure: PureCall, policy: Policy, observers: Observers, params: Any, args: Any, kwargs: Any
) -> dict[tuple[str, str], ObserverState]:
    """Returns what observers see in one call."""

    def wants(mark: Mark) -> bool:
        return (mark.site, mark.role) in observers

    def measure(pairs: Sequence[tuple[Mark, jax.Array]]) -> list[_Seen]:
        each = [(observers[mark.site, mark.role], x) for mark, x in pairs]
        return [_Seen(one.update(one.init(x.shape), x), one) for one, x in each]

    def fn(params: Any) -> Any:
        return call(pure.fn, policy, params, args, kwargs, root=pure.root, types=pure.types)

    with observing(()):
        traced = trace(fn, params, (), {})
    _, found = harvest(traced.jaxpr, traced.arrays, Collector(wants, measure, _Seen.merged, _Seen.emptied))
    return {(mark.site, mark.role): seen.state for mark, seen in found.items()}


def _reached(states: dict[tuple[str, str], ObserverState]) -> dict[tuple[str, str], ObserverState]:
    """Returns the states that have seen something; warns of the others, whose scales stay dynamic."""
    missed = [site for (site, _), state in states.items() if not int(state.updates)]
    if missed:
        warnings.warn(
            f"no batch reached {len(missed)} of {len(states)} operands, such as that of '{missed[0]}': their scales "
            "are found anew in every call.",
            stacklevel=3,
        )
    return {key: state for key, state in states.items() if int(state.updates)}


def _tell_of_nonfinite(states: Mapping[tuple[str, str], ObserverState], on_nonfinite: str) -> None:
    """Warns of sites where NaNs or infinities were seen, or raises."""
    counts = {key: int(state.nonfinite) for key, state in states.items() if int(state.nonfinite)}
    if not counts:
        return
    (site, role), count = next(iter(counts.items()))
    where = f"NaNs and infinities at {len(counts)} operands: '{site}' {role} had {count} of them."
    if on_nonfinite == "raise":
        raise ValueError(f"calibrate saw {where}")
    warnings.warn(f"calibrate left out {where}", stacklevel=3)
