"""The treatment of operations that are not products: in which types they run under autocast, and rounding by rule.

Under autocast a value may be narrower than the type in which its equation was traced. An equation of the op table
brings its operands to the types that its category says; every other equation gets them back as traced (`as_traced`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.formats import Format, round_to
from precision_lab.rewrite import _compat

# float64 and float8 operands were someone's explicit choice, which a policy leaves alone.
CASTABLE = frozenset(("float16", "bfloat16", "float32"))
_CASTABLE = frozenset(map(jnp.dtype, CASTABLE))
Values = list[Any]


@dataclasses.dataclass(frozen=True)
class Operate:
    """An operation that is not a product.

    Attributes:
      category: in which types it runs, see `precision_lab.policy.OP_TABLE`.
      compute: the format that "low" casts to.
      round: format that results and their cotangents are rounded to, or None.
    """

    category: str
    compute: Format
    round: Format | None


def is_castable(x: Any) -> bool:
    """Returns whether an array, or what stands for one, has a type that policies may change."""
    return getattr(x, "dtype", None) in _CASTABLE


def operate(step: Operate, eqn: Any, given: Values) -> Values:
    """Evaluates an equation in the types of its category; its results keep them."""
    if not all(is_castable(x) for x in given if _is_inexact(x)):
        operands = as_traced(eqn.invars, given)  # float64 or float8 among them: the author's business
    else:
        operands = _BRING[step.category](step, eqn, given)
    return rounded(_compat.bind(eqn, operands), step.round)


def rounded(results: Values, fmt: Format | None) -> Values:
    """Returns results on the grid of `fmt`, and their cotangents too when they come back."""
    if fmt is None:
        return results
    return [round_to(x, fmt, gradient=fmt) if is_castable(x) else x for x in results]


def as_traced(atoms: Sequence[Any], values: Sequence[Any]) -> Values:
    """Returns values in the types that the jaxpr has for them."""
    return [_cast(x, atom.aval.dtype) if is_castable(x) else x for atom, x in zip(atoms, values, strict=True)]


def like_operand(results: Values, given: Values) -> Values:
    """Returns results in the type of the first floating operand, as an activation function does."""
    dtype = next((x.dtype for x in given if is_castable(x)), None)
    return results if dtype is None else [_cast(x, dtype) if is_castable(x) else x for x in results]


def _low(step: Operate, eqn: Any, given: Values) -> Values:
    return _all_cast(given, step.compute.dtype or jnp.float32)


def _float32(step: Operate, eqn: Any, given: Values) -> Values:
    return _all_cast(given, jnp.float32)


def _promote(step: Operate, eqn: Any, given: Values) -> Values:
    floating = [(atom, x) for atom, x in zip(eqn.invars, given, strict=True) if is_castable(x)]
    dtypes = {np.dtype(x.dtype) for atom, x in floating if not _is_scalar(atom)} or {
        np.dtype(x.dtype) for _, x in floating
    }
    widest = dtypes.pop() if len(dtypes) == 1 else jnp.float32  # any two of float16, bfloat16 and float32
    if not all(_fits(atom.val, widest) for atom, _ in floating if _is_scalar(atom)):
        widest = jnp.float32
    return _all_cast(given, widest)


def _follow(step: Operate, eqn: Any, given: Values) -> Values:
    return given


def _never(step: Operate, eqn: Any, given: Values) -> Values:
    return as_traced(eqn.invars, given)


_BRING = {"low": _low, "float32": _float32, "promote": _promote, "follow": _follow, "never": _never}


def _is_scalar(atom: Any) -> bool:
    """Returns whether an operand is a number written into the equation, which takes the type of the others."""
    return _compat.is_literal(atom) and np.ndim(atom.val) == 0


def _fits(value: Any, dtype: Any) -> bool:
    """Returns whether a number survives a cast without becoming infinite or zero."""
    with np.errstate(over="ignore"):
        cast = np.asarray(value).astype(dtype).astype(np.float64)
    return bool(np.isfinite(cast) == np.isfinite(np.float64(value)) and (cast == 0) == (value == 0))


def _all_cast(values: Values, dtype: Any) -> Values:
    return [_cast(x, dtype) if is_castable(x) else x for x in values]


def _cast(x: Any, dtype: Any) -> Any:
    return x if x.dtype == dtype else jax.lax.convert_element_type(x, dtype)


def _is_inexact(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)
