"""What a table of storage says is what the arrays take."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import precision_lab as pl
from precision_lab.nn import storage


def test_a_converted_model_is_listed_with_what_its_arrays_take():
    model = nnx.Linear(64, 10, rngs=nnx.Rngs(0))
    packed = pl.convert(model, "weight=int4@group32", jnp.ones((1, 64)))

    table = storage(packed)

    kernel, bias = (next(row for row in table if row.path == path) for path in ("kernel", "bias"))
    # By hand: half a byte each, and a float32 scale for each 32 of them.
    assert (kernel.format, kernel.nbytes) == ("int4", 640 // 2 + 4 * 20)
    assert kernel.granularity == "group32"
    assert kernel.bits_per_element == Fraction(5)
    assert (bias.format, bias.granularity, bias.nbytes) == ("float32", "", 40)
    assert table.nbytes == sum(np.asarray(x).nbytes for x in jax.tree.leaves(nnx.state(packed, nnx.Param)))
    assert table.of_float32 == pytest.approx((400 + 40) / (4 * 650))
    assert storage(model).of_float32 == 1
    assert "440 bytes, 0.1692 of float32" in str(table)


def test_layers_stacked_for_a_scan_count_every_layer():
    params = {"w": jnp.ones((3, 32, 8)), "half": jnp.ones(5, jnp.bfloat16)}

    [half, w] = storage({"half": params["half"], "w": pl.quantize(params["w"], "int8@tensor")})

    assert (half.bits_per_element, w.shape, w.nbytes) == (16, (3, 32, 8), 768 + 4)
    stacked = pl.convert(
        lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w)[:, :1] * h, None), x, p["w"])[0],
        "weight=int8@tensor",
        jnp.ones((2, 32)),
        params={"w": params["w"]},
    )[1]
    assert (storage(stacked)[0].shape, storage(stacked).nbytes) == ((3, 32, 8), 3 * (256 + 4))
