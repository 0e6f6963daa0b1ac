"""Conversion: a model whose parameters are stored quantized and whose products take their codes.

Which parameters can be stored follows from a trace: those that nothing but quantized products and lookups use, along
the same axes each time. The model's code and the paths of its parameters stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from precision_lab.nn.calibration import Calibrated, arguments
from precision_lab.nn.carried import CONVERTED, SCALES, Scales, given_scales
from precision_lab.nn.linen_policy import linen_under_policy
from precision_lab.nn.linen_qat import stored_params
from precision_lab.nn.nnx_policy import nnx_with_stored
from precision_lab.nn.pure import apart, pure_call
from precision_lab.nn.qat_conversion import as_stored, as_trained
from precision_lab.policy import Policy
from precision_lab.policy.deriving import for_inference
from precision_lab.ptq import round_to_nearest
from precision_lab.quant import QTensor, quantize
from precision_lab.rewrite import UNDER, Use, Uses, call, is_qtensor, leaf_names

Method = Callable[[jax.Array, Any, tuple[int, ...]], tuple[QTensor, Any]]


class How(NamedTuple):
    """How a parameter is stored: its use, or why it cannot be; and the scale and offset it is given at a site."""

    use: Use | None
    why_not: str = ""
    scale: Mapping[str, jax.Array] = {}
    at: tuple[str, str] | None = None


def convert(
    target: Any, policy: Any = None, *args: Any, params: Any = None, method: Method = round_to_nearest, **kwargs: Any
) -> Any:
    """Returns `target` for inference: weights stored quantized, products of their codes where the hardware has them.

    Weight-only, dynamic and static quantization are three policies of this one path: "w4a16" quantizes weights alone,
    "w8a8" activations too, by scales found in each call, and `pl.calibrate(model, "w8a8", batches)` by static ones.
    What it returns computes what the policy promised: bit for bit the weights, to accumulation order the products.

    Args:
      target: a Calibrated, an `nnx.Module`, a `linen.Module`, or a function `fn(params, *args)`. A model of
        `prepare_qat` keeps the scales that it has learned, and its ranges: `pl.convert(model, None, x)`.
      policy: a Policy or what parses to one; not with a Calibrated or a trained model, which have their own.
      args, kwargs: an example of what the model is called with, arrays or `jax.ShapeDtypeStruct`s; not with a
        Calibrated. Nothing is executed on it.
      params: a Linen model's variables, or a function's params.
      method: what makes a QTensor of a weight: `(weight, quantizer, contracted axes) -> (QTensor, Info)`.

    Returns:
      For an NNX model a copy of it under the policy, with QTensors in its `Param`s; for a Linen model (module,
      variables); for a function (function, params). Call them as before.

    Raises:
      TypeError: arguments are missing or not for this target.
      ValueError: the policy quantizes nothing; a trained model with another policy, or before it has ranges.

    Warns: of parameters that the policy quantizes but that have to stay as they are: used in several ways, or computed
      with before they are multiplied. These are quantized in every call.
    """
    trained = as_trained(target, policy, params, args, kwargs)
    calibrated = _calibrated(target, policy, params, args, kwargs) if trained is None else trained
    target, policy = calibrated.target, calibrated.policy
    own, uses = uses_of(target, policy, calibrated.params, *calibrated.call, scales=calibrated.scales)
    ways = ways_of(own, uses, calibrated.scales)
    stored = _stored(own, ways, method)
    calibrated = dataclasses.replace(calibrated, scales=_of_the_rest(calibrated.scales, ways))
    if not stored and not calibrated.scales:
        why = "".join(f" '{path}' cannot be stored: {how.why_not}." for path, how in ways.items())
        raise ValueError(f"policy '{policy}' quantizes no parameter of this model that can be stored.{why}")
    for path, how in ways.items():
        if how.why_not:
            warnings.warn(f"'{path}' is quantized in every call, not stored: {how.why_not}.", stacklevel=2)
    return _assembled(target, policy, calibrated, stored)


def uses_of(
    target: Any, policy: Policy, params: Any, args: Any, kwargs: Any, scales: Mapping[str, Any] | None = None
) -> tuple[Any, Uses]:
    """Returns the params of a call, and how each of them is used under a policy; nothing is executed.

    Some quantizers have `scales` already, by site and operand; by default what a converted model carries.
    """
    if scales is None:
        carried = getattr(target, SCALES, None)
        scales = params.get(SCALES) if isinstance(params, Mapping) else carried and carried.get_raw_value()
    uses, found, given = Uses(), [], given_scales(scales or {})

    def run(arrays: list[Any]) -> Any:
        args, kwargs = together(arrays)  # under a trace, where NNX takes structs for the arrays that they stand for
        pure = pure_call(target, *arguments(target, params, args, kwargs))
        found.append(pure.params)
        options = {"root": pure.root, "types": pure.types, "given": given, "uses": uses}
        return call(pure.fn, policy, pure.params, pure.args, pure.kwargs, **options)

    arrays, together = apart((args, kwargs))
    jax.eval_shape(run, arrays)
    return found[0], uses


def ways_of(params: Any, uses: Uses, scales: Scales) -> dict[str, How]:
    """Returns how each parameter that the policy quantizes somewhere can be stored."""
    shapes = {path: np.shape(leaf) for path, leaf in named(params).items() if not is_qtensor(leaf)}
    quantized = {path: found for path, found in uses.by_path.items() if any(use.quantizer for use in found)}
    ways = {path: _how(found, shapes[path]) for path, found in quantized.items() if path in shapes}
    found = {path: _with_scale(how, uses.places.get(path, {}), scales, shapes[path]) for path, how in ways.items()}
    changed = How(None, "it is computed with before it is multiplied")
    return found | dict.fromkeys(sorted(uses.weights & shapes.keys() - found.keys()), changed)


def _with_scale(
    how: How, places: Mapping[tuple[str, str], np.ndarray], scales: Mapping[str, Any], shape: tuple[int, ...]
) -> How:
    """Returns how a parameter is stored, with the scale that it is given at its site."""
    own = {at: numbers for at in places if (numbers := scales.get(at[0], {}).get(at[1]))}
    if how.use is None or not own:
        return how
    if len(places) > 1:
        return How(None, "it has a scale of its own at each of its sites")
    [(at, numbers)] = own.items()
    brought = {name: as_stored(array, places[at], how.use, shape) for name, array in numbers.items()}
    found = {name: array for name, array in brought.items() if array is not None}
    if len(found) < len(brought):
        return How(None, "its scales in the product are none of the parameter as it is stored")
    return How(how.use, scale=found, at=at)


def _of_the_rest(scales: Scales, ways: Mapping[str, How]) -> Scales:
    """Returns scales without those of parameters that are stored with them."""
    stored = {how.at for how in ways.values()}
    left = {
        site: {role: s for role, s in roles.items() if (site, role) not in stored} for site, roles in scales.items()
    }
    return {site: roles for site, roles in left.items() if roles}


def _how(uses: list[Use], shape: tuple[int, ...]) -> How:
    """Returns how a parameter with these uses can be stored."""
    ways = {use._replace(site="", order=(), is_matrix=False) for use in uses}
    if len(ways) > 1:
        quantizers = dict.fromkeys(
            "as it is" if use.quantizer is None else f"{use.quantizer}, axes {use.axes}" for use in uses
        )
        return How(None, f"it is used in more than one way ({'; '.join(quantizers)})")
    use = uses[0]
    one, run = shape[use.stack :], _run_length(use.quantizer)
    if isinstance(run, tuple):
        fits = len(one) == 2 and use.axes == (0,)
        return How(use) if fits else How(None, f"tiles of {run} are of the matrix (in, out), and it is stored as {one}")
    if run and len(use.axes) > 1 and one[use.axes[-1]] % run:
        return How(None, f"runs of {run} cross axis {use.axes[-1]} of {one}")
    return How(use)


def _run_length(quantizer: Any) -> Any:
    """Returns how many neighbours share a scale along the last contracted axis; a tuple for tiles; 0 for all."""
    if quantizer.format.kind == "block":
        block = quantizer.format.block
        return tuple(block) if len(block) > 1 else block[0]
    sizes = quantizer.granularity.sizes
    return tuple(sizes) if len(sizes) > 1 else math.prod(sizes) if sizes else 0


def _stored(params: Any, ways: Mapping[str, How], method: Method) -> dict[str, QTensor]:
    """Returns the parameters that can be stored, quantized, by path."""
    leaves = named(params)
    return {path: stored_for(leaves[path], how.use, how.scale, method) for path, how in ways.items() if how.use}


def stored_for(weight: Any, use: Use, scale: Mapping[str, jax.Array], method: Method) -> QTensor:
    """Returns a weight stored as it is used; a stacked one slice by slice."""
    if scale and method is not round_to_nearest:
        raise ValueError(f"a learned scale is what weights are rounded by, so {method} cannot be; leave out method=.")

    def quantized(one: jax.Array, scale: Mapping[str, jax.Array]) -> QTensor:
        one = one.astype(use.dtype).astype(jnp.float32)
        if scale:
            return quantize(one, use.quantizer, axis=use.axes, **scale)  # pyright: ignore[reportArgumentType]
        return method(one, use.quantizer, use.axes)[0]

    for _ in range(use.stack):
        quantized = jax.vmap(quantized)
    return dataclasses.replace(jax.jit(quantized)(jnp.asarray(weight), scale), dtype=np.dtype(weight.dtype))


def _calibrated(target: Any, policy: Any, params: Any, args: Any, kwargs: Any) -> Calibrated:
    """Returns what is to be converted, without scales if it was not calibrated."""
    if isinstance(target, Calibrated):
        if policy is not None or args or kwargs or params is not None:
            raise TypeError(
                "a calibrated model has its policy, params and example already: say pl.convert(calibrated)."
            )
        return target
    if policy is None or not (args or kwargs):
        raise TypeError(
            "convert needs a policy and an example of what the model is called with, pl.convert(model, 'w4a16', x), or "
            "what pl.calibrate returned."
        )
    return Calibrated(target, for_inference(Policy.parse(policy)), params, {}, {}, (args, kwargs))


def _assembled(target: Any, policy: Policy, calibrated: Calibrated, stored: dict[str, QTensor]) -> Any:
    """Returns the model with its parameters replaced."""
    scales: Scales = calibrated.scales
    if isinstance(target, nnx.Module):
        return nnx_with_stored(target, policy, stored, scales)
    if isinstance(target, linen.Module):
        variables = dict(calibrated.params)
        packed = {**variables, "params": replaced(stored_params(policy, variables["params"], variables), stored)}
        return linen_under_policy(target, policy), packed | ({SCALES: scales} if scales else {})
    given = given_scales(scales)

    def converted(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        return policy.cast_to_output(call(target, policy, params, args, kwargs, given=given))

    setattr(converted, CONVERTED, True)
    setattr(converted, UNDER, policy)
    return converted, replaced(calibrated.params, stored)


def replaced(params: Any, stored: Mapping[str, Any]) -> Any:
    """Returns a tree with some of its leaves replaced."""
    leaves, structure = jax.tree.flatten(params, is_leaf=is_qtensor)
    return structure.unflatten([stored.get(name, leaf) for name, leaf in zip(leaf_names(params), leaves, strict=True)])


def named(params: Any) -> dict[str, Any]:
    """Returns the leaves of params by path, QTensors as leaves."""
    return dict(zip(leaf_names(params), jax.tree.leaves(params, is_leaf=is_qtensor), strict=True))
