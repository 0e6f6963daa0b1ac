"""Check 32 of quantization in JAX: what a converted transformer takes, against float32."""

import jax
import numpy as np
import pytest
from flax import nnx

import precision_lab as pl
from precision_lab import models
from precision_lab.models import DataSpec
from precision_lab.models.config import TransformerConfig


@pytest.mark.parametrize(
    ("policy", "share"),
    [
        ("weight=int8@channel", 0.28),
        ("weight=int4@group128", 0.165),
        ("weight=int4@group128,embedding=int4@group128", 0.14),
    ],
)
def test_a_converted_transformer_is_as_small_as_it_should_be(policy, share):
    model = models.build(TransformerConfig(depth=4, width=256, heads=4), DataSpec("language_model", (128,), 256), 0)
    tokens = jax.ShapeDtypeStruct((1, 128), np.int32)

    packed = pl.convert(model, policy, tokens)

    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(one))) for one in (packed, model)]
    assert sizes[0] / sizes[1] <= share


def test_all_products_and_lookups_of_a_transformer_are_sites():
    """Check 27: six linears a block and the head, two attention products a block, tables of tokens and positions."""
    model = models.build(TransformerConfig(depth=4, width=256, heads=4), DataSpec("language_model", (128,), 256), 0)

    table = pl.sites(model, jax.ShapeDtypeStruct((1, 128), np.int32), policy="embedding=int4@group128")

    by = [site.quantized_by for site in table]
    assert sum("weight" in each for each in by) == 25
    assert by.count(("attention", "attention")) == 8
    assert by.count(("embedding",)) == 2
