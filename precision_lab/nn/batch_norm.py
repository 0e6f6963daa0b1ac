"""Batch norms folded into the layers before them: the kernels that a deployed model has, and so the ones to quantize.

What a batch norm of fixed statistics does to each output feature is a factor and a shift. The factor goes into the
kernel, the shift into the bias; the batch norm stays where it was and does nothing, so that the model's structure and
paths stay too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, nnx

from precision_lab.nn.watching import Pair, evaluated, pairs_of
from precision_lab.quant.arithmetic import divide, multiply

_QUIET = 0.01
_PARTS = ("kernel", "bias"), ("scale", "bias", "mean", "var")


def fold_batch_norm(
    kernel: Any, bias: Any, scale: Any, offset: Any, mean: Any, var: Any, *, epsilon: float = 1e-5
) -> tuple[jax.Array, jax.Array]:
    """Returns the kernel and bias of the layer that does what a layer and the batch norm after it did.

    Args:
      kernel: of a convolution or linear layer, (..., out).
      bias: the layer's, (out,), or None.
      scale, offset: of the batch norm (gamma and beta), (out,), or None.
      mean, var: its running statistics, (out,).
      epsilon: what it adds to the variance.

    Returns:
      (kernel, bias): kernel * scale / sqrt(var + epsilon), in the kernel's dtype, and (bias - mean) * scale /
      sqrt(var + epsilon) + offset, float32 (out,); computed in float32, with the same bits in every program.

    Raises:
      ValueError: statistics that are not of the kernel's last axis.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
      Inference", 2018, arXiv:1712.05877, section 3.2, equation 14.
    """
    features = np.shape(kernel)[-1:]
    for name, value in {"bias": bias, "scale": scale, "offset": offset, "mean": mean, "var": var}.items():
        if value is not None and np.shape(value) != features:
            raise ValueError(
                f"a kernel {np.shape(kernel)} has {features} output features on its last axis, but {name} is "
                f"{np.shape(value)}."
            )
    factor = _factor(scale, var, epsilon)
    apart = (0 if bias is None else jnp.float32(bias)) - jnp.float32(mean)
    shift = multiply(apart, factor) + (np.float32(0) if offset is None else jnp.float32(offset))
    return multiply(jnp.float32(kernel), factor).astype(kernel.dtype), shift


def _factor(scale: Any, var: Any, epsilon: float) -> jax.Array:
    """Returns scale / sqrt(var + epsilon), float32."""
    return divide(jnp.float32(1 if scale is None else scale), jnp.sqrt(jnp.float32(var) + np.float32(epsilon)))


def batch_norm_pairs(model: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Returns the batch norms that can be folded: the path of each layer, and that of the batch norm after it.

    The model is called once, and watched: a pair is a batch norm over the last axis that gets the very array which a
    linear layer or convolution returned. It is kept only if the model computes the same with it folded, for random
    statistics, and random numbers in the place of parameters so small that they hide what comes before them: a layer
    whose output goes somewhere else too is none of a pair.

    Args:
      model: an `nnx.Module`, called as in evaluation; or a `linen.Module`, called as its `apply`.
      args, kwargs: what it is called with; for Linen its variables first, and whatever says evaluation.

    Raises:
      TypeError: `model` is neither.
    """
    return {name: pair.norm for name, pair in _exact_pairs(model, args, kwargs).items()}


def shifts_of_folded(model: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Returns the path of the parameter that is the bias of each folded layer that has none itself, by its path.

    That is the bias of a batch norm which does nothing else to what the layer returns. Arguments and errors are those
    of `batch_norm_pairs`.
    """
    found: list[bool] = []

    def look(layer: dict[str, Any], norm: dict[str, Any], epsilon: float) -> tuple[dict[str, Any], dict[str, Any]]:
        idle = "bias" in norm and np.all(norm["mean"] == 0) and np.all(norm.get("scale", 1) == np.float32(1))
        alone = "bias" not in layer and idle and np.all(norm["var"] == _unit_variance(epsilon))
        found.append(bool(alone))
        return layer, norm

    pairs = pairs_of(model, args, kwargs)
    _with(model, args, pairs, look)
    return {name: f"{pair.norm}/bias" for (name, pair), alone in zip(pairs.items(), found, strict=True) if alone}


def fold_batch_norms(model: Any, *args: Any, pairs: Mapping[str, str] | None = None, **kwargs: Any) -> Any:
    """Returns the model for evaluation with the factors of its batch norms in the kernels before them.

    Structure and paths are those of `model`. The shift is the layer's bias if it has one, else that of the batch norm,
    and where that has none either, minus its mean; its other numbers become those of an identity. Training would give
    it statistics again.

    Args:
      model: an `nnx.Module`, of which a copy is folded; or a `linen.Module`.
      args, kwargs: what it is called with, as for `batch_norm_pairs`.
      pairs: path of each layer, and of the batch norm after it; by default all that `batch_norm_pairs` finds.

    Returns:
      The folded copy of an NNX model in evaluation mode; the folded variables of a Linen one.

    Raises:
      ValueError: no pairs, or one that is asked for and is none.
      TypeError: `model` is neither of NNX nor of Linen, or the variables of a Linen one are missing.
    """
    found = _exact_pairs(model, args, kwargs)
    names = {name: pair.norm for name, pair in found.items()}
    wanted = names if pairs is None else dict(pairs)
    for layer, norm in wanted.items():
        if names.get(layer) != norm:
            raise ValueError(
                f"batch norm '{norm}' cannot be folded into '{layer}': it must get the array that the layer returns, "
                f"which nothing else uses, and normalize its last axis. Pairs found: {names or 'none'}."
            )
    if not wanted:
        raise ValueError(
            "no batch norm can be folded: none gets what a linear layer or convolution returned, as it is, over its "
            "last axis. Fold before apply_policy, and by fold_batch_norm what is left."
        )
    return _with(model, args, {name: found[name] for name in wanted}, _folded)


def _folded(layer: dict[str, Any], norm: dict[str, Any], epsilon: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays of a layer and of the batch norm after it, with the factor in the kernel."""
    options = (norm.get("scale"), norm.get("bias"), norm["mean"], norm["var"])
    kernel, shift = fold_batch_norm(layer["kernel"], layer.get("bias"), *options, epsilon=epsilon)
    idle = {name: jnp.zeros_like(array) for name, array in norm.items()}
    idle["var"] = jnp.full_like(norm["var"], _unit_variance(epsilon))
    if "scale" in norm:
        idle["scale"] = jnp.ones_like(norm["scale"])
    if "bias" in layer:
        return {"kernel": kernel, "bias": shift.astype(layer["bias"].dtype)}, idle
    return {"kernel": kernel}, {**idle, **({"mean": -shift} if "bias" not in norm else {"bias": shift})}


def _unit_variance(epsilon: float) -> np.float32:
    """Returns the variance that is 1 with epsilon added."""
    near = np.float32(1) - np.float32(epsilon)
    for candidate in (near, np.nextafter(near, np.float32(2)), np.nextafter(near, np.float32(0))):
        if candidate + np.float32(epsilon) == 1:
            return candidate
    raise ValueError(f"no float32 variance becomes 1 with epsilon={epsilon} added; fold by fold_batch_norm.")


def _exact_pairs(model: Any, args: Any, kwargs: Any) -> dict[str, Pair]:
    """Returns the pairs that can be folded; tried together first, as most models have no others."""
    found = pairs_of(model, args, kwargs)
    if not found:
        return {}
    loud, given = _louder(model, args)
    if _is_exact(loud, given, kwargs, found):
        return found
    return {name: pair for name, pair in found.items() if _is_exact(loud, given, kwargs, {name: pair})}


def _louder(model: Any, args: Any) -> tuple[Any, Any]:
    """Returns a model and its arguments with random numbers in the place of parameters that are almost zero.

    A head or a gain that starts at zero would hide from the output what a batch norm before it does.
    """
    rng = np.random.default_rng(1)

    def louder(array: Any) -> Any:
        dtype, shape = jnp.result_type(array), jnp.shape(array)
        if not jnp.issubdtype(dtype, jnp.floating) or np.max(np.abs(array), initial=0) > _QUIET:
            return array
        return jnp.asarray(rng.choice([-1, 1], shape) * rng.uniform(0.5, 1, shape), dtype)

    if isinstance(model, nnx.Module):
        copy = nnx.clone(model)
        nnx.update(copy, jax.tree.map(louder, nnx.state(copy, nnx.Param)))
        return copy, args
    return model, ({**args[0], "params": jax.tree.map(louder, args[0]["params"])}, *args[1:])


def _is_exact(model: Any, args: Any, kwargs: Any, pairs: dict[str, Pair]) -> bool:
    """Returns whether folding changes nothing but rounding; with random numbers in batch norms, lest they be idle."""
    rng = np.random.default_rng(0)

    def shaken(layer: dict[str, Any], norm: dict[str, Any], epsilon: float) -> tuple[dict[str, Any], dict[str, Any]]:
        del epsilon
        moved = {name: jnp.asarray(rng.uniform(0.5, 2, a.shape), a.dtype) for name, a in norm.items()}
        return layer, moved

    changed = _with(model, args, pairs, shaken)
    both = []
    for fold in (False, True):
        given = args if isinstance(model, nnx.Module) else (changed, *args[1:])
        subject = changed if isinstance(model, nnx.Module) else model
        if fold:
            result = _with(subject, given, pairs, _folded)
            subject, given = (result, args) if isinstance(model, nnx.Module) else (model, (result, *args[1:]))
        both.append(jax.tree.leaves(evaluated(subject, given, kwargs)))
    tolerance = 1e-3 if all(pair.is_float32 for pair in pairs.values()) else 0.05
    return all(_near(a, b, tolerance) for a, b in zip(*both, strict=True))


def _near(a: Any, b: Any, tolerance: float) -> bool:
    """Returns whether two arrays differ by little, in norm."""
    a, b = (np.asarray(each, np.float64) for each in (a, b))
    return bool(np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a))


def _with(model: Any, args: Any, pairs: dict[str, Pair], change: Any) -> Any:
    """Returns a copy of the model, or of the variables of a Linen one, with the arrays of pairs changed."""
    if isinstance(model, nnx.Module):
        copy = nnx.clone(model)
        copy.eval()
        modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(copy)}
        for name, pair in pairs.items():
            two = modules[name], modules[pair.norm]
            old = [
                {part: getattr(m, part)[...] for part in parts if getattr(m, part, None) is not None}
                for m, parts in zip(two, _PARTS, strict=True)
            ]
            for module, new in zip(two, change(*old, pair.epsilon), strict=True):
                for part, array in new.items():
                    getattr(module, part)[...] = array
        return copy
    variables = core.unfreeze(core.unbox(args[0]))
    for name, pair in pairs.items():
        layer = _subtree(variables["params"], name)
        norm = {**_subtree(variables["params"], pair.norm), **_subtree(variables["batch_stats"], pair.norm)}
        new_layer, new_norm = change(layer, norm, pair.epsilon)
        layer.update(new_layer)
        for collection in ("params", "batch_stats"):
            held = _subtree(variables[collection], pair.norm)
            held.update({part: new_norm[part] for part in held})
    return core.meta.replace_boxed(core.unfreeze(args[0]), variables)


def _subtree(tree: Any, path: str) -> Any:
    """Returns the variables of the module at a path; nothing where it has none."""
    for part in path.split("/") if path else ():
        tree = tree.get(part, {})
    return tree
