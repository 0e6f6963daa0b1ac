"""Every model of the zoo is converted, and computes from packed parameters what its policy promised."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import precision_lab as pl
from precision_lab.quant import QTensor
from tests.zoo.zoo import INPUTS, program

MODELS = [(kind, name) for kind in ("linen", "nnx") for name in INPUTS if (kind, name) != ("nnx", "Ensemble")]
POLICY = "weight=int4@channel,activation=int8@token,embedding=int4@channel,execution=simulated"


@pytest.mark.parametrize(("kind", "name"), MODELS, ids="-".join)
def test_a_model_of_the_zoo_computes_from_packed_parameters_what_its_policy_promised(kind, name):
    one = program(kind, name, None)

    def fn(params, unused):
        return one.run(params)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run, stored = pl.convert(fn, POLICY, 0, params=one.params)

    promised = jax.jit(pl.apply_policy(fn, POLICY))(one.params, 0)
    for got, expected in zip(*map(jax.tree.leaves, (jax.jit(run)(stored, 0), promised)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(expected))))
    whole = jax.tree.leaves(stored, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    assert any(isinstance(leaf, QTensor) for leaf in whole)


def test_parameters_that_a_branch_hands_back_stay_as_they_are():
    """nnx.cond returns the state of its model from each branch, which is another use than a product."""
    one = program("nnx", "Ensemble", None)

    with pytest.raises(ValueError, match="'head/kernel' cannot be stored: it is used in more than one way"):
        pl.convert(lambda params, unused: one.run(params)[0], POLICY, 0, params=one.params)
