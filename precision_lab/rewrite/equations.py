"""What is read off one equation: its size, and whether a policy may change it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from precision_lab.policy import Treatment
from precision_lab.policy.treatment import default_accum
from precision_lab.rewrite import _compat
from precision_lab.rewrite.operations import CASTABLE
from precision_lab.rewrite.sites import PRODUCTS

OPAQUE = "policies do not enter this operation"
# What a reduction or a scatter combines two numbers by is a jaxpr too, but nothing to enter.
_COMBINERS = ("reduce", "scatter", "select_and", "argmin", "argmax", "cum")
UNSUPPORTED = frozenset(("ragged_dot_general", "ragged_dot"))


def why_not(eqn: Any, treatment: Treatment, asked: bool, default_precision: Any) -> str:
    """Returns why a product is left alone, or an empty string."""
    if treatment.op == "never":
        return "op=never"
    dtypes = [str(atom.aval.dtype) for atom in eqn.invars[:2]]
    wide = treatment.compute.name == "float64"
    if other := [dtype for dtype in dtypes if dtype not in CASTABLE and not (wide and dtype == "float64")]:
        return f"{other[0]} operand"
    if str(eqn.outvars[0].aval.dtype) not in CASTABLE | {"float64"}:
        return f"{eqn.outvars[0].aval.dtype} result"
    precision = eqn.params.get("precision")
    explicit = {str(p) for p in (precision if isinstance(precision, tuple) else (precision,))} - {"None", "DEFAULT"}
    if explicit and not asked and precision != default_precision:
        return f"explicit precision {sorted(explicit)[0]}"
    return ""


def is_opaque(eqn: Any) -> bool:
    """Returns whether an equation runs a function that policies do not enter, such as a kernel of Pallas."""
    return bool(_compat.hidden_jaxprs(eqn)) and not eqn.primitive.name.startswith(_COMBINERS)


def already(eqn: Any, treatment: Treatment) -> bool:
    """Returns whether a product is, as it stands, what the policy asks for."""
    if treatment.compute.name not in ("float32", "float64"):
        return False  # JAX's own derivative would multiply in mixed types.
    free = ("execution",) if treatment.quantizes else ("execution", "backward", "outliers")
    same = {key: getattr(treatment, key) for key in free}  # which say how, and nothing of what
    plain = Treatment(compute=treatment.compute, accum=default_accum(treatment.compute), **same)
    dtypes = {np.dtype(atom.aval.dtype) for atom in eqn.invars[:2]}
    result = np.dtype(eqn.outvars[0].aval.dtype)
    return treatment == plain and dtypes == {treatment.compute.dtype} and result == treatment.compute.dtype


def flops(eqn: Any) -> int:
    """Returns two times the multiplications of a product; 0 for other operations."""
    if eqn.primitive.name not in PRODUCTS | UNSUPPORTED:
        return 0
    lhs, rhs, out = (atom.aval.shape for atom in (*eqn.invars[:2], eqn.outvars[0]))
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)
    if eqn.primitive.name in UNSUPPORTED:
        return 2 * math.prod(out) * lhs[-1]
    out_features = rhs[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(out) * math.prod(rhs) // max(out_features, 1)


def describe(aval: Any) -> str:
    """Writes an abstract array as in `float32[8,128]`."""
    if not hasattr(aval, "shape"):
        return str(aval)
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"
