"""Reading jaxprs in tests: which products a function runs, at any depth, and on what."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

PRODUCTS = ("dot_general", "conv_general_dilated")


def products(fn: Callable, *args: Any) -> list[tuple[str, str, str]]:
    """Returns (lhs dtype, rhs dtype, accumulator dtype) of every product in the jaxpr of `fn`, at any depth."""
    return products_in(jax.make_jaxpr(fn)(*args))


def products_in(jaxpr: Any) -> list[tuple[str, str, str]]:
    """Returns what `products` does, of what is traced already."""
    return [_dtypes(eqn) for eqn in equations(jaxpr) if eqn.primitive.name in PRODUCTS]


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields every equation of a jaxpr and of the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def _dtypes(eqn: Any) -> tuple[str, str, str]:
    """Reads a product's dtypes; without a preferred type it accumulates in its result's."""
    accum = eqn.params["preferred_element_type"] or eqn.outvars[0].aval.dtype
    lhs, rhs = (str(atom.aval.dtype) for atom in eqn.invars[:2])
    return lhs, rhs, str(np.dtype(accum))


_COMPILED: dict[Any, Any] = {}


def result_of(fn: Callable, *args: Any) -> Any:
    """Returns what `jax.jit(fn)` gives; programs of the same text, in whatever test, are compiled once."""
    lowered = jax.jit(fn).lower(*args)
    key = lowered.as_text(), lowered.in_tree, lowered.out_tree
    if key not in _COMPILED:
        _COMPILED[key] = lowered.compile()
    return _COMPILED[key](*args)


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Asserts that two pytrees have the same structure, dtypes and bits; NaN equals NaN."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))
