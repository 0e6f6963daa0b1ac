"""What BinaryConnect adds to an optimizer: real weights stay in [-1, 1], and learn in proportion to that range.

    tx = optax.chain(optax.adam(1e-3), glorot_scaling(), weight_clipping())

Signs do not change with a weight far outside of [-1, 1], and without the clip nothing would keep it from going there.
"""

import difflib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from precision_lab.formats import round_to
from precision_lab.optim.carrying import carry
from precision_lab.optim.transformation import transformation
from precision_lab.optim.trees import is_low_precision, is_masked, is_trainable, path_text
from precision_lab.policy.patterns import glob_matches

KERNELS = "**/kernel"


def weight_clipping(
    bound: float = 1.0, *, paths: str | tuple[str, ...] = KERNELS
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation after which chosen parameters lie in [-bound, bound], exactly.

    An update that would leave a parameter outside is replaced by one that brings it to the end of the interval, or
    within two ulps of it where the way back has to be rounded; inside in any case, also by `optax.apply_updates` in
    the same compiled program. Other updates stay as they are, in float32 for narrower parameters. NaN stays NaN.

    It comes last in a chain, since what follows would scale the way back too. `master_weights`, `nearest_rounding`
    and `stochastic_rounding` go around the chain: the masters are inside, and so are parameters rounded from them if
    their dtype has `bound`. `kahan` adds what earlier roundings lost afterwards, which may take a parameter one ulp
    beyond.

    Args:
      bound: end of the interval, positive. A narrower parameter has the largest number of its dtype up to it.
      paths: globs over the paths of parameters, `**` for any number of components; by default all called "kernel".

    Raises:
      ValueError: `bound` is not positive; from `init`, a glob that matches no parameter; from `update`, no parameters.
      TypeError: from `init`, a parameter to be clipped is complex.

    Source: Courbariaux et al., "BinaryConnect", 2015, arXiv:1511.00363, section 2.4 and algorithm 1.
    """
    if not 0 < bound < math.inf:
        raise ValueError(f"weight_clipping needs a positive, finite bound, got {bound}.")

    def clipped(path: Any, p: Any, u: Any) -> Any:
        return u if _untouched(u) or not _chosen(paths, path, p) else _kept_inside(p, u, bound)

    return _on_parameters(clipped, paths, "weight_clipping")


def glorot_scaling(*, power: int = 1, paths: str | tuple[str, ...] = KERNELS) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that divides updates of kernels by the size of Glorot's initial weights.

    With fan_in and fan_out counting what an output sums and what an input reaches, that is
    sqrt(1.5 / (fan_in + fan_out)); a step is then about as large a part of [-1, 1] as it was of the initial range.

    Args:
      power: 1 after Adam, whose steps do not grow with gradients; 2 after plain or Nesterov SGD.
      paths: of the kernels (..., in, out), as of `weight_clipping`.

    Raises:
      ValueError: `power` is neither; from `init`, a glob that matches no parameter or one with fewer than two axes.

    Source: Courbariaux et al., "BinaryConnect", 2015, arXiv:1511.00363, section 2.5; that updates are divided by the
      coefficients, and the convolution's fans with its window in both, are as in the authors' code.
    """
    if power not in (1, 2):
        raise ValueError(f"glorot_scaling has power 1, for Adam, or 2, for SGD; got {power}.")

    def scaled(path: Any, p: Any, u: Any) -> Any:
        if _untouched(u) or not _chosen(paths, path, p):
            return u
        if p.ndim < 2:
            raise ValueError(f"glorot_scaling is for kernels (..., in, out), but '{path_text(path)}' is {p.shape}.")
        fans = math.prod(p.shape[:-2]) * (p.shape[-2] + p.shape[-1])
        return u * jnp.asarray(math.sqrt(fans / 1.5) ** power, u.dtype)

    return _on_parameters(scaled, paths, "glorot_scaling")


def _on_parameters(change: Any, paths: Any, name: str) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation without state that makes `change(path, parameter, update)` of each update."""

    def init(params: Any) -> optax.EmptyState:
        _require_matches(params, paths, name)
        jax.tree_util.tree_map_with_path(lambda path, p: jax.eval_shape(lambda q: change(path, q, q), p), params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        if params is None:
            raise ValueError(f"{name} needs the parameters: call update(grads, state, params).")
        return jax.tree_util.tree_map_with_path(change, params, updates), state

    return transformation(init, update)


def _untouched(u: Any) -> bool:
    return u is None or is_masked(u)


def _chosen(paths: Any, path: Any, p: Any) -> bool:
    """Returns whether a parameter is one of those that the globs name."""
    return is_trainable(path, p) and any(glob_matches(glob, _name(path)) for glob in _globs(paths))


def _globs(paths: Any) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else tuple(paths)


def _name(path: Any) -> str:
    """Returns the path of a parameter; NNX states end in the attribute that holds the array."""
    return path_text(path).removesuffix("/value")


def _require_matches(params: Any, paths: Any, name: str) -> None:
    """Raises ValueError for a glob that no parameter goes by."""
    names = [_name(path) for path, p in jax.tree_util.tree_leaves_with_path(params) if is_trainable(path, p)]
    for glob in _globs(paths):
        if not any(glob_matches(glob, each) for each in names):
            near = difflib.get_close_matches(glob.replace("**/", ""), names, n=1, cutoff=0)
            hint = f"Nearest: '{near[0]}'." if near else "There are none to train."
            raise ValueError(f"{name}: '{glob}' matches no parameter. {hint}")


def _kept_inside(p: jax.Array, u: jax.Array, bound: float) -> jax.Array:
    """Returns the update, changed where `p + u` would be outside."""
    if not jnp.issubdtype(p.dtype, jnp.floating):
        raise TypeError(f"weight_clipping keeps real numbers in an interval, got {p.dtype} {p.shape}.")
    wide = jnp.float32 if is_low_precision(p) else p.dtype
    # Were u a product, XLA would add it unrounded here, and rounded where it is applied.
    u = jnp.where(jnp.isnan(u), jnp.asarray(np.nan, wide), u.astype(wide))
    limit = _largest_up_to(bound, p.dtype)

    def after(step: jax.Array) -> jax.Array:
        return (p.astype(wide) + step).astype(p.dtype)

    target = jnp.clip(after(u), -limit, limit)
    back = carry(target, p) if wide == jnp.float32 else target - p
    reached, ends = after(back), jnp.asarray(np.inf, wide)
    back = jnp.where(reached > limit, jnp.nextafter(back, -ends), back)
    back = jnp.where(reached < -limit, jnp.nextafter(back, ends), back)
    return jnp.where(jnp.abs(after(u)) > limit, back, u)


def _largest_up_to(bound: float, dtype: Any) -> jax.Array:
    """Returns the largest number of a dtype that is at most `bound`."""
    kind = np.float64 if dtype == jnp.float64 else np.float32
    nearest = kind(bound)
    below = np.nextafter(nearest, kind(0)) if float(nearest) > bound else nearest
    return jnp.asarray(below, dtype) if dtype == kind else round_to(below, dtype, rounding="toward_zero").astype(dtype)
