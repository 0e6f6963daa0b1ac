"""The one file that reads JAX's insides, on the versions it was written for."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas

from precision_lab.rewrite import _compat

TESTED = ("0.10.", "0.12.")


def test_this_is_a_jax_version_whose_jaxprs_are_known():
    assert jax.__version__.startswith(TESTED), (
        f"read rewrite/_compat.py against JAX {jax.__version__}, then add it here"
    )


@pytest.mark.parametrize(("consts", "carry", "scanned"), [(0, 1, 0), (2, 1, 1), (1, 3, 2), (0, 0, 2)])
def test_the_operands_of_a_scan_are_told_apart(consts, carry, scanned):
    closed_over = [jnp.full((2,), float(i)) for i in range(consts)]

    def scan(carried, xs, *constants):
        def body(state, x):
            return [2 * s + sum(constants) for s in state], [2 * v for v in x]

        return lax.scan(body, carried, xs, length=3)

    jaxpr = jax.make_jaxpr(scan)([jnp.ones(2)] * carry, [jnp.ones((3, 2))] * scanned, *closed_over)
    eqn = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")

    used_consts = consts if carry else 0
    assert _compat.scan_arity(eqn) == (used_consts, carry)


def test_an_equation_that_is_not_entered_still_shows_what_it_holds():
    def square(a, out):
        out[...] = a[...] @ a[...]

    call = pallas.pallas_call(square, out_shape=jax.ShapeDtypeStruct((2, 2), jnp.float32), interpret=True)
    eqn = next(e for e in jax.make_jaxpr(call)(jnp.ones((2, 2))).eqns if e.primitive.name == "pallas_call")

    assert _compat.inner_jaxprs(eqn) == []
    assert "dot_general" in [e.primitive.name for hidden in _compat.hidden_jaxprs(eqn) for e in hidden.eqns]
